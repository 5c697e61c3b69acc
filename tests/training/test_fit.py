# SPDX-License-Identifier: Apache-2.0
"""`Saddle.fit`, the averages, held-out data, the history and the warnings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, initialise, make_quadratic
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam
from referee import assert_global_rng_untouched, normal
from scipy import stats
from small_models import data_of, plate_model, quadratic_ebm, same, snapshot, tiny_pool, warm
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    MALA,
    AutoAmortisedNormal,
    AutoParticles,
    MLPEnergy,
    PersistentPool,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    lvebm,
)
from pyro_lvebm.pools.base import Pool
from pyro_lvebm.sampling.annealing import RoughEnergyError
from pyro_lvebm.training import history
from pyro_lvebm.training.fit import check_fit, half_cosine
from pyro_lvebm.training.history import LOW_ESS, WINDOW, pool_statistics
from pyro_lvebm.training.trust_region import default_radius
from pyro_lvebm.validation import TrainingWarning

pytestmark = pytest.mark.usefixtures("brief_settling")

GUIDES: dict[str, Callable[..., Any]] = {
    "particles": lambda model: AutoParticles(model, 2),
    "AutoNormal": AutoNormal,
    "amortised": lambda model: AutoAmortisedNormal(model, hidden=(4,)),
}


def make(
    ebm: LVEBM,
    *,
    guide: str = "particles",
    size: int | None = 8,
    lr: float = 0.02,
    num_moves: int = 2,
    **settings: Any,
) -> Saddle:
    pyro.clear_param_store()
    model = plate_model(ebm, size)
    optim = settings.pop("optim", None) or Adam({"lr": lr})
    return Saddle(model, GUIDES[guide](model), optim, num_moves=num_moves, **settings)


def state_of(saddle: Saddle) -> dict[str, Tensor]:
    """Everything a step may change, bit for bit."""
    state = {f"{k}.{n}": t for k, e in enumerate(saddle.ebms) for n, t in snapshot(e).items()}
    if isinstance(saddle.guide, nn.Module):
        state |= {f"guide.{n}": t for n, t in snapshot(saddle.guide).items()}
    return state


def parameters(saddle: Saddle) -> dict[str, Tensor]:
    """Copies of the parameters of energies and guide."""
    modules = {"ebm": saddle.ebms[0].f, "guide": saddle.guide}
    return {
        f"{role}.{name}": p.detach().clone()
        for role, module in modules.items()
        for name, p in module.named_parameters()
    }


def theta_of(ebm: LVEBM) -> list[Tensor]:
    return [p.detach().clone() for p in ebm.f.parameters()]


# --- schedules ------------------------------------------------------------------------------


def factor_model() -> None:
    """loss = 2 θ, whatever θ: every update of SGD is -2 lr."""
    pyro.factor("f", -2.0 * pyro.param("theta", torch.tensor(0.0).double()))


def updates(**options: Any) -> list[float]:
    """All updates of θ but the last in a fit of 8 steps with lr = 1/2."""
    pyro.clear_param_store()
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}))
    losses = saddle.fit(num_steps=8, progress=False, **options)
    return np.diff([0.5 * loss for loss in losses]).tolist()


@pytest.mark.parametrize(
    "schedule", [lambda p: 1.0 - p, lambda p: 0.3, lambda p: float(p < 0.5), half_cosine]
)
def test_a_schedule_multiplies_every_update(schedule: Callable[[float], float]) -> None:
    assert updates(schedule=schedule) == pytest.approx([-schedule(t / 8) for t in range(7)])


def test_the_schedule_is_a_half_cosine_unless_another_is_given() -> None:
    assert updates() == updates(schedule=half_cosine) != updates(schedule=lambda p: 1.0)


def test_a_schedule_sees_the_part_that_is_done() -> None:
    seen = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1.0

    updates(schedule=schedule)
    updates(schedule=schedule)
    assert seen == [t / 8 for t in range(8)] * 2


def test_a_constant_schedule_is_plain_steps() -> None:
    """Bit for bit, in all that is recorded."""
    histories = []
    for kind in ("fit", "step"):
        ebm = quadratic_ebm()
        saddle, x = make(ebm), data_of(ebm, 20)
        if kind == "fit":
            saddle.fit(x, num_steps=5, schedule=lambda p: 1.0, min_kl=0.0, progress=False)
        else:
            for _ in range(5):
                saddle.step(x)
        histories.append(saddle.history)
    pd.testing.assert_frame_equal(*histories, check_exact=True)


def test_a_schedule_of_zero_moves_no_parameter() -> None:
    ebm = quadratic_ebm()
    before = theta_of(ebm)
    saddle = make(ebm)
    saddle.fit(data_of(ebm, 20), num_steps=4, schedule=lambda p: 0.0, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, theta_of(ebm), strict=True))


# --- averages -------------------------------------------------------------------------------


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_a_fit_ends_at_the_averages(guide: str, decay: float) -> None:
    """Of all parameters, those of the guide too, by the recursion in numpy."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, guide=guide, lr=0.05, average_decay=decay), data_of(ebm, 20)
    path: list[dict[str, Tensor]] = []
    step = saddle.scaled_step

    def recorded(*args: Any) -> float:
        loss = step(*args)
        path.append(parameters(saddle))
        return loss

    saddle.scaled_step = recorded  # type: ignore[method-assign]
    saddle.fit(x, num_steps=24, progress=False)
    final = parameters(saddle)
    assert len(final) == {"particles": 2, "AutoNormal": 4, "amortised": 6}[guide]
    for name, value in final.items():
        expected = path[0][name].numpy()
        for t in range(1, 24):
            d = min(decay, (1 + t) / (10 + t))
            expected = d * expected + (1 - d) * path[t][name].numpy()
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-9, atol=1e-12)
        assert (decay == 0.0) == torch.equal(value, path[-1][name])
    average = [saddle.average.values[p] for p in ebm.f.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(average, theta_of(ebm), strict=True))


