# SPDX-License-Identifier: Apache-2.0
"""An LVEBM with a closed form whose pool a test chooses, and the moments of its law."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch
from referee import gaussian_draws, gaussian_log_partition, gaussian_moments
from torch import Tensor

from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool
from pyro_lvebm.pools.base import Pool

EYE = torch.eye(3, dtype=torch.float64)
PRECISION = torch.tensor([[2.5, 0.6, 0.0], [0.6, 0.6, -0.3], [0.0, -0.3, 1.5]]).double()
LINEAR = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)
LOG_Z = gaussian_log_partition(PRECISION, LINEAR)


def frozen_ebm(
    pool: Pool,
    precision: Tensor = PRECISION,
    linear: Tensor = LINEAR,
    dtype: torch.dtype = torch.float32,
) -> LVEBM:
    """x 2-D with a full base, z 1-D, and a quadratic energy that is not trained."""
    energy = QuadraticEnergy(2, 1).to(dtype)
    energy.set_precision(precision.to(dtype), linear.to(dtype))
    tril = torch.tensor([[2.0, 0.0], [-0.7, 0.4]], dtype=dtype)
    return LVEBM(
        energy,
        dist.MultivariateNormal(torch.tensor([1.0, -3.0], dtype=dtype), scale_tril=tril),
        dist.Normal(torch.tensor([0.5], dtype=dtype), 1.7).to_event(1),
        pool=pool,
    )


def level(
    beta: float | Tensor, precision: Tensor = PRECISION, linear: Tensor = LINEAR
) -> tuple[Tensor, Tensor]:
    """Total precision and linear term of ½ |u|² + β f."""
    eye = torch.eye(len(linear), dtype=torch.float64)
    return eye + beta * (precision - eye), beta * linear


def ladder_log_z(betas: Tensor, precision: Tensor = PRECISION, linear: Tensor = LINEAR) -> Tensor:
    """Exact log Z (L,) of every temperature."""
    levels = [gaussian_log_partition(*level(b, precision, linear)) for b in betas.double()]
    return torch.tensor(levels, dtype=torch.float64)


def ladder_draws(
    betas: Tensor, precision: Tensor, linear: Tensor, shape: tuple[int, ...], seed: int
) -> Tensor:
    """Exact draws (*shape[:-1], L, shape[-1], d) of every temperature."""
    draws = [
        gaussian_draws(*level(b, precision, linear), shape, 1000 * seed + k)
        for k, b in enumerate(betas.double())
    ]
    return torch.stack(draws, -3)


def equilibrate(
    ebm: LVEBM, seed: int, precision: Tensor = PRECISION, linear: Tensor = LINEAR
) -> TemperedPool:
    """Put the chains of a tempered pool in equilibrium at every temperature."""
    pool = ebm.pool
    draws = ladder_draws(pool.betas, precision, linear, (pool.num_chains,), seed)
    pool.u = draws.to(pool.u.dtype)
    return pool


def weighted_moments(pool: Pool) -> Tensor:
    """Weighted means, squares and one product (7,) of the negatives."""
    u, log_w = (part.double() for part in pool.negatives())
    features = torch.cat([u, u**2, u[:, [0]] * u[:, [1]]], -1)
    return log_w.exp() @ features


def exact_moments(precision: Tensor = PRECISION, linear: Tensor = LINEAR) -> np.ndarray:
    mean, covariance = gaussian_moments(precision, linear)
    second = covariance + np.outer(mean, mean)
    return np.array([*mean, *second.diagonal(), second[0, 1]])
