# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inline_executor import Inline
from referee import ALPHA, gaussian_log_partition, mean_p_value, variance_p_value
from scipy import stats

from benchmarks import calibration
from benchmarks.calibration import (
    COLUMNS,
    FULL,
    QUICK,
    Effort,
    Problem,
    Repeats,
    Row,
    bracket_limits,
    bracket_row,
    by_kind,
    coverage_limits,
    coverage_row,
    covered,
    evidence_row,
    forward_row,
    hard_rows,
    heading,
    in_double,
    quadratic,
    quadratic_data,
    quadrature,
    repeat,
    rows_of,
    truth,
)
from benchmarks.tables import table
from pyro_lvebm import LVEBM, LogPartition, TemperedPool, log_partition

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# The function hides the module of its name in the package.
log_partition_module = sys.modules["pyro_lvebm.evidence.log_partition"]

TINY = Effort(48, 48, 6, 4, 64, 1, 64, 2, 30)


def small_pool() -> LVEBM:
    return quadratic(2, 4.0, TemperedPool(2, 32, num_moves=1))


SMALL = Problem("small", small_pool, 32)


def row(value: float, low: float = 0.9, high: float = 0.99) -> Row:
    return Row("kind", "problem", "what", value, low, high, 1.0)


def runs_of(count: int, num_runs: int, seed: int = 0) -> Repeats:
    """Estimates of log Z = 0 with the standard errors and brackets of normal runs."""
    runs = 0.1 * np.random.default_rng(seed).normal(size=(count, num_runs))
    error = runs.std(1, ddof=1) / math.sqrt(num_runs)
    t = stats.t.ppf(0.99, num_runs - 1)
    mean = runs.mean(1)
    return Repeats(mean, error, np.zeros(count), mean - t * error, mean + t * error, np.ones(count))


def interval_row(repeats: Repeats, num_runs: int, quick: bool, log_z: float = 0.0) -> Row:
    return rows_of("problem", log_z, repeats, num_runs, quick)[0]


# --- limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "short"),
    [
        (0.9, False),
        (0.95, False),
        (0.99, False),
        (0.899, True),
        (0.991, True),
        (math.nan, True),
        (math.inf, True),
    ],
)
def test_a_row_is_short_outside_its_limits(value: float, short: bool) -> None:
    assert row(value).short is short


def test_full_limits_are_those_of_the_band() -> None:
    assert coverage_limits(200, quick=False) == (0.90, 0.99)
    assert bracket_limits(200, quick=False) == (0.95, 1.0)


@pytest.mark.parametrize("count", [12, 30, 200, 1000])
def test_quick_limits_are_those_of_binomial_tests(count: int) -> None:
    law = stats.binom(count, 0.95)
    low, high = (round(count * limit) for limit in coverage_limits(count, quick=True))
    assert law.cdf(low - 1) <= 0.5e-3 < law.cdf(low)
    assert law.sf(high) <= 0.5e-3
    assert high == count or law.sf(high - 1) > 0.5e-3
    low, high = (round(count * limit) for limit in bracket_limits(count, quick=True))
    assert law.cdf(low - 1) <= 1e-3 < law.cdf(low)
    assert high == count


# --- intervals --------------------------------------------------------------------------------


def test_coverage_is_that_of_student() -> None:
    t = stats.t.ppf(0.975, 7)
    error = np.array([0.0, 0.99 * t, -0.99 * t, 1.01 * t, -1.01 * t, 1.0, math.nan, 1.0])
    std_error = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, math.nan])
    expected = [True, True, True, False, False, False, False, False]
    assert covered(error, std_error, 8).tolist() == expected
    # With fewer degrees of freedom the interval is wider.
    assert covered(error, std_error, 4).tolist()[3:5] == [True, True]


def test_a_coverage_row_counts() -> None:
    error = np.array([-1.0] * 10 + [1.0] * 8 + [5.0] * 2)
    result = coverage_row("coverage", "p", "w", error, np.ones(20), 8, False, 3.0, "more")
    assert result.value == 0.9
    assert not result.short
    assert "bias +0.40 ± 0.41 s.e.; rms error 1.8439, stated 1.0000; more" in result.note
    error[:1] = 5.0
    assert coverage_row("coverage", "p", "w", error, np.ones(20), 8, False, 3.0).short