def test_parameters_outside_modules_are_averaged() -> None:
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}), average_decay=0.6)
    for _ in range(3):
        saddle.step()
    theta = pyro.param("theta").item()
    with saddle.averaged():
        assert theta < pyro.param("theta").item() < 0.0
    assert pyro.param("theta").item() == theta == -3.0


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_averaged_leaves_everything_as_it_was(
    guide: str, error: type[BaseException] | None
) -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, guide=guide, lr=0.05, average_decay=0.9), data_of(ebm, 20)
    for _ in range(4):
        saddle.step(x)
    before, fresh = state_of(saddle), ebm.pool_is_fresh()
    averages = {p: v.clone() for p, v in saddle.average.values.items()}
    try:
        with assert_global_rng_untouched(), saddle.averaged():
            inside = state_of(saddle)
            assert all(torch.equal(p, v) for p, v in averages.items())
            assert ebm.pool_is_fresh()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert same(before, state_of(saddle)) and ebm.pool_is_fresh() == fresh
    assert not torch.equal(before["0.f.linear"], inside["0.f.linear"])
    assert int(inside["0.pool.refreshes"]) >= int(before["0.pool.refreshes"]) + 4
    assert all(torch.equal(saddle.average.values[p], v) for p, v in averages.items())


def test_averaged_before_the_first_step_changes_nothing() -> None:
    ebm = quadratic_ebm()
    saddle, before = make(ebm), snapshot(ebm)
    with saddle.averaged():
        assert same(before, snapshot(ebm))
    assert same(before, snapshot(ebm))


def test_a_pool_that_cannot_follow_leaves_the_others_as_they_were() -> None:
    """The averages of the second energy are NaN, which its pool refuses."""
    a, b = quadratic_ebm(3, 2, seed=1), quadratic_ebm(2, 1, seed=2)
    saddle, x, y = side_by_side(a, b)
    saddle.step(x, y)
    saddle.average.values[b.f.linear].fill_(math.nan)
    before = state_of(saddle)
    fresh = [e.pool_is_fresh() for e in (a, b)]
    with pytest.raises(ValueError, match="NaN"), saddle.averaged():
        pass
    assert same(before, state_of(saddle)) and [e.pool_is_fresh() for e in (a, b)] == fresh


@pytest.mark.parametrize("guide", ["particles", "AutoNormal"])
def test_looking_at_averages_changes_no_later_step(guide: str) -> None:
    losses = []
    for look in (False, True):
        ebm = quadratic_ebm()
        saddle, x = make(ebm, guide=guide, lr=0.05), data_of(ebm, 20)
        run = []
        for _ in range(3):
            run.append(saddle.step(x))
            if look:
                saddle.log_evidence(x[:9])
                with saddle.averaged():
                    pass
                assert saddle.history.index.tolist() == list(range(1, len(run) + 1))
        losses.append(run)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("pool", [lambda: tiny_pool(), lambda: PersistentPool(64, num_moves=2)])
def test_pools_have_settled_after_a_fit(pool: Callable[[], Pool], held_out: bool) -> None:
    ebm = quadratic_ebm(pool=pool())
    x = data_of(ebm, 20)
    saddle = make(ebm, lr=0.05, average_decay=0.95)
    options = {"held_out": (x[:8],), "evaluate_every": 7} if held_out else {}
    saddle.fit(x, num_steps=21, progress=False, **options)
    assert ebm.pool_is_fresh() and float(ebm.kl_of_update()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.usefixtures("whole_settling")
def test_log_z_of_a_settled_pool_is_that_of_the_averages() -> None:
    """Within 5 standard errors of the closed form, as the pool states them."""
    ebm = quadratic_ebm(pool=TemperedPool(5, 80, num_moves=4, seed=2))
    x = data_of(ebm, 40)
    saddle = make(ebm, lr=0.03, average_decay=0.98)
    saddle.fit(x, num_steps=40, schedule=lambda p: 1.0, progress=False)
    error = float(ebm.pool.log_partition_std_error)
    exact = float(ebm.f.log_partition().detach())
    assert error < 0.05 and abs(float(ebm.log_partition) - exact) < 5 * error
    assert abs(exact) > 10 * error  # the log Z of the base, 0, is another


@pytest.mark.usefixtures("whole_settling")
def test_a_pool_settles_until_it_states_the_error_that_was_asked_for() -> None:
    """20 refreshes and up to 80; those of a pool that states no error are always 20."""

    def settled(asked: float | None) -> tuple[int, float]:
        ebm = quadratic_ebm(pool=TemperedPool(5, 60, num_moves=4, seed=2))
        ebm.settle(asked)
        assert ebm.pool_is_fresh()
        return int(ebm.pool.refreshes), float(ebm.pool.log_partition_std_error)

    count, error = settled(None)
    assert count == 20 and settled(1.0) == (count, error)
    more, smaller = settled(0.8 * error)
    assert 20 < more < 80 and smaller <= 0.8 * error
    most, smallest = settled(1e-6)
    assert most == 80 and 1e-6 < smallest < smaller
    ebm = quadratic_ebm(pool=PersistentPool(64, num_moves=2))
    ebm.settle(1e-6)
    assert int(ebm.pool.refreshes) == 20
    for bad in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="log_z_error must be positive"):
            ebm.settle(bad)
    assert int(ebm.pool.refreshes) == 20


def test_log_evidence_settles_longer_than_the_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    ebm = quadratic_ebm(pool=TemperedPool(5, 60, num_moves=4, seed=2))
    x = data_of(ebm, 30)
    saddle = make(ebm, size=30)
    saddle.step(x)
    asked = []
    monkeypatch.setattr(LVEBM, "settle", lambda self, log_z_error=None: asked.append(log_z_error))
    with saddle.averaged():
        pass
    saddle.log_evidence(x)
    assert asked == [None, 0.01]


# --- the log evidence of held-out data ------------------------------------------------------


def at_average(ebm: LVEBM, x: Tensor, guide: str = "particles") -> Saddle:
    """A Saddle whose averages are the θ of `ebm`, and whose own θ is far away."""
    saddle = make(ebm, guide=guide, size=30, lr=1e-9)
    saddle.step(x)
    for p in ebm.f.parameters():
        saddle.average.values[p] = p.detach().clone()
    with torch.no_grad():
        ebm.f.linear += 0.8
    return saddle


@contextmanager
def truth(saddle: Saddle) -> Iterator[LVEBM]:
    """The LVEBM at its averaged parameters."""
    with saddle.average.swapped_in():
        yield saddle.ebms[0]


