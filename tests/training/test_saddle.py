# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_sample
from pyro.optim import SGD, Adam, ClippedAdam
from referee import assert_global_rng_untouched, normal
from sklearn.datasets import make_moons
from small_models import (
    data_of,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
)
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    MALA,
    ULA,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    PersistentPool,
    Saddle,
    TemperedPool,
    lvebm,
)
from pyro_lvebm.latents import positive_phase as positive
from pyro_lvebm.rng import Stream, isolated_rng


def saddle_for(
    ebm: LVEBM,
    *,
    size: int | None = 8,
    count: int = 2,
    lr: float = 0.02,
    num_moves: int = 2,
    **settings: Any,
) -> Saddle:
    model = plate_model(ebm, size)
    optim = settings.pop("optim", None) or Adam({"lr": lr})
    return Saddle(model, AutoParticles(model, count), optim, num_moves=num_moves, **settings)


def state_of(saddle: Saddle) -> dict[str, Tensor]:
    """Everything a step may change, bit for bit."""
    state = {f"{k}.{n}": t for k, e in enumerate(saddle.ebms) for n, t in snapshot(e).items()}
    if isinstance(saddle.guide, nn.Module):
        state |= {f"guide.{n}": t for n, t in snapshot(saddle.guide).items()}
    return state


