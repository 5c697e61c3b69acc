# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from referee import (
    ALPHA,
    CERTAIN,
    gaussian_draws,
    gaussian_log_partition,
    gaussian_moments,
    mean_p_value,
    normal,
    seeded,
)
from torch import Tensor

from pyro_lvebm.sampling import annealing, langevin
from pyro_lvebm.sampling.annealing import Annealed, Schedule, anneal, pilot
from pyro_lvebm.sampling.base import standard_normal
from pyro_lvebm.sampling.langevin import ValueAndGrad
from pyro_lvebm.sampling.preconditioning import inverse_root
from pyro_lvebm.sampling.weights import log_mean_exp, log_mean_std_error

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# Two problems in three dimensions: ½ |v|² + f = ½ vᵀPv + bᵀv.
_ROOT = 0.7 * normal((3, 3), 1)
PRECISIONS = torch.zeros(2, 3, 3, dtype=torch.float64)
PRECISIONS[0] = _ROOT @ _ROOT.T + 0.7 * torch.eye(3)
PRECISIONS[1] = torch.diag(torch.tensor([0.6, 1.5, 4.0]))
LINEARS = torch.tensor([[0.5, -0.8, 0.3], [1.0, 0.0, -0.7]], dtype=torch.float64)
LOG_C = torch.tensor(
    [gaussian_log_partition(p, b) for p, b in zip(PRECISIONS, LINEARS, strict=True)],
    dtype=torch.float64,
)


def residual(dtype: torch.dtype = torch.float64) -> ValueAndGrad:
    a = (PRECISIONS - torch.eye(3, dtype=torch.float64)).to(dtype)
    b = LINEARS.to(dtype)[:, None]

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        av = v @ a
        return (v * (0.5 * av + b)).sum(-1), av + b

    return evaluate


def fixed_schedule(count: int = 6, dtype: torch.dtype = torch.float64) -> Schedule:
    betas = torch.linspace(0.0, 1.0, count + 1, dtype=dtype) ** 1.3
    steps = torch.linspace(0.5, 0.2, count + 1, dtype=dtype)[:, None, None].expand(-1, 2, 1)
    return Schedule(betas, steps)


def scaled_schedule(count: int = 6, dtype: torch.dtype = torch.float64) -> Schedule:
    """A fixed schedule with the exact scale of each temperature and problem."""
    schedule = fixed_schedule(count, dtype)
    eye = torch.eye(3, dtype=torch.float64)
    curvature = eye + schedule.betas.double()[:, None, None, None] * (PRECISIONS - eye)
    return schedule._replace(scales=inverse_root(curvature, 10**9).to(dtype))


def cut(schedule: Schedule, part: slice) -> Schedule:
    return Schedule(*(None if field is None else field[part] for field in schedule))


class AlwaysAccepts(langevin.MALA):
    """MALA without its test."""

    def step(self, f, state, step_size, *, inverse_temperature, base, scale, generator):
        grad = base.energy_and_grad(state.u)[1] + inverse_temperature * state.grad
        new, _ = langevin._propose(f, state, grad, step_size, generator, scale)
        return new, torch.full_like(new.f, 0.6)


def forward(
    schedule: Schedule,
    *,
    resample: bool,
    num_moves: int = 2,
    runs: int = 1200,
    dtype: torch.dtype = torch.float64,
    independence: bool = False,
) -> Annealed:
    v = normal((runs, 2, 16, 3), 2, dtype)
    result = anneal(
        residual(dtype),
        v,
        schedule,
        num_moves=num_moves,
        resample=resample,
        independence=independence,
        generator=seeded(3),
    )
    assert result.log_ratio.shape == (runs, 2) and result.log_ratio.dtype == dtype
    assert result.log_weights.shape == (runs, 2, 16) and result.state.u.shape == v.shape
    return result