@pytest.mark.usefixtures("whole_settling")
def test_log_evidence_is_that_of_the_closed_form() -> None:
    """At the averages, minibatch by minibatch; false alarm 6e-7. That of θ itself is another.

    Standard errors are those of log Z, as the pool states it, and of the rows: 16 particles in
    each of two runs leave less than 0.2 for one of them.
    """
    ebm = make_quadratic(pool=TemperedPool(6, 120, num_moves=4, seed=1))
    x = draw_x(ebm, 90, seed=1)
    saddle = at_average(ebm, x)
    value, _ = saddle.log_evidence(x)
    with saddle.averaged():
        error = math.hypot(float(ebm.pool.log_partition_std_error), 0.2 / math.sqrt(90))
    with truth(saddle):
        exact = float(ebm.f.log_evidence(x).detach().mean())
    assert abs(value - exact) < 5 * error
    assert abs(value - float(ebm.f.log_evidence(x).detach().mean())) > 10 * error


@pytest.mark.usefixtures("whole_settling")
def test_the_error_is_that_of_the_mean_over_data() -> None:
    ebm = make_quadratic(pool=TemperedPool(3, 40))
    x = draw_x(ebm, 120, seed=1)
    saddle = at_average(ebm, x)
    _, error = saddle.log_evidence(x)
    with truth(saddle):
        exact = stats.sem(ebm.f.log_evidence(x).detach().numpy())
    assert error == pytest.approx(exact, rel=0.1)


@pytest.mark.parametrize("guide", GUIDES)
def test_log_evidence_changes_nothing(guide: str) -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, guide=guide, lr=0.05), data_of(ebm, 20)
    for _ in range(3):
        saddle.step(x)
    before, history = state_of(saddle), saddle.history
    names = set(pyro.get_param_store())
    trained = [p.requires_grad for p in ebm.parameters()]
    with assert_global_rng_untouched():
        value = saddle.log_evidence(x[:9])
        with torch.random.fork_rng():
            torch.manual_seed(99)
            again = saddle.log_evidence(x[:9])
    assert value == again and all(type(v) is float for v in value)
    assert same(before, state_of(saddle)) and saddle.history.equals(history)
    assert set(pyro.get_param_store()) == names
    assert [p.requires_grad for p in ebm.parameters()] == trained
    assert all(p.grad is None or not p.grad.any() for p in ebm.parameters())


@pytest.mark.usefixtures("whole_settling")
def test_before_the_first_step_the_parameters_count_as_they_are() -> None:
    """And the pool follows them: θ away from the base has another log Z than 0."""
    ebm = make_quadratic(pool=TemperedPool(6, 120, num_moves=4, seed=1))
    x = draw_x(ebm, 90, seed=1)
    before = snapshot(ebm)
    value, _ = make(ebm, size=30).log_evidence(x)
    assert same(before, snapshot(ebm)) and abs(float(ebm.f.log_partition().detach())) > 0.5
    assert value == pytest.approx(float(ebm.f.log_evidence(x).detach().mean()), abs=0.2)


def test_a_single_datum_has_an_evidence_without_an_error() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, size=None), data_of(ebm, 20)
    saddle.fit(x, num_steps=2, held_out=(x[:1],), progress=False)
    assert saddle.history["log_evidence"].notna().tolist() == [True, False, True]
    assert saddle.history["log_evidence_se"].isna().all()


def test_log_evidence_of_a_frozen_energy_uses_its_pool_as_it_is() -> None:
    """With an SVI guide and the exact log Z in the pool, the closed form to the error of rows."""
    ebm = warm(make_quadratic(pool=TemperedPool(3, 40)), 1)
    x = draw_x(ebm, 64, seed=1)
    saddle = make(ebm, guide="AutoNormal", lr=0.05)
    ebm.pool.log_partition = ebm.f.log_partition().detach()
    with ebm.frozen():
        for _ in range(4):
            saddle.step(x)
        value, _ = saddle.log_evidence(x)
    assert int(ebm.pool.refreshes) == 1
    exact = float(ebm.f.log_evidence(x).detach().mean())
    assert abs(value - exact) < 5 * 0.2 / math.sqrt(64)


def test_log_evidence_takes_off_what_the_pool_has_missed() -> None:
    """A pool that is 2 nats too low; annealing finds them to 0.04 nats."""
    ebm = warm(make_quadratic(pool=TemperedPool(3, 40)), 1)
    x = draw_x(ebm, 64, seed=1)
    ebm.pool.log_partition = ebm.f.log_partition().detach() - 2.0
    ebm.pool.log_z_variance = torch.zeros_like(ebm.pool.log_z_variance)
    with ebm.frozen():
        value, _ = make(ebm, guide="AutoNormal").log_evidence(x)
    exact = float(ebm.f.log_evidence(x).detach().mean())
    assert abs(value - exact) < 5 * (0.04 + 0.2 / math.sqrt(64))


