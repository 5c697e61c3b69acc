# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inline_executor import Inline

from benchmarks import priors
from benchmarks.priors import Result, Size, digits, make_decoder

GOOD = Result(0, -17.3, -17.1, 0.2, 0.05, 1.6, 0.03, 60.0)


def test_rows_are_binary_and_split_once() -> None:
    parts = digits(1797, 3)
    assert [len(part) for part in parts] == [1257, 180, 360]
    whole = torch.cat(parts)
    assert set(whole.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(whole.sum(0), torch.cat(digits(1797, 4)).sum(0))
    assert not torch.equal(parts[2], digits(1797, 4)[2])


def test_a_decoder_starts_near_the_mean_and_alike_every_time() -> None:
    x = digits(300, 0)[0]
    logits = make_decoder(x, 1)(torch.zeros(1, priors.Z_DIM))
    assert (logits.sigmoid()[0] - x.mean(0)).abs().mean() < 0.1
    assert torch.equal(logits, make_decoder(x, 1)(torch.zeros(1, priors.Z_DIM)))


@pytest.mark.parametrize("change", [{"difference": 0.09}, {"difference": math.nan}])
def test_a_run_fails_where_the_prior_does_not_pay(change: dict[str, float]) -> None:
    assert not GOOD.failed and replace(GOOD, **change).failed


def test_runs_go_on_where_they_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []

    def run(seed: int, size: Size) -> Result:
        seen.append(seed)
        return replace(GOOD, seed=seed, difference=0.05 * seed)

    monkeypatch.setattr(priors, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(priors, "run", run)
    options = ["--results", str(tmp_path / "priors.jsonl"), "--seeds", "3", "4"]
    assert priors.main(options) == 0
    assert priors.main([*options, "1"]) == 1
    assert seen == [3, 4, 1] and "difference" in capsys.readouterr().out
    assert priors.main(["--quick"]) == 0
