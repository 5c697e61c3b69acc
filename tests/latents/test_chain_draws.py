# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam
from referee import (
    ALPHA,
    CERTAIN,
    assert_global_rng_untouched,
    ks_p_value,
    mean_p_value,
    normal,
    variance_p_value,
)
from small_models import (
    data_of,
    exact_joint,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    rotations,
    same,
    snapshot,
    warm,
    whitened,
)
from torch import Tensor

from pyro_lvebm import MALA, ULA, AutoParticles, Saddle, lvebm
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.sampling.langevin import Kernel, LangevinState, ValueAndGrad


def saddle_for(model: Callable[..., Any], count: int = 2, **settings: Any) -> Saddle:
    return Saddle(model, AutoParticles(model, count), Adam({"lr": 0.01}), **settings)


# --- shapes and state -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [None, 4, 10])
def test_draws_are_chains_times_draws_times_data(count: int, size: int | None) -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 10)
    saddle = saddle_for(plate_model(ebm, size), count)
    draws = saddle.draw_posterior(x, num_samples=5, num_warmup=3, thinning=2)
    assert set(draws.samples) == {"scene_z"}
    assert draws.samples["scene_z"].shape == (count, 5, 10, 2)
    assert set(draws.sample_stats) >= {"energy", "acceptance_rate"}
    assert all(v.shape[:3] == (count, 5, 10) for v in draws.sample_stats.values())
    rate = draws.sample_stats["acceptance_rate"]
    assert (rate >= 0).all() and (rate <= 1).all()
    again = saddle.sample_posterior(x, num_samples=5, num_warmup=3, thinning=2)
    assert torch.equal(again["scene_z"], draws.samples["scene_z"])