class FourSquares(nn.Module):
    """f = 4 |x|², without parameters; log Z = −2 log 3 on a standard normal x in 2-D."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 4.0 * x.square().sum(-1)


@pytest.mark.usefixtures("whole_settling")
@pytest.mark.parametrize("with_parameters", [False, True])
def test_the_pool_of_a_fixed_energy_catches_up_once(with_parameters: bool) -> None:
    """Its log Z is that of the energy, within 5 standard errors, and not that of the base."""
    pool = TemperedPool(4, 100, num_moves=4)
    if with_parameters:
        ebm = quadratic_ebm(2, 1, pool=pool)
        log_z = float(ebm.f.log_partition().detach())
    else:
        standard = [dist.Normal(torch.zeros(d).double(), 1.0).to_event(1) for d in (2, 1)]
        ebm = LVEBM(FourSquares(), *standard, pool=pool)
        log_z = -2.0 * math.log(3.0)
    x = data_of(ebm, 20) if with_parameters else 0.3 * normal((20, 2), 1)
    saddle = make(ebm, guide="AutoNormal")
    with ebm.frozen():
        saddle.step(x)
        assert int(pool.refreshes) == 20
        saddle.step(x)
        saddle.log_evidence(x)
    assert int(pool.refreshes) == 20 and ebm.pool_is_fresh()
    error = float(pool.log_partition_std_error)
    assert error < 0.1 and abs(float(pool.log_partition) - log_z) < 5 * error
    assert abs(log_z) > 10 * error  # the log Z of the base, 0, is another


def test_a_fit_of_a_guide_at_frozen_theta_trains_the_guide() -> None:
    """The evidence does not depend on the guide: every evaluation is as good as the first."""
    ebm = warm(quadratic_ebm(), 10)
    x = data_of(ebm, 40)
    saddle = make(ebm, guide="AutoNormal", size=None, lr=0.05)
    with ebm.frozen():
        saddle.step(x)
        start = parameters(saddle)
        saddle.fit(x, num_steps=60, held_out=(x[:10],), evaluate_every=20, progress=False)
    values = saddle.history["log_evidence"].dropna()
    assert len(values) == 4 and values.nunique() == 1
    for name, value in parameters(saddle).items():
        moved = (value - start[name]).abs().max()
        assert (moved == 0.0) if name.startswith("ebm.") else (moved > 0.3), name


def test_latents_outside_the_data_are_refused() -> None:
    ebm = quadratic_ebm()

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=5) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal((z * w).sum(-1), 1.0), obs=x[i].sum(-1))

    x = data_of(ebm, 20)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=1)
    saddle.step(x)
    before = state_of(saddle)
    with pytest.raises(ValueError, match="latents all lie in the same plates"):
        saddle.log_evidence(x)
    assert same(before, state_of(saddle))
    with pytest.raises(ValueError, match="latents all lie in the same plates"):
        saddle.fit(x, num_steps=2, held_out=(x,), progress=False)
    assert math.isfinite(saddle.step(x))


# --- held-out data in a fit -----------------------------------------------------------------


def scripted(saddle: Saddle, script: list[float]) -> list[dict[str, Tensor]]:
    """Let evaluations return these numbers; collect the averages that were evaluated."""
    seen: list[dict[str, Tensor]] = []
    values = iter(script)

    def log_evidence(*args: Any, **kwargs: Any) -> tuple[float, float]:
        with saddle.averaged():
            seen.append(parameters(saddle))
        return next(values), 0.1

    saddle.log_evidence = log_evidence  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("num_steps", "every", "expected"),
    [(10, 4, [0, 4, 8, 10]), (9, 3, [0, 3, 6, 9]), (2, 50, [0, 2]), (3, 1, [0, 1, 2, 3])],
)
def test_held_out_data_are_evaluated_every_so_many_steps(
    num_steps: int, every: int, expected: list[int]
) -> None:
    """Before the first step and after the last too, and the history says so."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 20)
    scripted(saddle, script := [float(k) for k in range(len(expected))])
    saddle.fit(x, num_steps=num_steps, held_out=(x,), evaluate_every=every, progress=False)
    history = saddle.history
    evaluated = history["log_evidence"].dropna()
    assert evaluated.index.tolist() == expected and evaluated.tolist() == script
    assert history["log_evidence_se"].dropna().tolist() == [0.1] * len(expected)
    assert history.index.tolist() == list(range(num_steps + 1))
    assert history["loss"].isna().tolist() == [True] + [False] * num_steps


def test_held_out_data_get_the_evidence_of_the_method() -> None:
    """In a fit after another too, whose steps go on counting."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 20)
    saddle.step(x)
    found = saddle.log_evidence(x[8:])
    saddle.fit(x[:20], num_steps=3, held_out=(x[8:],), evaluate_every=2, progress=False)
    row = saddle.history.loc[1]
    assert (row["log_evidence"], row["log_evidence_se"]) == found
    assert saddle.history["log_evidence"].dropna().index.tolist() == [1, 3, 4]


def test_keyword_arguments_are_those_of_the_training_data() -> None:
    ebm = quadratic_ebm()
    seen = []

    def model(x: Tensor, *, scale: float) -> None:
        seen.append((len(x), scale))
        with pyro.plate("data", len(x), subsample_size=8) as i:
            lvebm("scene", ebm, obs=scale * x[i])

    x = data_of(ebm, 20)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=1)
    saddle.fit(x, num_steps=2, held_out=(x[:9],), scale=0.5, progress=False)
    assert set(seen) == {(20, 0.5), (9, 0.5)}


@pytest.mark.parametrize(
    ("guide", "script", "best"),
    [
        ("particles", [0.0, -1.0, -2.0, -3.0], 0),
        ("particles", [-3.0, -1.0, -2.0, -1.5], 1),
        ("AutoNormal", [-3.0, -1.0, -2.0, -1.5], 1),
        ("particles", [-3.0, -2.0, -2.5, -1.0], 3),
        ("particles", [-math.inf, -math.inf, -5.0, -math.inf], 2),
        ("particles", [-3.0, math.nan, -2.0, math.nan], 2),
    ],
)
def test_the_best_averages_are_restored(guide: str, script: list[float], best: int) -> None:
    """Bit for bit, as they were when they were evaluated, in the guide too."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, guide=guide, lr=0.05, average_decay=0.8), data_of(ebm, 20)
    seen = scripted(saddle, script)
    losses = saddle.fit(x, num_steps=12, held_out=(x,), evaluate_every=4, progress=False)
    assert len(losses) == 12 and len(seen) == 4
    final = parameters(saddle)
    assert [same(final, values) for values in seen] == [k == best for k in range(4)]
    with saddle.averaged():
        assert same(final, parameters(saddle))
    assert ebm.pool_is_fresh() and math.isfinite(saddle.step(x))


def test_after_plain_steps_the_start_is_the_average_that_was_evaluated() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=0.05, average_decay=0.95), data_of(ebm, 20)
    for _ in range(15):
        saddle.step(x)
    seen = scripted(saddle, [0.0, -1.0])
    saddle.fit(x, num_steps=3, held_out=(x,), progress=False)
    assert same(seen[0], parameters(saddle))


@pytest.mark.parametrize(
    ("script", "patience", "steps"),
    [
        ([0.0, -1.0, -2.0], 2, 6),
        ([0.0, -1.0], 1, 3),
        ([0.0, -1.0, 1.0, 0.5, 0.6], 2, 12),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 1, 24),
        ([0.0, -1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0], None, 24),
    ],
)
def test_patience_ends_a_fit(script: list[float], patience: int | None, steps: int) -> None:
    """After so many evaluations in a row without a better one."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, num_moves=1), data_of(ebm, 20)
    seen = scripted(saddle, script)
    losses = saddle.fit(
        x, num_steps=24, held_out=(x,), evaluate_every=3, patience=patience, progress=False
    )
    assert len(losses) == saddle.step_count == steps
    assert same(seen[int(np.argmax(script))], parameters(saddle))


@pytest.mark.parametrize("value", [-1.0, -math.inf])
def test_equal_evaluations_use_up_patience(value: float) -> None:
    """As where every evaluation fails, or only a guide is trained; the last averages stay."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, num_moves=1), data_of(ebm, 20)
    seen = scripted(saddle, [value] * 9)
    losses = saddle.fit(
        x, num_steps=24, held_out=(x,), evaluate_every=3, patience=2, progress=False
    )
    assert len(losses) == 6 and same(seen[-1], parameters(saddle))


