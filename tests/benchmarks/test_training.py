# SPDX-License-Identifier: Apache-2.0
"""The rows of `make bench-training`: what counts as falling short, and how steps are chosen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from inline_executor import Inline
from small_models import quadratic_ebm
from torch import Tensor

from benchmarks import training
from benchmarks.suite import DataSet
from benchmarks.training import (
    FULL,
    Row,
    best_step,
    half_cosine_factors,
    main,
    quadrature,
    rate_rows,
    sweep,
    tasks,
)
from pyro_lvebm.training.fit import half_cosine


def row(value: float, goal: float) -> Row:
    return Row("suite", "a set", "what", value, 0.1, goal, 1.0)


@pytest.mark.parametrize(
    ("value", "goal", "short"),
    [
        (-0.01, -0.02, False),
        (-0.02, -0.02, False),
        (-0.03, -0.02, True),
        (0.0, 0.0, False),
        (math.nan, -0.02, True),
        (-math.inf, -0.02, True),
        (-5.0, math.nan, False),
    ],
)
def test_a_row_falls_short_of_its_goal(value: float, goal: float, short: bool) -> None:
    assert row(value, goal).short is short


def runs_of(name: str, finals: dict[float, list[float]], loss: float) -> dict[Any, Any]:
    """Runs by (name, rate, seed), of which those of the first seed end `loss` below their best."""
    return {
        (name, rate, seed): (value + (loss if seed == 0 else 0.0), value, 10.0)
        for rate, values in finals.items()
        for seed, value in enumerate(values)
    }


def test_rates_are_judged_by_loss_and_by_the_spread_of_their_means() -> None:
    """Means −1.0, −1.02 and −1.15: a spread of 0.15 nats, and a worst loss of 0.05."""
    finals = {1e-3: [-0.9, -1.1], 3e-3: [-1.02, -1.02], 1e-2: [-1.2, -1.1]}
    loss, spread = rate_rows(runs_of("two moons", finals, 0.05), quick=False)
    assert loss.value == pytest.approx(-0.05) and loss.what.endswith("worst of 6")
    assert spread.value == pytest.approx(-0.15)
    assert not loss.short and spread.short and (loss.goal, spread.goal) == (-0.1, -0.1)
    close = finals | {1e-2: [-1.05, -1.1]}
    loss, spread = rate_rows(runs_of("two moons", close, 0.2), quick=False)
    assert loss.short and not spread.short


def test_a_diverged_run_falls_short() -> None:
    finals = {1e-3: [-1.0], 1e-2: [-math.inf]}
    loss, spread = rate_rows(runs_of("Lorenz-63", finals, 0.0), quick=False)
    assert spread.short
    assert loss.short  # NaN: it never had a finite value
    fine = {("Lorenz-63", 1e-3, 0): (-1.0, -1.0, 1.0)}
    loss, _ = rate_rows(fine | {("Lorenz-63", 1e-2, 0): (-1.0, -math.inf, 1.0)}, quick=False)
    assert loss.short


def test_the_spread_has_no_goal_on_digits_nor_in_a_quick_run() -> None:
    finals = {1e-3: [-60.0], 1e-2: [-50.0]}
    for name, quick in (("digits", False), ("two moons", True)):
        loss, spread = rate_rows(runs_of(name, finals, 0.3), quick=quick)
        assert not spread.short and loss.short


@pytest.mark.parametrize("seed", [0, 3])
def test_quadrature_is_the_closed_form(seed: int) -> None:
    """Of a Gaussian model in three dimensions, in double precision."""
    ebm = quadratic_ebm(2, 1, seed=seed)
    exact = float(ebm.f.log_partition().detach())
    assert abs(exact) > 0.01
    assert quadrature(ebm, half_width=9.0, points=121) == pytest.approx(exact, abs=1e-4)
    with pytest.raises(AssertionError):
        assert quadrature(ebm, half_width=1.0, points=41) == pytest.approx(exact, abs=1e-4)


def test_quadrature_at_the_pool_is_that_of_its_theta() -> None:
    ebm = quadratic_ebm(2, 1)
    ebm.pool.refresh(ebm)
    ebm.mark_pool(fresh=True)
    before = quadrature(ebm, points=41)
    with torch.no_grad():
        ebm.f.linear += 0.3
    theta = [p.detach().clone() for p in ebm.f.parameters()]
    assert quadrature(ebm, points=41) != before
    # `online_row` needs its own half width and points, which do for models near their base.
    assert training._quadrature_at_pool(ebm) == pytest.approx(before, abs=0.05)
    assert all(torch.equal(p, q) for p, q in zip(ebm.f.parameters(), theta, strict=True))


def test_the_factors_are_those_of_the_default_schedule() -> None:
    factors = half_cosine_factors(10)
    assert factors.tolist() == [half_cosine(t / 10) for t in range(10)]


class ScriptedFit:
    """Stands for a `Saddle`: its fit leaves this held-out curve, and how it was called."""

    def __init__(self, curve: dict[int, float]) -> None:
        self.history = pd.DataFrame({"log_evidence": pd.Series(curve)})
        self.fitted = self.held_out = 0

    def fit(self, x: Tensor, *, held_out: tuple[Tensor], **options: Any) -> None:
        self.fitted, self.held_out = len(x), len(held_out[0])


def chosen(
    monkeypatch: pytest.MonkeyPatch, rows: int, curves: list[dict[int, float]]
) -> tuple[int, list[ScriptedFit]]:
    """The step that is chosen for so many rows, and the fits that were made."""
    fits = [ScriptedFit(curve) for curve in curves]
    remaining = iter(fits)
    monkeypatch.setattr(training, "build", lambda *args: (None, next(remaining)))
    x = np.random.default_rng(0).normal(size=(rows, 2))
    step = best_step(DataSet("a set", x, x[:5], 1, False), FULL, 0)
    return step, [fit for fit in fits if fit.fitted]


def test_steps_of_a_large_set_come_from_two_smoothed_curves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A single high evaluation is not chosen; the middle of a high stretch is, on average."""
    values = [-9.0, -9.0, -2.0, -9.0, -9.0, -4.0, -3.5, -3.0, -3.5, -4.0, -9.0, -9.0]
    curve = {100 * k: value for k, value in enumerate(values)}
    step, fits = chosen(monkeypatch, 2000, [curve, curve])
    assert step == 700
    assert [(fit.fitted, fit.held_out) for fit in fits] == [(1600, 400)] * 2
    # One part whose rows say nothing, or the opposite by a little, is overruled by the other.
    flat = {step: -5.0 + step / 1e4 for step in curve}
    assert chosen(monkeypatch, 2000, [flat, curve])[0] == 700
    assert chosen(monkeypatch, 2000, [flat, flat])[0] == 1100
    # A last evaluation that is high by chance does not make later steps look good.
    stopped = {step: -3.0 + (step == 800) for step in curve if step <= 800}
    falling = {step: -5.0 - step / 1e4 for step in curve}
    assert chosen(monkeypatch, 2000, [stopped, falling])[0] == 800


