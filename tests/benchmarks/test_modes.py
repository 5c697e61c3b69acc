# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inline_executor import Inline
from referee import plane_grid
from torch import Tensor, nn

from benchmarks import modes
from benchmarks.modes import MIXTURES, Mixture, Result, Run, exact, log_c, plane, runs_of
from pyro_lvebm import LVEBM, MixtureBase
from pyro_lvebm.bases import GaussianBase


def test_the_laws_are_normalised_and_drawn_from() -> None:
    law = plane(0.1, 6.0, 0.5)
    points, cell = plane_grid(12.0, 401)
    assert float(law.log_prob(points).exp().sum() * cell) == pytest.approx(1.0, abs=1e-6)
    x = law.draw(20000, np.random.default_rng(1))
    rare = (x.sum(1) > 6.0).double().mean().item()
    assert abs(rare - 0.1) < 4 * math.sqrt(0.09 / 20000) + 1e-3
    assert x[x.sum(1) > 6.0].std(0).mean().item() == pytest.approx(0.5, abs=0.05)
    assert len({m.name for m in MIXTURES}) == len(MIXTURES)


class Tilt(nn.Module):
    """f = ½ z², less log 4 at the far mode, whose weight rises by that factor."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(x.sum(-1) > 5.0, -math.log(4.0), 0.0) + 0.5 * z[..., 0].square()


def tilted(law: Mixture) -> LVEBM:
    means, scales = torch.tensor(law.centres), torch.tensor(law.scales)
    base = MixtureBase(
        GaussianBase(torch.zeros(2), torch.ones(2)),
        torch.tensor(law.shares).log(),
        means,
        scales[:, None, None] * torch.eye(2),
    )
    return LVEBM(Tilt(), base, GaussianBase(torch.zeros(1), torch.ones(1)))


def test_exact_values_are_those_of_a_closed_form() -> None:
    """log Z = log (1 + 3 s) − ½ log 2, and log C(x) = log base(x) − f − ½ log 2."""
    law = plane(0.05, 9.0)
    ebm = tilted(law)
    log_z, share = exact(ebm, law, np.random.default_rng(2))
    assert log_z == pytest.approx(math.log(1.15) - 0.5 * math.log(2.0), abs=0.01)
    assert share[1].item() == pytest.approx(0.2 / 1.15, abs=0.01)
    x = torch.tensor([[0.0, 0.0], [6.5, 6.5]])
    expected = law.log_prob(x) + torch.tensor([0.0, math.log(4.0)]) - 0.5 * math.log(2.0)
    torch.testing.assert_close(log_c(ebm, x).float(), expected, atol=1e-4, rtol=0)


GOOD = Result(0.05, 2.0, 0.01, 0.002, True, 0.1, 3, 10.0)


@pytest.mark.parametrize(
    "change",
    [{"log_z_error": 0.11}, {"share_z": 3.1}, {"loss": 0.03}, {"loss": math.nan}, {"held": False}],
)
def test_a_run_fails_where_a_goal_is_missed(change: dict[str, float]) -> None:
    assert not GOOD.failed and replace(GOOD, **change).failed


def test_the_sweep_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Run] = []

    def fit(run: Run, num_steps: int) -> Result:
        seen.append(run)
        return replace(GOOD, loss=0.1) if run.rate == 1e-2 else GOOD

    monkeypatch.setattr(modes, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(modes, "fit", fit)
    file = tmp_path / "modes.jsonl"
    options = ["--seeds", "0", "--only", "10-D", "--results", str(file), "--steps", "8"]
    assert modes.main(options) == 1
    assert len(seen) == 16 == len(file.read_text().splitlines())
    assert "failed" in capsys.readouterr().out
    modes.main(options)
    assert len(seen) == 16
    assert len(list(runs_of(True, range(5)))) == 1
