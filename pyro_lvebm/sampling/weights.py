# SPDX-License-Identifier: Apache-2.0
"""Weights: effective sample size, resampling, means and their errors, and log Z by MBAR."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MAX_STEPS = 50
"""Newton steps for MBAR; about three are taken where the start is a prediction."""

_LARGEST_STEP = 2.0
"""Nats by which a Newton step changes the difference of neighbouring log Z at most."""

_CONVERGED = 1e-3
"""Newton stops after a step of fewer nats; what remains is of the order of its square."""


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


def log_mixture(f: Tensor, betas: Tensor, log_z: Tensor) -> Tensor:
    """Return log Σ_m n exp(−β_m f − log Z_m) (L·n,), the density all particles were drawn from.

    It is relative to the base density, for residual energies f (L, n) of n particles at each of L
    inverse temperatures.
    """
    a = -betas[:, None] * f.reshape(1, -1)
    return torch.logsumexp(a - log_z[:, None], 0) + math.log(f.shape[1])


def mbar_log_z(f: Tensor, betas: Tensor, log_z: Tensor) -> Tensor:
    """MBAR estimates log Z_l (L,), solved to convergence by Newton's method.

        log Z ← log Z + H⁻¹ r,    r_l = Σ_i W_il − 1,    H = diag(1 + r) − n Wᵀ W

    with W as in `mbar_variance` and log Z_0 fixed. Where neighbours overlap little, fixed-point
    iteration stays close to its start for hundreds of iterations. A filter that starts it at its
    own prediction would then take that prediction for a new measurement.

    Args:
        f: Residual energies (L, n).
        betas: Inverse temperatures (L,); the first must be that of the normalised base, 0.
        log_z: Start (L,), in nats, with log Z_0 = 0.

    Source:
        Shirts and Chodera (2008), Statistically optimal analysis of samples from multiple
        equilibrium states, equation 11.

    Example:
        >>> import torch
        >>> f = torch.full((2, 3), 0.5)  # a constant energy: log Z = −β f
        >>> mbar_log_z(f, torch.tensor([0.0, 1.0]), torch.zeros(2))
        tensor([ 0.0000, -0.5000])
    """
    n = f.shape[1]
    a = -betas.double()[:, None] * f.double().reshape(1, -1)
    new = log_z.double()
    # The ridge bounds steps between levels that do not overlap at all.
    ridge = 1e-6 * torch.eye(len(betas) - 1, dtype=a.dtype, device=a.device)
    for _ in range(_MAX_STEPS):
        weights = torch.softmax(a - new[:, None], 0) / n
        total = weights.sum(1)
        hessian = total.diag() - n * (weights @ weights.T)
        step = torch.linalg.solve(hessian[1:, 1:] + ridge, total[1:] - 1.0)
        gaps = torch.cat([step[:1], step.diff()]).clamp(-_LARGEST_STEP, _LARGEST_STEP)
        new = torch.cat([new[:1], new[1:] + gaps.cumsum(0)])
        if gaps.abs().max() < _CONVERGED:
            break
    return new.to(f.dtype)


def mbar_variance(f: Tensor, betas: Tensor, log_z: Tensor) -> Tensor:
    """Variance (L,) of the MBAR estimates log Z_l, for independent particles.

        Θ = Wᵀ W (I − n Wᵀ W)⁺,    W_il = exp(−β_l f_i − log Z_l) / Σ_m n exp(−β_m f_i − log Z_m)
        Var(log Z_l − log Z_0) = Θ_ll − 2 Θ_l0 + Θ_00

    Args:
        f: Residual energies (L, n).
        betas: Inverse temperatures (L,).
        log_z: MBAR estimates (L,).

    Source:
        Shirts and Chodera (2008), Statistically optimal analysis of samples from multiple
        equilibrium states, equations 8 and D8, for equal numbers of particles.
    """
    n = f.shape[1]
    f64, betas64, log_z64 = f.double(), betas.double(), log_z.double()
    a = -betas64[:, None] * f64.reshape(1, -1) - log_z64[:, None]
    weights = torch.exp(a - log_mixture(f64, betas64, log_z64))
    # The last eigenvector is constant, with eigenvalue 1: a constant in all log Z, fixed by Z_0.
    eigenvalues, vectors = torch.linalg.eigh(n * (weights @ weights.T))
    eigenvalues, vectors = eigenvalues[:-1].clamp(0.0, 1.0 - 1e-9), vectors[:, :-1]
    offset = vectors - vectors[0]
    theta = eigenvalues / (1.0 - eigenvalues) / n
    variance: Tensor = (offset * offset * theta).sum(1)
    return variance.to(f.dtype)


def bar_log_ratio(work_0: Tensor, work_1: Tensor, start: Tensor) -> Tensor:
    """Bennett's acceptance ratio: log Z_1 / Z_0 from draws of both densities.

        Σ_i 1 / (1 + exp(W(u_i) + c)) = Σ_j 1 / (1 + exp(−W(u'_j) − c)),    c = log Z_1 / Z_0

    with W = E_1 − E_0, u_i from p_0, and as many u'_j from p_1. The left side falls in c and the
    right side rises, so the root is unique, and it lies between −max W and −min W. Newton's method
    finds it, with a bisection where its step is too long.

    Args:
        work_0: W at draws of p_0 (*b, n), nats.
        work_1: W at draws of p_1 (*b, n), nats.
        start: First guess of c (*b,), nats.

    Returns:
        c (*b,), nats.

    Source:
        Bennett (1976), Efficient estimation of free energy differences from Monte Carlo data;
        Shirts and Pande (2005), equation 2.

    Example:
        >>> import torch
        >>> w = torch.full((1, 8), 1.5)  # E_1 = E_0 + 1.5, so that Z_1 = exp(−1.5) Z_0
        >>> bar_log_ratio(w, w, torch.zeros(1))
        tensor([-1.5000])
    """
    work = torch.cat([work_0, work_1], -1)
    low, high = -work.amax(-1), -work.amin(-1)
    c = start.clamp(low, high)
    for _ in range(2 * _MAX_STEPS):
        left = torch.sigmoid(-work_0 - c[..., None])
        right = torch.sigmoid(work_1 + c[..., None])
        excess = (left - right).sum(-1)
        low, high = torch.where(excess > 0, c, low), torch.where(excess > 0, high, c)
        slope = (left * (1.0 - left) + right * (1.0 - right)).sum(-1)
        newton = c + excess / slope
        # Far from the root both sides are flat and Newton's step leaves the interval.
        inside = (low <= newton) & (newton <= high)
        new = torch.where(inside, newton, 0.5 * (low + high))
        moved, c = (new - c).abs().max(), new
        if float(moved) < _CONVERGED:
            break
    return c


def log_mean_exp(log_values: Tensor, dim: int = -1) -> Tensor:
    """Return log mean exp along one axis."""
    return torch.logsumexp(log_values, dim) - math.log(log_values.shape[dim])


def log_mean_std_error(log_values: Tensor, dim: int = 0) -> Tensor:
    """Standard error of log mean exp over independent estimates along one axis (delta method)."""
    n = log_values.shape[dim]
    relative = torch.exp(log_values - log_mean_exp(log_values, dim).unsqueeze(dim))
    return relative.std(dim) / math.sqrt(n)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Return the Pareto shape k̂ (N,) of importance weights (draws, N), by PSIS.

    Below min(1 − 1 / log10 S, 0.7) the importance-weighted average of S draws can be relied on.
    Log weights within
    a thousandth of a nat have no tail and get −inf; fewer than 25 draws say nothing and get NaN.

    Source:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
        sections 2.4 and 3; ArviZ computes it.
    """
    if len(log_weights) < 25:
        return torch.full(log_weights.shape[1:], torch.nan)
    import arviz as az  # as in `export`: it warns once a day on import

    rows = log_weights.double().T.cpu().numpy()
    varying = np.ptp(rows, axis=1) > 1e-3
    k = np.full(len(rows), -np.inf)
    if varying.any():
        if int(az.__version__.split(".")[0]) >= 1:
            psis: Any = import_module("arviz_stats.base").array_stats
            k[varying] = np.asarray(psis.psislw(rows[varying], axis=-1)[1])
        else:
            k[varying] = np.asarray(az.psislw(rows[varying])[1])
    return torch.as_tensor(k)