# --- the loss of a step ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_returns_the_loss_before_the_update(count: int) -> None:
    """With particles it is the energy: the mean over particles of -log p(x, z), over all data."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm, size=None, count=count, optim=SGD({"lr": 0.0}))
    for _ in range(3):
        loss = saddle.step(x)
        assert type(loss) is float
        z = saddle.particles.particles("scene_z")
        energy = (ebm.energy(x.expand(count, 20, 3), z) + ebm.log_partition).detach()
        assert loss == pytest.approx(float(energy.sum()) / count, rel=1e-9)
        assert saddle.evaluate_loss(x) == pytest.approx(loss, rel=1e-9)


def test_the_loss_of_a_minibatch_is_scaled_to_all_data() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 20)
    seen = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=8) as i:
            seen.append(i)
            lvebm("scene", ebm, obs=x[i])

    saddle = Saddle(model, AutoParticles(model, 3), SGD({"lr": 0.0}), num_moves=1)
    for _ in range(3):
        loss = saddle.step(x)
        i = seen[-1]
        z = saddle.particles.particles("scene_z")[:, i]
        energy = (ebm.energy(x[i].expand(3, 8, 3), z) + ebm.log_partition).detach()
        assert loss == pytest.approx(20 / 8 * float(energy.sum()) / 3, rel=1e-9)


@pytest.mark.parametrize("loss_class", [Trace_ELBO, TraceMeanField_ELBO, TraceGraph_ELBO])
@pytest.mark.parametrize(
    "guide_class",
    [
        AutoNormal,
        AutoPerDatumMultivariateNormal,
        partial(AutoAmortisedNormal, hidden=(4,)),
        AutoMultivariateNormal,
    ],
)
def test_with_any_other_guide_a_step_is_that_of_svi(
    guide_class: Callable[..., Any], loss_class: type[ELBO]
) -> None:
    """Bit for bit, given the same random numbers and a trust region that does not bind."""
    ebm = quadratic_ebm()
    # Pyro's joint guide has no rows to subsample.
    model = plate_model(ebm, None if guide_class is AutoMultivariateNormal else 8)
    x = data_of(ebm, 20)
    guide, loss = guide_class(model), loss_class()
    saddle = Saddle(model, guide, SGD({"lr": 1e-3}), loss, max_kl=math.inf, seed=3)
    saddle.step(x)
    before = snapshot(ebm), snapshot(guide)
    results = []
    for kind in ("SVI", "Saddle"):
        ebm.load_state_dict(before[0])
        guide.load_state_dict(before[1])
        ebm.mark_pool(fresh=False)
        if kind == "SVI":
            with isolated_rng(3, Stream.MINIBATCH, 1):
                value = SVI(model, guide, SGD({"lr": 1e-3}), loss).step(x)
        else:
            value = saddle.step(x)
        results.append((value, snapshot(ebm), snapshot(guide)))
    (a, theta, phi), (b, psi, chi) = results
    assert a == b and same(theta, psi) and same(phi, chi)
    assert not same(before[0], theta) and not same(before[1], phi)


# --- randomness -----------------------------------------------------------------------------


def run(seed: int, guide_class: str, steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    pyro.clear_param_store()
    torch.manual_seed(np.random.SeedSequence().entropy % 2**31)  # must not matter
    ebm = quadratic_ebm()
    model, x = plate_model(ebm, 8), data_of(ebm, 20)
    guide = AutoParticles(model, 3) if guide_class == "particles" else AutoNormal(model)
    saddle = Saddle(model, guide, ClippedAdam({"lr": 0.02}), num_moves=2, seed=seed)
    return [saddle.step(x) for _ in range(steps)], state_of(saddle)


@pytest.mark.parametrize("guide_class", ["particles", "normal"])
def test_the_seed_fixes_a_run(guide_class: str) -> None:
    first, again, other = (run(seed, guide_class) for seed in (1, 1, 2))
    assert first[0] == again[0] and same(first[1], again[1])
    assert first[0] != other[0] and not same(first[1], other[1])


def test_steps_draw_other_numbers_than_each_other() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 30)
    seen = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=8) as i:
            seen.append(tuple(i.tolist()))
            lvebm("scene", ebm, obs=x[i])

    saddle = Saddle(model, AutoParticles(model, 1), Adam({"lr": 0.01}), num_moves=1)
    saddle.step(x)
    seen.clear()
    for _ in range(4):
        saddle.step(x)
    assert len(set(seen)) == 4


def test_particles_move_with_new_noise_in_every_step() -> None:
    """Where f is zero, ULA moves v to (1 − η) v + √(2η) ξ, which gives ξ away.

    120 numbers of two steps are correlated by 0.09 at random; 0.33 is a false alarm of 2e-4.
    """
    ebm = quadratic_ebm()
    ebm.f.set_precision(torch.eye(5).double(), torch.zeros(5).double())
    warm(ebm, 2)
    x, places = data_of(ebm, 60), []
    with ebm.frozen():
        saddle = saddle_for(ebm, size=None, kernel=ULA(), num_moves=1, count=1)
        for _ in range(4):
            saddle.step(x)
            places.append(ebm.base_z.whiten(saddle.particles.particles("scene_z")).flatten())
    eta = float(saddle.particles.step_size("scene_z"))
    noise = torch.stack([b - (1.0 - eta) * a for a, b in pairwise(places)]) / math.sqrt(2.0 * eta)
    assert noise.std().item() == pytest.approx(1.0, abs=0.2)
    assert float(torch.corrcoef(noise).fill_diagonal_(0.0).abs().max()) < 0.33


def test_the_global_generator_is_left_alone() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    with assert_global_rng_untouched():
        saddle = saddle_for(ebm)
        saddle.step(x)
        saddle.fit(x, num_steps=2, progress=False)
        saddle.sample_posterior(x, num_samples=2, num_warmup=2)
        with pytest.raises(ValueError, match="NaN"):
            saddle.step(x * math.inf)
        model = plate_model(ebm, 8)
        Saddle(model, AutoNormal(model), Adam({"lr": 0.01})).step(x)


def test_particles_and_loss_share_a_minibatch_that_only_the_model_opens() -> None:
    """With global latents alone, the guide has no plate to choose rows in."""
    y = normal((30,), 1, torch.float32)
    seen = []

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 30, subsample_size=8) as i:
            seen.append(tuple(i.tolist()))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[i])

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=3)
    saddle.step(y)
    for _ in range(3):
        seen.clear()
        saddle.step(y)
        assert len(seen) > 3 and len(set(seen)) == 1


# --- kernels, pools, particles --------------------------------------------------------------


@pytest.mark.parametrize("kernel", [MALA(), MALA(0.8), ULA(), ULA(0.9)])
@pytest.mark.parametrize(
    ("pool", "count"), [(lambda: tiny_pool(), 4), (lambda: PersistentPool(64, num_moves=2), 1)]
)
def test_every_kernel_pool_and_number_of_particles_runs(
    kernel: MALA | ULA, pool: Callable[[], TemperedPool | PersistentPool], count: int
) -> None:
    ebm = quadratic_ebm(pool=pool())
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm, count=count, kernel=kernel)
    first = [saddle.step(x) for _ in range(2)]
    step_size = saddle.particles.step_size("scene_z").clone()
    before = state_of(saddle)
    losses = [saddle.step(x) for _ in range(2)]
    assert all(math.isfinite(v) for v in first + losses) and saddle.step_count == 4
    after = state_of(saddle)
    for name in ("0.f.linear", "0.pool.u", "guide.particles_scene_z"):
        assert not torch.equal(before[name], after[name])
    # The step size adapts, except that of a ULA without a target.
    adapts = kernel.target_acceptance is not None
    assert (saddle.particles.step_size("scene_z") != step_size) == adapts
    assert 0.0 <= saddle.acceptance["scene_z"] <= 1.0
    assert int(ebm.pool.refreshes) == 4  # once a step


def test_step_sizes_settle_at_the_acceptance_asked_for() -> None:
    """The last 40 of 120 steps have the target as their mean, to 0.04, for each target."""
    for target in (0.5, 0.8):
        pyro.clear_param_store()
        ebm = warm(quadratic_ebm(), 2)
        x = data_of(ebm, 60)
        with ebm.frozen():
            saddle = saddle_for(ebm, size=None, kernel=MALA(target), num_moves=1, count=1)
            rates = []
            for _ in range(120):
                saddle.step(x)
                rates.append(saddle.acceptance["scene_z"])
        assert np.mean(rates[-40:]) == pytest.approx(target, abs=0.04)


def test_a_model_without_an_lvebm_is_particle_maximum_likelihood() -> None:
    """y ~ N(z, 1), z ~ N(m, 1): the maximum of the marginal likelihood is m = mean(y)."""
    y = normal((200,), 0, torch.float32) * math.sqrt(2) + 3.0

    def model(y: Tensor) -> None:
        m = pyro.param("m", torch.tensor(0.0))
        with pyro.plate("data", len(y)) as i:
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    saddle = Saddle(model, AutoParticles(model, 10), Adam({"lr": 0.3}), num_moves=5)
    saddle.fit(y, num_steps=80, progress=False)
    assert saddle.ebms == []
    # 2,000 particles of variance 1/2 leave 0.016 for each step, less over the last, small steps.
    assert pyro.param("m").item() == pytest.approx(y.mean().item(), abs=0.06)


def test_two_lvebms_are_trained_side_by_side() -> None:
    a, b = quadratic_ebm(3, 2, seed=1), quadratic_ebm(2, 1, seed=2)
    x, y = data_of(a, 20), data_of(b, 20)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=7) as i:
            lvebm("first", a, obs=x[i])
            lvebm("second", b, obs=y[i])

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1.0}), max_kl=0.02, num_moves=2)
    before = [snapshot(e.f) for e in (a, b)]
    for _ in range(4):
        saddle.step(x, y)
        assert max(float(e.kl_of_update()) for e in saddle.ebms) <= 0.02
    assert saddle.ebms == [a, b]
    assert not any(same(old, snapshot(e.f)) for old, e in zip(before, (a, b), strict=True))
    assert set(saddle.acceptance) == {"first_z", "second_z"}
    draws = saddle.sample_posterior(x, y, num_samples=3, num_warmup=2)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "first_z": (2, 3, 20, 2),
        "second_z": (2, 3, 20, 1),
    }


def largest_global_particle() -> float:
    """The model of the design: z and a global w explain y, and data are subsampled."""
    ebm = quadratic_ebm(dtype=torch.float32)
    x = data_of(ebm, 1000)
    y = x.sum(-1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=100) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal((z * w).sum(-1), 1.0), obs=y[i])

    saddle = Saddle(model, AutoParticles(model, 4), ClippedAdam({"lr": 1e-3}), num_moves=4)
    for _ in range(20):
        saddle.step(x, y)
    return float(saddle.particles.particles("w").abs().max())


def test_a_global_latent_above_subsampled_data_is_stable() -> None:
    assert largest_global_particle() < 10


def test_stability_check_fails_for_moves_that_are_never_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(positive, "_NOISY_KERNEL", ULA(0.95))
    with pytest.raises(ValueError, match="not finite"):
        largest_global_particle()


# --- the trust region and the schedule ------------------------------------------------------


@pytest.mark.parametrize("max_kl", [0.002, 0.05])
@pytest.mark.parametrize("make", [lambda: Adam({"lr": 1.0}), lambda: SGD({"lr": 0.05})])
def test_no_step_moves_the_model_further_than_max_kl(
    max_kl: float, make: Callable[[], Any]
) -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 40) + 1.0
    saddle = saddle_for(ebm, optim=make(), max_kl=max_kl)
    kls, halvings = [], []
    for _ in range(15):
        saddle.step(x)
        kls.append(float(ebm.kl_of_update()))
        halvings.append(saddle.halvings)
    assert max(kls) <= max_kl and max(halvings) >= 3
    assert max(kls) > max_kl / 8  # by halving, and not by standing still


def test_without_a_trust_region_the_same_steps_go_far() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 40) + 1.0
    saddle = saddle_for(ebm, optim=Adam({"lr": 1.0}), max_kl=math.inf)
    saddle.step(x)
    assert saddle.halvings == 0 and ebm.kl_of_update() > 0.05


def factor_model() -> None:
    """loss = 2 θ, whatever θ: every update of SGD is -2 lr."""
    pyro.factor("f", -2.0 * pyro.param("theta", torch.tensor(0.0).double()))


@pytest.mark.parametrize("num_steps", [1, 7])
def test_fit_shrinks_updates_along_a_half_cosine(num_steps: int) -> None:
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}))
    values = [0.0]
    step = saddle.scaled_step

    def recorded(*args: Any) -> float:
        loss = step(*args)
        values.append(pyro.param("theta").item())
        return loss

    saddle.scaled_step = recorded  # type: ignore[method-assign]
    losses = saddle.fit(num_steps=num_steps, progress=False)
    t = np.arange(num_steps)
    expected = -(0.51 + 0.49 * np.cos(math.pi * t / num_steps))
    np.testing.assert_allclose(np.diff(values), expected, rtol=1e-12)
    np.testing.assert_allclose(losses, 2.0 * np.array(values[:-1]), rtol=1e-12)
    assert expected[0] == -1.0


def test_the_schedule_ends_near_a_fiftieth_and_plain_steps_have_none() -> None:
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}))
    saddle.fit(num_steps=200, progress=False)
    first = pyro.param("theta").item()
    for _ in range(3):
        saddle.step()
    assert pyro.param("theta").item() - first == pytest.approx(-3.0, rel=1e-9)
    assert saddle.step_count == 203


@pytest.mark.parametrize("progress", [True, False])
def test_fit_shows_its_progress_without_a_warning(
    progress: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ebm = quadratic_ebm()
    losses = saddle_for(ebm).fit(
        data_of(ebm, 20), num_steps=12, progress=progress, description="moons"
    )
    shown = capsys.readouterr().err
    assert len(losses) == 12
    for word in ("moons", "loss", "log Z", "ESS", "step"):
        assert (word in shown) == progress


def test_fit_leaves_pools_that_have_caught_up() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 40)
    saddle = saddle_for(ebm, lr=0.1)
    saddle.fit(x, num_steps=12, progress=False)
    assert ebm.pool_is_fresh() and ebm.kl_of_update() == pytest.approx(0.0, abs=1e-9)
    settled = int(ebm.pool.refreshes)
    assert settled > 12
    with ebm.frozen():
        saddle.fit(x, num_steps=1, progress=False)
    assert int(ebm.pool.refreshes) == settled  # θ was held, so the pool is where it was


# --- when a step fails ----------------------------------------------------------------------


class Fragile(nn.Module):
    """An energy that breaks when told to, for data only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.2, -0.1, 0.3]).double())
        self.broken = False

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        f = (x * self.weight).sum(-1).tanh() + (z.sum(-1) * self.weight[0]).sin()
        return f * math.nan if self.broken else f