def ratio_p_value(result: Annealed, log_ratio: Tensor = LOG_C) -> float:
    """Student's test that Ĉ / C has mean 1 over independent runs, Bonferroni over problems."""
    return mean_p_value(torch.exp(result.log_ratio.double() - log_ratio), 1.0)


def moment_p_value(result: Annealed) -> float:
    """Student's test of E[Ĉ φ] = C E_p[φ] for first and second moments φ of the last particles."""
    v = result.state.u.double()
    phi = torch.cat([v, v**2, (v[..., [0]] * v[..., [1]])], -1)  # (runs, problems, n, 7)
    w = torch.softmax(result.log_weights.double(), -1)
    weighted = (w[..., None] * phi).sum(-2)
    ratio = torch.exp(result.log_ratio.double() - LOG_C)[..., None]
    exact = []
    for precision, linear in zip(PRECISIONS, LINEARS, strict=True):
        mean, covariance = gaussian_moments(precision, linear)
        second = covariance + np.outer(mean, mean)
        exact.append([*mean, *second.diagonal(), second[0, 1]])
    return mean_p_value(ratio * weighted, np.array(exact))


SCHEDULES = pytest.mark.parametrize("make", [fixed_schedule, scaled_schedule])


@pytest.mark.parametrize(
    ("resample", "num_moves", "count", "dtype", "independence", "make"),
    [
        (True, 2, 6, torch.float64, False, fixed_schedule),
        (True, 2, 6, torch.float64, True, scaled_schedule),
        (True, 1, 3, torch.float32, False, scaled_schedule),
        (True, 1, 3, torch.float32, True, fixed_schedule),
        (False, 2, 6, torch.float64, False, scaled_schedule),
        (False, 2, 6, torch.float64, True, fixed_schedule),
        (False, 1, 10, torch.float32, False, fixed_schedule),
        (False, 1, 10, torch.float32, True, scaled_schedule),
    ],
)
def test_estimate_is_unbiased_and_draws_follow_the_target(
    resample: bool, num_moves: int, count: int, dtype: torch.dtype, independence: bool, make
) -> None:
    """SMC and AIS: mean of Ĉ / C, and of Ĉ φ / C, over 1,200 runs. False alarms: 2e-3 a case."""
    schedule = make(count, dtype)
    result = forward(
        schedule, resample=resample, num_moves=num_moves, dtype=dtype, independence=independence
    )
    assert ratio_p_value(result) > ALPHA
    assert moment_p_value(result) > ALPHA


@SCHEDULES
@pytest.mark.parametrize("resample", [True, False])
def test_both_checks_fail_for_a_schedule_off_by_one(resample: bool, make) -> None:
    late = cut(make(3), slice(1, None))  # starts at β_1 with draws of β_0
    early = cut(make(3), slice(None, -1))  # ends before β = 1
    for schedule in (late, early):
        result = forward(schedule, resample=resample)
        assert ratio_p_value(result) < CERTAIN
        assert moment_p_value(result) < CERTAIN


@pytest.mark.parametrize("resample", [True, False])
def test_both_checks_fail_for_moves_at_the_former_temperature(
    monkeypatch: pytest.MonkeyPatch, resample: bool
) -> None:
    schedule = fixed_schedule(3)
    former = dict(zip(schedule.betas[1:].tolist(), schedule.betas[:-1].tolist(), strict=True))

    class Late(langevin.MALA):
        def step(self, *args, inverse_temperature, **options):
            beta = former[inverse_temperature]
            return super().step(*args, inverse_temperature=beta, **options)

    monkeypatch.setattr(annealing, "_KERNEL", Late())
    result = forward(schedule, resample=resample, num_moves=4)
    assert ratio_p_value(result) < CERTAIN
    assert moment_p_value(result) < CERTAIN


def test_both_checks_fail_without_weights() -> None:
    result = forward(fixed_schedule(), resample=False)
    flat = result._replace(
        log_ratio=result.log_weights.mean(-1), log_weights=torch.zeros_like(result.log_weights)
    )
    assert ratio_p_value(flat) < CERTAIN  # mean log in place of log mean
    assert moment_p_value(result._replace(log_weights=flat.log_weights)) < CERTAIN


