# SPDX-License-Identifier: Apache-2.0
"""Weights: effective sample size, resampling, and the log partition by MBAR."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ess(log_weights: Tensor) -> Tensor:
    """Return the effective sample size of weights along the last axis.

        ESS = (Σ w)² / Σ w²

    Args:
        log_weights: log w (*b, n), in nats, normalised or not.

    Returns:
        ESS (*b,), between 1 and n.

    Source:
        Kong, Liu and Wong (1994), Sequential imputations and Bayesian missing data problems.

    Example:
        >>> import torch
        >>> ess(torch.zeros(4))
        tensor(4.)
    """
    log_w = torch.log_softmax(log_weights, -1)
    return torch.exp(-torch.logsumexp(2.0 * log_w, -1))


def systematic_resample(log_weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw n indices per row by systematic resampling.

    Index i is drawn n w_i times in expectation, which keeps sequential Monte Carlo unbiased.

    Args:
        log_weights: log w (*b, n), in nats, normalised or not.
        generator: Source of randomness; None means torch's global generator.

    Returns:
        Indices (*b, n) into the last axis.

    Source:
        Carpenter, Clifford and Fearnhead (1999), Improved particle filter for nonlinear problems.
    """
    *batch, n = log_weights.shape
    cdf = torch.softmax(log_weights, -1).cumsum(-1)
    shift = torch.rand(*batch, 1, dtype=cdf.dtype, device=cdf.device, generator=generator)
    grid = (torch.arange(n, dtype=cdf.dtype, device=cdf.device) + shift) / n
    return torch.searchsorted(cdf, grid * cdf[..., -1:]).clamp_(max=n - 1)


def mbar(f: Tensor, betas: Tensor, log_z: Tensor, num_iterations: int) -> tuple[Tensor, Tensor]:
    """Log partition of every temperature, and weights of all particles for the last one (MBAR).

    For n particles u_jk at each of L inverse temperatures β_l, targets exp(−E_0 − β_l f),

        log Z_l = log Σ_jk exp(−β_l f_jk) / Σ_m n exp(−β_m f_jk − log Z_m)

    is iterated from `log_z` with log Z_0 = 0 fixed. The base energy E_0 cancels.

    Args:
        f: Residual energies (L, n).
        betas: Inverse temperatures (L,); the first must be that of the normalised base, 0.
        log_z: Start (L,), in nats; the last answer is a good one.
        num_iterations: Number of fixed-point iterations, at least 1.

    Returns:
        log Z (L,), and normalised log weights (L·n,) of all particles for the last temperature.

    Source:
        Shirts and Chodera (2008), Statistically optimal analysis of samples from multiple
        equilibrium states, equations 11 and 13.

    Example:
        >>> import torch
        >>> f = torch.full((2, 3), 0.5)  # a constant energy: log Z = −β f
        >>> log_z, log_w = mbar(f, torch.tensor([0.0, 1.0]), torch.zeros(2), 10)
        >>> log_z
        tensor([ 0.0000, -0.5000])
    """
    n = f.shape[1]
    a = -betas[:, None] * f.reshape(1, -1)  # (L, L·n)
    for _ in range(num_iterations):
        log_mixture = torch.logsumexp(a - log_z[:, None], 0) + math.log(n)
        log_z = torch.logsumexp(a - log_mixture, 1)
        log_z = log_z - log_z[0]
    log_mixture = torch.logsumexp(a - log_z[:, None], 0)
    return log_z, torch.log_softmax(a[-1] - log_mixture, 0)
