# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch

from benchmarks.tightness import is_short, oracle


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
def test_what_falls_short(gap: float, lead: float, off: float, short: bool) -> None:
    assert is_short(gap, lead, 0.01, off, gap_se=0.01) is short


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