def test_checks_fail_without_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(log_weights: Tensor, _: torch.Generator) -> Tensor:
        return torch.arange(log_weights.shape[-1]).expand_as(log_weights)

    monkeypatch.setattr(annealing, "systematic_resample", keep)
    result = forward(fixed_schedule(), resample=True)
    assert ratio_p_value(result) < CERTAIN
    assert moment_p_value(result) < CERTAIN


@pytest.mark.parametrize(("make", "factor"), [(fixed_schedule, 1.0), (scaled_schedule, 2.0)])
def test_checks_fail_for_a_kernel_with_another_target(
    make, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annealing, "_KERNEL", AlwaysAccepts())
    schedule = make()
    schedule = schedule._replace(step_sizes=factor * schedule.step_sizes)
    result = forward(schedule, resample=False, num_moves=4)
    assert ratio_p_value(result) < CERTAIN
    assert moment_p_value(result) < CERTAIN


def test_checks_fail_for_independence_moves_that_are_always_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def accept(f, state, *, inverse_temperature, base, generator):
        return langevin.init_state(f, normal(tuple(state.u.shape), 9))

    monkeypatch.setattr(annealing, "independence_step", accept)
    result = forward(fixed_schedule(), resample=False, independence=True)
    assert ratio_p_value(result) < CERTAIN
    assert moment_p_value(result) < CERTAIN


# --- backwards from exact draws -------------------------------------------------------------


def reverse(schedule: Schedule, resample: bool) -> Annealed:
    draws = [
        gaussian_draws(p, b, (2000, 16), 5 + k)
        for k, (p, b) in enumerate(zip(PRECISIONS, LINEARS, strict=True))
    ]
    return anneal(
        residual(),
        torch.stack(draws, 1),
        schedule,
        resample=resample,
        generator=seeded(6),
    )


@SCHEDULES
@pytest.mark.parametrize("resample", [True, False])
def test_reverse_run_estimates_the_inverse(resample: bool, make) -> None:
    """Mean of (1 / C)^ · C over 2,000 runs from exact draws of the target. False alarms: 1e-3.

    The check rejects the forward schedule and the forward constant.
    """
    backward = make().reversed()
    assert ratio_p_value(reverse(backward, resample), -LOG_C) > ALPHA
    assert ratio_p_value(reverse(backward, resample), LOG_C) < CERTAIN
    assert ratio_p_value(reverse(make(), resample), -LOG_C) < CERTAIN


def pocket(v: Tensor) -> tuple[Tensor, Tensor]:
    """A ring of low energy around a pocket at the origin, behind a wall; two dimensions."""
    r = v.norm(dim=-1)
    inside, wall = 9.0 * torch.ones_like(r), 25.0 * torch.exp(-0.5 * ((r - 1.0) / 0.12) ** 2)
    f = torch.where(r < 1.0, inside, -1.0) + wall
    slope = -wall * (r - 1.0) / 0.12**2
    return f, (slope / r.clamp(min=1e-6))[..., None] * v


def pocket_runs(independence: bool) -> tuple[Tensor, float]:
    """64 reverse runs from exact draws, and the exact log C by quadrature in r."""
    r = torch.linspace(0.0, 9.0, 90_001, dtype=torch.float64)
    density = r * torch.exp(-0.5 * r**2 - pocket(torch.stack([r, 0.0 * r], -1))[0])
    exact = float(density.sum().log() + math.log(1e-4))
    base = normal((64 * 2000, 2), 15)
    index = torch.multinomial(torch.exp(-pocket(base)[0]), 64 * 500, True, generator=seeded(16))
    betas = torch.linspace(1.0, 0.0, 16, dtype=torch.float64)
    schedule = Schedule(betas, torch.full((16, 1, 1), 0.05, dtype=torch.float64))
    draws = base[index].reshape(64, 1, 500, 2)
    result = anneal(pocket, draws, schedule, independence=independence, generator=seeded(17))
    return -result.log_ratio[:, 0], exact