def test_a_rough_energy_counts_as_the_worst_and_other_errors_are_errors() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, num_moves=1), data_of(ebm, 20)
    errors = iter([None, RoughEnergyError("too rough"), RuntimeError("out of memory")])

    def log_evidence(*args: Any, **kwargs: Any) -> tuple[float, float]:
        error = next(errors)
        if error is not None:
            raise error
        return 0.0, 0.1

    saddle.log_evidence = log_evidence  # type: ignore[method-assign]
    with pytest.warns(TrainingWarning, match="could not be evaluated: too rough"):
        with pytest.raises(RuntimeError, match="out of memory"):
            saddle.fit(x, num_steps=9, held_out=(x,), evaluate_every=3, progress=False)
    assert saddle.history["log_evidence"].dropna().tolist() == [0.0, -math.inf]


def broken_off(error: BaseException, held_out: bool) -> tuple[Saddle, list[dict[str, Tensor]], str]:
    """A fit of 12 steps whose eighth raises; what was evaluated; and the notes of the error."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=0.05, average_decay=0.8), data_of(ebm, 20)
    seen = scripted(saddle, [-3.0, -1.0, -2.0, -2.0])
    step, count = saddle.scaled_step, iter(range(12))

    def fails(*args: Any) -> float:
        if next(count) == 7:
            raise error
        return step(*args)

    saddle.scaled_step = fails  # type: ignore[method-assign]
    options = {"held_out": (x,), "evaluate_every": 3} if held_out else {}
    with pytest.raises(type(error)) as caught:
        saddle.fit(x, num_steps=12, progress=False, **options)
    assert caught.value is error and saddle.step_count == 7
    saddle.scaled_step = step  # type: ignore[method-assign]
    return saddle, seen, " ".join(getattr(error, "__notes__", []))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no such row")])
def test_a_fit_that_is_broken_off_ends_at_the_best_averages(error: BaseException) -> None:
    saddle, seen, notes = broken_off(error, held_out=True)
    assert same(seen[1], parameters(saddle)) and not same(seen[2], seen[1])
    assert "after 7 steps, parameters now have the averages that were best" in notes
    assert math.isfinite(saddle.step(data_of(saddle.ebms[0], 20)))


def test_without_held_out_data_only_an_interrupt_ends_at_the_averages() -> None:
    """The averages of a fit that diverged are worse than what a failed step goes back to."""
    saddle, _, notes = broken_off(KeyboardInterrupt(), held_out=False)
    now = parameters(saddle)
    with saddle.averaged():
        assert same(now, parameters(saddle))
    assert "parameters now have their averages" in notes
    saddle, _, notes = broken_off(OSError("no such row"), held_out=False)
    now = parameters(saddle)
    with saddle.averaged():
        assert not same(now, parameters(saddle))
    assert notes == ""


def test_a_step_that_fails_after_a_fit_leaves_the_averages() -> None:
    """And does not go back to what θ was before the last update of the fit."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=0.05, average_decay=0.9), data_of(ebm, 20)
    saddle.fit(x, num_steps=12, progress=False)
    before = parameters(saddle)
    with pytest.raises(ValueError, match="not finite"):
        saddle.step(x * 1e200)
    assert same(before, parameters(saddle))


class Course:
    """A fit of all five by five precisions to 8 rows of N(0, I), from a base that is too wide.

    The maximum-likelihood precision of so few rows is far too large. z stays outside: it keeps
    the law of its base, so the closed form says all about every evaluation.
    """

    def __init__(self, held_out: bool) -> None:
        x, self.others = normal((8, 5), 5), normal((60, 5), 6)
        energy, mask = QuadraticEnergy(5, 1).double(), torch.ones(6, 1).double()
        mask[-1] = 0.0
        energy.raw_tril.register_hook(lambda grad: grad * mask)
        energy.linear.register_hook(lambda grad: grad * mask[:, 0])
        bases = [
            dist.Normal(torch.zeros(k).double(), std).to_event(1) for k, std in ((5, 2.5), (1, 1.0))
        ]
        self.ebm = LVEBM(energy, *bases, pool=TemperedPool(5, 64, num_moves=3))
        self.saddle = make(self.ebm, size=None, lr=0.05, max_kl=0.03, average_decay=0.8)
        self.exact_values: list[float] = []
        evaluate = self.saddle.log_evidence

        def log_evidence(*args: Any) -> tuple[float, float]:
            with self.saddle.average.swapped_in():
                self.exact_values.append(self.exact())
            return evaluate(*args)

        self.saddle.log_evidence = log_evidence  # type: ignore[method-assign]
        options = {"held_out": (self.others,), "evaluate_every": 20} if held_out else {}
        self.saddle.fit(x, num_steps=60, progress=False, **options)
        self.saddle.log_evidence = evaluate  # type: ignore[method-assign]

    def exact(self) -> float:
        return self.ebm.f.log_evidence(self.others).detach().mean().item()


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(held_out=True)


def test_evaluations_in_a_fit_are_those_of_the_closed_form(course: Course) -> None:
    """Each of the four to 0.2 nats, some four standard errors of log Z, of a range of 2."""
    found = course.saddle.history["log_evidence"].dropna()
    assert len(found) == 4
    np.testing.assert_allclose(found, course.exact_values, atol=0.2)
    assert np.ptp(course.exact_values) > 1.5


@pytest.mark.usefixtures("whole_settling")
def test_overfitting_is_undone(course: Course) -> None:
    """The evidence rises above that of the base and falls again; the fit ends at its best."""
    found = course.saddle.history["log_evidence"].dropna()
    best, noise = found.max(), 5 * float(course.ebm.pool.log_partition_std_error)
    assert 15 <= found.idxmax() <= 45 and noise < 0.4
    assert best > found.loc[0] + 1.0 and best > found.loc[60] + 1.0
    assert course.exact() == course.exact_values[int(found.argmax())]
    assert course.exact() > max(course.exact_values) - 0.2
    assert course.saddle.log_evidence(course.others)[0] == pytest.approx(best, abs=noise)
    with course.ebm.frozen():  # the pool is as it was at the evaluation, to the bit
        assert course.saddle.log_evidence(course.others)[0] == best


