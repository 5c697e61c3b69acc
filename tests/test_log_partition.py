# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import (
    PlainQuadratic,
    Unadjusted,
    assert_unchanged,
    make_neural,
    make_quadratic,
    quadrature_log_partition,
)
from referee import ALPHA, CERTAIN, gaussian_log_partition, mean_p_value, normal
from scipy import stats
from small_models import warm
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    MALA,
    LogPartition,
    MLPEnergy,
    PersistentPool,
    TemperedPool,
    annealing,
    log_partition,
)
from pyro_lvebm.pool import Pool

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# The function hides the module of its name in the package.
MODULE = sys.modules["pyro_lvebm.log_partition"]

RUNS = 6
CHEAP = {
    "num_particles": 96,
    "num_runs": RUNS,
    "num_moves": 3,
    "relative_ess": 0.9,
    "num_refreshes": 15,
}


def tempered(seed: int) -> Pool:
    return TemperedPool(4, 48, num_moves=4, seed=seed)


def persistent(seed: int) -> Pool:
    return PersistentPool(192, kernel=MALA(), num_moves=6, step_size=0.2, seed=seed)


def brackets(count: int, make_pool: Callable[[int], Pool] | None = None) -> list[LogPartition]:
    """Brackets of the linear-Gaussian model, each from a pool and a seed of its own."""
    pools = [tempered, persistent] if make_pool is None else [make_pool]
    return [
        log_partition(make_quadratic(pool=pools[k % len(pools)](k)), seed=100 + k, **CHEAP)
        for k in range(count)
    ]


def exact() -> float:
    f = make_quadratic().f
    return gaussian_log_partition(f.precision.detach(), f.linear.detach())


def miss_p_value(results: list[LogPartition], expected: float) -> float:
    """Each end misses in at most 2.5 % of brackets, so at most 5 % of brackets miss."""
    misses = sum(not r.lower <= expected <= r.upper for r in results)
    return float(stats.binom.sf(misses - 1, len(results), 0.05))


def spread_p_value(results: list[LogPartition]) -> float:
    """F test that the estimates scatter as their standard errors say."""
    variance = np.var([r.estimate for r in results], ddof=1)
    stated = np.mean([r.std_error**2 for r in results])
    law = stats.f(len(results) - 1, len(results) * (RUNS - 1))
    return 2.0 * float(min(law.cdf(variance / stated), law.sf(variance / stated)))


def estimate_p_value(result: LogPartition, num_runs: int, expected: float) -> float:
    """Student's test of an estimate by the standard error that comes with it."""
    return 2.0 * float(stats.t(num_runs - 1).sf(abs(result.estimate - expected) / result.std_error))


# --- the linear-Gaussian model --------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> list[LogPartition]:
    return brackets(20)


def test_bracket_holds_the_exact_value(many: list[LogPartition]) -> None:
    """20 pools and seeds; a bracket may miss in 5 % of cases. False alarm ALPHA (6 misses)."""
    assert abs(exact()) > 0.5
    assert miss_p_value(many, exact()) > ALPHA


def test_bracket_is_narrow_and_ordered(many: list[LogPartition]) -> None:
    for result in many:
        assert result.lower < result.estimate <= result.upper
        assert result.upper - result.lower < 0.6
        assert 4 <= result.num_temperatures <= 20


def test_bracket_check_fails_where_the_ends_are_those_of_another_model(
    many: list[LogPartition],
) -> None:
    assert miss_p_value(many, exact() + 0.3) < CERTAIN
    assert miss_p_value(many, exact() - 0.3) < CERTAIN