def test_independence_moves_reach_a_pocket_that_few_draws_are_in() -> None:
    """A third of the base's mass is in a pocket that has 3e-5 of the model's.

    Only particles that begin there show it to Langevin moves. Their runs have many times the usual
    1/Ẑ, and all others too small a one. False alarms: 1e-3.
    """
    found, exact = pocket_runs(True)
    relative = torch.exp(exact - found)
    assert mean_p_value(relative[:, None], 1.0) > ALPHA
    assert relative.std() < 0.1
    heavy = torch.exp(exact - pocket_runs(False)[0])
    assert heavy.std() > 10 * relative.std()
    assert heavy.median() < 0.8 and abs(relative.median() - 1.0) < 0.05


@SCHEDULES
def test_reversed_schedule_keeps_the_moves_of_each_temperature(make) -> None:
    schedule = make(4)
    backward = schedule.reversed()
    assert backward.betas.tolist() == schedule.betas.tolist()[::-1]
    steps = dict(zip(schedule.betas.tolist(), schedule.step_sizes, strict=True))
    for beta, step in zip(backward.betas.tolist(), backward.step_sizes, strict=True):
        assert torch.equal(step, steps[beta])
    assert (schedule.scales is None) == (backward.scales is None)
    if schedule.scales is not None:
        scales = dict(zip(schedule.betas.tolist(), schedule.scales, strict=True))
        assert not torch.equal(schedule.scales[0], schedule.scales[-1])
        for beta, scale in zip(backward.betas.tolist(), backward.scales, strict=True):
            assert torch.equal(scale, scales[beta])
    for a, b in zip(backward.reversed(), schedule, strict=True):
        assert a is b is None or torch.equal(a, b)


@SCHEDULES
@pytest.mark.parametrize("backward", [False, True])
def test_moves_are_made_at_each_new_temperature_with_its_own_step_and_scale(
    monkeypatch: pytest.MonkeyPatch, backward: bool, make
) -> None:
    seen = []

    class Spy(langevin.MALA):
        def step(self, f, state, step_size, *, inverse_temperature, base, scale, generator):
            corner = None if scale is None else scale[0, 0, 0].item()
            seen.append((inverse_temperature, step_size[0, 0].item(), corner))
            return super().step(
                f,
                state,
                step_size,
                inverse_temperature=inverse_temperature,
                base=base,
                scale=scale,
                generator=generator,
            )

    monkeypatch.setattr(annealing, "_KERNEL", Spy())
    schedule = make(4).reversed() if backward else make(4)
    anneal(residual(), normal((2, 2, 8, 3), 1), schedule, num_moves=2, generator=seeded(1))
    steps = schedule.step_sizes[:, 0, 0].tolist()
    corners = [None] * 5 if schedule.scales is None else schedule.scales[:, 0, 0, 0].tolist()
    assert len(set(steps)) == 5 and len(set(corners)) in (1, 5)
    once = list(zip(schedule.betas.tolist(), steps, corners, strict=True))[1:]
    assert seen == [pair for pair in once for _ in range(2)]


def test_forward_is_low_and_reverse_is_high_in_expectation() -> None:
    """E log Ĉ < log C < -E log (1/C)^, each by more than 5 standard errors."""
    schedule = fixed_schedule(2)
    lower = forward(schedule, resample=True).log_ratio
    upper = -reverse(schedule.reversed(), True).log_ratio
    for sample, sign in ((lower, -1.0), (upper, 1.0)):
        error = sample.std(0) / math.sqrt(len(sample))
        assert (sign * (sample.mean(0) - LOG_C) > 5.0 * error).all()


# --- the energies along the way -------------------------------------------------------------


