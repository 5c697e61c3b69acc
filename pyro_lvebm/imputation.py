# SPDX-License-Identifier: Apache-2.0
"""Draws of the missing entries of x given the others."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.annealing import anneal, pick_draws, pilot, standard_normal
from pyro_lvebm.langevin import value_and_grad
from pyro_lvebm.model import LVEBM
from pyro_lvebm.rng import generator_for
from pyro_lvebm.validation import check_rows

_NUM_PARTICLES = 64


def impute(
    ebm: LVEBM, x: Tensor, observed: Tensor, *, num_samples: int = 1, seed: int = 0
) -> Tensor:
    """Draw the missing entries of x, jointly with z, from p_θ(x_missing | x_observed).

    The conditional of the Gaussian base is exact; from its draws, (x_missing, z) is annealed to
    the model by sequential Monte Carlo, every draw by a run of its own.

    Args:
        ebm: The LVEBM; unchanged.
        x: Observations (N, *x_shape); missing entries may hold any finite number.
        observed: Which entries are observed, boolean, shape x_shape, the same for all rows.
        num_samples: Draws for each row.
        seed: Fixes every random number.

    Returns:
        Completed observations (num_samples, N, *x_shape).

    Raises:
        ValueError: If x is not finite or of another shape, `observed` is not a boolean mask of
            shape x_shape, or nothing is missing.
    """
    check_rows(x, ebm.x_shape)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    if observed.dtype != torch.bool or observed.shape != ebm.x_shape:
        raise ValueError(
            f"observed must be a boolean mask of shape {tuple(ebm.x_shape)}; got "
            f"{observed.dtype} of shape {tuple(observed.shape)}"
        )
    missing = ~observed.flatten()
    if not missing.any():
        raise ValueError("nothing is missing: every entry of `observed` is True")
    n, d, m = len(x), ebm.base_x.dim, int(missing.sum())
    mean, tril = _conditional_base(ebm, x.reshape(n, d), missing)
    flat = x.reshape(n, d).repeat(num_samples, 1)[:, None]
    mean = mean.repeat(num_samples, 1)[:, None]

    def complete(v: Tensor) -> Tensor:
        whole = flat.expand(*v.shape[:-1], d).clone()
        whole[..., missing] = mean + v[..., :m] @ tril.T
        return whole.reshape(*v.shape[:-1], *ebm.x_shape)

    def residual(v: Tensor) -> Tensor:
        z = ebm.base_z.unwhiten(v[..., m:])
        value: Tensor = ebm.f(complete(v), z)
        return value

    generator = generator_for(seed, 40, device=x.device)
    f = value_and_grad(residual)
    shape = (1, n * num_samples, _NUM_PARTICLES, m + ebm.base_z.dim)
    with ebm.frozen():
        schedule = pilot(f, standard_normal(shape, x, generator), generator=generator)
        start = standard_normal(shape, x, generator)
        state = anneal(f, start, schedule, num_moves=4, generator=generator).state
    draws = complete(pick_draws(state, generator)[0][:, None])
    return draws.reshape(num_samples, n, *ebm.x_shape)


def _conditional_base(ebm: LVEBM, flat: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (N, m) and Cholesky factor (m, m) of x_missing given x_observed under base_x."""
    scale = ebm.base_x.scale.diag() if ebm.base_x.diagonal else ebm.base_x.scale
    inverse = torch.cholesky_inverse(scale.double())
    precision = inverse[missing][:, missing]
    cross = inverse[missing][:, ~missing]
    centred = (flat - ebm.base_x.loc).double()[:, ~missing]
    shift = torch.linalg.solve(precision, cross @ centred.T).T
    tril = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(precision)))
    mean = ebm.base_x.loc[missing].double() - shift
    return mean.to(flat.dtype), tril.to(flat.dtype)
