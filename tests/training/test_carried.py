# SPDX-License-Identifier: Apache-2.0
"""A long fit ends with what the latents carry."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import Adam
from referee import normal
from small_models import exact_joint, quadratic_ebm, tiny_pool
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    EnergyPrior,
    MLPEnergy,
    Saddle,
    ZeroEnergy,
    energy_prior,
    lvebm,
    mutual_information,
)
from pyro_lvebm.validation import TrainingWarning

saddle_room: Any = import_module("pyro_lvebm.training.saddle")

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

STEPS = 4


def model_of(ebm: LVEBM, size: int | None = None) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            lvebm("s", ebm, obs=x[i])

    return model


def saddle_of(ebm: LVEBM, size: int | None = None, lr: float = 1e-3) -> Saddle:
    pyro.clear_param_store()
    model = model_of(ebm, size)
    return Saddle(model, AutoParticles(model), Adam({"lr": lr}), num_moves=1, seed=3)


def free_form(x: Tensor) -> LVEBM:
    """An energy that has learnt nothing yet, so that the posterior is the prior."""
    return LVEBM.from_data(MLPEnergy(2, 1, (8,)), x, z_dim=1, base="gaussian", pool=tiny_pool())


@pytest.fixture
def short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saddle_room, "LONG_FIT", STEPS)


@pytest.mark.usefixtures("short_is_long")
@pytest.mark.parametrize("size", [None, 20])
def test_latents_that_carry_nothing_are_named(
    size: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    x = normal((150, 2), 0).float()
    saddle = saddle_of(free_form(x), size)
    with pytest.warns(TrainingWarning, match="the latents carry next to nothing"):
        saddle.fit(x, num_steps=STEPS, description="moons")
    last = saddle.history.iloc[-1]
    assert abs(last["mutual_information"]) < 0.05 and 0 <= last["mutual_information_se"] < 0.05
    assert saddle.history["mutual_information"].notna().sum() == 1
    assert "moons: I(x; z) = " in capsys.readouterr().err


@pytest.mark.usefixtures("short_is_long")
def test_latents_that_carry_the_data_are_welcome(capsys: pytest.CaptureFixture[str]) -> None:
    a = normal((1, 4), 1).float()
    x = normal((200, 1), 2).float() @ a + 0.1 * normal((200, 4), 3).float()
    ebm = LVEBM.from_data(ZeroEnergy(4, 1), x, z_dim=1, generator="linear", pool=tiny_pool())
    saddle = saddle_of(ebm)
    saddle.fit(x, num_steps=STEPS, progress=False)  # warnings are errors
    last = saddle.history.iloc[-1]
    careful = mutual_information(ebm, x, num_rows=200)
    assert careful.value > 1.0
    error = 3.0 * (careful.std_error + last["mutual_information_se"])
    assert abs(last["mutual_information"] - careful.value) < error
    assert "I(x; z)" not in capsys.readouterr().err


@pytest.mark.usefixtures("short_is_long")
def test_an_energy_prior_is_looked_at_through_its_likelihood() -> None:
    y = normal((60, 3), 4).float()
    weak = 0.01 * normal((1, 3), 5).float()
    prior = EnergyPrior(MLPEnergy(1, hidden=(8,)), z_dim=1, pool=tiny_pool())

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = energy_prior("z", prior)
            pyro.sample("y", dist.Normal(z @ weak, 1.0).to_event(1), obs=y)

    pyro.clear_param_store()
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}), num_moves=1)
    with pytest.warns(TrainingWarning, match="next to nothing"):
        saddle.fit(y, num_steps=STEPS, progress=False)


@pytest.mark.parametrize("ended", [True, False])
def test_looking_takes_no_random_numbers_of_others(
    monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    x = normal((40, 2), 0).float()
    losses = []
    for long in (STEPS, 1_000):
        monkeypatch.setattr(saddle_room, "LONG_FIT", long)
        saddle = saddle_of(free_form(x), 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TrainingWarning)
            first = saddle.fit(x, num_steps=STEPS, progress=False)
        assert ("mutual_information" in saddle.history) is (long == STEPS)
        then = saddle.fit(x, num_steps=2, progress=False) if ended else [saddle.step(x)]
        losses.append([*first, *then])
    assert losses[0] == losses[1]


def test_short_fits_and_other_guides_are_left_alone() -> None:
    x = normal((40, 2), 0).float()
    saddle = saddle_of(free_form(x))
    saddle.fit(x, num_steps=2, progress=False)
    assert "mutual_information" not in saddle.history


def test_of_a_saddle_it_is_that_of_its_averages() -> None:
    ebm = quadratic_ebm(2, 1, seed=5)
    joint = exact_joint(ebm)
    c = joint.covariance_matrix
    exact = 0.5 * float(torch.logdet(c[:2, :2]) + torch.logdet(c[2:, 2:]) - torch.logdet(c))
    x = (joint.loc + normal((150, 3), 6) @ joint.scale_tril.T)[:, :2]
    saddle = saddle_of(ebm, lr=1e-9)
    saddle.step(x)
    for rows in (150, 100):  # all, and some at random
        low, high = mutual_information(saddle, x, num_rows=rows, num_draws=8).interval
        assert low <= exact <= high and high - low < exact
    average = {p: p.detach().clone() for p in ebm.parameters()}
    with torch.no_grad():
        ebm.f.linear.add_(3.0)
        for p in ebm.parameters():
            p.mul_(0.0).add_(torch.eye(len(p)) if p.dim() == 2 else 0.0)
    assert mutual_information(saddle, x, num_rows=100, num_draws=8).interval == (low, high)
    assert not all(torch.equal(p, average[p]) for p in ebm.parameters())


def test_a_model_whose_latents_lie_apart_has_none() -> None:
    ebm = quadratic_ebm(2, 1)

    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            lvebm("s", ebm, obs=x - shift)

    pyro.clear_param_store()
    x = normal((10, 2), 0)
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}), num_moves=1)
    saddle.step(x)
    with pytest.raises(ValueError, match="latents all lie in the same plates"):
        mutual_information(saddle, x)