@pytest.mark.parametrize("size", [None, 4])
def test_the_energies_are_those_of_the_draws(size: int | None) -> None:
    """-log p(x, z) of every draw, with the pool's log Z."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 10)
    saddle = saddle_for(plate_model(ebm, size), 2)
    draws = saddle.draw_posterior(x, num_samples=4, num_warmup=5)
    z = draws.samples["scene_z"]
    error = ebm.log_partition - ebm.f.log_partition().detach()
    log_p = exact_joint(ebm).log_prob(torch.cat([x.expand(2, 4, 10, 3), z], -1)).detach() - error
    torch.testing.assert_close(draws.sample_stats["energy"], -log_p)


@pytest.mark.parametrize("size", [None, 4])
def test_drawing_changes_nothing(size: int | None) -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 10)
    saddle = saddle_for(plate_model(ebm, size), 3)
    saddle.step(x)
    before = snapshot(ebm), snapshot(saddle.particles), saddle.step_count
    with assert_global_rng_untouched():
        saddle.sample_posterior(x, num_samples=3, num_warmup=3)
    assert same(before[0], snapshot(ebm)) and same(before[1], snapshot(saddle.particles))
    assert saddle.step_count == before[2]
    assert all(p.requires_grad for p in ebm.parameters())
    assert not ebm.pool_is_fresh()  # the next step still refreshes it


def test_drawing_between_steps_leaves_training_as_it_was() -> None:
    results = []
    for draw in (False, True):
        pyro.clear_param_store()
        ebm = quadratic_ebm()
        x = data_of(ebm, 10)
        saddle = saddle_for(plate_model(ebm, 4), 2)
        losses = []
        for _ in range(3):
            losses.append(saddle.step(x))
            if draw:
                saddle.sample_posterior(x, num_samples=1, num_warmup=1)
        results.append((losses, snapshot(ebm), snapshot(saddle.particles)))
    (a, theta, z), (b, phi, v) = results
    assert a == b and same(theta, phi) and same(z, v)


def test_the_seed_of_the_saddle_fixes_the_draws() -> None:
    draws = []
    for seed in (1, 1, 2):
        ebm = warm(quadratic_ebm(), 2)
        saddle = saddle_for(plate_model(ebm, 4), 2, seed=seed)
        draws.append(saddle.sample_posterior(data_of(ebm, 10), num_samples=2, num_warmup=2))
    assert torch.equal(draws[0]["scene_z"], draws[1]["scene_z"])
    assert not torch.equal(draws[0]["scene_z"], draws[2]["scene_z"])


def test_minibatches_do_not_share_their_noise() -> None:
    """Two data alike in everything but their minibatch get draws of their own."""
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 1).expand(4, 3).clone()
    saddle = saddle_for(plate_model(ebm, 2), 1)
    saddle.sample_posterior(x, num_samples=1, num_warmup=0)
    particles = saddle.particles.particles("scene_z")
    saddle.particles.write(
        "scene_z", {"data": torch.arange(4)}, particles[:, :1].expand(1, 4, 2).clone()
    )
    z = saddle.sample_posterior(x, num_samples=3, num_warmup=2)["scene_z"]
    assert len(z[0, -1].unique(dim=0)) == 4


# --- the exact posterior --------------------------------------------------------------------


def posterior_p_value(
    *,
    kernel: Kernel | None = None,
    num_warmup: int = 80,
    size: int | None = 64,
    shuffle: bool = False,
    dtype: torch.dtype = torch.float64,
) -> float:
    """p-value that one draw of each of 2 particles of 200 data has the exact posterior's law.

    Chains of different particles and data never meet, so whitened draws are 400 independent
    N(0, I): chi-square tests of their second moments in all directions, and of their means.
    """
    ebm = warm(quadratic_ebm(3, 2, seed=11, dtype=dtype), 3)
    x = 3.0 * data_of(ebm, 200)
    saddle = saddle_for(plate_model(ebm, size), 2, kernel=kernel, seed=5)
    z = saddle.sample_posterior(x, num_samples=1, num_warmup=num_warmup)["scene_z"][:, 0]
    white = whitened(z.roll(1, 1) if shuffle else z, exact_posterior(ebm, x))
    assert white.shape == (400, 2)
    second = variance_p_value(rotations(white), 1.0)
    return min(1.0, 2.0 * min(second, mean_p_value(white, 0.0)))


@pytest.mark.parametrize("kernel", [MALA(), MALA(0.8)])
@pytest.mark.parametrize(("size", "dtype"), [(None, torch.float64), (64, torch.float32)])
def test_particles_follow_the_exact_posterior(
    kernel: MALA, size: int | None, dtype: torch.dtype
) -> None:
    """False alarms: 1e-3 a case."""
    assert posterior_p_value(kernel=kernel, size=size, dtype=dtype) > ALPHA


class Warmer(MALA):
    """An exact kernel for another target, f at a lower inverse temperature."""

    def step(
        self, f: ValueAndGrad, state: LangevinState, step_size: Any, **options: Any
    ) -> tuple[LangevinState, Tensor]:
        return super().step(f, state, step_size, **options, inverse_temperature=0.6)


@pytest.mark.parametrize(
    "broken",
    [
        {"num_warmup": 0},
        {"kernel": Warmer()},
        {"kernel": ULA(0.3)},
        {"shuffle": True},
    ],
)
def test_posterior_check_fails(broken: dict[str, Any]) -> None:
    """For particles at their start, at another temperature, of large ULA steps, of other data."""
    assert posterior_p_value(**broken) < CERTAIN


def test_later_draws_of_a_chain_follow_the_posterior_too() -> None:
    """Chain averages of 100 data as replicates; Student's test. False alarms: 1e-3."""
    ebm = warm(quadratic_ebm(3, 2, seed=11), 3)
    x = data_of(ebm, 100)
    saddle = saddle_for(plate_model(ebm), 1, seed=6)
    z = saddle.sample_posterior(x, num_samples=40, num_warmup=60, thinning=2)["scene_z"][0]
    white = whitened(z, exact_posterior(ebm, x)).reshape(40, 100, 2)
    second = (rotations(white.flatten(0, 1)) ** 2).reshape(40, 100, -1)
    replicates = torch.cat([white.mean(0), second.mean(0)], -1)
    expected = [0.0] * 2 + [1.0] * (replicates.shape[1] - 2)
    assert mean_p_value(replicates, expected) > ALPHA
    assert mean_p_value(replicates, [0.0] * 2 + [1.3] * (len(expected) - 2)) < CERTAIN


