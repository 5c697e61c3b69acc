# SPDX-License-Identifier: Apache-2.0
"""Residual energies of one part of (x, z) with the rest held fixed, and draws by annealing."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.bases import Completion, GeneratorBase
from pyro_lvebm.model.density import Density
from pyro_lvebm.sampling import (
    Residuals,
    ValueAndGrad,
    anneal_problems,
    pick_draws,
    value_and_grad,
)


def given_x(density: Density, w_x: Tensor) -> ValueAndGrad:
    """Residual energy of whitened z at fixed x, with its gradient in z.

    Args:
        density: The joint density, at its contexts if there are any.
        w_x: Coordinates of x (*b, x_dim) by `base_x.whiten`, whose batch shape expands to that of
            z.
    """
    f = density.residual_given_x(w_x)
    base = density.base_x
    if not isinstance(base, GeneratorBase):
        return f
    standardised, whitener = base.standardised(w_x), base.whitener()
    constant = -0.5 * w_x.square().sum(-1)

    def beyond(v: Tensor) -> Tensor:
        epsilon, log_det = base.noise_at(standardised, density.base_z.unwhiten(v), whitener)
        return 0.5 * (epsilon * epsilon).sum(-1) + constant + log_det

    own = value_and_grad(beyond)
    if density.is_base:
        return own

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        (value, grad), (f_value, f_grad) = own(v), f(v)
        return value + f_value, grad + f_grad

    return evaluate


def log_base_of(density: Density, x: Tensor) -> Tensor:
    """Log density (*b,) of x that `given_x` leaves out, in nats.

    It is log base_x(x); where base_x varies with z, the density of x under the Gaussian over x.
    """
    base = density.base_x
    return base.log_normal(x) if base.depends_on_z else base.log_prob(x)


def given_observed(density: Density, completion: Completion, columns: Tensor) -> ValueAndGrad:
    """Residual energy of v = (whitened z, missing entries of x) at the observed entries of x.

    It is relative to N(0, I): where base_x is no Gaussian, what it has beyond one is in it.

    Args:
        density: The joint density, at its contexts if there are any.
        completion: The observed entries, of a batch shape that expands to that of v.
        columns: Indices (c,) of entries that are missing in some row; the last c entries of v.
    """
    u_x, slope = completion.whitened(columns)
    d, k = u_x.shape[-1], density.base_z.dim

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        # A product of matrices would copy `slope` for every particle.
        x = u_x + torch.einsum("...c,...cd->...d", v[..., k:], slope)
        value, grad = density.at_coordinates(torch.cat([x, v[..., :k]], -1))
        by_entries = torch.einsum("...cd,...d->...c", slope, grad[..., :d])
        return value, torch.cat([grad[..., d:], by_entries], -1)

    return evaluate


def residuals_given_x(density: Density, w_x: Tensor) -> Residuals | None:
    """Map ζ to r = (ε, ζ), whose ½ |r|² is the energy of `given_x` but for f; None without an ε.

    Only a base of x that varies with z has one.
    """
    base = density.base_x
    if not isinstance(base, GeneratorBase):
        return None
    standardised, whitener = base.standardised(w_x), base.whitener()

    def residuals(v: Tensor) -> Tensor:
        z = density.base_z.unwhiten(v)
        return torch.cat([base.noise_at(standardised, z, whitener)[0], v], -1)

    return residuals


def residuals_given_observed(
    density: Density, completion: Completion, columns: Tensor
) -> Residuals | None:
    """Map v to (ε, ζ) and what v has at observed entries; as in `residuals_given_x`."""
    base = density.base_x
    if not isinstance(base, GeneratorBase):
        return None
    u_x, slope = completion.whitened(columns)
    k, seen = density.base_z.dim, completion.observed[..., columns].to(u_x)

    def residuals(v: Tensor) -> Tensor:
        w_x = u_x + torch.einsum("...c,...cd->...d", v[..., k:], slope)
        epsilon, _ = base.noise_and_log_det(w_x, density.base_z.unwhiten(v[..., :k]))
        return torch.cat([epsilon, v[..., :k], seen * v[..., k:]], -1)

    return residuals


def given_z(density: Density, w_z: Tensor) -> ValueAndGrad:
    """Residual energy of x in its coordinates given z, with its gradient in them.

    It is relative to N(0, I), as in `given_observed`; `density.unwhiten` knows the coordinates.

    Args:
        density: The joint density, at its contexts if there are any.
        w_z: Whitened z (*b, z_dim), whose batch shape expands to that of x.
    """
    f = density.residual_and_grad if density.base_x.depends_on_z else density.at_coordinates

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = f(torch.cat([v, w_z.expand(*v.shape[:-1], -1)], -1))
        return value, grad[..., : v.shape[-1]]

    return evaluate


def draw_conditional(
    f: ValueAndGrad,
    num_problems: int,
    dim: int,
    num_particles: int,
    like: Tensor,
    residuals: Residuals | None = None,
) -> Tensor:
    """Draw one v (num_problems, dim) of every problem by a run of its own, fixed after a pilot."""
    shape = (num_problems, num_particles, dim)
    return pick_draws(anneal_problems(f, residuals, shape, like, generator=None).state, None)[0]
