# SPDX-License-Identifier: Apache-2.0
"""Rows with missing entries, and the exact law of what is observed."""

from __future__ import annotations

import math

import torch
from referee import normal
from small_models import exact_joint
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_lvebm import LVEBM


def draws_of_x(ebm: LVEBM, n: int, seed: int) -> Tensor:
    law = exact_joint(ebm)
    draws = law.mean + normal((n, ebm.dim), seed) @ torch.linalg.cholesky(law.covariance_matrix).T
    return draws[:, : ebm.base_x.dim].to(ebm.base_x.loc.dtype)


def with_holes(x: Tensor, share: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return x.masked_fill(torch.rand(x.shape, generator=generator) < share, math.nan)


def observed_log_density(law: MultivariateNormal, x: Tensor) -> Tensor:
    """log p(x_o) of every row under a Gaussian whose first entries are those of x."""
    values = []
    for row in x.double():
        o = torch.nonzero(~row.isnan())[:, 0]
        part = MultivariateNormal(law.mean[o], law.covariance_matrix[o][:, o]) if len(o) else None
        values.append(part.log_prob(row[o]) if part else row.new_zeros(()))
    return torch.stack(values).detach()