def path_p_value(backward: bool, shift: int = 0) -> float:
    """Student's test of the mean of f at every temperature, over 400 runs of exact draws.

    With exact scales and no bias from resampling, E[f] under p_β has a closed form.
    """
    schedule = scaled_schedule()
    schedule = schedule.reversed() if backward else schedule
    if backward:
        laws = zip(PRECISIONS, LINEARS, strict=True)
        draws = [gaussian_draws(p, b, (400, 64), 70 + k) for k, (p, b) in enumerate(laws)]
        v = torch.stack(draws, 1)
    else:
        v = normal((400, 2, 64, 3), 71)
    result = anneal(
        residual(), v, schedule, num_moves=4, keep_path=True, resample=True, generator=seeded(72)
    )
    assert result.f_path is not None and result.f_path.shape == (7, 400, 2, 64)
    assert torch.equal(result.f_path[-1], result.state.f)
    assert torch.equal(result.f_path[0], residual()(v)[0])
    exact = torch.empty(7, 2, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    for k, beta in enumerate(schedule.betas):
        for i, (p, b) in enumerate(zip(PRECISIONS, LINEARS, strict=True)):
            mean, covariance = gaussian_moments(eye + beta * (p - eye), beta * b)
            second = covariance + np.outer(mean, mean)
            exact[k, i] = 0.5 * float(np.sum((p - eye).numpy() * second)) + float(b.numpy() @ mean)
    means = result.f_path.mean(-1).transpose(0, 1)  # (runs, T + 1, problems)
    return mean_p_value(means, exact.roll(shift, 0))


@pytest.mark.parametrize("backward", [False, True])
def test_path_holds_the_energies_at_each_temperature(backward: bool) -> None:
    """f after the moves at each β has the mean of p_β, in either direction. False alarms: 1e-3.

    Resampling biases a mean over 64 particles by less than its standard error over 400 runs. The
    check rejects a path that is off by one temperature, to either side.
    """
    assert path_p_value(backward) > ALPHA
    for shift in (-1, 1):
        assert path_p_value(backward, shift) < CERTAIN


@pytest.mark.parametrize("resample", [True, False])
def test_keeping_the_path_changes_nothing_else(resample: bool) -> None:
    v = normal((4, 2, 8, 3), 7)
    plain, kept = (
        anneal(
            residual(), v, scaled_schedule(), resample=resample, keep_path=k, generator=seeded(1)
        )
        for k in (False, True)
    )
    assert plain.f_path is None and torch.equal(plain.log_ratio, kept.log_ratio)
    assert all(torch.equal(a, b) for a, b in zip(plain.state, kept.state, strict=True))


# --- properties of a run --------------------------------------------------------------------


def test_weights_agree_with_the_ratio() -> None:
    schedule = fixed_schedule()
    importance = forward(schedule, resample=False, runs=10)
    torch.testing.assert_close(importance.log_ratio, log_mean_exp(importance.log_weights))
    assert importance.log_weights.std() > 0.05
    sequential = forward(schedule, resample=True, runs=10)
    assert torch.equal(sequential.log_weights, torch.zeros(10, 2, 16, dtype=torch.float64))


@pytest.mark.parametrize("resample", [True, False])
def test_a_constant_energy_is_exact(resample: bool) -> None:
    def constant(v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full(v.shape[:-1], 2.5, dtype=v.dtype), torch.zeros_like(v)

    result = anneal(
        constant, normal((3, 2, 8, 4), 1), fixed_schedule(), resample=resample, generator=seeded(1)
    )
    torch.testing.assert_close(result.log_ratio, torch.full((3, 2), -2.5, dtype=torch.float64))


@pytest.mark.parametrize("resample", [True, False])
def test_infinite_energy_is_a_wall(resample: bool) -> None:
    """f = ∞ where v_1 > 1, with a NaN gradient there: C = Φ(1). False alarms: 1e-3 a case."""

    def wall(v: Tensor) -> tuple[Tensor, Tensor]:
        outside = v[..., 0] > 1.0
        f = torch.where(outside, math.inf, torch.zeros_like(v[..., 0]))
        return f, torch.where(outside[..., None], math.nan, torch.zeros_like(v))

    v = normal((2000, 2, 16, 3), 2)
    schedule = fixed_schedule(3)
    result = anneal(wall, v, schedule, resample=resample, generator=seeded(3))
    inside = torch.special.ndtr(torch.tensor(1.0, dtype=torch.float64))
    assert mean_p_value(result.log_ratio.exp(), inside) > ALPHA
    assert mean_p_value(result.log_ratio.exp(), 0.98 * inside) < CERTAIN
    alive = result.log_weights > -math.inf
    assert (result.state.u[..., 0][alive] <= 1.0).all()


@pytest.mark.parametrize("resample", [True, False])
def test_runs_repeat_by_generator_and_leave_their_input(resample: bool) -> None:
    v = normal((4, 2, 8, 3), 7)
    copy = v.clone()

    def once(seed: int) -> Annealed:
        return anneal(residual(), v, fixed_schedule(), resample=resample, generator=seeded(seed))

    first, again, other = once(1), once(1), once(2)
    assert torch.equal(v, copy)
    assert torch.equal(first.log_ratio, again.log_ratio)
    assert torch.equal(first.state.u, again.state.u)
    assert not torch.equal(first.state.u, other.state.u)
    value, grad = residual()(first.state.u)
    torch.testing.assert_close(first.state.f, value)
    torch.testing.assert_close(first.state.grad, grad)


def test_nan_energy_is_refused() -> None:
    def broken(v: Tensor) -> tuple[Tensor, Tensor]:
        f, grad = residual()(v)
        return torch.where(v[..., 0] > 1.0, math.nan, f), grad

    v = normal((4, 2, 8, 3), 7)
    with pytest.raises(ValueError, match="NaN at the start of annealing"):
        anneal(broken, v, fixed_schedule(), generator=seeded(1))
    with pytest.raises(ValueError, match="NaN at the start of annealing"):
        pilot(broken, v[:1], generator=seeded(1))


# --- the pilot ------------------------------------------------------------------------------


def exact_relative_ess(beta: float, beta_next: float) -> float:
    """(E w)² / E w² under p_β for w = exp(-(β' - β) f): C(β')² / (C(β) C(2β' - β)), both problems.

    This is what ESS / n tends to.
    """

    def log_c(b: float) -> np.ndarray:
        eye = torch.eye(3, dtype=torch.float64)
        return np.array(
            [
                gaussian_log_partition(eye + b * (p - eye), b * linear)
                for p, linear in zip(PRECISIONS, LINEARS, strict=True)
            ]
        )

    return float(np.exp(2 * log_c(beta_next) - log_c(beta) - log_c(2 * beta_next - beta)).mean())


@pytest.mark.parametrize("relative_ess", [0.6, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pilot_finds_a_schedule_with_the_wanted_ess(
    relative_ess: float, dtype: torch.dtype
) -> None:
    """Against the closed form for n = 20,000, where ESS / n has a standard error below 0.01."""
    v = normal((1, 2, 20000, 3), 11, dtype)
    schedule = pilot(residual(dtype), v, relative_ess=relative_ess, generator=seeded(12))
    betas = schedule.betas.tolist()
    assert schedule.betas.dtype == schedule.step_sizes.dtype == dtype
    assert betas[0] == 0.0 and betas[-1] == 1.0 and len(betas) >= 3
    assert all(a < b for a, b in itertools.pairwise(betas))
    assert schedule.step_sizes.shape == (len(betas), 2, 1)
    ratios = [exact_relative_ess(a, b) for a, b in itertools.pairwise(betas)]
    np.testing.assert_allclose(ratios[:-1], relative_ess, atol=0.03)
    assert ratios[-1] > relative_ess - 0.03


def first_step_p_value(relative_ess: float, claimed: float) -> float:
    """Student's test of the exact relative ESS of the first step over 30 pilots of exact draws."""
    ratios = []
    for seed in range(30):
        v = normal((1, 2, 2000, 3), 100 + seed)
        f = residual()(v)[0]
        ratios.append(exact_relative_ess(0.0, annealing._next_beta(f, 0.0, relative_ess)))
    return mean_p_value(np.array(ratios)[:, None], claimed)


def test_next_temperature_has_the_wanted_ess() -> None:
    """False alarms: 1e-3 a case. The check rejects a target that is 0.03 away."""
    for target in (0.7, 0.9):
        assert first_step_p_value(target, target) > ALPHA
        assert first_step_p_value(target, target - 0.03) < CERTAIN


def test_next_temperature_is_the_largest() -> None:
    f = residual()(normal((1, 2, 50, 3), 13))[0]

    def relative(beta: float, beta_next: float) -> float:
        return float(annealing.ess(-(beta_next - beta) * f).mean() / 50)

    for beta in (0.0, 0.3):
        found = annealing._next_beta(f, beta, 0.8)
        assert beta < found < 1.0
        assert relative(beta, found) >= 0.8 > relative(beta, found + 0.004 * (found - beta))
    assert annealing._next_beta(1e-3 * f, 0.0, 0.8) == 1.0
    assert annealing._next_beta(1e12 * f, 0.5, 0.99) == pytest.approx(0.5 + 1e-7, abs=1e-12)


def test_pilot_adapts_the_step_of_each_problem() -> None:
    """At the end the acceptance of each problem is near the target 0.574; at first it is not."""

    def stiff(v: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.tensor([100.0, 3.0], dtype=v.dtype)[:, None, None]
        return 0.5 * (k * v * v).sum(-1), k * v

    v = normal((1, 2, 2000, 3), 14)
    schedule = pilot(stiff, v, relative_ess=0.9, num_moves=4, generator=seeded(15))
    last = schedule.step_sizes[-1].flatten()
    assert last[0] < 0.1 * last[1]
    exact = normal((1, 2, 2000, 3), 16) / torch.tensor([101.0, 4.0]).sqrt()[:, None, None]
    for step, near in ((last[:, None], True), (schedule.step_sizes[0], False)):
        _, accepted = langevin.MALA().step(
            stiff, langevin.init_state(stiff, exact), step, generator=seeded(17)
        )
        assert ((accepted.mean((0, -1)) - 0.574).abs() < 0.1).all() == near


def test_pilot_adapts_steps_to_given_temperatures() -> None:
    """The schedule found at other temperatures is that of the free run, step for step."""
    v = normal((1, 2, 500, 3), 18)
    free = pilot(residual(), v, relative_ess=0.8, generator=seeded(19))
    given = pilot(residual(), v, betas=free.betas, generator=seeded(19))
    assert torch.equal(given.betas, free.betas)
    assert torch.equal(given.step_sizes, free.step_sizes)
    betas = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    other = pilot(residual(), v, betas=betas, generator=seeded(19))
    assert torch.equal(other.betas, betas) and other.step_sizes.shape == (9, 2, 1)
    assert (other.step_sizes[-1] != 0.3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioned_pilot_finds_the_scale_of_each_temperature(dtype: torch.dtype) -> None:
    """L Lᵀ times the exact curvature is I at every β, within noise of 20,000 gradients.

    An entry of the mean of outer products has a relative error of about 1 / √20,000 = 0.007; the
    limit is ten times as large.
    """
    v = normal((1, 2, 20000, 3), 22, dtype)
    schedule = pilot(residual(dtype), v, num_moves=4, precondition=True, generator=seeded(23))
    count = len(schedule.betas)
    assert schedule.scales is not None and schedule.scales.dtype == dtype
    assert schedule.scales.shape == (count, 2, 3, 3) and count > 4
    eye = torch.eye(3, dtype=torch.float64)
    scales, betas = schedule.scales.double(), schedule.betas.double()
    root = torch.linalg.cholesky(eye + betas[:, None, None, None] * (PRECISIONS - eye))
    white = root.mT @ scales
    assert (white @ white.mT - eye).abs().max() < 0.07
    last = root[-1].mT @ scales[0]  # the scale of another temperature does not fit
    assert (last @ last.mT - eye).abs().max() > 0.3
    assert pilot(residual(dtype), v[:, :, :50], generator=seeded(23)).scales is None


def test_preconditioned_moves_suit_an_ill_conditioned_energy() -> None:
    """Precisions 1 to 10^4: the step size stays near that of a round energy, 30 times larger."""
    curvature = torch.tensor([1e4, 100.0, 1.0], dtype=torch.float64)

    def narrow(v: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * ((curvature - 1.0) * v * v).sum(-1), (curvature - 1.0) * v

    v = normal((1, 1, 1000, 3), 24)
    plain, scaled = (
        pilot(narrow, v, num_moves=4, precondition=p, generator=seeded(25)) for p in (False, True)
    )
    assert scaled.step_sizes[-1].item() > 0.3
    assert plain.step_sizes[-1].item() < 0.01


@pytest.mark.parametrize("count", [2, 3, 50])
def test_preconditioned_pilot_with_few_particles(count: int) -> None:
    """Even fewer particles than dimensions give finite, invertible scales."""
    v = normal((1, 2, count, 3), 26, torch.float32)
    schedule = pilot(residual(torch.float32), v, precondition=True, generator=seeded(27))
    assert torch.isfinite(schedule.scales).all()
    assert (torch.linalg.det(schedule.scales) > 0.0).all()


def test_pilot_of_a_flat_energy_takes_one_step() -> None:
    def flat(v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(v.shape[:-1], dtype=v.dtype), torch.zeros_like(v)

    assert pilot(flat, normal((1, 3, 10, 2), 1), generator=seeded(1)).betas.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("limit", [1, 4])
def test_pilot_gives_up_beyond_its_limit(limit: int) -> None:
    v = normal((1, 2, 100, 3), 11)

    def run(max_temperatures: int) -> Schedule:
        return pilot(
            residual(),
            v,
            relative_ess=0.98,
            max_temperatures=max_temperatures,
            generator=seeded(12),
        )

    needed = len(run(400).betas) - 1
    assert needed > limit
    assert len(run(needed).betas) == needed + 1  # just enough
    for too_few in (limit, needed - 1):
        with pytest.raises(
            RuntimeError, match=rf"after {too_few} temperatures.*lower relative_ess"
        ):
            run(too_few)


# --- small functions ------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_mean_exp_is_the_formula(dim: int) -> None:
    values = 3.0 * normal((4, 5, 6), 20)
    torch.testing.assert_close(log_mean_exp(values, dim), values.exp().mean(dim).log())
    torch.testing.assert_close(log_mean_exp(values - 1e4, dim), log_mean_exp(values, dim) - 1e4)


def test_log_mean_std_error_has_the_spread_of_repetitions() -> None:
    """Mean over 400 repetitions against their own spread, whose standard error is 1/√800 = 3.5%."""
    values = 0.3 * normal((200, 400), 21)
    stated = log_mean_std_error(values, 0)
    actual = log_mean_exp(values, 0).std()
    assert stated.shape == (400,)
    assert abs(stated.mean() / actual - 1.0) < 4 * 0.036
    torch.testing.assert_close(log_mean_std_error(values - 500.0, 0), stated)
    w = values.exp()
    torch.testing.assert_close(stated, w.std(0) / w.mean(0) / math.sqrt(200))


def test_standard_normal_follows_its_template() -> None:
    like = torch.empty(0, dtype=torch.float64)
    draws = standard_normal((3, 4), like, seeded(1))
    assert draws.shape == (3, 4) and draws.dtype == torch.float64
    assert torch.equal(draws, standard_normal((3, 4), like, seeded(1)))
