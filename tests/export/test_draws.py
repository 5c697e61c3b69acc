# SPDX-License-Identifier: Apache-2.0
"""Draws from guides and MCMC, as `to_arviz` exports them."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, full_covariance_guide, initialise, make_model, make_quadratic
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from referee import ALPHA, CERTAIN, mean_p_value, normal, variance_p_value
from small_models import rotations, whitened
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, Saddle, TemperedPool, lvebm, to_arviz

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(3, 16, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, 30, seed=1)


def export(source: Any, *args: Any, **options: Any) -> Any:
    return to_arviz(source, *args, num_predictive=0, **options)


# --- guides ---------------------------------------------------------------------------------


def guide_p_value(draws: np.ndarray, ebm: LVEBM, x: Tensor) -> float:
    """p-value that independent draws (1, S, N, 2) have the exact posterior, by chi-square tests."""
    white = whitened(torch.from_numpy(draws[0]), ebm.f.posterior(x))
    second = variance_p_value(rotations(white.detach()), 1.0)
    return min(1.0, 2.0 * min(second, mean_p_value(white.detach(), 0.0)))


@pytest.mark.parametrize("size", [None, 12])
def test_a_guide_gives_one_chain_of_its_own_draws(ebm: LVEBM, x: Tensor, size: int | None) -> None:
    """The full-covariance guide at the exact posterior, in minibatches too. False alarm ALPHA."""
    model = make_model(ebm, size)
    guide = full_covariance_guide(model, ebm, x)
    for source in (guide, SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())):
        draws = export(source, x, num_samples=60, seed=3)["posterior"]["scene_z"]
        assert draws.dims == ("chain", "draw", "data", "scene_z_dim_0")
        assert draws.shape == (1, 60, 30, 2)
        assert guide_p_value(draws.to_numpy(), ebm, x) > ALPHA
        assert guide_p_value(np.roll(draws.to_numpy(), 1, 2), ebm, x) < CERTAIN
    other = export(guide, x, num_samples=60, seed=4)["posterior"]["scene_z"]
    assert not np.array_equal(draws, other)


def test_a_function_as_a_guide_needs_its_model(ebm: LVEBM, x: Tensor) -> None:
    model = make_model(ebm)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("scene_z", dist.Normal(x[:, :2], 0.5).to_event(1))

    with pytest.raises(ValueError, match=r"function does not say which model.*give model="):
        export(guide, x)
    idata = export(guide, x, model=model, num_samples=200)
    draws = (idata["posterior"]["scene_z"].to_numpy()[0] - x[:, :2].numpy()) / 0.5
    assert variance_p_value(draws.reshape(-1, 1), 1.0) > ALPHA


def regression(x: Tensor, y: Tensor, size: int | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as i:
        b = pyro.sample("b", dist.Normal(w, 1.0))
        pyro.sample("y", dist.Normal(b * x[i], 1.0), obs=y[i])


def test_latents_of_all_data_are_one_draw_in_all_minibatches() -> None:
    """The guide draws b ~ N(100 w, 1): each b lies at the w of its own draw."""

    def guide(x: Tensor, y: Tensor, size: int | None) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=size):
            pyro.sample("b", dist.Normal(100.0 * w, 1.0))

    posterior = export(guide, normal((7,), 0), normal((7,), 1), 3, model=regression)["posterior"]
    assert posterior["w"].shape == (1, 100) and posterior["w"].dims == ("chain", "draw")
    assert posterior["b"].dims == ("chain", "draw", "data")
    distance = posterior["b"] - 100.0 * posterior["w"]
    assert float(abs(distance).max()) < 6.0 and float(abs(posterior["w"]).max()) > 1.0


def test_auxiliary_sites_of_guides_are_left_out() -> None:
    x, y = normal((5,), 0), normal((5,), 1)
    guide = AutoMultivariateNormal(regression)
    initialise(guide, x, y)
    assert set(export(guide, x, y)["posterior"]) == {"w", "b"}


def test_guides_beside_particles_are_held_for_each_chain(ebm: LVEBM, x: Tensor) -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=12) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal((z * w).sum(-1), 1.0), obs=x[i, 0])

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    guide.append(AutoParticles(poutine.block(model, hide=["w"]), 3))
    initialise(guide, x)
    saddle = Saddle(model, guide, Adam({"lr": 0.01}))
    posterior = export(saddle, x, num_samples=5, num_warmup=2)["posterior"]
    assert posterior["w"].dims == ("chain", "draw", "w_dim_0")
    w = posterior["w"].to_numpy()
    assert (w == w[:, :1]).all() and len(np.unique(w)) == 6
    assert posterior["scene_z"].shape == (3, 5, 30, 2)


def test_particles_without_their_saddle_are_refused(ebm: LVEBM, x: Tensor) -> None:
    guide = AutoParticles(make_model(ebm))
    with pytest.raises(ValueError, match="pass the Saddle that trained it"):
        export(guide, x)


def test_a_guide_of_other_latents_is_refused(x: Tensor) -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("other", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no site for any latent"):
        export(guide, x[:, 0], x[:, 1], model=regression)


# --- MCMC -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> tuple[MCMC, Tensor, Tensor]:
    x, y = normal((6,), 0), normal((6,), 1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mcmc = MCMC(NUTS(regression), num_samples=40, warmup_steps=30, disable_progbar=True)
        mcmc.run(x, y)
    return mcmc, x, y


def test_mcmc_gives_its_draws(run: tuple[MCMC, Tensor, Tensor]) -> None:
    mcmc, x, y = run
    idata = export(mcmc, x, y)
    samples = mcmc.get_samples(group_by_chain=True)
    for name in ("w", "b"):
        np.testing.assert_array_equal(idata["posterior"][name], samples[name])
    assert idata["posterior"]["b"].dims == ("chain", "draw", "data")
    flags = idata["sample_stats"]["diverging"]
    assert flags.dtype == bool and flags.shape == (1, 40)
    assert flags.sum() == len(mcmc.diagnostics()["divergences"]["chain 0"])
    thinned = export(mcmc, x, y, num_samples=5, thinning=3)["posterior"]["w"]
    np.testing.assert_array_equal(thinned, samples["w"][:, ::3][:, -5:])


def test_divergences_stand_where_they_happened(
    run: tuple[MCMC, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    mcmc, x, y = run
    monkeypatch.setattr(mcmc, "diagnostics", lambda: {"divergences": {"chain 0": [3, 39]}})
    flags = export(mcmc, x, y)["sample_stats"]["diverging"].to_numpy()
    assert np.flatnonzero(flags[0]).tolist() == [3, 39]
    flags = export(mcmc, x, y, thinning=3, num_samples=4)["sample_stats"]["diverging"].to_numpy()
    assert np.flatnonzero(flags[0]).tolist() == [3]  # of draws 30, 33, 36, 39


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 41}, r"num_samples must lie in 1 … 40, the thinned draws.*got 41"),
        ({"num_samples": 0}, r"num_samples must lie in 1 … 40.*got 0"),
        ({"thinning": 0}, "thinning must be at least 1; got 0"),
    ],
)
def test_impossible_parts_of_a_run_are_refused(
    run: tuple[MCMC, Tensor, Tensor], options: dict[str, int], message: str
) -> None:
    mcmc, x, y = run
    with pytest.raises(ValueError, match=message):
        export(mcmc, x, y, **options)


def test_a_run_on_other_data_is_refused(run: tuple[MCMC, Tensor, Tensor]) -> None:
    mcmc, x, y = run
    with pytest.raises(ValueError, match=r"'b' of shape \(6,\), and the model has \(4,\)"):
        export(mcmc, x[:4], y[:4])

    def other(x: Tensor, y: Tensor) -> None:
        pyro.sample("c", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"no draws of the latents \['c'\]"):
        export(mcmc, x, y, model=other)


# --- az.summary on the oracle ---------------------------------------------------------------


def summary_z(idata: Any, ebm: LVEBM, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(mean − exact) / MCSE and (sd − exact) / MCSE of every latent, by `az.summary`."""
    summary = az.summary(idata, var_names=["scene_z"], kind="all", round_to="none")
    posterior = ebm.f.posterior(x)
    mean = posterior.mean.detach().numpy().reshape(-1)
    sd = posterior.stddev.detach().expand(len(x), -1).numpy().reshape(-1)
    found = {name: summary[name].to_numpy().astype(float) for name in summary}
    return (
        (found["mean"] - mean) / found["mcse_mean"],
        (found["sd"] - sd) / found["mcse_sd"],
    )