def test_bracket_check_fails_for_reverse_runs_from_the_base(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The upper end needs model draws; without them it is no more than the estimate."""

    def base_draws(
        ebm: LVEBM, pool: Pool, runs: int, particles: int, generator: torch.Generator
    ) -> Tensor:
        return annealing.standard_normal((runs, 1, particles, ebm.dim), pool.u, generator)

    monkeypatch.setattr(MODULE, "_model_draws", base_draws)
    assert miss_p_value(brackets(40), exact()) < CERTAIN


def test_bracket_check_fails_for_a_kernel_with_another_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its Metropolis test a kernel has another stationary law, which moves both ends."""
    monkeypatch.setattr(annealing, "_KERNEL", Unadjusted())
    assert miss_p_value(brackets(10), exact()) < CERTAIN


def test_ratio_is_unbiased(many: list[LogPartition]) -> None:
    """E[Ẑ / Z] = 1 over 20 seeds; false alarm ALPHA."""
    ratios = np.exp([r.estimate - exact() for r in many])
    assert mean_p_value(ratios, 1.0) > ALPHA
    # The mean of log Ẑ, which is biased low, is another thing; here it is the check's failure.
    assert mean_p_value(ratios * math.exp(-0.15), 1.0) < CERTAIN


def test_ends_and_estimate_are_those_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With five particles the mean of log Ẑ and the log of mean Ẑ are far apart."""
    anneal, recorded = MODULE.anneal, []

    def record(*args: Any, **options: Any) -> annealing.Annealed:
        recorded.append(anneal(*args, **options))
        return recorded[-1]

    monkeypatch.setattr(MODULE, "anneal", record)
    settings = CHEAP | {"num_particles": 5, "relative_ess": 0.6}
    result = log_partition(make_quadratic(pool=tempered(0)), seed=1, **settings)
    low, high = (r.log_ratio[:, 0].numpy() for r in recorded)
    assert low.shape == high.shape == (RUNS,)
    margin = stats.t(RUNS - 1).ppf(0.975) / math.sqrt(RUNS)
    ratio, inverse = np.exp(low), np.exp(high)
    assert result.estimate == pytest.approx(np.log(ratio.mean()))
    assert result.estimate > low.mean() + 0.02
    assert result.std_error == pytest.approx(ratio.std(ddof=1) / ratio.mean() / math.sqrt(RUNS))
    spread = margin * ratio.std(ddof=1) / ratio.mean()
    assert result.lower == pytest.approx(np.log(ratio.mean()) - spread)
    upper = -np.log(inverse.mean()) + margin * inverse.std(ddof=1) / inverse.mean()
    assert result.upper == pytest.approx(max(upper, result.estimate))


def test_standard_error_is_the_spread_over_seeds(many: list[LogPartition]) -> None:
    """False alarm ALPHA."""
    assert spread_p_value(many) > ALPHA


def test_spread_check_fails_for_the_error_of_the_sum_of_runs(many: list[LogPartition]) -> None:
    assert spread_p_value([replace(r, std_error=RUNS * r.std_error) for r in many]) < CERTAIN


def test_default_settings_and_the_pool_of_training() -> None:
    """A pool at work before and the settings of the door; false alarm ALPHA for the estimate."""
    ebm = make_quadratic(dtype=torch.float32)
    for _ in range(5):
        ebm.pool.refresh(ebm)
    result = log_partition(ebm, seed=3)
    assert result.std_error < 0.02 and result.upper - result.lower < 0.1
    assert estimate_p_value(result, 16, exact()) > ALPHA
    assert result.lower - 0.02 < exact() < result.upper + 0.02


# --- neural energies and other shapes -------------------------------------------------------


NEURAL = {
    "1+1, diagonal bases, tempered": lambda: make_neural(1, 1, pool=tempered(1), seed=1),
    "1+1, full bases, persistent MALA, float32": lambda: make_neural(
        1, 1, full=True, pool=persistent(2), seed=2, dtype=torch.float32
    ),
    "2+1, full bases, tempered, float32": lambda: make_neural(
        2, 1, full=True, pool=tempered(3), seed=1, dtype=torch.float32
    ),
    "2+1, diagonal bases, persistent ULA": lambda: make_neural(
        2, 1, pool=PersistentPool(256, step_size=0.02, seed=4), seed=2
    ),
    "1+2, full bases, persistent MALA": lambda: make_neural(
        1, 2, full=True, pool=persistent(5), seed=0
    ),
}


def test_neural_energies_agree_with_quadrature() -> None:
    """Five energies, one bracket each; false alarm 5 · ALPHA for the estimates, 1e-3 for misses.

    Three of five brackets missing has probability 1.2e-3 if each end misses in 2.5 % of cases.
    """
    inside = 0
    for name, make in NEURAL.items():
        ebm = make()
        expected = quadrature_log_partition(ebm)
        result = log_partition(ebm, seed=7, num_particles=256, num_runs=8, num_refreshes=25)
        assert abs(expected) > 0.1 and result.std_error < 0.1, name
        assert estimate_p_value(result, 8, expected) > ALPHA, name
        assert estimate_p_value(result, 8, expected + 1.0) < 1e-4, name
        inside += result.lower <= expected <= result.upper
    assert inside >= 3


def test_event_shapes_of_any_rank() -> None:
    """An energy that is no WhitenedEnergy, x of shape (2, 2); false alarm ALPHA."""
    root = 0.5 * normal((5, 5), 8)
    curvature, linear = root @ root.T - 0.1 * torch.eye(5, dtype=torch.float64), normal((5,), 9)
    loc, scale = normal((2, 2), 10), 0.5 + normal((2, 2), 11).abs()
    zero = torch.zeros(1, dtype=torch.float64)
    ebm = LVEBM(
        PlainQuadratic(curvature, linear, 2),
        dist.Normal(loc, scale).to_event(2),
        dist.Normal(zero, 1.0).to_event(1),
        tempered(0),
    )
    # In whitened coordinates u = loc + Su, and the constant goes to log Z.
    s = torch.cat([scale.flatten(), torch.ones(1, dtype=torch.float64)])
    m = torch.cat([loc.flatten(), zero])
    precision = torch.eye(5, dtype=torch.float64) + s[:, None] * curvature * s
    shift = s * (curvature @ m + linear)
    constant = 0.5 * m @ curvature @ m + linear @ m
    expected = gaussian_log_partition(precision, shift) - float(constant)
    result = log_partition(ebm, seed=2, num_particles=256, num_runs=8, num_refreshes=20)
    assert estimate_p_value(result, 8, expected) > ALPHA
    assert estimate_p_value(result, 8, expected + float(constant)) < 1e-4


def test_an_untrained_energy_has_log_z_zero_exactly() -> None:
    x = normal((50, 3), 0, torch.float32)
    ebm = LVEBM.from_data(MLPEnergy(3, 2, hidden=(8,)), x, z_dim=2, pool=tempered(0))
    result = log_partition(ebm, seed=1, num_particles=16, num_runs=2, num_refreshes=1)
    assert result == LogPartition(0.0, 0.0, 0.0, 0.0, 1)
    assert str(result) == "log Z = 0.0000 ± 0.0000 in [0.0000, 0.0000]"


# --- reproducible, and nothing moves --------------------------------------------------------


def test_results_are_fixed_by_the_seed() -> None:
    ebm = make_quadratic(pool=tempered(0))
    first, again = (log_partition(ebm, seed=5, **CHEAP) for _ in range(2))
    assert first == again
    other = log_partition(ebm, seed=6, **CHEAP)
    assert other.estimate != first.estimate and other.upper != first.upper


def test_the_model_and_its_pool_stay_as_they_are() -> None:
    ebm = make_quadratic(pool=tempered(0))
    ebm.f.linear.requires_grad_(False)
    warm(ebm)
    with assert_unchanged(ebm):
        log_partition(ebm, seed=5, **CHEAP)
    assert ebm.pool_is_fresh()


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_particles", 1),
        ("num_particles", 0),
        ("num_runs", 1),
        ("num_moves", 0),
        ("relative_ess", 0.0),
        ("relative_ess", 1.0),
        ("relative_ess", -0.5),
        ("relative_ess", math.nan),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    ebm = make_quadratic(pool=tempered(0))
    with assert_unchanged(ebm), pytest.raises(ValueError, match=f"{name} must .*{value}"):
        log_partition(ebm, **{name: value})


class Broken(torch.nn.Module):
    """Finite at the mean of the bases, and NaN to the right of it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.scale * torch.where(x > 0.5, torch.nan, x).sum(-1) + z.sum(-1)


def test_nan_energy() -> None:
    one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    ebm = LVEBM(Broken(), one, one, tempered(0))
    with assert_unchanged(ebm), pytest.raises(ValueError, match="NaN"):
        log_partition(ebm, **CHEAP)
    assert all(p.requires_grad for p in ebm.parameters())


def test_an_energy_too_rough_for_the_pilot_run() -> None:
    one = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1)
    curvature = 1e6 * torch.eye(2, dtype=torch.float64)
    ebm = LVEBM(PlainQuadratic(curvature, normal((2,), 0), 1), one, one, tempered(0))
    with assert_unchanged(ebm), pytest.raises(RuntimeError, match="lower relative_ess"):
        log_partition(ebm, num_particles=64, num_moves=1, relative_ess=0.9999)