def test_without_held_out_data_it_stays(course: Course) -> None:
    """The sibling: the same fit ends at the last values, bit for bit."""
    blind = Course(held_out=False)
    assert "log_evidence" not in blind.saddle.history and blind.exact_values == []
    assert blind.exact() == course.exact_values[-1] < course.exact() - 1.0


@pytest.mark.parametrize("guide", ["particles", "AutoNormal"])
def test_where_training_only_harms_the_base_is_restored(guide: str) -> None:
    """The base is a Gaussian fitted to the data, these are Gaussian, and the rows are few."""
    x, others = normal((16, 4), 1, torch.float32), normal((40, 4), 2, torch.float32)
    energy = MLPEnergy(4, 1, hidden=(32,), fourier_features=16, kl_penalty=0.0, seed=0)
    ebm = LVEBM.from_data(
        energy, x, z_dim=1, base="gaussian", pool=TemperedPool(4, 48, num_moves=2)
    )
    before = theta_of(ebm)
    saddle = make(ebm, guide=guide, size=None, max_kl=0.1, average_decay=0.8)
    options: dict[str, Any] = {"evaluate_every": 10, "patience": 2, "progress": False}
    losses = saddle.fit(x, num_steps=200, held_out=(others,), **options)
    assert len(losses) == 20
    evaluated = saddle.history["log_evidence"].dropna()
    assert evaluated.is_monotonic_decreasing and evaluated.index.tolist() == [0, 10, 20]
    assert all(torch.equal(a, b) for a, b in zip(before, theta_of(ebm), strict=True))
    assert float(ebm.log_partition) == 0.0  # exactly, for f = 0
    exact = ebm.base_x.log_prob(others).mean().item()
    assert saddle.log_evidence(others)[0] == pytest.approx(exact, abs=1e-5)
    assert evaluated.loc[0] == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1; got 0"),
        ({"evaluate_every": 0}, "evaluate_every and patience must be at least 1; got 0"),
        ({"patience": 0}, "evaluate_every and patience must be at least 1; got [0-9]+ and 0"),
        ({"patience": 2, "held_out": None}, "patience needs held-out data"),
        ({"held_out": torch.zeros(4, 3)}, r"held_out must be a tuple .*held_out=\(x,\).*Tensor"),
        ({"held_out": [torch.zeros(4, 3)]}, "held_out must be a tuple .* got list"),
    ],
)
def test_impossible_fits_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything happens."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 20)
    before = snapshot(ebm)
    options = {"num_steps": 5, "held_out": (x,), "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        saddle.fit(x, **options)
    assert saddle.step_count == 0 and same(before, snapshot(ebm)) and saddle.history.empty


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_impossible_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be in"):
        make(quadratic_ebm(), average_decay=decay)


def test_bad_held_out_data_are_refused_before_the_first_step() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 20)
    for bad, message in ((x * math.inf, "infinite"), (x[:, :2], "trailing shape")):
        before = snapshot(ebm)
        with pytest.raises(ValueError, match=message):
            saddle.fit(x, num_steps=5, held_out=(bad,), progress=False)
        assert saddle.step_count == 0 and same(before, snapshot(ebm))


# --- the history ----------------------------------------------------------------------------


def test_a_step_is_a_row_of_what_happened() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=0.5), data_of(ebm, 20) + 1.0
    assert saddle.history.empty
    rows_of_steps = []
    for _ in range(6):
        loss = saddle.step(x)
        row = {
            "loss": loss,
            "kl": float(ebm.kl_of_update()),
            "halvings": float(saddle.halvings),
            "lengthening": 1.0,
            "latent_acceptance_scene_z": saddle.acceptance["scene_z"],
            **pool_statistics(ebm),
        }
        rows_of_steps.append(row)
    history = saddle.history
    assert set(history.columns) == {*rows_of_steps[0], "positive_energy"}
    assert history.index.tolist() == list(range(1, 7))
    for found, expected in zip(history.to_dict("records"), rows_of_steps, strict=True):
        found.pop("positive_energy")
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (history["halvings"] >= 1).any()
    assert ((history["kl"] > 0.0) & (history["kl"] <= default_radius(ebm.dim))).all()


