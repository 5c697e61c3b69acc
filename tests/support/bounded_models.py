# SPDX-License-Identifier: Apache-2.0
"""LVEBMs with x on bounded supports, each beside the same LVEBM of unconstrained coordinates."""

from __future__ import annotations

import torch
from small_models import quadratic_ebm, tiny_pool
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm import LVEBM, QuadraticEnergy
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.bases.supports import Support

CONSTRAINTS = [
    constraints.positive,
    constraints.interval(-0.5, 2.0),
    constraints.stack([constraints.positive, constraints.unit_interval, constraints.real], -1),
    constraints.simplex,
]


def twins(constraint: Constraint, dim: int = 3) -> tuple[LVEBM, LVEBM]:
    """Linear-Gaussian LVEBMs of y and of x = T(y), with the same energy of whitened coordinates."""
    entries = dim + 1 if constraint is constraints.simplex else dim
    plain = quadratic_ebm(dim, 2)
    support = Support(constraint, torch.Size([entries]))
    base_x = GaussianBase(plain.base_x.loc, plain.base_x.scale, support)
    energy = QuadraticEnergy(dim, 2).double()
    energy.load_state_dict(
        {k: v for k, v in plain.f.state_dict().items() if "base" not in k}, False
    )
    return plain, LVEBM(energy, base_x, plain.base_z, pool=tiny_pool())


def to_support(ebm: LVEBM, y: torch.Tensor) -> torch.Tensor:
    return ebm.base_x.support.constrain(y)


def log_jacobian(ebm: LVEBM, y: torch.Tensor) -> torch.Tensor:
    """log |det dx/dy| (*b,) of a support from formulas written out for it."""
    name = str(ebm.base_x.support)
    if name.startswith("GreaterThan"):
        return y.sum(-1)
    if name.startswith("Interval"):
        s = torch.sigmoid(y)
        return (2.5 * s * (1 - s)).log().sum(-1)
    if name.startswith("Cat"):
        s = torch.sigmoid(y[..., 1])
        return y[..., 0] + (s * (1 - s)).log()
    assert name == "Simplex()"
    # The triangular Jacobian of stick-breaking: dx_k/dy_k = s_k (1 − s_k) times what is left.
    k = y.shape[-1]
    s = torch.sigmoid(y - torch.arange(k, 0, -1).to(y).log())
    left = torch.cat([torch.ones_like(s[..., :1]), (1 - s).cumprod(-1)[..., :-1]], -1)
    return (s * (1 - s) * left).log().sum(-1)
