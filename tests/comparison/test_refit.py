# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from linear_gaussian import draw_x, make_model, make_quadratic
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from referee import bracket
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, ElboTable, Saddle, TemperedPool, compare_elbo
from pyro_lvebm.evidence import programs as model_evidence

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(autouse=True)
def exact_log_z(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form in place of annealing, which is not what these tests are about."""

    def exact(ebm: LVEBM, **_: Any) -> Any:
        return bracket(float(ebm.f.log_partition().detach()))

    monkeypatch.setattr(model_evidence, "log_partition", exact)


def parts() -> tuple[LVEBM, Callable[..., Any], Tensor, Tensor]:
    pyro.clear_param_store()
    ebm = make_quadratic(pool=TemperedPool(4, 32, num_moves=2, seed=0))
    x = 0.7 * draw_x(ebm, 90, seed=1) + 0.5  # from another model, so that there is much to learn
    return ebm, make_model(ebm, 40), x[:60], x[60:]


def builder(
    model: Callable[..., Any], guide: Callable[..., Any], lr: float = 0.02
) -> Callable[[], Saddle]:
    return lambda: Saddle(model, guide(model), Adam({"lr": lr}), num_moves=2)


def state(ebm: LVEBM) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in ebm.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0.0, atol=0.0, equal_nan=True)


def test_every_fit_starts_from_the_same_place_and_leaves_no_trace() -> None:
    """The same builder twice gives the same row to the last digit, and the model is put back."""
    ebm, model, x, held_out = parts()
    before = state(ebm)
    rows = {
        "first": builder(model, AutoNormal),
        "particles": builder(model, lambda m: AutoParticles(m, 2)),
        "second": builder(model, AutoNormal),
    }
    table = compare_elbo(
        model, rows, x, theta="refit", num_steps=8, held_out=(held_out,), num_samples=8
    )
    after = state(ebm)
    same(before, after)
    numbers = table.rows.drop(columns="seconds")
    np.testing.assert_array_equal(numbers.loc["first"], numbers.loc["second"])
    assert numbers.loc["particles", "elbo"] != numbers.loc["first", "elbo"]
    assert table.rows["held_out"].is_monotonic_decreasing
    assert list(table.rows.columns[:2]) == ["held_out", "held_out_se"]
    assert math.isnan(table.log_evidence) and table.theta == "refit" and table.num_data == 60
    assert len(table.log_partitions) == 3 and "θ refitted for each row" in str(table)
    difference = table.differences("first").loc["second"]
    assert difference["difference"] == 0.0 and difference["std_error"] == 0.0


def test_held_out_values_are_the_closed_form_of_each_fit() -> None:
    """Of the θ that the builder's own fit ends with, run by itself."""
    ebm, model, x, held_out = parts()
    rows = {"mean field": builder(model, AutoNormal)}
    table = compare_elbo(
        model, rows, x, theta="refit", num_steps=20, held_out=(held_out,), num_samples=8
    )
    pyro.clear_param_store()
    rows["mean field"]().fit(x, num_steps=20, progress=False)
    exact = ebm.f.log_evidence(held_out).detach()
    row = table.rows.loc["mean field"]
    assert row["held_out"] == pytest.approx(float(exact.mean()), abs=0.02)
    assert row["held_out_se"] == pytest.approx(float(exact.std()) / math.sqrt(30), rel=0.05)
    # The start is not where the fit ends, so a table of the start would be wrong.
    fresh = parts()[0].f.log_evidence(held_out).detach()
    assert abs(float(fresh.mean()) - row["held_out"]) > 0.03


def test_differences_of_refits_have_the_errors_of_both_log_z() -> None:
    """And that over the data, which are paired: a shift common to all of them has none."""
    held_out = torch.linspace(-1.0, 1.0, 9)[None].double()
    noise = 0.5 * torch.tensor([[-1.0, 1.0, 0.0] * 3]).double()
    terms = {"first": held_out, "shifted": held_out - 0.25, "noisy": held_out + noise}
    frame = pd.DataFrame({"held_out": {n: float(t.mean()) for n, t in terms.items()}})
    errors = {"first": 0.3, "shifted": 0.4, "noisy": 0.0}
    table = ElboTable(frame, "refit", math.nan, math.nan, [], 9, terms, errors)
    found = table.differences("first")
    assert found.loc["shifted"].tolist() == pytest.approx([-0.25, 0.5])
    spread = float(noise.std()) / 3.0
    assert found.loc["noisy"].tolist() == pytest.approx([0.0, math.hypot(spread, 0.3)])


def test_an_error_puts_the_model_back_at_once() -> None:
    """Even while someone holds the error, and with it the frames it came through."""
    ebm, model, x, held_out = parts()
    before = state(ebm)
    rows = {"mean field": builder(model, AutoNormal)}
    with pytest.raises(ValueError, match="infinite") as held:
        compare_elbo(model, rows, x, theta="refit", num_steps=3, held_out=(held_out * math.inf,))
    same(before, state(ebm))
    assert held.value.__traceback__ is not None


def test_only_builders_of_new_saddles() -> None:
    ebm, model, x, held_out = parts()
    before = state(ebm)
    trained = builder(model, AutoNormal)()
    trained.fit(x, num_steps=1, progress=False)
    after = state(ebm)
    for wrong in (trained, lambda: AutoNormal(model), lambda: trained):
        with pytest.raises(ValueError, match="must be a function that returns a new Saddle"):
            compare_elbo(model, {"row": wrong}, x, theta="refit", num_steps=2, held_out=(held_out,))
    same(after, state(ebm))
    assert not torch.equal(before["f.linear"], after["f.linear"])
