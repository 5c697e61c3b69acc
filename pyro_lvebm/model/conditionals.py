# SPDX-License-Identifier: Apache-2.0
"""Residual energies of one part of (x, z) with the rest held fixed, and draws by annealing."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.bases import Completion
from pyro_lvebm.model.density import Density
from pyro_lvebm.sampling import (
    STANDARD_NORMAL,
    Schedule,
    ValueAndGrad,
    anneal,
    pick_draws,
    pilot,
    standard_normal,
)


def given_x(density: Density, w_x: Tensor) -> ValueAndGrad:
    """Residual energy of whitened z at fixed whitened x, with its gradient in z.

    Args:
        density: The joint density, at its contexts if there are any.
        w_x: Whitened x (*b, x_dim), whose batch shape expands to that of z.
    """

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.cat([w_x.expand(*v.shape[:-1], -1), v], -1)
        value, grad = density.residual_and_grad(u)
        return value, grad[..., w_x.shape[-1] :]

    return evaluate


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
        value, grad = density.residual_and_grad(torch.cat([x, v[..., :k]], -1))
        more, grad_x = _beyond_normal(density, x, grad[..., :d])
        by_entries = torch.einsum("...cd,...d->...c", slope, grad_x)
        return value + more, torch.cat([grad[..., d:], by_entries], -1)

    return evaluate


def given_z(density: Density, w_z: Tensor) -> ValueAndGrad:
    """Residual energy of whitened x at fixed whitened z, with its gradient in x.

    It is relative to N(0, I), as in `given_observed`.

    Args:
        density: The joint density, at its contexts if there are any.
        w_z: Whitened z (*b, z_dim), whose batch shape expands to that of x.
    """

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.cat([v, w_z.expand(*v.shape[:-1], -1)], -1)
        value, grad = density.residual_and_grad(u)
        more, grad_x = _beyond_normal(density, v, grad[..., : v.shape[-1]])
        return value + more, grad_x

    return evaluate


def _beyond_normal(density: Density, w_x: Tensor, grad: Tensor) -> tuple[Tensor | float, Tensor]:
    """Return U(w_x) − ½ |w_x|² of base_x, and the gradient with that of U − ½ |w_x|² added."""
    law = density.base_x.law
    if law is STANDARD_NORMAL:
        return 0.0, grad
    energy, slope = law.energy_and_grad(w_x)
    return energy - STANDARD_NORMAL.energy(w_x), grad + slope - w_x


def draw_conditional(
    f: ValueAndGrad, num_problems: int, dim: int, num_particles: int, like: Tensor
) -> Tensor:
    """Draw one v (num_problems, dim) of every problem by a run of its own, fixed after a pilot."""
    shape = (1, num_problems, num_particles, dim)
    schedule: Schedule = pilot(f, standard_normal(shape, like, None))
    start = standard_normal(shape, like, None)
    return pick_draws(anneal(f, start, schedule, num_moves=4).state, None)[0]
