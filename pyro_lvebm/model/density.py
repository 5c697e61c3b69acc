# SPDX-License-Identifier: Apache-2.0
"""The joint density of a residual energy on two bases, unnormalised: it knows no pool."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase, GeneratorBase, JointBase, MixtureBase
from pyro_lvebm.energies import (
    ConjugateEnergy,
    QuadraticEnergy,
    WhitenedEnergy,
    ZeroEnergy,
    check_at_rest,
    check_energy,
)
from pyro_lvebm.model.contexts import as_context, context_rows, expand_context
from pyro_lvebm.sampling import STANDARD_NORMAL, Base, ValueAndGrad, value_and_grad
from pyro_lvebm.validation import as_like


class Density(nn.Module):
    """The unnormalised joint density exp(−E_θ(x, z)) of a residual energy and two bases.

        E_θ = f_θ(x, z) − log base_x(x) − log base_z(z)

    In coordinates u whitened by the bases it is E = U(u) + f + const, with the base energy U, which
    is ½ |u|² where both bases are Gaussian. Where base_x is a `GeneratorBase`, it is that of x
    given z, u = (ε, ζ) with x = x(ε, z(ζ)), and θ has its parameters too. With a `context_shape` f
    has a context c as a third argument; `given(c)` is the density at contexts, and whoever has
    that need not know of them.

    Args:
        energy: The residual energy f, any `nn.Module` that maps x (*b, *x_shape) and
            z (*b, *z_shape), and a context (*b, *context_shape) if there are any, to (*b).
        base_x: Gaussian over x, or the transform of one by the bijection to its support; or a
            `MixtureBase` or `GeneratorBase`.
        base_z: Gaussian over z.
        context_shape: Shape of one context; None for a density without contexts.

    Raises:
        ValueError: If a base is not a Gaussian, the transform of base_x is not that of `biject_to`,
            or the energy returns the wrong shape or NaN.
    """

    base_x: GaussianBase
    base_z: GaussianBase
    context: Tensor | None  # where it is held, (*rows, *shape of one)

    is_frozen = False  # whether a block of `frozen` is open

    def __init__(
        self,
        energy: nn.Module,
        base_x: dist.TorchDistribution | GaussianBase,
        base_z: dist.TorchDistribution | GaussianBase,
        *,
        context_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(energy, nn.Module):
            raise ValueError(f"energy must be an nn.Module; got {type(energy).__name__}")
        base_x = GaussianBase.from_bounded(base_x, "base_x")
        base_z = GaussianBase.from_distribution(base_z, "base_z")
        if isinstance(base_z, MixtureBase | GeneratorBase):
            raise ValueError(f"base_z must be a Gaussian; got a {type(base_z).__name__}")
        if isinstance(base_x, GeneratorBase):
            if base_x.z_shape != base_z.event_shape:
                raise ValueError(
                    f"the generator takes z of shape {tuple(base_x.z_shape)}; base_z has "
                    f"{tuple(base_z.event_shape)}"
                )
            if isinstance(energy, ConjugateEnergy | QuadraticEnergy):
                raise ValueError(
                    f"a {type(energy).__name__} has closed forms only where base_x does not "
                    "vary with z; leave the generator out, or give an MLPEnergy"
                )
        if context_shape == ():
            raise ValueError("context_shape must have one axis at least, as (1,) for a number")
        shape = None if context_shape is None else torch.Size(context_shape)
        if isinstance(energy, WhitenedEnergy):
            energy.bind(base_x.coordinates(), base_z)
        check_energy(energy, base_x, base_z, shape)
        self._compose(energy, base_x, base_z, shape, None)

    def _compose(
        self,
        energy: nn.Module,
        base_x: GaussianBase,
        base_z: GaussianBase,
        context_shape: torch.Size | None,
        context: Tensor | None,
    ) -> None:
        """Take checked parts; with a context the density is that at it, and has no others."""
        self.f, self.base_x, self.base_z = energy, base_x, base_z
        self.context_shape = context_shape if context is None else None
        self._held_shape = None if context is None else context_shape
        self.register_buffer("context", context)

    def __getstate__(self) -> dict[str, Any]:
        # Pyro leaves weak references on the parameters it knows, and these cannot be pickled.
        for p in self.parameters():
            p.__dict__.pop("unconstrained", None)
        return self.__dict__.copy()

    @property
    def dim(self) -> int:
        """Number of unconstrained entries of x and z together."""
        return self.base_x.dim + self.base_z.dim

    @property
    def base(self) -> Base:
        """The law of u under both bases."""
        plain = self.base_x.law is self.base_z.law is STANDARD_NORMAL
        return STANDARD_NORMAL if plain else JointBase(self.base_x, self.base_z)

    @property
    def x_shape(self) -> torch.Size:
        """Event shape of x."""
        return self.base_x.event_shape

    @property
    def z_shape(self) -> torch.Size:
        """Event shape of z."""
        return self.base_z.event_shape

    @property
    def is_base(self) -> bool:
        """Whether f = 0, so that the density is that of its bases and log Z = 0 exactly."""
        return isinstance(self.f, ZeroEnergy)

    def theta(self) -> list[nn.Parameter]:
        """Return θ: the parameters of f, and those of the bases where they have any."""
        own = {id(p): p for part in (self.f, self.base_x) for p in part.parameters()}
        return list(own.values())

    def given(self, context: Tensor | None) -> Density:
        """Return the density at contexts, with the same θ and bases; itself where there are none.

        Args:
            context: Contexts (*b, *context_shape), which expand to the batch of what it is
                evaluated at; None for a density without contexts.

        Raises:
            ValueError: If there is a context and should be none, or the other way round; if it is
                not finite, or has another dtype than the bases.
        """
        if context is not None and self.context is not None:
            raise ValueError("this density is at contexts already, and takes no others")
        if context is not None and self.context_shape is not None:
            context = as_context(context, self.base_x.loc)
        context_rows(context, self.context_shape)
        if context is None:
            return self
        density = Density.__new__(Density)
        nn.Module.__init__(density)
        density._compose(self.f, self.base_x, self.base_z, self.context_shape, context)
        return density

    def _contexts(self, context: Tensor | None, batch: torch.Size) -> tuple[Tensor, ...]:
        """Return the context of each element of a batch, as a tuple of one or none."""
        if context is None and self.context is not None:
            return expand_context(self.context, self._held_shape, batch)
        return expand_context(context, self.context_shape, batch)

    def energy(self, x: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the total energy E_θ (*b,), in nats; arguments as in `residual_of`."""
        x, z = (as_like(n, v, self.base_x.loc) for n, v in (("x", x), ("z", z)))
        f = self.residual_of(x, z, context)
        energy: Tensor = f - self.base_x.log_prob_given(x, z) - self.base_z.log_prob(z)
        return energy

    def residual_of(self, x: Tensor, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Return f (*b,) for x (*b, *x_shape) and z (*b, *z_shape), in nats.

        Args:
            x: Observations.
            z: Latents.
            context: Contexts whose shape expands to (*b, *context_shape), if there are any.

        Raises:
            ValueError: If there is a context and should be none, or the other way round; if
                x or z has another dtype than the bases.
        """
        x, z = (as_like(n, v, self.base_x.loc) for n, v in (("x", x), ("z", z)))
        batch = x.shape[: x.dim() - len(self.x_shape)]
        result: Tensor = self.f(x, z, *self._contexts(context, batch))
        return result

    def whiten(self, x: Tensor, z: Tensor) -> Tensor:
        """Return u (*b, dim) for x (*b, *x_shape) and z (*b, *z_shape)."""
        return torch.cat([self.base_x.whiten_given(x, z), self.base_z.whiten(z)], -1)

    def unwhiten(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return x (*b, *x_shape) and z (*b, *z_shape) for u (*b, dim)."""
        k = self.base_x.dim
        z = self.base_z.unwhiten(u[..., k:])
        return self.base_x.unwhiten_given(u[..., :k], z), z

    def coordinates(self, u: Tensor) -> Tensor:
        """Return (w_x, ζ) (*b, dim) for u (*b, dim), w_x coordinates that do not vary with z.

        They are u itself unless base_x varies with z.
        """
        base = self.base_x
        if not isinstance(base, GeneratorBase):
            return u
        epsilon, zeta = u.split([base.dim, self.base_z.dim], -1)
        return torch.cat([base.coordinates_of(epsilon, self.base_z.unwhiten(zeta)), zeta], -1)

    def base_energy(self, u: Tensor) -> Tensor:
        """Return −log base(x, z) (*b,) at u (*b, dim), in the coordinates of the data, in nats."""
        if self.base_x.depends_on_z:
            x, z = self.unwhiten(u)
            return -self.base_x.log_prob_given(x, z) - self.base_z.log_prob(z)
        constant = 0.5 * self.dim * math.log(2 * math.pi) + self.base_z.log_det
        log_det = self.base_x.log_abs_det(u[..., : self.base_x.dim])
        return self.base.energy(u) + constant + log_det

    def residual(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, dim); contexts as in `residual_of`."""
        given = self._contexts(context, u.shape[:-1])
        if isinstance(self.f, WhitenedEnergy):
            return self.f.whitened(u if self.is_base else self.coordinates(u), *given)
        result: Tensor = self.f(*self.unwhiten(u), *given)
        return result

    def residual_and_grad(self, u: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return f (*b,) and its gradient in u (*b, dim), without a graph."""
        if not isinstance(self.f, WhitenedEnergy):
            return value_and_grad(lambda u: self.residual(u, context))(u)
        given = self._contexts(context, u.shape[:-1])
        if not self.base_x.depends_on_z or self.is_base:
            return self.f.value_and_grad(u, *given)
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            w = self.coordinates(u)
            value, by_w = self.f.value_and_grad(w.detach(), *given)
            (grad,) = torch.autograd.grad(w, u, by_w)
        return value, grad

    def residual_given_x(self, w_x: Tensor) -> ValueAndGrad:
        """Return f alone and its gradient in whitened z, as a function of that, at the present θ.

        Args:
            w_x: Coordinates of x (*b, x_dim) that do not vary with z, whose batch shape expands to
                that of z.
        """
        d = w_x.shape[-1]
        if isinstance(self.f, WhitenedEnergy):
            rows = context_rows(self.context, self._held_shape)
            batch = torch.broadcast_shapes(rows, w_x.shape[:-1])
            return self.f.given_x(w_x.expand(*batch, -1), *self._contexts(None, batch))

        def f(w: Tensor) -> Tensor:
            return self.residual_of(
                self.base_x.unwhiten(w[..., :d]), self.base_z.unwhiten(w[..., d:])
            )

        both = value_and_grad(f)

        def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
            value, grad = both(torch.cat([w_x.expand(*v.shape[:-1], -1), v], -1))
            return value, grad[..., d:]

        return evaluate

    def at_coordinates(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return E(x, z) − ½ |w|² + const (*b,) at w = (w_x, ζ) (*b, dim), and its gradient in w.

        It is the energy relative to N(0, I) of coordinates that do not vary with z, and the
        constant is that of log N(w; 0, I) and of the Jacobian of w: f itself on Gaussian bases.
        Without a graph.
        """
        d, base = self.base_x.dim, self.base_x
        if not isinstance(base, GeneratorBase):
            value, grad = self.residual_and_grad(w)
            if base.law is STANDARD_NORMAL:
                return value, grad
            energy, slope = base.law.energy_and_grad(w[..., :d])
            value = value + energy - STANDARD_NORMAL.energy(w[..., :d])
            return value, torch.cat([grad[..., :d] + slope - w[..., :d], grad[..., d:]], -1)

        def beyond(w: Tensor) -> Tensor:
            epsilon, log_det = base.noise_and_log_det(w[..., :d], self.base_z.unwhiten(w[..., d:]))
            return 0.5 * ((epsilon * epsilon).sum(-1) - w[..., :d].square().sum(-1)) + log_det

        value, grad = value_and_grad(beyond)(w)
        if self.is_base:
            return value, grad
        if isinstance(self.f, WhitenedEnergy):
            f, slope = self.f.value_and_grad(w, *self._contexts(None, w.shape[:-1]))
        else:
            f, slope = value_and_grad(
                lambda w: self.residual_of(
                    base.unwhiten(w[..., :d]), self.base_z.unwhiten(w[..., d:])
                )
            )(w)
        return value + f, grad + slope

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold θ fixed inside the block: no gradients for it, and a pool stays where it is.

        Other parameters of a Pyro model train on; `Saddle.fit_guide` holds all of a model fixed.
        """
        check_at_rest(self.f)
        params = [p for p in self.parameters() if p.requires_grad]
        was_frozen, self.is_frozen = self.is_frozen, True
        for p in params:
            p.requires_grad_(False)
        try:
            with warnings.catch_warnings():
                # A PyroModule announces all its parameters, and these are meant to rest.
                warnings.filterwarnings("ignore", message=".*not registered in the param store")
                yield
        finally:
            self.is_frozen = was_frozen
            for p in params:
                p.requires_grad_(True)
