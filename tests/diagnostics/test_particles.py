# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.optim import ClippedAdam
from scipy import stats
from small_models import data_of, plate_model, quadratic_ebm

from pyro_lvebm import AutoParticles, ParticleDiagnostics, Saddle, particle_diagnostics, to_arviz


def autoregressive(shape: tuple[int, ...], correlation: float, seed: int = 0) -> np.ndarray:
    """Stationary chains along axis 1 with standard normal margins."""
    noise = np.random.default_rng(seed).normal(size=shape)
    values = [noise[:, 0]]
    for k in range(1, shape[1]):
        values.append(correlation * values[-1] + np.sqrt(1.0 - correlation**2) * noise[:, k])
    return np.stack(values, 1)


def chains(seed: int = 0, correlation: float = 0.5) -> np.ndarray:
    """(4, 100, 60, 2): 60 data with two latents, all converged."""
    return autoregressive((4, 100, 60, 2), correlation, seed)


# --- R-hat ------------------------------------------------------------------------------------


def test_data_whose_chains_disagree_are_named_worst_first() -> None:
    """In location, in scale with the same mean, and in location of a law without a mean."""
    z = chains()
    z[0, :, 17, 1] += 2.0
    z[1, :, 42] *= 6.0
    cauchy = np.random.default_rng(1).standard_cauchy((4, 100, 2))
    z[:, :, 5], z[:, :, 6] = cauchy, cauchy
    z[2, :, 6] += 10.0
    result = particle_diagnostics({"z": z}, max_rhat=1.1)
    assert set(result.failing) == {6, 17, 42}
    rhat = result.frame.set_index(["latent", "datum"])["rhat"]
    assert rhat["z[1]", 17] > 1.1 > rhat["z[0]", 17]
    worst = result.frame.groupby("datum")["rhat"].max()[result.failing]
    assert worst.is_monotonic_decreasing
    named = ", ".join(str(i) for i in result.failing)
    assert f"3 of 60 data have R-hat > 1.1: indices {named}; the smallest bulk ESS" in str(result)


def classic_rhat(z: np.ndarray) -> np.ndarray:
    """Of Gelman and Rubin (1992), which sees means only."""
    within, between = z.var(1, ddof=1).mean(0), z.mean(1).var(0, ddof=1)
    return np.sqrt(1.0 - 1.0 / z.shape[1] + between / within)


def test_the_classic_statistic_would_miss_scales() -> None:
    z = chains()
    z[1, :, 42] *= 6.0
    assert classic_rhat(z)[42].max() < 1.1


def test_split_halves_show_a_trend_that_all_chains_share() -> None:
    z = chains()
    z[:, :, 3] += np.linspace(0.0, 4.0, 100)[:, None]
    assert particle_diagnostics({"z": z}, max_rhat=1.2).failing == [3]
    assert classic_rhat(z)[3].max() < 1.1


def test_values_are_those_of_arviz_entry_by_entry() -> None:
    import arviz as az

    z = chains()[:, :, :3]
    frame = particle_diagnostics({"z": z}).frame
    for row in frame.itertuples():
        entry = z[:, :, row.datum, int(row.latent[2])]
        assert row.rhat == pytest.approx(float(az.rhat(entry)))
        assert row.ess_bulk == pytest.approx(float(az.ess(entry, method="bulk")))
        tail = az.ess(entry, method="tail", prob=(0.05, 0.95))
        assert row.ess_tail == pytest.approx(float(tail))


# --- ESS --------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
def test_bulk_ess_is_that_of_autoregressive_chains(correlation: float) -> None:
    """N (1 − ρ) / (1 + ρ), within 10 % in the median over 400 latents of 4 × 400 draws."""
    z = autoregressive((4, 400, 400, 1), correlation)
    result = particle_diagnostics({"z": z})
    exact = 1600 * (1.0 - correlation) / (1.0 + correlation)
    assert result.frame["ess_bulk"].median() == pytest.approx(exact, rel=0.1)
    assert result.frame["ess_tail"].median() > 0.7 * exact


# --- what is accepted -------------------------------------------------------------------------


def test_entries_that_never_move_have_none() -> None:
    z = chains()
    z[:, :, 7, 0] = 3.0
    result = particle_diagnostics({"z": z}, max_rhat=1.2)
    row = result.frame.query("datum == 7 and latent == 'z[0]'")
    assert row[["rhat", "ess_bulk", "ess_tail"]].isna().all(axis=None)
    assert "R-hat is at most 1.2 for all 60 data" in result.verdict
    assert result.verdict.endswith("; 1 entries never move and have no R-hat")


def test_chains_stuck_at_different_places_fail() -> None:
    z = chains()
    z[:, :, 7] = np.arange(4.0)[:, None, None]
    result = particle_diagnostics({"z": z}, max_rhat=1.2)
    assert result.failing == [7] and result.frame["rhat"].max() > 100.0