@pytest.mark.parametrize("lr", [0.0, 1e-3])
@pytest.mark.parametrize("guide", ["particles", "minibatch"])
def test_energies_are_those_of_the_loss(guide: str, lr: float) -> None:
    """With particles, loss = N (mean of E_θ over the minibatch + log Z), before the update."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 20)
    saddle = make(ebm, size=8 if guide == "minibatch" else None, optim=SGD({"lr": lr}))
    for _ in range(3):
        saddle.step(x)
    history = saddle.history
    expected = 20 * (history["positive_energy"] + history["log_partition"])
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-9)


def test_at_an_optimum_positive_and_negative_energies_agree() -> None:
    """Data of the model itself: means over 25 steps differ by less than 0.3 nats, of some 7."""
    ebm = warm(make_quadratic(pool=TemperedPool(4, 80, num_moves=4)), 20)
    x = draw_x(ebm, 400, seed=2)
    saddle = make(ebm, size=None, num_moves=8, optim=SGD({"lr": 0.0}))
    for _ in range(32):
        saddle.step(x)
    last = saddle.history.tail(25).mean()
    assert last["positive_energy"] == pytest.approx(last["negative_energy"], abs=0.3)
    shifted = make(ebm, size=None, num_moves=8, optim=SGD({"lr": 0.0}))
    for _ in range(15):
        shifted.step(x + 1.5)
    last = shifted.history.tail(5).mean()
    assert last["positive_energy"] > last["negative_energy"] + 1.0


def side_by_side(a: LVEBM, b: LVEBM) -> tuple[Saddle, Tensor, Tensor]:
    pyro.clear_param_store()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=7) as i:
            lvebm("first", a, obs=x[i])
            lvebm("second", b, obs=y[i])

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.02}), num_moves=2)
    return saddle, data_of(a, 20), data_of(b, 20)


def test_columns_of_further_lvebms_name_their_site() -> None:
    a = quadratic_ebm(3, 2, seed=1, pool=TemperedPool(3, 20, num_moves=1))
    b = quadratic_ebm(2, 1, seed=2, pool=PersistentPool(30, num_moves=1))
    saddle, x, y = side_by_side(a, b)
    for _ in range(3):
        saddle.step(x, y)
    own = {
        "loss",
        "kl",
        "halvings",
        "lengthening",
        "latent_acceptance_first_z",
        "latent_acceptance_second_z",
    }
    columns = {f"{name}@second" for name in (*pool_statistics(b), "positive_energy")}
    history = saddle.history
    assert set(history.columns) == {*own, *pool_statistics(a), "positive_energy", *columns}
    assert history.notna().all(axis=None)
    for suffix, ebm in (("", a), ("@second", b)):
        for name, value in pool_statistics(ebm).items():
            assert history[f"{name}{suffix}"].iloc[-1] == value
    assert not (history["positive_energy"] == history["positive_energy@second"]).any()


@pytest.mark.parametrize("guide", ["AutoNormal", "amortised"])
def test_an_svi_guide_has_a_history_without_acceptance(guide: str) -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, guide=guide), data_of(ebm, 20)
    for _ in range(2):
        saddle.step(x)
    columns = saddle.history.columns
    assert "positive_energy" in columns and not any("latent" in name for name in columns)


def test_a_model_without_an_lvebm_has_a_short_history() -> None:
    saddle = Saddle(factor_model, lambda: None, SGD({"lr": 0.5}))
    saddle.fit(num_steps=WINDOW + 1, progress=False)
    assert list(saddle.history.columns) == ["loss", "kl", "halvings", "lengthening"]
    assert len(saddle.history) == WINDOW + 1 and (saddle.history["kl"] == 0.0).all()


def test_a_step_that_failed_has_no_row() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 20)
    saddle.step(x)
    with pytest.raises(ValueError, match="NaN"):
        saddle.step(x * math.inf)
    saddle.step(x)
    assert saddle.history.index.tolist() == [1, 2]


# --- warnings -------------------------------------------------------------------------------


ROWS = normal((30, 3), 4)
SHORT = 20


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 20 steps, which show the same as those of 50."""
    monkeypatch.setattr(history, "WINDOW", SHORT)


def sharp(pool: Pool, precision: float) -> LVEBM:
    """p_θ = N(·, I / precision) in five whitened dimensions, off the centre of the base."""
    ebm = quadratic_ebm(pool=pool)
    ebm.f.set_precision(precision * torch.eye(5).double(), torch.ones(5).double())
    return ebm


class Lopsided(PersistentPool):
    """One chain in a hundred has all the weight."""

    def _advance(self, *args: Any) -> None:
        super()._advance(*args)
        heavy = torch.arange(self.num_chains) < self.num_chains // 100
        self.log_weights = torch.log_softmax(torch.where(heavy, 0.0, -30.0).double(), 0)


def few_effective() -> Saddle:
    return make(sharp(Lopsided(400, num_moves=2), 4.0), optim=SGD({"lr": 1e-9}))


def short_ladder() -> Saddle:
    return make(sharp(TemperedPool(2, 48, num_moves=2), 60.0), optim=SGD({"lr": 1e-9}))


def refused_moves() -> Saddle:
    """Nine moves of ten are refused: from the start, by its step size, and as the kernel asks."""
    saddle = make(sharp(tiny_pool(), 1.0), lr=1e-3, kernel=MALA(0.1))
    initialise(saddle.guide, ROWS)
    saddle.guide.step_size("scene_z").fill_(8.0)
    return saddle


def huge_updates() -> Saddle:
    return make(sharp(tiny_pool(), 1.0), optim=SGD({"lr": 1e6}))


PROVOKED = {
    "the effective sample size of the pool": few_effective,
    "levels 0 and 1 of the pool exchange only": short_ladder,
    "of the Langevin moves of the latent particles are accepted": refused_moves,
    "updates are halved": huge_updates,
}


