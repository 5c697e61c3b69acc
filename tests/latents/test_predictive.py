# SPDX-License-Identifier: Apache-2.0
"""Draws without data, replicates, and what counts as data, as `to_arviz` exports them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, initialise, make_model, make_quadratic
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from referee import ALPHA, CERTAIN, mean_p_value, normal, variance_p_value
from scipy import stats
from small_models import exact_joint, rotations, warm, whitened
from torch import Tensor

from pyro_lvebm import LVEBM, TemperedPool, lvebm, to_arviz
from pyro_lvebm.latents import predictive as replicates

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return warm(make_quadratic(pool=TemperedPool(4, 512, seed=0)), 30)


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, 20, seed=1)


def of_guide(model: Any, *args: Any, **options: Any) -> Any:
    """Export of an untrained guide: what follows does not depend on it."""
    guide = AutoNormal(poutine.block(model, hide=["label"]))
    initialise(guide, *args)
    return to_arviz(guide, *args, model=model, **{"num_samples": 5} | options)


# --- the prior ------------------------------------------------------------------------------


def prior_p_value(idata: Any, ebm: LVEBM, shift: int = 0) -> float:
    """p-value that pairs (x, z) of one datum have the joint law of the model, by chi-square."""
    x, z = idata["prior_predictive"]["scene"], idata["prior"]["scene_z"].roll(draw=shift)
    pairs = torch.from_numpy(np.concatenate([x, z], -1)[0, :, 0])
    white = whitened(pairs, exact_joint(ebm)).detach()
    return min(1.0, 2.0 * min(variance_p_value(rotations(white), 1.0), mean_p_value(white, 0.0)))


def test_the_prior_is_joint_draws_of_the_model(ebm: LVEBM, x: Tensor) -> None:
    """150 pairs out of a pool of 2,048 chains, in minibatches of 8 rows. False alarm ALPHA.

    x of one draw beside z of another fail.
    """
    idata = of_guide(make_model(ebm, 8), x, num_prior=150, num_predictive=0)
    assert idata["prior"]["scene_z"].dims == ("chain", "draw", "data", "scene_z_dim_0")
    assert idata["prior"]["scene_z"].shape == (1, 150, 20, 2)
    assert idata["prior_predictive"]["scene"].shape == (1, 150, 20, 4)
    assert prior_p_value(idata, ebm) > ALPHA
    assert prior_p_value(idata, ebm, shift=1) < CERTAIN


def test_the_model_of_a_guide_is_not_held_at_its_first_values() -> None:
    """An autoguide's own model starts latents at values of the guide's choice."""

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(3.0, 2.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    guide = AutoNormal(model)
    initialise(guide, torch.zeros(()))
    idata = to_arviz(guide, torch.zeros(()), num_predictive=0, num_prior=300)
    w = (idata["prior"]["w"].to_numpy().reshape(-1, 1) - 3.0) / 2.0
    assert variance_p_value(w, 1.0) > ALPHA


def test_latents_of_all_data_are_one_draw_of_the_prior() -> None:
    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y), subsample_size=3) as i:
            pyro.sample("y", dist.Normal(w, 0.1), obs=y[i])

    idata = of_guide(model, torch.zeros(8), num_prior=40, num_predictive=0)
    w, y = idata["prior"]["w"], idata["prior_predictive"]["y"]
    assert w.shape == (1, 40) and y.shape == (1, 40, 8)
    residual = ((y - w) / 0.1).to_numpy()
    assert variance_p_value(residual.reshape(-1, 1), 1.0) > ALPHA


def test_chunks_of_draws_are_joined_in_order(
    ebm: LVEBM, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for 2 draws at a time, replicates still lie at their own draw of w."""
    monkeypatch.setattr(replicates, "_MAX_DRAWS", 40)

    def model(y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(1000.0 * w, 0.1), obs=y)

    idata = of_guide(model, torch.zeros(20), num_predictive=5, num_prior=5)
    for group, predictive in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        distance = idata[predictive]["y"] - 1000.0 * idata[group]["w"]
        assert idata[predictive]["y"].shape == (1, 5, 20) and float(abs(distance).max()) < 1.0


# --- replicates -----------------------------------------------------------------------------


def mixture(y: Tensor) -> None:
    """y ~ N(±5, 1) with a label of each datum; what w is does not matter."""
    pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        label = pyro.sample("label", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(10.0 * label - 5.0, 1.0), obs=y)


def test_labels_of_replicates_are_those_of_the_data() -> None:
    """y_rep ~ N(5 sign(y), 1) where the label is certain; prior labels would mix both signs.

    Kolmogorov's test; false alarm ALPHA.
    """
    y = torch.tensor([-5.0, 5.0]).repeat(30)
    idata = of_guide(mixture, y, num_predictive=5)
    replicate = idata["posterior_predictive"]["y"].to_numpy()[0]
    residual = (replicate - y.numpy()).reshape(-1)
    assert stats.kstest(residual, "norm").pvalue > ALPHA
    prior = of_guide(mixture, y, num_predictive=0, num_prior=5)
    assert "label" in prior["prior"]
    residual = (prior["prior_predictive"]["y"].to_numpy()[0] - y.numpy()).reshape(-1)
    assert stats.kstest(residual, "norm").pvalue < CERTAIN


# --- data -----------------------------------------------------------------------------------


def test_arguments_that_are_no_observed_data_are_constant(ebm: LVEBM, x: Tensor) -> None:
    t = normal((20, 3), 2)

    def model(x: Tensor, t: Tensor, *, y: Tensor, scale: float, name: str) -> None:
        with pyro.plate("data", len(x)):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal(z.sum(-1) + t.sum(-1), scale), obs=y)

    y = x[:, 0]
    guide = AutoNormal(model)
    initialise(lambda: guide(x, t, y=y, scale=0.5, name="a"))
    idata = to_arviz(
        guide, x, t, y=y, scale=0.5, name="a", num_predictive=0, dims={"t": ["data", "column"]}
    )
    constant = idata["constant_data"]
    assert set(constant.data_vars) == {"t", "scale"} and float(constant["scale"]) == 0.5
    assert constant["t"].dims == ("data", "column")
    np.testing.assert_array_equal(constant["t"], t)
    assert set(idata["observed_data"].data_vars) == {"scene", "y"}


def test_missing_entries_are_missing_in_the_data(ebm: LVEBM, x: Tensor) -> None:
    holes = x.clone()
    holes[3, 1] = torch.nan
    idata = of_guide(make_model(ebm), holes, num_predictive=0)
    np.testing.assert_array_equal(idata["observed_data"]["scene"], holes)
    assert "constant_data" not in idata


def test_what_latents_move_is_no_data(ebm: LVEBM, x: Tensor) -> None:
    def model(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x - shift)

    idata = of_guide(model, x, num_predictive=0)
    assert "observed_data" not in idata
    np.testing.assert_array_equal(idata["constant_data"]["x"], x)