def test_shapes_of_events_and_several_latents() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50, 5)), rng.normal(size=(2, 50, 5, 2, 2))
    draws = {"a": torch.from_numpy(a), "b": b}
    frame = particle_diagnostics(draws).frame
    assert frame["latent"].unique().tolist() == ["a", "b[0, 0]", "b[0, 1]", "b[1, 0]", "b[1, 1]"]
    assert frame.groupby("latent").size().tolist() == [5] * 5
    assert (frame.groupby("latent")["datum"].max() == 4).all()


def test_many_failures_are_not_all_named() -> None:
    z = chains()
    z[0] += 3.0
    text = particle_diagnostics({"z": z}).verdict
    assert text.startswith("60 of 60 data have R-hat > 1.05: indices ")
    assert len(re.findall(r"\d+, ", text)) == 10 and ", …;" in text


@pytest.fixture(scope="module")
def trained() -> tuple[Saddle, torch.Tensor]:
    pyro.clear_param_store()
    ebm = quadratic_ebm(3, 2, dtype=torch.float32)
    x = data_of(ebm, 12)
    model = plate_model(ebm)
    saddle = Saddle(model, AutoParticles(model, num_particles=4), ClippedAdam({"lr": 1e-4}))
    saddle.fit(x, num_steps=2, progress=False)
    return saddle, x


def test_draws_of_a_saddle_and_its_export_agree(trained: tuple[Saddle, torch.Tensor]) -> None:
    """Particles of a linear-Gaussian model converge; those of one datum are then set apart."""
    saddle, x = trained
    samples = saddle.sample_posterior(x, num_samples=100, num_warmup=100, thinning=3)
    exported = to_arviz(saddle, x, num_samples=100, num_warmup=100, thinning=3)
    a, b = particle_diagnostics(samples, max_rhat=1.15), particle_diagnostics(exported)
    np.testing.assert_allclose(a.frame["rhat"], b.frame["rhat"], rtol=1e-6)
    assert a.frame[["latent", "datum"]].equals(b.frame[["latent", "datum"]])
    assert a.frame["latent"].unique().tolist() == ["scene_z[0]", "scene_z[1]"]
    assert a.failing == []
    samples["scene_z"][0, :, 4] += 5.0
    assert particle_diagnostics(samples, max_rhat=1.15).failing == [4]


def test_latents_outside_plates_belong_to_datum_zero() -> None:
    import arviz as az

    rng = np.random.default_rng(0)
    draws = {"w": rng.normal(size=(2, 50, 3)), "s": rng.normal(size=(2, 50, 4, 6, 2))}
    dims = {"w": ["w_dim_0"], "s": ["rows", "columns", "s_dim_0"]}
    if int(az.__version__.split(".")[0]) >= 1:
        idata = az.from_dict({"posterior": draws}, dims=dims)
    else:
        idata = az.from_dict(posterior=draws, dims=dims)
    frame = particle_diagnostics(idata).frame
    w, s = frame[frame["latent"].str.startswith("w")], frame[frame["latent"].str.startswith("s")]
    assert w["latent"].tolist() == ["w[0]", "w[1]", "w[2]"] and (w["datum"] == 0).all()
    assert s["datum"].max() == 23 and s["latent"].nunique() == 2


@pytest.mark.parametrize(
    ("draws", "message"),
    [
        ({"z": np.zeros((1, 50, 2))}, "'z' has 1 chains of 50 draws; R-hat needs two chains"),
        ({"z": np.zeros((4, 3, 2))}, "'z' has 4 chains of 3 draws"),
        ({"z": np.zeros((4, 50))}, r"shape \(4, 50\); expected \(chain, draw, datum, \*event\)"),
        ({"z": np.full((4, 50, 2), np.nan)}, "draws of 'z' are NaN or infinite"),
        ({}, "no draws to diagnose"),
        (SimpleNamespace(), "what to_arviz returns or a mapping .*; got SimpleNamespace"),
    ],
)
def test_wrong_draws_are_refused(draws: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        particle_diagnostics(draws)


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_rhat must exceed 1; got 1.0"):
        particle_diagnostics({"z": chains()}, max_rhat=1.0)


def test_false_alarms_grow_with_the_number_of_data() -> None:
    """A handful of failures among many data proves nothing: 240 converged data, 4 × 25 draws."""
    z = np.concatenate([chains(seed)[:, :25] for seed in range(4)], axis=2)
    result: ParticleDiagnostics = particle_diagnostics({"z": z})
    assert 1 <= len(result.failing)
    assert stats.binom.sf(len(result.failing) - 1, 240, 1e-3) < 1e-6
