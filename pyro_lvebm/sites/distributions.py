# SPDX-License-Identifier: Apache-2.0
"""Distributions of the sites of the primitive `lvebm`.

They hold the LVEBM and ask it for energies and draws; they own no parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, kl_divergence
from torch.distributions.kl import register_kl

from pyro_lvebm.bases import Completion
from pyro_lvebm.model import (
    LVEBM,
    Shape,
    as_problems,
    context_rows,
    draw_conditional,
    expand_events,
    given_z,
)

_EMPTY = torch.Size()

_JOINT_PARTICLES = 64
"""Particles of the run behind each draw of (x, z) at a context."""

_MAX_RUNS = 1024
"""Such runs that go side by side."""


class Pairing:
    """Remembers the pair (z, x) that a z site drew, so that its x site can return the same x."""

    def __init__(self) -> None:
        self.z: Tensor | None = None
        self.x: Tensor | None = None


class LatentSite(TorchDistribution):
    """Distribution of the site `{name}_z`: `log_prob` is log base_z, draws come from the pool.

    With contexts, each draw is annealed from the bases to p_θ(x, z | c) by a run of its own.

    Args:
        ebm: The LVEBM.
        pairing: Shared with the `ObservedSite` of the same primitive.
        batch_shape: Batch shape; with contexts it expands to theirs.
        context: Contexts (*b, *context_shape) of a conditional LVEBM.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        ebm: LVEBM,
        pairing: Pairing,
        batch_shape: torch.Size = _EMPTY,
        context: Tensor | None = None,
    ) -> None:
        self.ebm, self.pairing, self.context = ebm, pairing, context
        rows = context_rows(context, ebm.context_shape)
        batch_shape = torch.broadcast_shapes(batch_shape, rows)
        super().__init__(torch.Size(batch_shape), ebm.z_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Real events of the shape of z."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Shape, _instance: Any = None) -> LatentSite:
        """Return the distribution with another batch shape."""
        return LatentSite(self.ebm, self.pairing, torch.Size(batch_shape), self.context)

    def sample(self, sample_shape: Shape = _EMPTY) -> Tensor:
        """Draw the z of joint draws from the pool, and remember their x."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            self.pairing.x, self.pairing.z = _draw_pairs(self.ebm, self.context, shape)
        return self.pairing.z.clone()

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log base_z (*b,), in nats."""
        log_prob = self.ebm.base_z.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def _draw_pairs(ebm: LVEBM, context: Tensor | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Draw x (*shape, *x_shape) and z (*shape, *z_shape) from the joint."""
    contexts = as_problems(context, ebm, shape)
    if contexts is None:
        u = ebm.pool.draw(ebm, shape.numel())
    else:
        # A run for each draw would fill the memory if all ran side by side.
        runs = [
            draw_conditional(
                ebm.given(part).residual_and_grad,
                len(part),
                ebm.dim,
                _JOINT_PARTICLES,
                ebm.base_x.loc,
            )
            for part in contexts.split(_MAX_RUNS)
        ]
        u = torch.cat(runs)
    x, z = ebm.unwhiten(u)
    return x.reshape(*shape, *ebm.x_shape), z.reshape(*shape, *ebm.z_shape)


@register_kl(torch.distributions.Independent, LatentSite)  # type: ignore[untyped-decorator]
@register_kl(torch.distributions.MultivariateNormal, LatentSite)  # type: ignore[untyped-decorator]
def _kl_to_latent(q: Any, p: LatentSite) -> Tensor:
    result: Tensor = kl_divergence(q, p.ebm.base_z.distribution().expand(p.batch_shape))
    return result


class ObservedSite(TorchDistribution):
    """Distribution of the site `{name}`: `log_prob` is log base_x(x) − f(x, z) − log Z.

    This is *not* log p(x | z): it is what is left of the joint log density once the z site has
    contributed log base_z(z). Where entries of x are missing, x is completed by the values of the
    site `{name}_missing`, and what that site has contributed is left out too. Draws are the x of
    the pool's pair where z is that of the pool, and otherwise draws of p_θ(x | z) by annealed
    Langevin. Where z has no entries it is the one site of an LVEBM, latent in `energy_prior`, and
    draws come from the pool.

    Args:
        ebm: The LVEBM.
        z: Latents (*b, *z_shape).
        pairing: Shared with the `LatentSite` of the same primitive.
        batch_shape: Batch shape; that of z if None.
        missing: What is observed of x, and values (*b, *x_shape) for what is not; None where all
            is observed.
        context: Contexts (*b, *context_shape) of a conditional LVEBM.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = False

    def __init__(
        self,
        ebm: LVEBM,
        z: Tensor,
        pairing: Pairing,
        batch_shape: torch.Size | None = None,
        missing: tuple[Completion, Tensor] | None = None,
        context: Tensor | None = None,
    ) -> None:
        self.ebm, self.z, self.pairing, self.missing = ebm, z, pairing, missing
        self.context = context
        self._known: tuple[Tensor, Tensor] | None = None  # a value, and log_base_x − f there
        if batch_shape is None:
            batch_shape = z.shape[: z.dim() - len(ebm.z_shape)]
        super().__init__(torch.Size(batch_shape), ebm.x_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """That of the base of x."""
        return self.ebm.base_x.support.constraint

    def expand(self, batch_shape: Shape, _instance: Any = None) -> ObservedSite:
        """Return the distribution with another batch shape."""
        batch_shape = torch.Size(batch_shape)
        z = self.z.expand(*batch_shape, *self.ebm.z_shape)
        return ObservedSite(self.ebm, z, self.pairing, batch_shape, self.missing, self.context)

    def sample(self, sample_shape: Shape = _EMPTY) -> Tensor:
        """Draw x given z."""
        z = self.z.detach().expand(*sample_shape, *self.z.shape)
        if not self.ebm.base_z.dim:
            return _draw_pairs(self.ebm, self.context, z.shape[:-1])[0]
        paired_z, paired_x = self.pairing.z, self.pairing.x
        if paired_z is not None and paired_x is not None and _equal(paired_z, z):
            return paired_x.clone()
        w_z = self.ebm.base_z.whiten(z)
        shape = w_z.shape[:-1]
        context = as_problems(self.context, self.ebm, shape)
        f = given_z(self.ebm.given(context), w_z.reshape(-1, 1, w_z.shape[-1]))
        v = draw_conditional(f, shape.numel(), self.ebm.base_x.dim, 16, w_z)
        with torch.no_grad():
            x, _ = self.ebm.unwhiten(torch.cat([v, w_z.reshape(len(v), -1)], -1))
        return x.reshape(*shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log base_x(x) − f(x, z) − log Z (*b,), in nats."""
        x, z = self._pairs(value)
        base = self.ebm.base_x.log_prob_given(x, z)
        log_prob = base - self.ebm.residual_of(x, z, self.context)
        self._known = (value, log_prob.detach())
        if self.missing is not None:
            completion, entries = self.missing
            log_prob = log_prob - completion.log_prob_missing(entries)
        return log_prob - self.ebm.log_norm(self.context)

    def energy(self, value: Tensor) -> Tensor:
        """Return E_θ(x, z) (*b,), in nats, without a graph; what `log_prob` found there serves."""
        with torch.no_grad():
            x, z = self._pairs(value)
            if self._known is None or self._known[0] is not value:
                return self.ebm.energy(x, z, self.context)
            return -self._known[1] - self.ebm.base_z.log_prob(z)

    def _pairs(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.missing is not None:
            completion, entries = self.missing
            value = completion.complete(entries, value)
        x = expand_events(value, self.z, self.ebm.x_shape, self.ebm.z_shape)
        return x, expand_events(self.z, value, self.ebm.z_shape, self.ebm.x_shape)


def is_prior(fn: object) -> bool:
    """Return whether a distribution is that of an LVEBM over one vector, as in `energy_prior`."""
    return isinstance(fn, ObservedSite) and not fn.ebm.base_z.dim


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


_NO_SHAPE = torch.Size()


class MissingSite(TorchDistribution):
    """Distribution of the site `{name}_missing`: base_x of the missing entries given the others.

    Args:
        completion: The observed entries.
        batch_shape: Batch shape; that of the observations if None.
    """

    arg_constraints: dict[str, Any] = {}
    has_rsample = True

    def __init__(self, completion: Completion, batch_shape: torch.Size | None = None) -> None:
        self.completion = completion
        shape = completion.batch_shape if batch_shape is None else batch_shape
        super().__init__(torch.Size(shape), completion.event_shape, validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """That of x."""
        return self.completion.support.constraint

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> MissingSite:
        """Return the distribution with another batch shape."""
        return MissingSite(self.completion, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = _NO_SHAPE) -> Tensor:
        """Draw values (*sample_shape, *batch_shape, *x_shape)."""
        shape = torch.Size(sample_shape) + self.batch_shape
        mean = self.completion.mean
        v = torch.randn(*shape, self.completion.dim, dtype=mean.dtype, device=mean.device)
        return self.completion.support.constrain(self.completion.unwhiten(v))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (*b,) of values, in nats."""
        log_prob = self.completion.log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
