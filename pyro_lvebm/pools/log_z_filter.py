# SPDX-License-Identifier: Apache-2.0
"""Following log Z of every temperature while θ moves: a Kalman filter over MBAR estimates."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.sampling import log_mixture

_MEMORY = 50.0
"""Refreshes after which an estimate is forgotten even if θ stands still."""

_SURPRISE = 3.0
"""Standard errors between prediction and estimate beyond which the prediction is dropped."""


class LogZTrack(NamedTuple):
    """Filtered log Z of every temperature, in nats."""

    log_z: Tensor  # (L,)
    variance: Tensor  # (L,), of the filter's error, nats²


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