def beyond(z: np.ndarray) -> int:
    return int((np.abs(z) > 3.5).sum())


def test_summary_is_exact_within_mcse(ebm: LVEBM, x: Tensor) -> None:
    """60 means and 60 sds of 4 chains of 300 draws.

    MCSE is itself an estimate from correlated draws, and a z-value beyond 3.5 has a probability
    of at most 0.5 % (nominally 0.05 %). 5 or more of 120 then have a probability of 3e-4 by the
    binomial law: the false-alarm rate. Draws 20 % too wide, or moved by a fifth of an sd, fail.
    """
    model = make_model(ebm, 12)
    guide = AutoParticles(model, 4)
    initialise(guide, x)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}), seed=2)
    idata = export(saddle, x, num_samples=300, num_warmup=150, thinning=4)
    means, sds = summary_z(idata, ebm, x)
    assert beyond(means) + beyond(sds) < 5
    posterior = idata["posterior"]
    centre = posterior["scene_z"].mean(("chain", "draw"))
    wide = idata.copy()
    wide["posterior"]["scene_z"] = centre + 1.2 * (posterior["scene_z"] - centre)
    assert beyond(summary_z(wide, ebm, x)[1]) > 30
    aside = idata.copy()
    aside["posterior"]["scene_z"] = posterior["scene_z"] + 0.2 * posterior["scene_z"].std()
    assert beyond(summary_z(aside, ebm, x)[0]) > 30
