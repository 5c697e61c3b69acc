# SPDX-License-Identifier: Apache-2.0
"""AutoParticles: latent particles of every datum as a Pyro autoguide."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.runtime import get_plates
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import Transform

from pyro_lvebm.guides.building import check_latent, unbuilt_on_error
from pyro_lvebm.guides.plates import KnownRows, draw_full_size, first_draw, open_plates
from pyro_lvebm.sites import PARTICLE_PLATE
from pyro_lvebm.validation import check_at_least


class AutoParticles(AutoGuide):
    """An empirical guide: K latent particles of every datum, kept between steps.

        q(z | x_i) = (1/K) Σ_k δ(z − z_k^(i))

    The particles are buffers in unconstrained coordinates, one of shape (K, *full_batch_shape,
    *event_shape) for each latent site, with plates at their full size even if the model
    subsamples. A model that is given the rows of its minibatch, as in `pyro.plate("data", size,
    subsample=ids)`, gets the particles of these. `Saddle` moves them; as a guide, each site is a
    `Delta` at the particles of the present minibatch: all K under a vectorised ELBO with K
    particles, otherwise one drawn at random for each datum. Being made of deltas it has no entropy,
    so a loss with this guide is an energy and not an ELBO; `compare_elbo` gives its ELBO.

    Args:
        model: A Pyro model whose latent sites are continuous.
        num_particles: K, at least 1.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If num_particles < 1; at the first call, if a latent site is discrete or has no
            unconstrained coordinates; later, if the plates of the model have other sizes than at
            the first call.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoParticles
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
        >>> guide = AutoParticles(model, num_particles=4)
        >>> guide(torch.zeros(100))["z"].shape
        torch.Size([10])
        >>> guide.particles("z").shape
        torch.Size([4, 100])
    """

    prototype_trace: Any  # a `Trace`; None before the first call

    def __init__(
        self,
        model: Callable[..., Any],
        num_particles: int = 4,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_at_least(1, num_particles=num_particles)
        self.num_particles = num_particles
        self._rows = KnownRows()
        super().__init__(InitMessenger(first_draw)(model), create_plates=create_plates)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with unbuilt_on_error(self):
            super()._setup_prototype(*args, **kwargs)
            for name, site in self.prototype_trace.iter_stochastic_nodes():
                transform = check_latent(self, site)
                draws = draw_full_size(site, (self.num_particles,))
                self.register_buffer(_key(name), transform.inv(draws).clone())
                step = draws.new_tensor(0.1)
                self.register_buffer(_key(name) + "_step_size", step)

    def transform(self, name: str) -> Transform:
        """Return the bijection from unconstrained coordinates to the support of a site."""
        transform: Transform = biject_to(self.prototype_trace.nodes[name]["fn"].support)
        return transform

    def particles(self, name: str) -> Tensor:
        """Return the particles of a site, (K, *full_batch_shape, *event_shape)."""
        value: Tensor = self.transform(name)(getattr(self, _key(name)))
        return value

    def step_size(self, name: str) -> Tensor:
        """Return the Langevin step size of a site, a scalar buffer."""
        step: Tensor = getattr(self, _key(name) + "_step_size")
        return step

    def index(self, name: str, indices: dict[str, Tensor]) -> tuple[slice | Tensor, ...]:
        """Index tuple of a minibatch into the batch axes of a site's buffer."""
        site = self.prototype_trace.nodes[name]
        batch_shape = site["fn"].batch_shape
        device = getattr(self, _key(name)).device
        by_dim = {f.dim: indices[f.name].to(device) for f in site["cond_indep_stack"]}
        axes = [
            by_dim.get(axis - len(batch_shape), torch.arange(size, device=device))
            for axis, size in enumerate(batch_shape)
        ]
        return torch.meshgrid(*axes, indexing="ij") if axes else ()

    def read(self, name: str, indices: dict[str, Tensor]) -> Tensor:
        """Return unconstrained particles (K, *batch_shape, *event) of a minibatch.

        Args:
            name: The site.
            indices: Data indices of every plate.
        """
        buffer: Tensor = getattr(self, _key(name))
        return buffer[(slice(None), *self.index(name, indices))]

    def write(self, name: str, indices: dict[str, Tensor], value: Tensor) -> None:
        """Store unconstrained particles (K, *batch_shape, *event) of a minibatch."""
        getattr(self, _key(name))[(slice(None), *self.index(name, indices))] = value

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site at its particles."""
        rows = self._rows.given(self, args, kwargs)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._rows.check(self, args, kwargs)
        plates = open_plates(self, rows, args, kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                indices = {f.name: plates[f.name]._indices for f in site["cond_indep_stack"]}
                value = self.transform(name)(self._choose(name, indices))
                fn = dist.Delta(value, event_dim=site["fn"].event_dim)
                result[name] = pyro.sample(name, fn)
        return result

    def _choose(self, name: str, indices: dict[str, Tensor]) -> Tensor:
        """All K particles under a plate of K vectorised particles, else random ones."""
        v = self.read(name, indices)
        batch_dim = len(self.prototype_trace.nodes[name]["fn"].batch_shape)
        batch, event = v.shape[1 : 1 + batch_dim], v.shape[1 + batch_dim :]
        sizes = {
            frame.dim + batch_dim: frame.size  # counts from the right, as plates do
            for frame in get_plates()
            if frame.dim is not None and frame.name not in indices and -frame.dim > batch_dim
        }
        lead = [sizes.get(axis, 1) for axis in range(min(sizes, default=0), 0)]
        vectorised = any(f.name == PARTICLE_PLATE for f in get_plates())
        if self.num_particles == 1:
            return v[0].expand(*lead, *batch, *event) if lead else v[0]
        if vectorised and math.prod(lead) == self.num_particles:
            return v.reshape(*lead, *batch, *event)
        return self._pick(v, (*lead, *batch), batch_dim)

    def _pick(self, v: Tensor, shape: tuple[int, ...], batch_dim: int) -> Tensor:
        """One random particle for every element of a batch of `shape`."""
        k = torch.randint(self.num_particles, shape, device=v.device)
        rows = [torch.arange(size, device=v.device) for size in shape]
        grids = torch.meshgrid(*rows, indexing="ij") if rows else ()
        return v[(k, *grids[len(shape) - batch_dim :])]


def _key(name: str) -> str:
    # Buffer names may not contain dots, and must not hide attributes of the module.
    return "particles_" + name.replace(".", "__")


def undo_particles(
    guide: AutoParticles, indices: dict[str, Tensor], names: list[str]
) -> Callable[[], None]:
    """Return an action that puts particles of a minibatch, and their step sizes, back.

    Args:
        guide: The particles.
        indices: Data indices of each plate.
        names: The sites.
    """
    values = {name: guide.read(name, indices).clone() for name in names}
    steps = {name: guide.step_size(name).clone() for name in names}

    def undo() -> None:
        for name, value in values.items():
            guide.write(name, indices, value)
            guide.step_size(name).copy_(steps[name])

    return undo
