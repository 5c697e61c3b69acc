# SPDX-License-Identifier: Apache-2.0
"""Following log Z of every temperature while θ moves: a Kalman filter over MBAR estimates."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_MEMORY = 50.0
"""Refreshes after which an estimate is forgotten even where θ stands still."""

_SURPRISE = 3.0
"""Standard errors between prediction and estimate beyond which the prediction is dropped."""

_MAX_STEPS = 50
"""Newton steps for MBAR; about three are taken where the start is a prediction."""

_LARGEST_STEP = 2.0
"""Nats by which a Newton step changes the difference of neighbouring log Z at most."""

_CONVERGED = 1e-3
"""Newton stops after a step of fewer nats; what remains is of the order of its square."""


class LogZTrack(NamedTuple):
    """Filtered log Z of every temperature, in nats."""

    log_z: Tensor  # (L,)
    variance: Tensor  # (L,), of the filter's error, nats²


def log_mixture(f: Tensor, betas: Tensor, log_z: Tensor) -> Tensor:
    """Return log Σ_m n exp(−β_m f − log Z_m) (L·n,), the density all particles were drawn from.

    It is relative to the base density, for residual energies f (L, n) of n particles at each of L
    inverse temperatures.
    """
    a = -betas[:, None] * f.reshape(1, -1)
    return torch.logsumexp(a - log_z[:, None], 0) + math.log(f.shape[1])


def predict(
    track: LogZTrack, f_old: Tensor, f_new: Tensor, betas_old: Tensor, betas_new: Tensor
) -> LogZTrack:
    """Carry log Z to a new θ and ladder by reweighting the particles, before they move.

        log Z'_l − log Z_l = log Σ_i w_li exp(β_l f_i − β'_l f'_i),    w_li ∝ exp(−β_l f_i) / m_i
        s_l² = Σ_i (w'_li − w_li)²,    w'_li ∝ exp(−β'_l f'_i) / m_i,    √P_l ← √P_l + s_l

    with m the mixture density of `log_mixture`, w and w' normalised over i, and s_l the standard
    error of the change. Standard errors add up, and not variances, because the errors of
    successive changes are alike: θ follows a gradient that comes from the same particles.

    Args:
        track: log Z (L,) under the old θ and ladder.
        f_old: Residual energies (L, n) under the old θ.
        f_new: Residual energies (L, n) of the same particles under the new θ.
        betas_old: The old ladder (L,).
        betas_new: The new ladder (L,).
    """
    mixture = log_mixture(f_old, betas_old, track.log_z)
    before = -betas_old[:, None] * f_old.reshape(1, -1) - mixture
    after = -betas_new[:, None] * f_new.reshape(1, -1) - mixture
    step = torch.softmax(after, 1) - torch.softmax(before, 1)
    change = torch.logsumexp(after, 1) - torch.logsumexp(before, 1)
    error = track.variance.sqrt() + (step * step).sum(1).sqrt()
    return LogZTrack(track.log_z + change, error * error)


def mbar_log_z(f: Tensor, betas: Tensor, log_z: Tensor) -> Tensor:
    """MBAR estimates log Z_l (L,), solved to convergence by Newton's method.

        log Z ← log Z + H⁻¹ r,    r_l = Σ_i W_il − 1,    H = diag(1 + r) − n Wᵀ W

    with W as in `mbar_variance` and log Z_0 fixed. Where neighbours overlap little, the fixed-point
    iteration of `mbar` stays close to its start for hundreds of iterations. A filter that starts it
    at the prediction would then take its own prediction for a new measurement.

    Args:
        f: Residual energies (L, n).
        betas: Inverse temperatures (L,); the first must be that of the normalised base, 0.
        log_z: Start (L,), in nats, with log Z_0 = 0.

    Source:
        Shirts and Chodera (2008), appendix C.
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


def correct(predicted: LogZTrack, estimate: Tensor, variance: Tensor) -> LogZTrack:
    """Combine the prediction with MBAR estimates from the particles after they moved.

        K = P / (P + R),    log Z ← log Z + K (log Z_MBAR − log Z),    P ← K R

    P grows a little at every refresh, so that nothing is remembered for ever. Where an estimate
    contradicts the prediction by more than three standard errors, P is raised to explain it.

    Args:
        predicted: What `predict` returned.
        estimate: MBAR estimates (L,), nats.
        variance: R, their variance (L,), nats².

    Source:
        Kalman (1960), A new approach to linear filtering and prediction problems.
    """
    innovation = estimate - predicted.log_z
    p = predicted.variance * (1.0 + 1.0 / _MEMORY)
    p = torch.maximum(p, innovation**2 - _SURPRISE**2 * variance)
    # The base has log Z = 0 and no variance; R / P is then 0 / 0.
    k = torch.where(variance > 0, 1.0 / (1.0 + variance / p), torch.ones_like(p))
    return LogZTrack(predicted.log_z + k * innovation, k * variance)