@pytest.mark.parametrize("quick", [True, False])
def test_rows_pass_for_a_calibrated_estimator(quick: bool) -> None:
    rows = rows_of("problem", 0.0, runs_of(200, 8)._replace(forward=forwards(0.0)), 8, quick)
    assert [result.kind for result in rows] == ["coverage", "forward", "bracket"]
    assert not any(result.short for result in rows)


@pytest.mark.parametrize("quick", [True, False])
def test_rows_fall_short_for_a_broken_estimator(quick: bool) -> None:
    good = runs_of(200, 8)
    assert interval_row(good._replace(std_error=0.5 * good.std_error), 8, quick).short
    assert interval_row(good._replace(estimate=good.estimate + 2 * good.std_error), 8, quick).short
    assert interval_row(good._replace(std_error=10 * good.std_error), 8, quick=False).short
    assert interval_row(good, 8, quick, log_z=math.nan).short


def test_the_normal_quantile_would_cover_too_little() -> None:
    """With 4 runs ± 1.96 s.e. covers 85 %; the rows use Student's quantile."""
    repeats = runs_of(2000, 4)
    normal = np.mean(np.abs(repeats.estimate) < 1.96 * repeats.std_error)
    assert normal < 0.9 < covered(repeats.estimate, repeats.std_error, 4).mean()


# --- the forward estimate and brackets ----------------------------------------------------------


def forwards(shift: float) -> np.ndarray:
    """Log Ẑ of runs with E[Ẑ] = exp(shift)."""
    return 0.1 * np.random.default_rng(1).normal(size=200) - 0.005 + shift


def test_forward_row() -> None:
    result = forward_row("p", forwards(0.0), 1.0)
    assert not result.short
    assert "false-alarm rate 0.0006" in result.note
    ratio = np.exp(forwards(0.0))
    student = stats.ttest_1samp(ratio, 1.0)
    assert result.value == pytest.approx(student.statistic)
    assert forward_row("p", forwards(0.05), 1.0).short
    assert forward_row("p", forwards(-0.05), 1.0).short
    assert forward_row("p", np.zeros(20), 1.0).short


def test_bracket_row_counts_both_ends() -> None:
    repeats = runs_of(40, 8)._replace(lower=np.full(40, -1.0), upper=np.full(40, 1.0))
    assert bracket_row("p", 0.0, repeats, False, 1.0).value == 1.0
    repeats.lower[:1] = 0.5
    repeats.upper[1:2] = -0.5
    result = bracket_row("p", 0.0, repeats, False, 1.0)
    assert result.value == 0.95
    assert not result.short
    assert "1 lower ends too high, 1 upper too low" in result.note
    repeats.upper[2:3] = math.nan
    assert bracket_row("p", 0.0, repeats, False, 1.0).short
    assert not bracket_row("p", 0.0, repeats, True, 1.0).short


def test_ill_conditioned_rows() -> None:
    rows = hard_rows([(0.05, 0.02, 30.0), (-0.09, 0.02, 50.0)], quick=False)
    assert [result.value for result in rows] == [0.09, 50.0]
    assert not any(result.short for result in rows)
    assert hard_rows([(0.05, 0.02, 61.0)], quick=False)[1].short
    assert hard_rows([(-0.11, 0.02, 30.0)], quick=False)[0].short
    assert not hard_rows([(-0.11, 0.02, 30.0)], quick=True)[0].short
    assert hard_rows([(0.05, 0.02, 30.0), (math.nan, 0.02, 30.0)], quick=False)[0].short


# --- problems -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 3])
def test_quadrature_is_the_closed_form(dim: int) -> None:
    energy = in_double(quadratic(dim, 2.0))
    coarse, fine = (quadrature(energy, h, radius=9.0) for h in (0.5, 0.25))
    exact = gaussian_log_partition(energy.precision, energy.linear)
    assert fine == pytest.approx(exact, abs=1e-6)
    assert coarse == pytest.approx(exact, abs=1e-6)
    # A ball that is too small leaves mass out.
    assert quadrature(energy, 0.25, radius=2.0) < exact - 0.01


def test_truth() -> None:
    energy = in_double(quadratic(8, 30.0))
    eigenvalues = np.linalg.eigvalsh(energy.precision.numpy())
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(30.0, rel=1e-3)
    exact = gaussian_log_partition(energy.precision, energy.linear)
    assert truth(calibration.EVIDENCE) == pytest.approx(exact, abs=1e-9)
    network = calibration.PROBLEMS[-1]
    log_z = truth(network)
    assert 1.0 < log_z < 4.0
    with pytest.raises(RuntimeError, match=r"network, 2 \+ 1: quadrature gives"):
        truth(replace(network, spacing=1.5))


