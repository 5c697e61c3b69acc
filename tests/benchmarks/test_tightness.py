# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from benchmarks.tightness import MEAN_FIELD, ORACLES, by_quadrature, is_short, oracle
from pyro_lvebm import LVEBM, TemperedPool, ZeroEnergy


@pytest.mark.parametrize(
    ("gap", "lead", "off", "short"),
    [
        (0.2, 0.06, 0.0, False),
        (0.2, 0.049, 0.0, True),  # a gap that the paired difference does not show
        (0.2, math.nan, 0.0, True),
        (0.04, 0.0, 0.0, False),  # too small to ask for
        (0.04, -0.054, 0.0, False),
        (0.04, -0.056, 0.0, True),  # particles below a guide
        (0.2, 0.09, 0.02, False),
        (0.2, 0.09, 0.06, True),  # a gap that contradicts its closed form
    ],
)
def test_what_falls_short_on_an_oracle(gap: float, lead: float, off: float, short: bool) -> None:
    row = {"data": ORACLES[0], "lead": lead, "std_error": 0.01, "kl_gap": gap, "kl_gap_se": 0.01}
    assert is_short(row | {"closed form": gap + off}) is short


@pytest.mark.parametrize(
    ("guide", "lead", "below", "short"),
    [
        (MEAN_FIELD, 0.11, 0.0, False),
        (MEAN_FIELD, 0.09, 0.0, True),  # too little, though well above its error
        ("IAF", 0.09, 0.0, False),
        ("IAF", 0.049, 0.0, True),
        ("IAF", math.nan, 0.0, True),
        ("IAF", 0.09, 0.06, True),  # particles far below quadrature
        ("IAF", 0.09, math.nan, False),  # z is no plane
    ],
)
def test_what_falls_short_on_data(guide: str, lead: float, below: float, short: bool) -> None:
    row = {"data": "digits", "guide": guide, "lead": lead, "std_error": 0.01}
    assert is_short(row | {"below exact": below}) is short


def test_quadrature_of_a_linear_decoder_is_its_closed_form() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    ebm = LVEBM.from_data(ZeroEnergy(3, 2), x, z_dim=2, generator="linear", pool=TemperedPool(2, 4))
    base = ebm.base_x
    tril = base.unit[:, None] * base.linear.detach()
    noise = base.unit * (1e-3 + base.log_noise.detach().exp())
    law = torch.distributions.LowRankMultivariateNormal(base.loc, tril, noise.square())
    assert by_quadrature(ebm, x[:4]) == pytest.approx(float(law.log_prob(x[:4]).mean()), abs=1e-3)


@pytest.mark.parametrize(("x_dim", "z_dim"), [(3, 2), (6, 4)])
def test_the_gap_of_an_oracle_is_that_of_its_posterior(x_dim: int, z_dim: int) -> None:
    """KL of the best diagonal Gaussian from the posterior; and x follows the model."""
    ebm, x, gap = oracle(x_dim, z_dim, 4000)
    posterior = ebm.f.posterior(x[:1])
    scale = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
    diagonal = torch.distributions.MultivariateNormal(posterior.mean, scale_tril=scale.diag_embed())
    expected = float(torch.distributions.kl_divergence(diagonal, posterior).detach())
    assert gap == pytest.approx(expected, rel=1e-4) and gap > 0.05
    covariance = torch.linalg.inv(ebm.f.precision.detach())[:x_dim, :x_dim]
    whitened = ebm.base_x.whiten(x)
    found = whitened.T @ whitened / len(x)
    assert (found - covariance).abs().max() < 0.15 * covariance.diagonal().max()
