# SPDX-License-Identifier: Apache-2.0
"""Conditional LVEBMs with closed forms."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from referee import normal
from torch import Tensor

from pyro_lvebm import LVEBM, ContextPool, QuadraticEnergy, lvebm

X_DIM, Z_DIM, C_DIM = 2, 1, 2


def tiny_pool(seed: int = 0, num_contexts: int = 24) -> ContextPool:
    return ContextPool(4, num_contexts, num_moves=4, seed=seed)


def linear_ebm(seed: int = 0, pool: ContextPool | None = None) -> tuple[LVEBM, Tensor, Tensor]:
    """A linear-Gaussian conditional LVEBM in float64, with rows x and contexts c."""
    c = normal((40, C_DIM), seed + 1)
    x = normal((40, X_DIM), seed + 2) + c @ normal((C_DIM, X_DIM), seed + 3)
    energy = QuadraticEnergy(X_DIM, Z_DIM, context_dim=C_DIM)
    ebm = LVEBM.from_data(energy, x, z_dim=Z_DIM, context=c, pool=pool or tiny_pool(seed))
    d = X_DIM + Z_DIM
    root = 0.5 * normal((d, d), seed + 4)
    energy.set_precision(root @ root.T + 0.7 * torch.eye(d), 0.3 * normal((d,), seed + 5))
    with torch.no_grad():
        energy.by_context.copy_(0.5 * normal((C_DIM, d), seed + 6))
    return ebm, x, c


def model_of(ebm: LVEBM, batch: int | None = None) -> Any:
    def model(x: Tensor, c: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            lvebm("scene", ebm, obs=x[i], context=c[i])

    return model
