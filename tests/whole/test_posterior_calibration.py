# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration of the particles' posterior.

If (x, z) is a draw of the model and z_1 … z_L are draws of p(z | x), the rank of any function of z
among the same function of z_1 … z_L is uniform on 0 … L (Talts et al., 2018, theorem 1).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_gaussian import make_model, make_quadratic
from pyro.optim import Adam
from referee import ALPHA, CERTAIN, gaussian_draws
from scipy import stats
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, Saddle, TemperedPool

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N, DRAWS, BINS = 1200, 19, 10
"""Data, thinned draws of each, and bins of two ranks each."""


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(4, 16, seed=0))


@pytest.fixture(scope="module")
def pairs(ebm: LVEBM) -> tuple[Tensor, Tensor]:
    """Exact draws of the model: data x, and the z they came with."""
    u = gaussian_draws(ebm.f.precision.detach(), ebm.f.linear.detach(), (N,), 3)
    return ebm.unwhiten(u.to(ebm.base_x.loc))


def ranks(z: Tensor, draws: Tensor) -> dict[str, np.ndarray]:
    """Ranks (N,) of z (N, 2) among draws (L, N, 2), for coordinates and other functions of z."""
    functions = {
        "first": lambda v: v[..., 0],
        "second": lambda v: v[..., 1],
        "sum": lambda v: v.sum(-1),
        "squared norm": lambda v: (v * v).sum(-1),
    }
    return {name: (f(draws) < f(z)).sum(0).numpy() for name, f in functions.items()}


def uniform_p_value(found: np.ndarray) -> float:
    """Chi-square test that ranks in 0 … DRAWS are uniform, in BINS bins."""
    counts = np.bincount(found * BINS // (DRAWS + 1), minlength=BINS)
    return float(stats.chisquare(counts).pvalue)


@pytest.fixture(scope="module")
def draws(ebm: LVEBM, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """One thinned chain of each datum's only particle, (DRAWS, N, 2)."""
    x, _ = pairs
    model = make_model(ebm, 400)
    saddle = Saddle(model, AutoParticles(model, 1), Adam({"lr": 1e-3}), seed=0)
    with ebm.frozen():
        samples = saddle.sample_posterior(x, num_samples=DRAWS, num_warmup=150, thinning=25)
    return samples["scene_z"][0]


@pytest.mark.parametrize("name", ["first", "second", "sum", "squared norm"])
def test_ranks_are_uniform(pairs: tuple[Tensor, Tensor], draws: Tensor, name: str) -> None:
    """False alarm ALPHA for each function."""
    assert uniform_p_value(ranks(pairs[1], draws)[name]) > ALPHA


def test_a_posterior_of_another_width_fails(pairs: tuple[Tensor, Tensor], draws: Tensor) -> None:
    """Draws too narrow by a fifth, too wide by three tenths, or 0.3 standard deviations aside."""
    mean, sd = draws.mean(0), draws.std(0)
    for wrong in (mean + 0.8 * (draws - mean), mean + 1.3 * (draws - mean), draws + 0.3 * sd):
        assert uniform_p_value(ranks(pairs[1], wrong)["first"]) < CERTAIN


def test_the_prior_in_place_of_the_posterior_fails(
    ebm: LVEBM, pairs: tuple[Tensor, Tensor]
) -> None:
    prior = torch.randn(DRAWS, N, 2, generator=torch.Generator().manual_seed(0))
    wrong = ebm.base_z.unwhiten(prior.to(ebm.base_z.loc))
    assert min(uniform_p_value(r) for r in ranks(pairs[1], wrong).values()) < CERTAIN