def warnings_of(saddle: Saddle, num_steps: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            saddle.step(ROWS)
    assert all(issubclass(w.category, TrainingWarning) for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("words", PROVOKED)
def test_each_symptom_is_warned_of_once(words: str) -> None:
    """After the first window of steps, with the step, and not again while it lasts."""
    saddle = PROVOKED[words]()
    assert warnings_of(saddle, SHORT - 1) == []
    (text,) = warnings_of(saddle, 1)
    assert text.startswith(f"step {SHORT}: ") and words in text
    assert warnings_of(saddle, SHORT) == []
    with pytest.warns(TrainingWarning, match=words):  # another Saddle says it again
        again = PROVOKED[words]()
        for _ in range(SHORT):
            again.step(ROWS)


@pytest.mark.usefixtures("short_windows")
def test_a_warning_may_come_late() -> None:
    """When the last steps, not those of the first window, show the symptom."""
    ebm = sharp(tiny_pool(), 1.0)
    saddle = make(ebm, optim=SGD({"lr": 1e-4}))
    assert warnings_of(saddle, SHORT) == []
    for group in saddle.optim.optim_objs.values():
        group.param_groups[0]["lr"] = 1e6
    (text,) = warnings_of(saddle, SHORT)
    assert text.startswith(f"step {2 * SHORT}: updates are halved 21 times")


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(("num_steps", "found"), [(SHORT // 2, True), (SHORT // 2 - 1, False)])
def test_the_end_of_a_short_fit_is_looked_at(num_steps: int, found: bool) -> None:
    """Where there is half a window of steps, which say more than the noise of a few."""
    saddle = huge_updates()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saddle.fit(ROWS, num_steps=num_steps, progress=False)
    texts = [str(w.message) for w in caught]
    assert [t.startswith(f"step {num_steps}: updates are halved") for t in texts] == [True] * found


@pytest.mark.usefixtures("short_windows")
def test_a_second_lvebm_is_named() -> None:
    a = quadratic_ebm(3, 2, seed=1)
    b = quadratic_ebm(2, 1, seed=2, pool=TemperedPool(2, 48, num_moves=2))
    b.f.set_precision(torch.tensor([900.0, 900.0, 1.0]).double().diag())
    saddle, x, y = side_by_side(a, b)
    saddle.optim = SGD({"lr": 1e-9})
    with pytest.warns(TrainingWarning, match="levels 0 and 1 of the pool@second exchange only"):
        for _ in range(SHORT):
            saddle.step(x, y)


@pytest.mark.usefixtures("short_windows")
def test_a_warning_as_an_error_stops_after_the_step_and_training_can_go_on() -> None:
    saddle, x = huge_updates(), ROWS
    with pytest.raises(TrainingWarning):  # warnings are errors in these tests
        for _ in range(SHORT):
            saddle.step(x)
    assert saddle.step_count == SHORT == len(saddle.history)
    assert math.isfinite(saddle.step(x))


@pytest.mark.usefixtures("short_windows")
def test_a_warning_points_at_the_caller() -> None:
    saddle, x = huge_updates(), ROWS
    with pytest.warns(TrainingWarning) as caught:
        saddle.fit(x, num_steps=SHORT, progress=False)
    (warning,) = caught
    assert warning.filename == __file__


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(
    ("pool", "guide"),
    [
        (lambda: TemperedPool(6, 48, num_moves=3), "particles"),
        (lambda: TemperedPool(6, 48, num_moves=3), "AutoNormal"),
        (lambda: PersistentPool(100, num_moves=3), "particles"),
    ],
)
def test_healthy_training_raises_no_warning(pool: Callable[[], Pool], guide: str) -> None:
    """Warnings are errors here. Towards the data's own law, from the base."""
    source = make_quadratic()
    x = draw_x(source, 80, seed=3)
    ebm = LVEBM.from_data(QuadraticEnergy(4, 2).double(), x, z_dim=2, pool=pool())
    saddle = make(ebm, guide=guide, size=40, lr=0.01, num_moves=3)
    saddle.fit(x, num_steps=3 * SHORT, progress=False)
    last = saddle.history.tail(SHORT).mean()
    assert last["ess"] > 2 * LOW_ESS * len(ebm.pool.log_weights)


def test_a_small_learning_rate_is_lengthened_in_a_fit_only() -> None:
    """A rate of 1e-5 moves the model by far less than half of the radius."""

    def moved(how: Callable[[Saddle, Tensor], object]) -> Saddle:
        ebm = quadratic_ebm()
        saddle, x = make(ebm, lr=1e-5), data_of(ebm, 20) + 1.0
        how(saddle, x)
        return saddle

    flat = {"schedule": lambda _: 1.0, "progress": False}
    fitted = moved(lambda saddle, x: saddle.fit(x, num_steps=4, **flat)).history
    assert (fitted["lengthening"] == 8.0).all()
    plain = moved(lambda saddle, x: saddle.fit(x, num_steps=4, min_kl=0.0, **flat)).history
    steps = moved(lambda saddle, x: [saddle.step(x) for _ in range(4)]).history
    assert (plain["lengthening"] == 1.0).all() and (steps["lengthening"] == 1.0).all()
    assert plain["kl"].iloc[0] == steps["kl"].iloc[0]
    ratio = fitted["kl"].iloc[0] / plain["kl"].iloc[0]
    assert ratio == pytest.approx(64.0, rel=0.2)
    with pytest.raises(ValueError, match="min_kl must not be negative"):
        moved(lambda saddle, x: saddle.fit(x, num_steps=1, min_kl=-1.0, **flat))


def test_a_short_update_reaches_half_of_the_radius_by_default() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=1e-2), data_of(ebm, 20) + 1.0
    saddle.fit(x, num_steps=3, schedule=lambda _: 0.5, progress=False)
    history = saddle.history
    longer = history[(history["lengthening"] > 1.0) & (history["lengthening"] < 8.0)]
    expected = 0.25 * 0.5 * default_radius(ebm.dim)
    assert len(longer) and longer["kl"].to_numpy() == pytest.approx(expected, rel=0.1)


def test_a_lengthened_update_reaches_min_kl() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm, lr=1e-3), data_of(ebm, 20) + 1.0
    saddle.fit(x, num_steps=3, schedule=lambda _: 0.5, min_kl=1e-4, progress=False)
    history = saddle.history
    longer = history[(history["lengthening"] > 1.0) & (history["lengthening"] < 8.0)]
    assert len(longer) and longer["kl"].to_numpy() == pytest.approx(2.5e-5, rel=0.1)


@pytest.mark.parametrize("as_array", [False, True])
def test_held_out_rows_of_nothing_are_refused(as_array: bool) -> None:
    """A row of NaN has log p = 0 whatever θ is; rows with one entry observed are welcome."""
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 12)
    rows = x[:4].clone()
    rows[2] = torch.nan
    with pytest.raises(ValueError, match="1 rows without an observed entry, the first being row 2"):
        saddle.fit(x, num_steps=1, held_out=(rows.numpy() if as_array else rows,), progress=False)
    assert saddle.step_count == 0
    with pytest.raises(ValueError, match="held_out has no rows"):
        saddle.fit(x, num_steps=1, held_out=(x[:0],), progress=False)


@pytest.mark.parametrize("as_array", [False, True])
@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        ([0, 1, 2], "none of the 12 training rows has an observed entry"),
        ([1], r"no training row has entries \[1\] of x"),
        ([0, 2], r"no training row has entries \[0, 2\] of x"),
    ],
)
def test_training_rows_of_nothing_are_refused(
    unseen: list[int], message: str, as_array: bool
) -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 12)
    x[:, unseen] = torch.nan
    rows = x.numpy() if as_array else x
    with pytest.raises(ValueError, match=message):
        saddle.fit(rows, num_steps=1, progress=False)
    assert saddle.step_count == 0
    with ebm.frozen():  # particles of rows that lack the same entry
        saddle.fit(rows, num_steps=1, progress=False)


def test_single_training_rows_may_hold_nothing() -> None:
    ebm = quadratic_ebm()
    saddle, x = make(ebm), data_of(ebm, 12)
    x[3], x[1:, 0] = torch.nan, torch.nan
    assert math.isfinite(saddle.fit(x, num_steps=1, progress=False)[0])


def test_unknown_labels_of_held_out_rows_are_welcome() -> None:
    x, y = normal((3, 2), 0, torch.float32), torch.tensor([0.0, torch.nan, 1.0])
    check_fit((x, y), 1, None, None, (x, y), None, 1, 1)
    x[1] = torch.nan
    with pytest.raises(ValueError, match="the first being row 1"):
        check_fit((x, y), 1, None, None, (x, y), None, 1, 1)