def test_steps_of_a_small_set_come_from_the_mean_of_five_splits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A split that stopped early keeps its last value."""
    long = {0: -5.0, 25: -4.0, 50: -3.0, 75: -2.0}
    early = {0: -1.0, 25: -0.5, 50: -4.0}
    step, fits = chosen(monkeypatch, 200, [long, early, early, early, early])
    assert step == 25
    assert [(fit.fitted, fit.held_out) for fit in fits] == [(160, 40)] * 5
    step, _ = chosen(monkeypatch, 200, [long] * 4 + [early])
    assert step == 75


def test_every_kind_of_row_is_there() -> None:
    names = [t.func.__name__ for t in tasks(FULL, False, ("suite", "online"))]
    assert names.count("suite_row") == 8 and names.count("online_row") == 3
    assert [t.func.__name__ for t in tasks(FULL, True, ("online",))] == ["online_row"]


def test_rates_are_all_of_four_sets_or_the_ends_on_one() -> None:
    assert len(sweep(False)) == 4 * 4 and sweep(False, ["wine", "digits"]) == [
        ("digits", rate) for rate in (3e-4, 1e-3, 3e-3, 1e-2)
    ]
    assert sweep(True) == [("two moons", 3e-4), ("two moons", 1e-2)]
    assert sweep(True, ["digits"]) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], training.NAMES),
        (["--quick"], training.QUICK_SETS),
        (["--quick", "--data", "wine"], ("wine",)),
    ],
)
def test_sets_of_the_suite(
    arguments: list[str],
    expected: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[str] = []

    def fitted(name: str, effort: training.Effort, quick: bool, seed: int) -> Row:
        seen.append(name)
        return row(0.0, -0.02)

    monkeypatch.setattr(training, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(training, "suite_row", fitted)
    main(["--rows", "suite", *arguments])
    assert sorted(seen) == sorted(expected)


def test_the_first_seed_is_that_of_the_rows_with_one_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def fitted(name: str, effort: training.Effort, quick: bool, seed: int) -> Row:
        seen.append(seed)
        return row(0.0, -0.02)

    monkeypatch.setattr(training, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(training, "suite_row", fitted)
    main(["--rows", "suite", "--data", "wine"])
    main(["--rows", "suite", "--data", "wine", "--seeds", "3", "4"])
    assert seen == [0, 3]


@pytest.mark.parametrize(("value", "status"), [(-0.01, 0), (-0.03, 1)])
def test_the_exit_status_is_one_where_a_row_falls_short(
    value: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(training, "suite_row", lambda *args: row(value, -0.02))
    assert main(["--rows", "suite", "--data", "two moons"]) == status
    printed = capsys.readouterr().out
    assert ("SHORT" in printed) == bool(status) and "a set" in printed


def test_a_model_of_the_suite_has_default_settings() -> None:
    """Nothing is tuned for one set: only the dimensions differ."""
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    data = DataSet("a set", x.numpy(), x.numpy(), 1, False)
    ebm, saddle = training.build(data, x, 3e-3, 0)
    assert ebm.pool.num_levels == 8 and ebm.pool.num_chains == 128 and ebm.pool.num_moves == 8
    assert saddle.max_kl is None and saddle.num_moves == 8 and saddle.average_decay == 0.99
    assert saddle.penalties == () and ebm.f.kl_penalty == 8.0 * 3
