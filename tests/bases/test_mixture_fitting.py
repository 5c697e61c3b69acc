# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from referee import ALPHA, CERTAIN, grid_cdf, ks_p_value, normal, seeded
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_lvebm.bases import GaussianBase, MixtureBase
from pyro_lvebm.bases.mixture_fitting import (
    DEFENSIVE_WEIGHT,
    _fill_in,
    choose_size,
    fit_mixture,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SHARE = 0.06


def two_modes(count: int, dim: int, seed: int) -> Tensor:
    """A standard normal, and a mode of 6 % of the rows, 8 away along every axis, half as wide."""
    rare = torch.rand(count, generator=seeded(seed)) < SHARE
    x = normal((count, dim), seed + 1)
    return torch.where(rare[:, None], 8.0 + 0.5 * x, x)


def whitened(x: Tensor) -> Tensor:
    return GaussianBase.fit(x).whiten(x)


@pytest.mark.parametrize(("count", "dim"), [(50, 1), (200, 2), (1000, 5), (200, 20)])
def test_one_component_stands_for_gaussian_rows(count: int, dim: int) -> None:
    """Over ten sets; more win by two standard errors in fewer than 5 %."""
    sizes = [choose_size(normal((count, dim), seed))[0] for seed in range(10)]
    assert sum(size > 1 for size in sizes) <= 2


def test_one_component_is_the_gaussian_itself() -> None:
    found = fit_mixture(normal((200, 3), 1))
    assert torch.equal(found.log_weights, torch.zeros(1).double())
    assert torch.equal(found.means, torch.zeros(1, 3).double())
    assert torch.equal(found.trils, torch.eye(3).double()[None])


@pytest.mark.parametrize("dim", [1, 2, 6])
def test_a_rare_mode_has_its_share(dim: int) -> None:
    """Within 4 standard errors of the share of the rows (false alarms: 1e-4), and in its place.

    Some 90 rows of standard deviation ½ say where that is to 0.05, which the limit has three times.
    """
    x = two_modes(1500, dim, 3)
    base = MixtureBase.fit(x)
    drawn = base.unwhiten(base.draw((20000, dim), x, seeded(5)))
    rare = (x.mean(1) > 4.0).double().mean()
    share = (drawn.mean(1) > 4.0).double().mean()
    error = math.sqrt(SHARE * (1 - SHARE) / 20000)
    assert abs(share - rare) < 4.0 * error + DEFENSIVE_WEIGHT
    far = drawn[drawn.mean(1) > 4.0]
    torch.testing.assert_close(
        far.median(0).values, torch.full((dim,), 8.0).double(), atol=0.15, rtol=0
    )


def test_the_broad_component_reaches_all_rows() -> None:
    """No density is below a hundredth of the Gaussian's; without that component one is."""
    w = whitened(two_modes(800, 2, 7))
    found = fit_mixture(w)
    assert found.log_weights.exp()[-1].item() == pytest.approx(DEFENSIVE_WEIGHT)
    gaussian = GaussianBase(torch.zeros(2).double(), torch.ones(2).double())
    u = 4.0 * normal((500, 2), 8)
    broad = DEFENSIVE_WEIGHT * gaussian.log_prob(u).exp()
    assert (MixtureBase(gaussian, *found).log_prob(u).exp() >= 0.999 * broad).all()
    narrow = torch.log_softmax(found.log_weights[:-1], 0), found.means[:-1], found.trils[:-1]
    assert (MixtureBase(gaussian, *narrow).log_prob(u).exp() < broad).any()


def test_the_same_rows_give_the_same_mixture() -> None:
    w = whitened(two_modes(400, 2, 9))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = fit_mixture(w)
        torch.manual_seed(2)
        assert all(torch.equal(a, b) for a, b in zip(first, fit_mixture(w), strict=True))


def test_few_rows_are_one_gaussian() -> None:
    assert choose_size(normal((8, 2), 1))[0] == 1


def test_missing_entries_leave_the_mixture_near_that_of_all() -> None:
    """A fifth at random: share and places of the modes stay; those of a Gaussian fill do not.

    Rows filled in by the Gaussian of all rows put mass between the modes.
    """
    x = two_modes(1500, 2, 11)
    holes = torch.rand(x.shape, generator=seeded(12)) < 0.2
    holes[holes.all(1)] = False
    holey = x.masked_fill(holes, torch.nan)
    base = MixtureBase.fit(holey)
    test = two_modes(3000, 2, 13)
    complete = MixtureBase.fit(x)
    loss = (complete.log_prob(test) - base.log_prob(test)).mean().item()
    gaussian = GaussianBase.fit(holey)
    assert loss < 0.03
    assert (complete.log_prob(test) - gaussian.log_prob(test)).mean().item() > 0.5


def conditional_p_value(weights: Tensor) -> float:
    """Kolmogorov's test of 4,000 draws of x_1 given x_0 = 0.7, under a mixture of two."""
    means = torch.tensor([[0.0, 0.0], [1.5, 4.0]]).double()
    trils = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.5, 0.0], [-0.3, 0.4]]]).double()
    y = torch.tensor([[0.7, torch.nan]], dtype=torch.float64).repeat(4000, 1)
    drawn = _fill_in(y, means, trils, weights.log(), seeded(16))
    assert (drawn[:, 0] == 0.7).all()
    law = MixtureBase(
        GaussianBase(torch.zeros(2).double(), torch.ones(2).double()),
        torch.tensor([0.8, 0.2]).double().log(),
        means,
        trils,
    )

    def energy(x: Tensor) -> Tensor:
        return -law.log_prob(torch.stack([torch.full_like(x, 0.7), x], -1))

    return ks_p_value(drawn[:, 1], grid_cdf(energy, 9.0))


def test_missing_entries_are_drawn_given_the_others() -> None:
    """Against quadrature. False alarms: 1e-3. With other weights of the components it fails."""
    assert conditional_p_value(torch.tensor([0.8, 0.2]).double()) > ALPHA
    assert conditional_p_value(torch.tensor([0.5, 0.5]).double()) < CERTAIN


def test_sizes_that_cannot_be_fitted_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few rows for a component each, or a fit that breaks down."""
    assert choose_size(normal((13, 1), 17))[0] == 1
    w = whitened(two_modes(300, 1, 18))
    assert choose_size(w)[0] > 1
    real = GaussianMixture.fit

    def fit(self: GaussianMixture, rows: Any) -> GaussianMixture:
        if self.n_components > 1:
            raise ValueError("a component collapsed")
        return real(self, rows)

    monkeypatch.setattr(GaussianMixture, "fit", fit)
    assert choose_size(w)[0] == 1
    with pytest.raises(ValueError, match="a mixture of 2 Gaussians to all rows broke down"):
        fit_mixture(w, (2, 0.0))


def test_of_many_rows_some_choose_the_size() -> None:
    size, _ = choose_size(whitened(two_modes(2500, 1, 19)))
    assert 1 < size < 5
