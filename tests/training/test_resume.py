# SPDX-License-Identifier: Apache-2.0
"""A fit that was broken off goes on, to the bit as if it had not been."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam
from small_models import data_of, plate_model, quadratic_ebm, same, snapshot
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_lvebm import AutoParticles, PersistentPool, Saddle, TemperedPool, lvebm
from pyro_lvebm.training import saddle as saddle_room

pytestmark = pytest.mark.usefixtures("brief_settling", "cheap_evidence")


@pytest.fixture
def cheap_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out evidence by few particles, at log Z of the pool: what counts is that it repeats."""
    real = saddle_room.model_log_evidence

    def cheap(sweep: Any, **_: int) -> Any:
        return real(sweep, num_particles=2, num_runs=2)

    monkeypatch.setattr(saddle_room, "model_log_evidence", cheap)
    monkeypatch.setattr(saddle_room, "missed_log_z", lambda sweep, ebm: 0.0)


Penalty = Callable[..., Tensor]


def nothing(ebm: Any) -> Tensor:
    return 0.0 * ebm.f.linear.sum()


def make(path: Path | None, guide: str = "particles", penalty: Penalty = nothing) -> Saddle:
    """A Saddle as a script makes one at its start: from the file, if there is one."""
    pyro.clear_param_store()
    tempered = guide == "particles"
    pool = TemperedPool(2, 12, num_moves=1) if tempered else PersistentPool(12, num_moves=1)
    ebm = quadratic_ebm(2, 1, pool=pool)
    model = plate_model(ebm, 4)
    torch.manual_seed(3)
    parts = model, AutoParticles(model, 1) if tempered else AutoNormal(model)
    optim = ClippedAdam({"lr": 0.02, "lrd": 0.9}) if tempered else Adam({"lr": 0.02})
    if path is not None and path.exists():
        return Saddle.load(path, *parts, optim, X, penalties=(penalty,))
    return Saddle(*parts, optim, num_moves=1, seed=5, penalties=(penalty,))


X = data_of(quadratic_ebm(2, 1), 8)


def fit(saddle: Saddle, path: Path | None = None, **options: Any) -> list[float]:
    known = {"num_steps": 9, "held_out": (X[:4],), "evaluate_every": 3, "every": 2}
    known |= {"progress": False, "resume": path is not None, "checkpoint": path}
    return saddle.fit(*([] if "batches" in options else [X]), **{**known, **options})


def end_of(saddle: Saddle, losses: list[float]) -> tuple[Any, ...]:
    modules = snapshot(saddle.ebms[0]), snapshot(saddle.guide)
    with saddle.averaged():
        averages = snapshot(saddle.ebms[0])
    return losses, modules, averages, saddle.history, saddle.step_count


def assert_same_end(a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    assert a[0] == b[0] and a[4] == b[4]
    assert all(map(same, a[1], b[1])) and same(a[2], b[2])
    pd.testing.assert_frame_equal(a[3], b[3], check_exact=True)


@cache
def uninterrupted(guide: str = "particles", **options: Any) -> tuple[Any, ...]:
    saddle = make(None, guide)
    return end_of(saddle, fit(saddle, **options))


class Interrupts:
    """A penalty, or another function, that is interrupted at one call."""

    def __init__(self, at: int) -> None:
        self.count, self.at = 0, at

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt
        return nothing(*args)


@pytest.mark.parametrize(("guide", "at"), [("particles", 2), ("particles", 8), ("AutoNormal", 4)])
def test_an_interrupted_fit_goes_on_to_the_bit(guide: str, at: int, tmp_path: Path) -> None:
    """The file is that of the last whole step, while the process goes to its averages."""
    path = tmp_path / "run"
    broken = make(path, guide, Interrupts(at))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, path)
    assert broken.step_count == at - 1
    resumed = make(path, guide)
    assert resumed.step_count == at - 1
    losses = fit(resumed, path)
    assert_same_end(end_of(resumed, losses), uninterrupted(guide))


