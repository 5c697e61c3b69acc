# SPDX-License-Identifier: Apache-2.0
"""LVEBMs over events with several axes."""

from __future__ import annotations

import torch
from referee import normal
from small_models import tiny_pool
from torch.distributions import Independent, MultivariateNormal, Normal

from pyro_lvebm import LVEBM, QuadraticEnergy
from pyro_lvebm.bases.gaussian import GaussianBase


def shaped_ebm(full_z: bool = False) -> LVEBM:
    """x of shape (2, 2) and z of shape (2, 1) with bases away from the standard normal."""
    base_x = GaussianBase(normal((2, 2), 1), 0.3 * normal((4, 4), 2).tril(-1) + torch.eye(4))
    loc = normal((2, 1), 3)
    base_z = (
        GaussianBase(loc, torch.tensor([[0.8, 0.0], [0.5, 1.3]]).double())
        if full_z
        else GaussianBase(loc, torch.tensor([[0.8], [1.3]]).double())
    )
    ebm = LVEBM(QuadraticEnergy(4, 2).double(), base_x, base_z, pool=tiny_pool())
    root = 0.5 * normal((6, 6), 4)
    ebm.f.set_precision(root @ root.T + 0.6 * torch.eye(6).double(), 0.5 * normal((6,), 5))
    return ebm


def base_law(base: GaussianBase) -> torch.distributions.Distribution:
    """The base over flattened events, written with torch alone."""
    if base.diagonal:
        return Independent(Normal(base.loc, base.scale), 1)
    return MultivariateNormal(base.loc, scale_tril=base.scale)