def break_loss(saddle: Saddle, value: float) -> None:
    """Let the next losses be another number, after everything has moved as usual."""
    real = Trace_ELBO.loss_and_grads

    def loss_and_grads(*args: Any, **kwargs: Any) -> float:
        real(saddle.elbo, *args, **kwargs)
        return value

    saddle.loss_and_grads = loss_and_grads


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_puts_everything_back(value: float) -> None:
    """θ to the last values whose loss was finite, pool and particles to before the step."""
    ebm = quadratic_ebm()
    ebm.base_z.loc.zero_()
    ebm.base_z.scale.fill_(1.0)
    ebm.base_z.inverse_scale.fill_(1.0)
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm)
    history = []
    for _ in range(3):
        saddle.step(x)
        history.append(state_of(saddle))
    theta = [{n: t for n, t in state.items() if ".f." in n} for state in history]
    rest = {n: t for n, t in history[-1].items() if ".f." not in n}
    working = saddle.loss_and_grads
    break_loss(saddle, value)
    for _ in range(2):  # and again, from there
        with pytest.raises(ValueError, match=rf"loss \({value}\) is not finite at step 3"):
            saddle.step(x)
        now = state_of(saddle)
        assert same(theta[1], {n: t for n, t in now.items() if ".f." in n})
        assert same(rest, {n: t for n, t in now.items() if ".f." not in n})
        assert saddle.step_count == 3 and ebm.pool_is_fresh()  # for the θ that is back
        assert all(p.grad is None or not p.grad.any() for p in ebm.parameters())
    saddle.loss_and_grads = working
    for group in saddle.optim.optim_objs.values():
        group.param_groups[0]["lr"] *= 0.1
    assert all(math.isfinite(saddle.step(x)) for _ in range(3)) and saddle.step_count == 6


