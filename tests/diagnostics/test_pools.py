# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from bounded_models import twins
from linear_gaussian import assert_unchanged
from pool_models import EYE, LINEAR, PRECISION, equilibrate, frozen_ebm, ladder_draws
from referee import ALPHA, CERTAIN, mean_p_value, plane_grid
from scipy import stats
from small_models import tiny_pool
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_lvebm import LVEBM, PersistentPool, TemperedPool, pool_diagnostics
from pyro_lvebm.sampling.langevin import LangevinState

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# The function hides the module of its name in the package.
MODULE = sys.modules["pyro_lvebm.diagnostics.pools"]


def untrained(num_levels: int, num_moves: int = 1) -> LVEBM:
    pool = TemperedPool(num_levels, 10, num_moves=num_moves)
    return frozen_ebm(pool, EYE, torch.zeros(3), torch.float64)


# --- chains are followed ----------------------------------------------------------------------


@pytest.mark.parametrize(("num_levels", "num_moves"), [(2, 1), (3, 2), (4, 1), (5, 3)])
def test_round_trips_without_an_energy_are_counted_exactly(num_levels: int, num_moves: int) -> None:
    """All exchanges happen, so chains travel by a fixed permutation; the referee is a walk of one.

    Even pairs and then odd pairs exchange; a chain that is drawn at level 0 before them is followed
    by hand until it is back.
    """
    result = pool_diagnostics(untrained(num_levels, num_moves), num_refreshes=20)
    moves, trip, top = 20 * num_moves, [0], None
    while not (top is not None and trip[-1] == 0):
        level = trip[-1]
        for start in (0, 1):
            partner = level + 1 if (level - start) % 2 == 0 else level - 1
            if start <= min(level, partner) and partner < num_levels:
                level = partner
        trip.append(level)
        top = len(trip) - 1 if top is None and level == num_levels - 1 else top
    duration = len(trip) - 1
    assert result.round_trips == 10 * (moves - duration + 1)
    assert result.round_trip_rate == result.round_trips / (20 * 10)
    assert result.climb_moves == top
    assert (result.levels["swap_rate"].iloc[:-1] == 1.0).all()
    assert result.levels["ess"].to_numpy() == pytest.approx(10 * num_levels)
    assert "round trips in 20 refreshes" in str(result)


def test_counts_fail_where_marks_stay_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(state: LangevinState, betas: Tensor, generator: Any) -> Any:
        return state, torch.ones_like(betas[1:])

    monkeypatch.setattr(MODULE, "exchange", forgetful)
    result = pool_diagnostics(untrained(3), num_refreshes=20)
    assert result.round_trips == 0 and math.isnan(result.climb_moves)


def test_a_ladder_with_a_gap_is_cut_off() -> None:
    """Chains climb to the gap and no further."""
    pool = TemperedPool(4, 20, num_moves=2, step_size=1e-4)
    ebm = frozen_ebm(pool, 1e6 * EYE, LINEAR, torch.float64)
    equilibrate(ebm, 0, 1e6 * EYE, LINEAR)
    pool.betas.copy_(torch.tensor([0.0, 1e-7, 2e-7, 1.0]))
    result = pool_diagnostics(ebm, num_refreshes=20)
    assert result.round_trips == 0
    assert "no chain went from the base to the model" in result.verdict
    assert "levels 2 and 3 exchange 0% of their chains" in result.verdict
    climbing = result.levels["climbing"]
    assert (climbing.iloc[:3] == 1.0).all() and math.isnan(climbing.iloc[3])


def test_swap_rates_are_those_of_the_ladder() -> None:
    """Student's test over 8 seeds of swap rates against means over exact draws of neighbours.

    The exchange of odd pairs follows that of even ones, which leaves them independent draws.
    False alarms: ALPHA. Rates that are off by 0.02 fail.
    """
    betas = TemperedPool(4, 2).betas.double()
    f = [
        frozen_ebm(TemperedPool(4, 2), dtype=torch.float64).residual(u).detach()
        for u in ladder_draws(betas, PRECISION, LINEAR, (100_000,), 1)
    ]
    exact = [
        ((betas[k + 1] - betas[k]) * (f[k + 1] - f[k])).clamp(max=0.0).exp().mean()
        for k in range(3)
    ]
    rates = []
    for seed in range(8):
        ebm = frozen_ebm(TemperedPool(4, 100, num_moves=2, step_size=0.3, seed=seed))
        equilibrate(ebm.double(), seed)
        result = pool_diagnostics(ebm, num_refreshes=40, seed=seed)
        rates.append(result.levels["swap_rate"].to_numpy()[:-1])
        assert (result.levels["acceptance"].iloc[1:] < 1.0).all()
    assert mean_p_value(np.array(rates), np.array(exact)) > ALPHA
    assert mean_p_value(np.array(rates), np.array(exact) + 0.02) < CERTAIN


# --- modes ------------------------------------------------------------------------------------