def test_data_follow_the_model() -> None:
    ebm = quadratic(8, 30.0)
    energy = in_double(ebm)
    covariance = torch.linalg.inv(energy.precision)[:6, :6]
    mean = -torch.linalg.solve(energy.precision, energy.linear)[:6]
    x = quadratic_data(ebm, 4000).double()
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (x - mean).T, upper=False
    ).T
    assert variance_p_value(white, 1.0) > ALPHA
    assert mean_p_value(white, 0.0) > ALPHA


# --- repeats of the real estimator ----------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Repeats:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log_partition_module, "_REFRESHES_PER_RUN", 2)
        return repeat(SMALL, range(48), TINY)


def test_the_estimator_is_calibrated(real: Repeats) -> None:
    rows = rows_of("small", truth(SMALL), real, TINY.num_runs, quick=True)
    assert not any(result.short for result in rows)
    assert len(set(real.estimate)) == 48


@pytest.mark.parametrize("fault", ["half", "shift"])
def test_a_broken_estimator_falls_short(real: Repeats, fault: str) -> None:
    """The estimator as it is, but half its standard error, or 2 standard errors too high."""
    done = iter(range(48))

    def broken(ebm: LVEBM, **settings: Any) -> Any:
        k = next(done)
        result = {name: float(values[k]) for name, values in real._asdict().items()}
        if fault == "half":
            result["std_error"] *= 0.5
        else:
            result["estimate"] += 2.0 * result["std_error"]
        return SimpleNamespace(**result)

    repeats = repeat(SMALL, range(48), TINY, broken)
    assert interval_row(repeats, TINY.num_runs, False, truth(SMALL)).short


def test_each_repeat_moves_its_own_copy_of_the_settled_pool() -> None:
    seen = []

    def spy(ebm: LVEBM, *, seed: int, **settings: Any) -> LogPartition:
        seen.append((seed, ebm.pool.seed, int(ebm.pool.refreshes), settings))
        return log_partition(ebm, seed=seed, **(settings | {"num_particles": 8, "num_runs": 2}))

    result = repeat(SMALL, [3, 4], TINY, spy)
    settings = {"num_particles": 32, "num_runs": 6, "num_refreshes": 4}
    assert seen == [(3, 4, 100, settings), (4, 5, 100, settings)]
    again = repeat(SMALL, [4], TINY, spy)
    assert again.estimate[0] == result.estimate[1]


def test_evidence_row() -> None:
    result = evidence_row(TINY, quick=True)
    assert (result.kind, result.short) == ("evidence", False)
    assert "30 rows" in result.what


# --- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_exit_status_is_1_if_a_row_falls_short(
    error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(calibration, "_SETTLING_REFRESHES", 5)
    monkeypatch.setattr(calibration, "QUICK", replace(TINY, repeats=4, chunk=3))
    monkeypatch.setattr(calibration, "QUICK_PROBLEMS", (SMALL,))
    monkeypatch.setattr(calibration, "hard_run", lambda seed, effort: (error, 0.02, 1.0))
    monkeypatch.setattr(calibration, "evidence_row", lambda effort, quick: row(0.95))
    assert calibration.main(["--quick", "--jobs", "1"]) == int(error > 0.0)
    printed = capsys.readouterr()
    assert "Student's t with num_runs − 1 degrees of freedom; 6 runs" in printed.out
    assert "binomial tests at false-alarm rate 0.001" in printed.out
    assert "interval of log Z, 4 seeds" in printed.out
    assert ("SHORT" in printed.out) is (error > 0.0)
    assert printed.err.startswith("small ")


def test_the_table_is_ordered_by_kind() -> None:
    rows = [replace(row(0.5), kind=kind) for kind in ("b", "a", "b")]
    lines = table(by_kind(rows), COLUMNS).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["b", "b", "a"]
    assert lines[1].count("SHORT") == 1
    assert "fixed limits" in heading(FULL, quick=False)


def test_quick_is_smaller() -> None:
    assert set(calibration.QUICK_PROBLEMS) < set(calibration.PROBLEMS)
    assert QUICK.repeats < FULL.repeats
    assert all(isinstance(problem.build, partial) for problem in calibration.PROBLEMS)