def test_particles_come_back_to_the_bit_for_any_base() -> None:
    ebm = quadratic_ebm(dtype=torch.float32)
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm, count=4)
    saddle.step(x)
    before = saddle.particles.particles("scene_z").clone()
    break_loss(saddle, math.nan)
    with pytest.raises(ValueError, match="not finite"):
        saddle.step(x)
    assert torch.equal(before, saddle.particles.particles("scene_z"))


def test_an_energy_that_turns_nan_is_named_with_its_step() -> None:
    standard = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    energy = Fragile()
    ebm = LVEBM(energy, standard, standard, pool=tiny_pool())
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm)
    thetas = []
    for _ in range(3):
        thetas.append(energy.weight.detach().clone())
        saddle.step(x)
    energy.broken = True
    with pytest.raises(ValueError, match="step 3"):
        saddle.step(x)
    assert torch.equal(energy.weight, thetas[-1])


def test_an_energy_that_turns_nan_leaves_pool_and_particles_alone() -> None:
    standard = dist.Normal(torch.zeros(3).double(), 1.0).to_event(1)
    energy = Fragile()
    ebm = LVEBM(energy, standard, standard, pool=tiny_pool())
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm)
    saddle.step(x)
    before = {n: t for n, t in state_of(saddle).items() if "f.weight" not in n}
    energy.broken = True
    with pytest.raises(ValueError, match="NaN"):
        saddle.step(x)
    assert same(before, {n: t for n, t in state_of(saddle).items() if "f.weight" not in n})
    energy.broken = False
    assert math.isfinite(saddle.step(x))