def test_thinned_draws_are_every_other_one() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 6)
    saddle = saddle_for(plate_model(ebm), 1)
    every = saddle.sample_posterior(x, num_samples=6, num_warmup=4)["scene_z"]
    third = saddle.sample_posterior(x, num_samples=2, num_warmup=4, thinning=3)["scene_z"]
    assert torch.equal(third, every[:, [2, 5]])


# --- other models ---------------------------------------------------------------------------


def gamma_p_value(shape: float) -> float:
    """p-value of z | y in z ~ Gamma(2, 1.5), y ~ N(z, 0.5), for 600 data by quadrature.

    One draw of each datum, at its own posterior distribution function, is uniform.
    """
    y = 0.2 + 4.0 * torch.rand(600, generator=torch.Generator().manual_seed(0))

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y), subsample_size=250) as i:
            z = pyro.sample("z", dist.Gamma(shape, 1.5))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])

    saddle = saddle_for(model, 1, seed=4)
    z = saddle.sample_posterior(y, num_samples=1, num_warmup=120)["z"].reshape(600)
    assert (z > 0).all()
    grid = torch.linspace(1e-6, 12.0, 4001, dtype=torch.float64)
    log_p = dist.Gamma(2.0, 1.5).log_prob(grid) + dist.Normal(grid, 0.5).log_prob(y[:, None])
    cdf = torch.softmax(log_p, -1).cumsum(-1).numpy()
    uniform = [np.interp(v, grid.numpy(), c) for v, c in zip(z.tolist(), cdf, strict=True)]
    return ks_p_value(np.array(uniform), lambda u: u)


def test_a_latent_on_the_half_line_follows_quadrature() -> None:
    """Kolmogorov's test, without an LVEBM. False alarms: 1e-3."""
    assert gamma_p_value(2.0) > ALPHA


def test_half_line_check_fails_without_the_jacobian() -> None:
    """The missing Jacobian of exp is one power of z: Gamma(1, ·) for Gamma(2, ·)."""
    assert gamma_p_value(1.0) < CERTAIN


def feeding(ebm: Any, w: Tensor, size: int | None) -> Callable[..., None]:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z @ w, 0.5), obs=y[i])

    return model


def feeding_p_value(forget_y: bool) -> float:
    """p-value of z | x, y with y ~ N(z·w, 0.5): the Gaussian posterior, updated by y."""
    ebm = warm(quadratic_ebm(3, 2, seed=11), 3)
    w = torch.tensor([1.0, -0.7]).double()
    x, y = data_of(ebm, 200), 1.5 * normal((200,), 3)
    saddle = saddle_for(feeding(ebm, w, 100), 1, seed=5)
    z = saddle.sample_posterior(x, y, num_samples=1, num_warmup=60)["scene_z"][0, 0]
    law = exact_posterior(ebm, x)
    if not forget_y:
        prior = law.covariance_matrix[0]
        gain = prior @ w / (w @ prior @ w + 0.25)
        mean = law.mean + (y - law.mean @ w)[:, None] * gain
        covariance = prior - torch.outer(gain, w @ prior)
        law = torch.distributions.MultivariateNormal(mean, 0.5 * (covariance + covariance.T))
    white = whitened(z, law)
    second = variance_p_value(rotations(white), 1.0)
    return min(1.0, 2.0 * min(second, mean_p_value(white, 0.0)))


def test_a_latent_that_feeds_another_site_is_conditioned_on_it() -> None:
    """Chi-square and Student's test. False alarms: 1e-3."""
    assert feeding_p_value(False) > ALPHA


def test_feeding_check_fails_where_y_is_forgotten() -> None:
    assert feeding_p_value(True) < CERTAIN