@pytest.mark.parametrize("held_out", [None, (X[:4],)])
def test_an_interrupt_between_two_steps_and_one_in_an_evaluation(
    held_out: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def schedule(progress: float) -> float:
        if progress == 4 / 9 and not broken_off:
            broken_off.append(True)
            raise KeyboardInterrupt
        return 1.0 - progress

    path, broken_off = tmp_path / "run", [True]
    options = {"schedule": schedule, "held_out": held_out}
    saddle = make(None)
    expected = end_of(saddle, fit(saddle, **options))
    broken_off.clear()
    saddle = make(path)
    with pytest.raises(KeyboardInterrupt):
        fit(saddle, path, **options)
    if held_out is not None:
        saddle = make(path)
        with monkeypatch.context() as patch:
            patch.setattr(saddle, "log_evidence", Interrupts(1))
            with pytest.raises(KeyboardInterrupt):
                fit(saddle, path, **options)
        assert saddle.step_count == 6
    saddle = make(path)
    assert_same_end(end_of(saddle, fit(saddle, path, **options)), expected)


def test_batches_go_on_where_they_were(tmp_path: Path) -> None:
    rows = TensorDataset(X, torch.arange(8))
    batches = DataLoader(rows, batch_size=3)

    def create_plates(x: Tensor, ids: Tensor) -> Any:
        return pyro.plate("data", 8, subsample=ids)

    def make_rows(penalty: Penalty = nothing) -> Saddle:
        pyro.clear_param_store()
        ebm = quadratic_ebm(2, 1, pool=PersistentPool(12, num_moves=1))

        def model(x: Tensor, ids: Tensor) -> None:
            with pyro.plate("data", 8, subsample=ids):
                lvebm("scene", ebm, obs=x)

        parts = model, AutoParticles(model, 1, create_plates=create_plates), Adam({"lr": 0.02})
        if path.exists():
            return Saddle.load(path, *parts, X[:3], torch.arange(3), penalties=(penalty,))
        return Saddle(*parts, num_moves=1, penalties=(penalty,))

    path = tmp_path / "run"
    options: dict[str, Any] = {"batches": batches, "held_out": None}
    saddle = make_rows()
    expected = end_of(saddle, fit(saddle, **options))
    with pytest.raises(KeyboardInterrupt):
        fit(make_rows(Interrupts(5)), path, **options)
    saddle = make_rows()
    assert_same_end(end_of(saddle, fit(saddle, path, **options)), expected)


def test_patience_is_not_given_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations get worse; the fit stops at the same one, and at the best averages."""

    def worse(saddle: Saddle) -> Any:
        return lambda *args, **kwargs: (-float(saddle.step_count), 0.1)

    def run(path: Path | None, penalty: Penalty = nothing) -> tuple[Any, ...]:
        saddle = make(path, penalty=penalty)
        monkeypatch.setattr(saddle, "log_evidence", worse(saddle))
        return end_of(saddle, fit(saddle, path, evaluate_every=2, patience=2))

    expected = run(None)
    assert expected[4] == 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupts(4))
    assert_same_end(run(tmp_path / "run"), expected)


def test_saving_changes_nothing_and_a_fit_that_has_ended_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, saved = tmp_path / "run", []
    saddle = make(path)
    save = saddle.save

    def counted(to: Any) -> None:
        saved.append(saddle.step_count)
        save(to)

    monkeypatch.setattr(saddle, "save", counted)
    losses = fit(saddle, path)
    expected = uninterrupted()
    assert saved == [2, 4, 6, 8, 9, 9]
    assert_same_end(end_of(saddle, losses), expected)
    again = make(path)
    assert fit(again, path) == losses
    assert_same_end(end_of(again, losses), expected)
    again.step(X)
    with pytest.raises(ValueError, match="the fit ended after step 9, and now 10 have been taken"):
        fit(again, path)
    assert len(fit(again, path, resume=False)) == 9 and again.step_count == 19


def test_a_fit_goes_on_with_the_arguments_it_began_with(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(make(path, penalty=Interrupts(4)), path)
    saddle = make(path)
    before = snapshot(saddle.ebms[0])
    with pytest.raises(ValueError, match="num_steps is 12, and was 9; held_out is False, and was"):
        fit(saddle, path, num_steps=12, held_out=None)
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        fit(saddle, path, every=0)
    assert same(before, snapshot(saddle.ebms[0])) and saddle.step_count == 3
    plain = make(None)
    plain.step(X)
    with pytest.raises(ValueError, match="there is no fit to go on with: this Saddle has taken 1"):
        fit(plain, path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.5, None])
def test_a_schedule_that_is_not_finite_is_refused_before_the_step(bad: Any) -> None:
    saddle = make(None)
    saddle.step(X)
    before = snapshot(saddle.ebms[0])
    with pytest.raises(ValueError, match=rf"schedule\(0\) returned {bad}; expected a finite"):
        fit(saddle, held_out=None, schedule=lambda progress: bad)
    assert same(before, snapshot(saddle.ebms[0])) and saddle.step_count == 1


# --- processes that are killed --------------------------------------------------------------


def fork_a_fit(path: Path, num_steps: int) -> int:
    """Start the script in a process of its own; return its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fit(make(path), path, num_steps=num_steps, evaluate_every=20)
            status = 0
        finally:
            os._exit(status)
    return pid


def killed_fit(path: Path, num_steps: int, kills: int, draw: np.random.Generator) -> Iterator[int]:
    """Kill a fit so many times, at any moment, and let it end; yield steps that each one saved."""
    before = 0
    for _ in range(kills):
        pid = fork_a_fit(path, num_steps)
        start = path.stat().st_mtime_ns if path.exists() else 0
        while not path.exists() or path.stat().st_mtime_ns == start:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the fit ended before it was killed"
            time.sleep(0.001)
        time.sleep(float(draw.uniform(0.0, 0.04)))
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        now = make(path).step_count
        assert now > before
        before = now
        yield now
    assert os.waitpid(fork_a_fit(path, num_steps), 0)[1] == 0


def check_killed(tmp_path: Path, num_steps: int, kills: int, seed: int) -> None:
    path = tmp_path / "run"
    saved = list(killed_fit(path, num_steps, kills, np.random.default_rng(seed)))
    assert len(saved) == kills and all(k % 2 == 0 for k in saved)
    saddle = make(path)
    assert saddle.step_count == num_steps
    options = {"num_steps": num_steps, "evaluate_every": 20}
    losses = fit(saddle, path, **options)
    assert_same_end(end_of(saddle, losses), uninterrupted(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_fit_goes_on_to_the_bit(tmp_path: Path) -> None:
    check_killed(tmp_path, num_steps=30, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fit_that_is_killed_twenty_times_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Slow: kills fall anywhere in a fit that is long enough for twenty of them."""
    check_killed(tmp_path, num_steps=400, kills=20, seed=1)
