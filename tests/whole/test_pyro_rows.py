# SPDX-License-Identifier: Apache-2.0
"""Data of another size than a guide was made for."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from linear_gaussian import draw_x, make_quadratic
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, ClippedAdam
from referee import ALPHA, CERTAIN, mean_p_value
from small_models import (
    classifier,
    data_of,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
    whitened,
)

from pyro_lvebm import (
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    Saddle,
    lvebm,
)


def adam() -> ClippedAdam:
    return ClippedAdam({"lr": 1e-2})


# --- data of another size ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [AutoParticles, AutoPerDatumMultivariateNormal])
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("rows", [6, 20])
def test_guides_with_rows_refuse_other_data(make: Any, size: int | None, rows: int) -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm, size), data_of(ebm, 12)
    guide = make(model)
    saddle = Saddle(model, guide, adam())
    saddle.step(x)
    new = data_of(ebm, rows, seed=1)
    before = snapshot(guide), snapshot(ebm)
    message = f"made for 12 rows of plate 'data', and these arguments give the plate {rows}"
    for call in (saddle.step, saddle.evaluate_loss, Predictive(model, guide=guide, num_samples=1)):
        with pytest.raises(ValueError, match=message):
            call(new)
    assert same(before[0], snapshot(guide)) and same(before[1], snapshot(ebm))
    saddle.step(x)


def test_the_number_of_rows_may_be_a_plain_argument() -> None:
    ebm = quadratic_ebm()

    def model(count: int) -> None:
        with pyro.plate("data", count):
            lvebm("scene", ebm)

    guide = AutoParticles(model)
    guide(5)
    with pytest.raises(ValueError, match="give the plate 6"):
        guide(6)
    assert guide(5)["scene_z"].shape == (5, 2)


@pytest.mark.usefixtures("global_rng_untouched")
def test_saddle_refuses_other_data_for_pyros_guides_too() -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 12)
    saddle = Saddle(model, AutoNormal(model), adam())
    saddle.step(x)
    before = snapshot(ebm)
    with pytest.raises(ValueError, match="'data' has 12 rows in the guide and 20 in the model"):
        saddle.step(data_of(ebm, 20))
    assert same(before, snapshot(ebm))


@pytest.mark.parametrize("size", [None, 4])
def test_amortised_guides_take_any_number_of_rows(size: int | None) -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm, size), data_of(ebm, 12)
    guide = AutoAmortisedNormal(model, hidden=(4,))
    guide(x)
    encoder = snapshot(guide.encoder)
    for rows in (6, 20, 12):
        new = data_of(ebm, rows, seed=1)
        with poutine.trace() as seen:
            z = guide(new)["scene_z"]
        i = seen.trace.nodes["data"]["value"]
        assert len(z) == (size or rows) and int(i.max()) < rows
        mean = seen.trace.nodes["scene_z"]["fn"].mean
        torch.testing.assert_close(mean, guide.encode(new[i]).mean)
        Saddle(model, guide, SGD({"lr": 0.0})).step(new)
    assert same(encoder, snapshot(guide.encoder))


def new_data_p_value() -> float:
    """p-value of fresh chains for 40 new data, each datum's mean a replicate, signed by its own."""
    ebm = warm(make_quadratic(pool=tiny_pool()), 3)
    model = plate_model(ebm)
    Saddle(model, AutoParticles(model), SGD({"lr": 0.0})).step(draw_x(ebm, 10, 1))
    x = draw_x(ebm, 40, 2)
    before = snapshot(ebm)
    fresh = Saddle(model, AutoParticles(model), SGD({"lr": 0.0}))
    draws = fresh.sample_posterior(x, num_samples=40, num_warmup=150)["scene_z"]
    assert draws.shape == (4, 40, 40, 2) and same(before, snapshot(ebm))
    law = exact_posterior(ebm, x)
    error = whitened(draws[:, -1:].mean((0, 1))[None], law).reshape(40, 2)
    side = (law.mean - law.mean.mean(0)).sign()
    return mean_p_value(error * side, 0.0)


def test_fresh_chains_give_the_posterior_of_new_data() -> None:
    """Student's test. False alarms: 1e-3."""
    assert new_data_p_value() > ALPHA


def test_new_data_check_fails_without_moves() -> None:
    ebm = warm(make_quadratic(pool=tiny_pool()), 3)
    x, model = draw_x(ebm, 40, 2), plate_model(ebm)
    guide = AutoParticles(model, 64)
    guide(x)
    law = exact_posterior(ebm, x)
    error = whitened(guide.particles("scene_z").mean(0)[None], law).reshape(40, 2)
    assert mean_p_value(error * (law.mean - law.mean.mean(0)).sign(), 0.0) < CERTAIN


def test_predictive_on_new_data_takes_the_draws_of_fresh_chains() -> None:
    ebm = quadratic_ebm()
    model, x = classifier(ebm), data_of(ebm, 7)
    saddle = Saddle(model, AutoParticles(poutine.block(model, hide=["y"])), adam())
    draws = saddle.sample_posterior(x, torch.zeros(7), num_samples=5, num_warmup=5)["scene_z"]
    samples = {"scene_z": draws.flatten(0, 1)}
    for parallel in (False, True):
        out = Predictive(model, posterior_samples=samples, parallel=parallel)(x)
        assert out["y"].shape == (20, 7)