def shifted(ebm: Any) -> Callable[..., None]:
    """Observations moved by a latent of all data, μ ~ N(0, 2.25 I)."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3).double(), 1.5).to_event(1))
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x - mu)

    return model


def turns_p_value(num_warmup: int = 50) -> float:
    """p-value that μ and the z of one of 2 data have their joint posterior, in 300 chains.

    μ has the precision I / 2.25 + 2 S_xx⁻¹ of its prior and of the marginals of x; given μ, z is
    the posterior of an LVEBM at x − μ.
    """
    ebm = warm(quadratic_ebm(3, 2, seed=11), 3)
    x = data_of(ebm, 2) + torch.tensor([1.0, 0.0, -1.0]).double()
    saddle = saddle_for(shifted(ebm), 300, seed=7)
    draws = saddle.sample_posterior(x, num_samples=1, num_warmup=num_warmup)
    mu, z = draws["mu"][:, 0], draws["scene_z"][:, 0, 0]
    joint = exact_joint(ebm)
    precision = torch.linalg.inv(joint.covariance_matrix[:3, :3])
    covariance = torch.linalg.inv(torch.eye(3).double() / 2.25 + 2.0 * precision)
    mean = covariance @ (precision @ (x - joint.mean[:3]).sum(0))
    given = exact_posterior(ebm, x[0] - mean)
    slope = -joint.covariance_matrix[3:, :3] @ precision
    cross = slope @ covariance
    law = torch.distributions.MultivariateNormal(
        torch.cat([mean, given.mean]),
        torch.cat(
            [
                torch.cat([covariance, cross.T], 1),
                torch.cat([cross, given.covariance_matrix + cross @ slope.T], 1),
            ]
        ),
    )
    white = whitened(torch.cat([mu, z], -1), law)
    second = variance_p_value(rotations(white), 1.0)
    return min(1.0, 2.0 * min(second, mean_p_value(white, 0.0)))


def test_latents_of_all_data_and_of_single_data_take_turns() -> None:
    """Chi-square and Student's test. False alarms: 1e-3."""
    assert turns_p_value() > ALPHA


def test_turns_check_fails_where_blocks_do_not_see_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert turns_p_value(num_warmup=0) < CERTAIN
    monkeypatch.setattr(LatentBlock, "fix", lambda *_: None)
    assert turns_p_value() < CERTAIN