def test_nan_in_one_gradient_is_found() -> None:
    """A loss may be finite where its gradient is not, as for sqrt at zero."""

    def model() -> None:
        a = pyro.param("a", torch.tensor(1.0))
        pyro.factor("f", -(a - 1.0).abs().sqrt() - a)

    saddle = Saddle(model, lambda: None, SGD({"lr": 0.1}))
    with pytest.raises(ValueError, match="a gradient is not finite at step 0"):
        saddle.step()
    assert pyro.param("a").item() == 1.0


@pytest.mark.parametrize("validation", [False, True])
def test_a_huge_learning_rate_is_survived(validation: bool) -> None:
    """A guide's parameters have no trust region: the error names the step, θ comes back.

    With Pyro's validation an impossible scale is refused on the way to the loss.
    """
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 20)
    guide, optim = AutoNormal(model), SGD({"lr": 1e-3})
    saddle = Saddle(model, guide, optim)

    def set_rate(lr: float) -> None:
        for group in optim.optim_objs.values():
            group.param_groups[0]["lr"] = lr

    with pyro.validation_enabled(validation):
        saddle.step(x)
        good = state_of(saddle)
        set_rate(1e7)
        saddle.step(x)
        assert guide.locs.scene_z.abs().max() > 1e6
        with pytest.raises(ValueError, match=r"step 2"):
            saddle.step(x)
        now = state_of(saddle)
        theta = [n for n in now if "unconstrained" in n or ".f." in n]
        assert len(theta) >= 4 and all(torch.equal(now[n], good[n]) for n in theta)
        set_rate(1e-3)
        assert all(math.isfinite(saddle.step(x)) for _ in range(3))