class TwoWells(nn.Module):
    """Two modes in x, of unequal shares."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 2.0 * (x[..., 0] ** 2 - 2.0) ** 2 + 0.4 * x[..., 0] + 0.3 * z[..., 0] * x[..., 0]


def two_wells(seed: int = 0, num_refreshes: int = 20) -> LVEBM:
    base = dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    pool = TemperedPool(5, 60, num_moves=3, seed=seed)
    ebm = LVEBM(TwoWells(), base, base, pool)
    for _ in range(num_refreshes):
        pool.refresh(ebm)
    return ebm


def left(x: Tensor, z: Tensor) -> Tensor:
    return (x[:, 0] < 0.0).long()


def exact_share() -> float:
    grid, _ = plane_grid(8.0, 801)
    log_p = -0.5 * grid.square().sum(1) - TwoWells()(grid[:, :1], grid[:, 1:])
    on_axis = 0.5 * (grid[:, 0] == 0.0) + 1.0 * (grid[:, 0] < 0.0)
    return float((torch.softmax(log_p, 0) * on_axis).sum())


def test_shares_of_modes_are_those_of_quadrature() -> None:
    """z-scores of 8 pools: their mean by Student's test, their spread by a chi-square test.

    Errors by 20 batch means: 19 degrees of freedom each. False alarms: 3e-3.
    """
    tables = [
        pool_diagnostics(two_wells(seed, 12), num_refreshes=40, modes=left, seed=seed).modes
        for seed in range(8)
    ]
    share, error = (np.array([t.loc[1, name] for t in tables]) for name in ("share", "std_error"))
    z = (share - exact_share()) / error
    assert 0.5 < exact_share() < 0.9 and error.max() < 0.03
    assert mean_p_value(share[:, None], exact_share()) > ALPHA
    assert mean_p_value(share[:, None], 1.0 - exact_share()) < CERTAIN
    law = stats.chi2(8)
    assert ALPHA < law.sf((z**2).sum() * 17 / 19) < 1.0 - ALPHA
    assert law.sf((25.0 * z**2).sum()) < CERTAIN  # with errors a fifth as large
    assert all(t["share"].sum() == pytest.approx(1.0) for t in tables)


def test_modes_by_location_are_those_of_the_nearest() -> None:
    ebm = two_wells()
    by_labels = pool_diagnostics(ebm, num_refreshes=20, modes=left).modes
    by_place = pool_diagnostics(ebm, num_refreshes=20, modes=torch.tensor([[1.4], [-1.4]])).modes
    pd.testing.assert_frame_equal(by_labels, by_place)


def test_a_mode_that_appears_late_has_share_zero_before() -> None:
    calls: list[int] = []

    def late(x: Tensor, z: Tensor) -> Tensor:
        calls.append(0)
        return torch.full((len(x),), 7 if len(calls) > 10 else 3)

    modes = pool_diagnostics(untrained(3), num_refreshes=20, modes=late).modes
    assert modes["share"].to_dict() == pytest.approx({3: 0.5, 7: 0.5})
    assert modes.loc[3, "std_error"] == pytest.approx(math.sqrt(5.0 / 19.0 / 20.0))


# --- the rest ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pool_does_not_move_and_the_seed_decides(dtype: torch.dtype) -> None:
    ebm = frozen_ebm(tiny_pool(), dtype=dtype)
    ebm.pool.refresh(ebm)
    with assert_unchanged(ebm):
        a, b, c = (pool_diagnostics(ebm, num_refreshes=20, seed=seed) for seed in (1, 1, 2))
    assert a.levels.equals(b.levels) and not a.levels.equals(c.levels)
    assert list(a.levels.columns) == ["beta", "ess", "acceptance", "swap_rate", "climbing"]
    assert a.modes is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_refreshes": 30}, "num_refreshes must be a multiple of 20; got 30"),
        ({"modes": torch.zeros(3, 2)}, r"modes has shape \(3, 2\); expected \(k, \*\(1,\)\)"),
        ({"modes": lambda x, z: x[:, 0]}, r"modes\(x, z\) returned torch.float64"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_diagnostics(two_wells(num_refreshes=0), **options)


@pytest.mark.parametrize(
    ("place", "message"),
    [(-1.0, "support"), (0.0, "support"), (math.nan, "NaN or inf"), (math.inf, "NaN or inf")],
)
def test_modes_that_are_no_places_of_x_are_refused(place: float, message: str) -> None:
    _, ebm = twins(constraints.positive)
    modes = torch.ones(2, 3).double()
    modes[1, 0] = place
    with pytest.raises(ValueError, match=message):
        pool_diagnostics(ebm, num_refreshes=20, modes=modes)
    modes[1, 0] = 3.0
    shares = pool_diagnostics(ebm, num_refreshes=20, modes=modes).modes
    assert len(shares) == 2 and shares["share"].sum() == pytest.approx(1.0)


def test_a_pool_without_a_ladder_is_refused() -> None:
    with pytest.raises(ValueError, match="a PersistentPool has no ladder"):
        pool_diagnostics(frozen_ebm(PersistentPool(10)))
