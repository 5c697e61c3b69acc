# SPDX-License-Identifier: Apache-2.0
"""The conditional p(z | x) of a joint density as a Pyro distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_lvebm.model.conditionals import draw_conditional, given_x, residuals_given_x
from pyro_lvebm.model.contexts import expand_context
from pyro_lvebm.model.density import Density

Shape = torch.Size | list[int] | tuple[int, ...]

_EMPTY = torch.Size()


class Posterior(TorchDistribution):
    """The conditional p_θ(z | x), sampled by annealed Langevin from base_z.

    `log_prob` is the unnormalised −f(x, z) + log base_z(z), with log base_x(x | z) where base_x
    varies with z; its normaliser is what `log_evidence` estimates. Every draw is the outcome of a
    small sequential Monte Carlo run of its own, so draws are independent.

    Args:
        density: The joint density, such as an LVEBM.
        x: Observations (*b, *x_shape).
        context: Contexts (*b, *context_shape) of a conditional LVEBM.
        num_particles: Particles of the run behind each draw.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, density: Density, x: Tensor, context: Tensor | None = None, num_particles: int = 16
    ) -> None:
        self.density, self.x, self.num_particles = density, x, num_particles
        batch_shape = x.shape[: x.dim() - len(density.x_shape)]
        given = expand_context(context, density.context_shape, batch_shape)
        self.context = given[0] if given else None
        super().__init__(batch_shape, density.z_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Real events of the shape of z."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Posterior:
        """Return the distribution with another batch shape."""
        x = self.x.expand(*batch_shape, *self.density.x_shape)
        return Posterior(self.density, x, self.context, self.num_particles)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the unnormalised log density (*b,) of z, in nats."""
        x = expand_events(self.x, value, self.density.x_shape, self.density.z_shape)
        z = expand_events(value, self.x, self.density.z_shape, self.density.x_shape)
        return log_prob_given_x(self.density, x, z, self.context)

    def sample(self, sample_shape: Shape = _EMPTY) -> Tensor:
        """Draw z given x by annealed Langevin."""
        shape = torch.Size(sample_shape) + self.batch_shape
        w_x = self.density.base_x.whiten(self.x).expand(*shape, -1)
        context = as_problems(self.context, self.density, shape)
        density, w_x = self.density.given(context), w_x.reshape(-1, 1, w_x.shape[-1])
        f = given_x(density, w_x)
        r = residuals_given_x(density, w_x)
        count, k = shape.numel(), self.density.base_z.dim
        v = draw_conditional(f, count, k, self.num_particles, w_x, r)
        return self.density.base_z.unwhiten(v).reshape(*shape, *self.event_shape)


def log_prob_given_x(density: Density, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
    """Return log p(z | x) (*b,) but for a term that only x is in."""
    log_prob = density.base_z.log_prob(z) - density.residual_of(x, z, context)
    if density.base_x.depends_on_z:
        log_prob = log_prob + density.base_x.log_prob_given(x, z)
    return log_prob


def as_problems(context: Tensor | None, density: Density, shape: torch.Size) -> Tensor | None:
    """Contexts (problems, 1, *context_shape) of as many problems as `shape` has elements."""
    given = expand_context(context, density.context_shape, shape)
    return given[0].reshape(-1, 1, *given[0].shape[len(shape) :]) if given else None


def expand_events(a: Tensor, b: Tensor, a_event: torch.Size, b_event: torch.Size) -> Tensor:
    """Expand a's batch shape to that of a and b together."""
    batch = torch.broadcast_shapes(
        a.shape[: a.dim() - len(a_event)], b.shape[: b.dim() - len(b_event)]
    )
    return a.expand(*batch, *a_event)