def test_statistics_of_blocks_that_take_turns() -> None:
    """Energies are those of the kept positions, also where the other block moved last."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 5)
    draws = saddle_for(shifted(ebm), 2).draw_posterior(x, num_samples=4, num_warmup=20)
    mu, z = draws.samples["mu"], draws.samples["scene_z"]
    with torch.no_grad():
        energy = ebm.energy(x - mu[:, :, None], z) + ebm.log_partition
        prior = dist.Normal(0.0, 1.5).log_prob(mu).sum(-1)
    stats = draws.sample_stats
    assert set(stats) == {"energy", "acceptance_rate", "step_size"} and draws.sites == {}
    torch.testing.assert_close(stats["energy"], energy.sum(-1) - prior, rtol=1e-7, atol=0.0)
    assert stats["step_size"].shape == (2, 4) and bool((stats["step_size"] > 0).all())


def test_several_latents_of_a_plate_come_back_by_name() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 9)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 9, subsample_size=4) as i:
            lvebm("scene", ebm, obs=x[i])
            pyro.sample("share", dist.Dirichlet(torch.ones(3).double()))

    saddle = saddle_for(model, 2)
    draws = saddle.draw_posterior(x, num_samples=3, num_warmup=2)
    assert {k: tuple(v.shape) for k, v in draws.samples.items()} == {
        "scene_z": (2, 3, 9, 2),
        "share": (2, 3, 9, 3),
    }
    torch.testing.assert_close(draws.samples["share"].sum(-1), torch.ones(2, 3, 9).double())


def test_nested_plates_keep_their_places() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 12).reshape(4, 3, 3)

    def model(x: Tensor) -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1, subsample_size=2) as i:
            lvebm("scene", ebm, obs=x[:, i])

    saddle = saddle_for(model, 2)
    draws = saddle.draw_posterior(100.0 * x, num_samples=2, num_warmup=60)
    z = draws.samples["scene_z"]
    assert z.shape == (2, 2, 4, 3, 2)
    law = exact_posterior(ebm, 100.0 * x)
    distance = (z - law.mean).norm(dim=-1) / law.stddev.norm(dim=-1)
    assert distance.max() < 6.0 and law.mean.std() > 20.0 * law.stddev.max()
    assert draws.sample_stats["energy"].shape == (2, 2, 4, 3)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_samples": 1, "num_warmup": -1}, "num_warmup must be at least 0; got -1"),
        ({"num_samples": 1, "thinning": 0}, "thinning must be at least 1; got 0"),
    ],
)
def test_impossible_counts_are_refused(settings: dict[str, int], message: str) -> None:
    ebm = warm(quadratic_ebm(), 2)
    with pytest.raises(ValueError, match=message):
        saddle_for(plate_model(ebm)).sample_posterior(data_of(ebm, 4), **settings)


def test_a_guide_without_particles_is_sent_to_predictive() -> None:
    ebm = warm(quadratic_ebm(), 2)
    model = plate_model(ebm)
    saddle = Saddle(model, AutoNormal(model), Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match=r"no AutoParticles.*Predictive\(model, guide=guide"):
        saddle.sample_posterior(data_of(ebm, 4), num_samples=1)


def test_latents_in_different_plates_are_refused_where_one_subsamples() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 6)

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        with pyro.plate("data", 6, subsample_size=3) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z.sum(-1) * w, 1.0), obs=x[i].sum(-1))

    with pytest.raises(ValueError, match=r"latents \['w'\] lie outside a plate that subsamples"):
        saddle_for(model).sample_posterior(x, num_samples=1, num_warmup=1)
    # With w in a guide of its own the local particles can be drawn.
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    guide.append(AutoParticles(poutine.block(model, hide=["w"]), 2))
    saddle = Saddle(model, guide, Adam({"lr": 0.01}))
    draws = saddle.draw_posterior(x, num_samples=2, num_warmup=1)
    assert set(draws.samples) == {"scene_z"} and draws.samples["scene_z"].shape == (2, 2, 6, 2)
    w = draws.held["w"]
    assert set(draws.held) == {"w"} and w.shape == (2,) and w[0] != w[1]
    # Both minibatches have the same w: the energy is that of the model at w.
    z = draws.samples["scene_z"]
    with torch.no_grad():
        energy = ebm.energy(x.expand(2, 2, 6, 3), z) + ebm.log_partition
        law = dist.Normal(z.sum(-1) * w[:, None, None], 1.0)
        torch.testing.assert_close(
            draws.sample_stats["energy"], energy - law.log_prob(x.sum(-1)), rtol=1e-9, atol=0.0
        )

    def nested(x: Tensor) -> None:
        with pyro.plate("outer", 6, dim=-2, subsample_size=3):
            u = pyro.sample("u", dist.Normal(torch.zeros(()).double(), 1.0))
            with pyro.plate("inner", 2, dim=-1):
                pyro.sample("v", dist.Normal(u, 1.0))

    groups = r"different plates, \[\['u'\], \['v'\]\].*'outer' subsamples"
    with pytest.raises(ValueError, match=groups):
        saddle_for(nested).sample_posterior(x, num_samples=1, num_warmup=1)


def test_bad_data_are_refused() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 6)
    saddle = saddle_for(plate_model(ebm))
    saddle.step(x)
    before = snapshot(saddle.particles)
    with pytest.raises(ValueError, match="infinite"):
        saddle.sample_posterior(x * math.inf, num_samples=1)
    with pytest.raises(ValueError, match=r"'scene' has missing entries.*new guide.*observed="):
        saddle.sample_posterior(x * math.nan, num_samples=1)
    assert same(before, snapshot(saddle.particles))
