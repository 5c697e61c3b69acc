# SPDX-License-Identifier: Apache-2.0
"""Residual energies f(x, z) on coordinates whitened by the bases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.energies.at_rest import COUPLED, check_at_rest
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sampling import ValueAndGrad, value_and_grad
from pyro_lvebm.validation import check_at_least, close_up_to_rounding


class WhitenedEnergy(nn.Module):
    """A residual energy that is a function of u = (whitened x, whitened z) ∈ R^d.

    Subclasses implement `whitened`. Called as f(x, z) on data coordinates it whitens first, so
    it is an energy like any other; an `LVEBM` skips that detour in its inner loops.

    Args:
        x_dim: Number of entries of x, unconstrained: K − 1 on a simplex with K entries.
        z_dim: Number of entries of z; 0 for an energy of x alone.
        kl_penalty: Strength of the `kl_to_base` that a `Saddle` adds to its loss, in nats; 0
            leaves maximum likelihood.

    Raises:
        ValueError: If x_dim is less than 1, z_dim negative, or the strength negative or not
            finite.
    """

    def __init__(self, x_dim: int, z_dim: int = 0, *, kl_penalty: float = 0.0) -> None:
        super().__init__()
        check_at_least(1, x_dim=x_dim)
        check_at_least(0, z_dim=z_dim)
        if not 0 <= kl_penalty < math.inf:
            raise ValueError(f"kl_penalty must be finite and not negative; got {kl_penalty}")
        self.kl_penalty = kl_penalty
        self.x_dim, self.z_dim = x_dim, z_dim
        self.dim = x_dim + z_dim
        self.base_x = GaussianBase(torch.zeros(x_dim), torch.ones(x_dim))
        self.base_z = GaussianBase(torch.zeros(z_dim), torch.ones(z_dim))
        self._bound = False

    def bind(self, base_x: GaussianBase, base_z: GaussianBase) -> None:
        """Take the coordinates of these bases; an `LVEBM` calls this when it is built.

        Raises:
            ValueError: If the dimensions do not fit, or the energy already belongs to an `LVEBM`
                with other bases.
        """
        if (base_x.dim, base_z.dim) != (self.x_dim, self.z_dim):
            raise ValueError(
                f"the energy has x_dim={self.x_dim} and z_dim={self.z_dim}, but the bases have "
                f"{base_x.dim} and {base_z.dim} (unconstrained) dimensions"
            )
        if self._bound and not (_same(self.base_x, base_x) and _same(self.base_z, base_z)):
            raise ValueError(
                "this energy already belongs to an LVEBM with other bases, in whose coordinates "
                "it is defined; build a new energy for the other LVEBM"
            )
        self.base_x, self.base_z, self._bound = base_x, base_z, True

    def forward(self, x: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        """Return f(x, z) (*b,) for x (*b, *x_shape) and z (*b, *z_shape)."""
        u = torch.cat([self.base_x.whiten(x), self.base_z.whiten(z)], -1)
        return self.whitened(u, *context)

    def whitened(self, u: Tensor, *context: Tensor) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, x_dim + z_dim).

        A conditional energy takes a context (*b, *context_shape) too.
        """
        raise NotImplementedError

    def value_and_grad(self, u: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (*b,) and ∇f (*b, d) at u, without a graph; by autograd unless overridden."""
        return value_and_grad(lambda u: self.whitened(u, *context))(u)

    def given_x(self, u_x: Tensor, *context: Tensor) -> ValueAndGrad:
        """Return f (*b,) and ∂f/∂u_z (*b, z_dim) as a function of u_z, at fixed x and θ.

        Args:
            u_x: Whitened x (*b', x_dim), whose batch shape expands to that of u_z.
            context: A context (*b', *context_shape), if there is one.
        """

        def evaluate(u_z: Tensor) -> tuple[Tensor, Tensor]:
            batch = u_z.shape[:-1]
            u = torch.cat([u_x.expand(*batch, -1), u_z], -1)
            rows = (c.expand(*batch, *c.shape[u_x.dim() - 1 :]) for c in context)
            value, grad = self.value_and_grad(u, *rows)
            return value, grad[..., self.x_dim :]

        return evaluate


def _same(a: GaussianBase, b: GaussianBase) -> bool:
    w = torch.linspace(-1.0, 1.0, a.dim).to(a.loc)  # tells supports and laws apart
    return (
        a.event_shape == b.event_shape
        and a.diagonal == b.diagonal
        and torch.equal(a.loc, b.loc)
        and torch.equal(a.scale, b.scale)
        and torch.equal(a.unwhiten(w), b.unwhiten(w))
        and torch.equal(a.law.energy(w), b.law.energy(w))
    )


def check_energy(
    energy: nn.Module,
    base_x: GaussianBase,
    base_z: GaussianBase,
    context_shape: torch.Size | None,
) -> None:
    """Evaluate f at and near the means of the bases, and say what is wrong with the answers.

    Args:
        energy: The residual energy, called as f(x, z) or f(x, z, context).
        base_x: The base of x.
        base_z: The base of z.
        context_shape: Shape of one context; None where there are none.

    Raises:
        ValueError: If it cannot be called so, or returns the wrong shape or NaN; if it is random,
            or the energy of one row depends on the others in its batch.
    """
    check_at_rest(energy)
    rows = torch.tensor([0.0, -1.0, 0.5, 1.0])[:, None].to(base_x.loc)
    x = base_x.unwhiten(rows * base_x.loc.new_ones(base_x.dim))
    z = base_z.unwhiten(rows * base_z.loc.new_ones(base_z.dim))
    context = () if context_shape is None else (x.new_zeros(4, *context_shape),)
    arguments = "energy(x, z, context)" if context else "energy(x, z)"
    try:
        with torch.no_grad(), isolated_rng(0, Stream.ENERGY_CHECK, device=x.device):
            value = energy(x, z, *context)
            again = energy(x, z, *context)
            # Others in a batch, and another place in it.
            alone = energy(x[[3, 1]], z[[3, 1]], *(c[[3, 1]] for c in context))
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the energy cannot be called as {arguments}: {error}") from error
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != (len(rows),):
        raise ValueError(
            f"{arguments} must return one value for each pair: for x {tuple(x.shape)} and z "
            f"{tuple(z.shape)} expected shape ({len(rows)},); got {shape}"
        )
    if torch.isnan(value[0]):
        raise ValueError(f"{arguments} is NaN at the mean of the bases")
    if not close_up_to_rounding(value, again):
        raise ValueError(
            f"{arguments} is random: two calls differ. Draw nothing in it; dropout needs .eval()"
        )
    if not close_up_to_rounding(value[[3, 1]], alone):
        raise ValueError(
            f"{arguments} of a row depends on the others in its batch, or on its place there: of "
            f"two rows it gives other values than of these among four. {COUPLED}"
        )