def test_an_update_beyond_the_largest_number_is_undone() -> None:
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}))
    saddle.step()
    (optimiser,) = saddle.optim.optim_objs.values()
    optimiser.param_groups[0]["lr"] = 1e308
    with pytest.raises(ValueError, match="the update of step 1 made a parameter NaN or infinite"):
        saddle.step()
    assert pyro.param("theta").item() == -1.0 and saddle.step_count == 1


@pytest.mark.parametrize("guide_class", [AutoParticles, AutoNormal])
def test_bad_data_in_a_step_change_nothing(guide_class: Callable[..., Any]) -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    model = plate_model(ebm, 8)
    saddle = Saddle(model, guide_class(model), Adam({"lr": 0.02}), num_moves=2)
    for _ in range(2):
        saddle.step(x)
    before = state_of(saddle)
    for bad in (x * math.inf, x[:, :2], x.long()):
        with pytest.raises(ValueError, match=r"NaN|trailing shape|floating point"):
            saddle.step(bad)
        assert same(before, state_of(saddle)) and saddle.step_count == 2
    assert math.isfinite(saddle.step(x))


def test_an_error_of_the_optimiser_changes_no_pool() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm)
    saddle.step(x)
    before = {n: t for n, t in state_of(saddle).items() if "pool" in n}

    def fail(params: object) -> None:
        raise KeyboardInterrupt

    saddle.optim = fail
    with pytest.raises(KeyboardInterrupt):
        saddle.step(x)
    assert same(before, {n: t for n, t in state_of(saddle).items() if "pool" in n})
    assert not ebm.pool_is_fresh()  # θ is that of the last update, which the old pool never saw


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_moves": 0}, "num_moves must be at least 1; got 0"),
        ({"max_kl": 0.0}, "max_kl must be positive; got 0"),
        ({"max_kl": math.nan}, "max_kl must be positive; got nan"),
        ({"max_kl": -1.0}, "max_kl must be positive"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        saddle_for(quadratic_ebm(), **settings)


def test_fit_and_save_refuse_nothing_to_do(tmp_path: Any) -> None:
    ebm = quadratic_ebm()
    saddle = saddle_for(ebm)
    with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
        saddle.fit(data_of(ebm, 20), num_steps=0)
    with pytest.raises(ValueError, match="take a step first"):
        saddle.save(tmp_path / "file")


# --- every ELBO trains θ --------------------------------------------------------------------

MOONS = [
    torch.tensor(make_moons(n, noise=0.1, random_state=seed)[0], dtype=torch.float32)
    for n, seed in ((150, 0), (600, 1))
]


def moons_ebm() -> LVEBM:
    energy = MLPEnergy(2, 1, hidden=(16, 16), fourier_features=0, seed=0)
    pool = TemperedPool(4, 64, num_moves=2)
    # From a mixture there is nothing left to learn in a few steps.
    return LVEBM.from_data(energy, MOONS[0], z_dim=1, base="gaussian", pool=pool)


def health(ebm: LVEBM) -> tuple[float, float]:
    """Error of the online log Z, and gain in held-out log p(x) over the base, by quadrature."""
    line, z = torch.linspace(-4.8, 4.8, 41), torch.linspace(-6.0, 6.0, 49)
    with torch.no_grad():
        u = torch.cartesian_prod(line, line, z)
        log_cell = math.log((line[1] - line[0]) ** 2 * (z[1] - z[0]))
        log_base = -0.5 * (u**2).sum(-1) - 1.5 * math.log(2 * math.pi)
        log_z = torch.logsumexp(log_base - ebm.residual(u), 0) + log_cell
        w = ebm.base_x.whiten(MOONS[1])[:, None].expand(-1, len(z), 2)
        f = ebm.residual(torch.cat([w, z[None, :, None].expand(len(w), -1, 1)], -1))
        log_prior = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
        log_c = torch.logsumexp(log_prior - f, -1)
        return abs(float(ebm.log_partition - log_z)), float((log_c - log_z).mean())


def train(
    make_guide: Callable[..., Any], loss: ELBO, kind: str, size: int | None, steps: int = 60
) -> LVEBM:
    pyro.set_rng_seed(0)
    ebm = moons_ebm()
    model = plate_model(ebm, size)
    optim = Adam({"lr": 0.02})
    guide = make_guide(model)
    if kind == "SVI":
        svi = SVI(model, guide, optim, loss)
    else:
        svi = Saddle(model, guide, optim, loss, num_moves=2, max_kl=0.05)
    for _ in range(steps):
        svi.step(MOONS[0])
    # So small a pool strays from log Z by 0.3 now and then while θ moves.
    ebm.settle()
    return ebm


GUIDES = {
    "AutoNormal": (partial(AutoNormal, init_scale=0.8, init_loc_fn=init_to_sample), 75),
    "AutoMultivariateNormal": (partial(AutoMultivariateNormal, init_scale=0.8), None),
    "AutoAmortisedNormal": (partial(AutoAmortisedNormal, hidden=(16,)), 75),
    "AutoPerDatumMultivariateNormal": (
        partial(AutoPerDatumMultivariateNormal, init_scale=0.8),
        75,
    ),
}


# Every guide and every ELBO; a step of `Saddle` is that of SVI for all pairs, bit for bit, above.
TRAINED = [
    ("AutoNormal", TraceGraph_ELBO, "Saddle"),
    ("AutoMultivariateNormal", TraceMeanField_ELBO, "Saddle"),
    ("AutoAmortisedNormal", Trace_ELBO, "Saddle"),
    ("AutoPerDatumMultivariateNormal", Trace_ELBO, "SVI"),
]


@pytest.mark.parametrize(("name", "loss_class", "kind"), TRAINED)
def test_any_elbo_with_any_guide_trains_the_energy(
    name: str, loss_class: type[ELBO], kind: str
) -> None:
    """Held-out log p(x) rises above the base, and the settled log Z is that of quadrature."""
    make_guide, size = GUIDES[name]
    error, gain = health(train(make_guide, loss_class(), kind, size))
    assert error < 0.2 and gain > 0.1


@pytest.mark.filterwarnings("ignore::pyro_lvebm.validation.TrainingWarning")  # rightly raised
def test_without_the_gradient_of_log_z_the_energy_collapses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same check fails by far: log p(x) falls below the base, or θ becomes NaN."""
    log_norm = LVEBM.log_norm
    monkeypatch.setattr(LVEBM, "log_norm", lambda self, context=None: log_norm(self).detach())
    make_guide, size = GUIDES["AutoAmortisedNormal"]
    try:
        _, gain = health(train(make_guide, Trace_ELBO(), "SVI", size))
    except ValueError as failure:
        assert "nan" in str(failure).lower()
    else:
        assert not gain > -1.0


def test_an_untrained_energy_has_no_gain() -> None:
    assert health(moons_ebm()) == pytest.approx((0.0, 0.0), abs=1e-3)


def test_particles_train_the_energy_too() -> None:
    error, gain = health(train(partial(AutoParticles, num_particles=2), Trace_ELBO(), "Saddle", 75))
    assert error < 0.2 and gain > 0.1


def test_the_loss_of_the_exact_posterior_is_the_log_evidence() -> None:
    """Up to the pool's error of log Z, and without any noise."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 10)
    model = plate_model(ebm)

    def exact(x: Tensor) -> None:
        with pyro.plate("data", 10):
            pyro.sample("scene_z", ebm.f.posterior(x))

    with torch.no_grad(), poutine.block():
        loss = Trace_ELBO().loss(model, exact, x)
    error = ebm.log_partition - ebm.f.log_partition().detach()
    expected = -ebm.f.log_evidence(x).detach().sum() + 10 * error
    assert loss == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.usefixtures("brief_settling")
def test_random_numbers_are_made_where_the_lvebm_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where a loader left the data: no generator can be made on the device of these."""
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    saddle = saddle_for(ebm)
    nowhere = torch.device("meta")
    monkeypatch.setattr("pyro_lvebm.training.saddle.device_of", lambda args, kwargs: nowhere)
    saddle.fit(x, num_steps=2, held_out=(x,), progress=False)
    assert saddle.sample_posterior(x, num_samples=2, num_warmup=2)["scene_z"].device.type == "cpu"
