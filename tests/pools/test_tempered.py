# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pool_models import (
    EYE,
    LINEAR,
    LOG_Z,
    PRECISION,
    equilibrate,
    exact_moments,
    frozen_ebm,
    ladder_log_z,
    level,
    weighted_moments,
)
from referee import (
    ALPHA,
    CERTAIN,
    fixed_point_mbar,
    gaussian_log_partition,
    ks_p_value,
    mean_p_value,
    normal,
    plane_grid,
    seeded,
    variance_p_value,
)
from scipy import stats
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MALA, ULA, TemperedPool
from pyro_lvebm.pools import ladder
from pyro_lvebm.pools import tempered as tempered_pool
from pyro_lvebm.pools.log_z_filter import LogZTrack
from pyro_lvebm.sampling import langevin, tempering
from pyro_lvebm.sampling.langevin import LangevinState, init_state
from pyro_lvebm.sampling.tempering import adapt_ladder, exchange
from pyro_lvebm.sampling.weights import log_mixture, mbar_variance

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# --- on a Gaussian --------------------------------------------------------------------------


def tempered_p_values(make: Callable[[int], TemperedPool], dtype: torch.dtype) -> tuple:
    """p-values of log Z and of weighted moments over 12 pools with their own seeds.

    Chains start in equilibrium, and each pool is averaged over 10 refreshes. The bias of log Z,
    half the variance of an estimate by MBAR, is below a quarter of the standard error of the mean.
    """
    log_zs, moments = [], []
    for seed in range(12):
        ebm = frozen_ebm(make(seed), dtype=dtype)
        equilibrate(ebm, 500 + seed)
        chain = []
        for _ in range(10):
            ebm.pool.refresh(ebm)
            chain.append((ebm.pool.log_partition.double(), weighted_moments(ebm.pool)))
            assert (ebm.pool.swap_rate >= 0).all() and (ebm.pool.swap_rate <= 1 + 1e-6).all()
            assert 1.0 <= ebm.pool.ess <= ebm.pool.log_weights.numel() + 1e-2
        log_zs.append(torch.stack([c[0] for c in chain]).mean())
        moments.append(torch.stack([c[1] for c in chain]).mean(0))
        assert int(ebm.pool.refreshes) == 10
    return (
        mean_p_value(torch.stack(log_zs), LOG_Z),
        mean_p_value(torch.stack(moments), exact_moments()),
    )


@pytest.mark.parametrize(
    ("levels", "chains", "moves", "target", "dtype"),
    [(4, 256, 1, 0.574, torch.float32), (3, 200, 2, 0.7, torch.float64)],
)
def test_tempered_pool_has_the_exact_log_partition_and_moments(
    levels: int, chains: int, moves: int, target: float, dtype: torch.dtype
) -> None:
    """Student's test over independent pools. False alarms: 2e-3 a case."""

    def make(seed: int) -> TemperedPool:
        return TemperedPool(levels, chains, num_moves=moves, kernel=MALA(target), seed=seed)

    assert min(tempered_p_values(make, dtype)) > ALPHA


def test_tempered_check_fails_for_exchanges_without_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(state: LangevinState, betas: Tensor, generator: torch.Generator) -> tuple:
        return exchange(state, torch.zeros_like(betas), generator)

    monkeypatch.setattr(tempering, "exchange", always)
    p_values = tempered_p_values(
        lambda seed: TemperedPool(4, 256, num_moves=1, seed=seed), torch.float32
    )
    assert max(p_values) < CERTAIN


def test_tempered_check_fails_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempered_pool.mbar_log_z
    monkeypatch.setattr(tempered_pool, "mbar_log_z", lambda *args: 0.7 * real(*args))
    monkeypatch.setattr(tempered_pool, "log_mixture", lambda f, *_: -f.flatten())
    p_values = tempered_p_values(
        lambda seed: TemperedPool(3, 200, num_moves=1, seed=seed), torch.float32
    )
    assert max(p_values) < CERTAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_those_of_the_mixture_at_the_tracked_log_z(dtype: torch.dtype) -> None:
    ebm = frozen_ebm(TemperedPool(4, 50, num_moves=3, seed=1), dtype=dtype)
    pool = ebm.pool
    for _ in range(6):
        pool.refresh(ebm)
        f, betas, log_z = pool.f.double(), pool.betas.double(), pool.log_z.double()
        torch.testing.assert_close(pool.f.flatten(), ebm.residual(pool.negatives()[0]).detach())
        mixture = log_mixture(f, betas, log_z)
        expected = torch.log_softmax(-f.flatten() - mixture, 0).to(dtype)
        torch.testing.assert_close(pool.log_weights, expected, rtol=1e-5, atol=2e-5)
        assert pool.log_partition == pool.log_z[-1] and pool.log_z[0] == 0.0
        assert pool.log_partition_std_error == pool.log_z_variance[-1].sqrt()


def distance_from_mbar(num_pools: int) -> float:
    """Largest distance between the tracked log Z and that of MBAR, in their standard errors.

    MBAR sees the chains at the end of a refresh and is iterated to convergence.
    """
    distances = []
    for seed in range(num_pools):
        ebm = frozen_ebm(TemperedPool(4, 100, num_moves=4, step_size=0.4, seed=seed))
        pool = equilibrate(ebm.double(), seed)
        for _ in range(6):
            pool.refresh(ebm)
            log_z, _ = fixed_point_mbar(pool.f, pool.betas, pool.log_z, 200)
            error = (mbar_variance(pool.f, pool.betas, log_z) + pool.log_z_variance).sqrt()
            distances.append(((pool.log_z - log_z).abs() / error)[1:])
    return torch.stack(distances).max().item()


def test_tracked_log_z_is_near_the_solution_of_mbar(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than 5 standard errors in 36 comparisons. False alarms: 1e-4."""
    assert distance_from_mbar(2) < 5.0
    real = tempered_pool.mbar_log_z
    monkeypatch.setattr(tempered_pool, "mbar_log_z", lambda *args: 0.1 * real(*args))
    assert distance_from_mbar(2) > 5.0


class TwoWells(nn.Module):
    """A user energy on data coordinates with two modes, far apart in z."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 2.0 * (z[..., 0] ** 2 - 4.0) ** 2 / 16.0 + 0.5 * z[..., 0] * x[..., 0]


def two_wells() -> tuple[Tensor, float]:
    """Estimates of log Z by 10 pools, and log Z by quadrature."""
    base_x, base_z = dist.Normal(0.3, 0.8), dist.Normal(-0.4, 2.0)
    grid, cell = plane_grid(15.0, 301)
    x, z = grid[:, :1], grid[:, 1:]
    log_z = torch.logsumexp(
        base_x.log_prob(x[:, 0]) + base_z.log_prob(z[:, 0]) - TwoWells()(x, z), 0
    ) + math.log(cell)
    estimates = []
    for seed in range(10):
        ebm = LVEBM(
            TwoWells(),
            base_x.expand([1]).to_event(1),
            base_z.expand([1]).to_event(1),
            pool=TemperedPool(5, 200, num_moves=1, seed=seed),
        )
        chain = []
        for refresh in range(25):
            ebm.pool.refresh(ebm)
            if refresh >= 10:
                chain.append(ebm.pool.log_partition)
        estimates.append(torch.stack(chain).mean())
    return torch.stack(estimates), float(log_z)


def test_tempered_pool_on_two_modes() -> None:
    """Quadrature in 1 + 1 dimensions, 10 pools. False alarms: 1e-3.

    The check finds an error of 0.1 nats.
    """
    estimates, log_z = two_wells()
    assert mean_p_value(estimates, log_z) > ALPHA
    assert mean_p_value(estimates, log_z + 0.1) < CERTAIN


# --- tracking log Z --------------------------------------------------------------------------

STILL = [(PRECISION, LINEAR)] * 12
SLOW = [level(t) for t in torch.linspace(0.5, 0.7, 12).tolist()]
PATHS = {"still": STILL, "slow": SLOW}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


class Setting(NamedTuple):
    """A pool whose chains keep up with θ."""

    num_levels: int
    num_chains: int
    num_moves: int
    dtype: torch.dtype


SETTINGS = [Setting(4, 32, 4, torch.float64), Setting(3, 48, 5, torch.float32)]


class Tracks(NamedTuple):
    """Errors of log Z and their claimed standard errors (n, T), of n pools in equilibrium.

    `single` are the errors of each refresh's own estimate, by MBAR, before the track is corrected.
    """

    errors: Tensor
    claimed: Tensor
    single: Tensor


def tracked(thetas: list[tuple[Tensor, Tensor]], setting: Setting, num_pools: int) -> Tracks:
    correct, estimates = tempered_pool.correct, []

    def recorded(track: LogZTrack, estimate: Tensor, variance: Tensor) -> LogZTrack:
        estimates.append(estimate[-1].item())
        return correct(track, estimate, variance)

    tracks, claimed, exact = [], [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempered_pool, "correct", recorded)
        for seed in range(num_pools):
            pool = TemperedPool(*setting[:2], num_moves=setting.num_moves, step_size=0.4, seed=seed)
            ebm = frozen_ebm(pool, *thetas[0], setting.dtype)
            equilibrate(ebm, seed, *thetas[0])
            for precision, linear in thetas:
                ebm.f.set_precision(precision.to(setting.dtype), linear.to(setting.dtype))
                pool.refresh(ebm)
                tracks.append(pool.log_partition.item())
                claimed.append(pool.log_partition_std_error.item())
                exact.append(gaussian_log_partition(precision, linear))
    parts = (torch.tensor(part) for part in (tracks, claimed, estimates, exact))
    tracks, claimed, estimates, exact = (part.reshape(num_pools, -1) for part in parts)
    return Tracks(tracks - exact, claimed, estimates - exact)


@functools.cache
def tracked_well(path: str, setting: Setting) -> Tracks:
    """What `tracked` returns for pools that are not broken."""
    return tracked(PATHS[path], setting, 20 if setting.dtype == torch.float64 else 12)


def calibration_p_values(errors: Tensor, claimed: Tensor) -> tuple[float, float]:
    """p-values that claimed errors are at least 1/1.3 and at most 2.5 times the true ones.

    One-sided chi-square tests of Σ (error / claim)² over the pools, after 3, 6 and 12 refreshes,
    with Bonferroni's correction.
    """
    square = ((errors / claimed) ** 2).sum(0)[[2, 5, 11]].numpy()
    law = stats.chi2(len(errors))
    too_small, too_large = law.sf(square / 1.3**2), law.cdf(square * 2.5**2)
    return min(1.0, 3.0 * too_small.min()), min(1.0, 3.0 * too_large.min())


@pytest.mark.parametrize(
    ("path", "setting"),
    [("still", SETTINGS[0]), ("slow", SETTINGS[0]), ("slow", SETTINGS[1])],
    ids=["still-double", "slow-double", "slow-single"],
)
def test_tracked_log_z_is_within_its_standard_error(path: str, setting: Setting) -> None:
    """Against the closed form, at a fixed θ and where θ moves. False alarms: 2e-3 a case.

    Besides, |error| < 3 claims in 90 % of the pools; Gaussian errors fail with probability 5e-4.
    """
    errors, claimed, _ = tracked_well(path, setting)
    assert min(calibration_p_values(errors, claimed)) > ALPHA
    assert ((errors / claimed)[:, -1].abs() < 3.0).double().mean() >= 0.9


@EVERY_PATH
@pytest.mark.parametrize(("factor", "side"), [(0.05, 0), (60.0, 1)])
def test_calibration_check_fails_for_a_wrong_variance(path: str, factor: float, side: int) -> None:
    """A track is linear in its estimates: with `factor` in all variances only the claims change."""
    errors, claimed, _ = tracked_well(path, SETTINGS[0])
    assert calibration_p_values(errors, factor**0.5 * claimed)[side] < CERTAIN


def test_calibration_check_fails_where_log_z_does_not_follow_theta(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempered_pool, "predict", lambda track, *_: track)
    errors, claimed, _ = tracked(SLOW, SETTINGS[0], 12)
    assert calibration_p_values(errors, claimed)[0] < CERTAIN


def gain_p_value(errors: Tensor, single: Tensor) -> float:
    """p-value, by Fisher's test, that the last error varies no less than that of one MBAR."""
    ratio = (single[:, -1] ** 2).sum() / (errors[:, -1] ** 2).sum()
    return float(stats.f(len(single), len(errors)).sf(ratio.item()))


def test_tracking_beats_a_single_estimate() -> None:
    """Errors of one MBAR estimate vary more, at a significance of 1e-2, on both paths together.

    Their variance is 6 to 8 times as large after twelve refreshes; the check then fails with a
    probability below 1e-3. It fails for an estimate that remembers nothing.
    """
    tracks = [tracked_well(path, SETTINGS[0]) for path in PATHS]
    errors, single = (
        torch.cat([getattr(t, name) for t in tracks]) for name in ("errors", "single")
    )
    assert gain_p_value(errors, single) < 0.01
    assert gain_p_value(single, single) > 0.01


def test_standard_error_is_infinite_before_the_first_refresh() -> None:
    pool = TemperedPool(3, 20)
    assert pool.log_partition_std_error == math.inf and pool.log_partition == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_z_without_an_energy_is_known_exactly(dtype: torch.dtype) -> None:
    ebm = frozen_ebm(TemperedPool(4, 20, num_moves=2), EYE, torch.zeros(3), dtype)
    for _ in range(5):
        ebm.pool.refresh(ebm)
        assert ebm.pool.log_z.abs().max() < 1e-6 and ebm.pool.log_partition_std_error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_that_do_not_overlap_say_so(dtype: torch.dtype) -> None:
    """The error is within its claim, which is tens of nats."""
    ebm = frozen_ebm(TemperedPool(2, 20, step_size=1e-6), 1e7 * EYE, LINEAR, dtype)
    pool = equilibrate(ebm, 0, 1e7 * EYE, LINEAR)
    for _ in range(3):
        pool.refresh(ebm)
        error = pool.log_z.double() - ladder_log_z(pool.betas, 1e7 * EYE, LINEAR)
        assert torch.isfinite(pool.log_z_variance).all()
        assert pool.log_partition_std_error > 10.0
        assert error[-1].abs() < 3.0 * pool.log_partition_std_error


# --- the base, and steps --------------------------------------------------------------------


def test_level_zero_is_drawn_from_the_base_at_each_move() -> None:
    """Where f = 0 all exchanges happen, and level 1 gets the new draws. False alarms: 1e-3."""
    ebm = frozen_ebm(TemperedPool(2, 2000, num_moves=1), EYE, torch.zeros(3), torch.float64)
    ebm.pool.u.fill_(100.0)
    ebm.pool.refresh(ebm)
    assert torch.equal(ebm.pool.swap_rate, torch.ones(1).double())
    assert ebm.pool.log_partition.item() == pytest.approx(0.0, abs=1e-12)
    assert ebm.pool.ess.item() == pytest.approx(4000.0)
    old, new = ebm.pool.u
    assert variance_p_value(new, torch.ones(3)) > ALPHA
    assert variance_p_value(old, torch.ones(3)) < CERTAIN and old.min() > 50.0
    # With a second move nothing is left of the old chains: level 0 was drawn twice.
    twice = frozen_ebm(TemperedPool(2, 2000, num_moves=2), EYE, torch.zeros(3), torch.float64)
    twice.pool.u.fill_(100.0)
    twice.pool.refresh(twice)
    assert twice.pool.u.max() < 50.0


def base_p_value(num_moves: int, *, exchanged: bool, monkeypatch: pytest.MonkeyPatch) -> float:
    """Smallest p-value of level 0 after each of 10 refreshes: by coordinate, and of |u|².

    Exchanges hand chains between levels; from level 1 in equilibrium they leave level 0 exact.
    """
    if not exchanged:

        def nothing(state: LangevinState, betas: Tensor, _: torch.Generator) -> tuple:
            return state, torch.zeros_like(betas[1:])

        monkeypatch.setattr(tempering, "exchange", nothing)
    ebm = frozen_ebm(TemperedPool(3, 2000, num_moves=num_moves, step_size=0.2, seed=3))
    pool = equilibrate(ebm, 9)
    p_values = []
    for _ in range(10):
        if not exchanged:
            pool.u = pool.u.clone()
            pool.u[0] = 40.0  # forgotten at the first move
        pool.refresh(ebm)
        u = pool.u[0]
        p_values += [ks_p_value(column, stats.norm.cdf) for column in u.T]
        p_values.append(ks_p_value(u.square().sum(-1), stats.chi2(3).cdf))
    return min(1.0, len(p_values) * min(p_values))


@pytest.mark.parametrize(("num_moves", "exchanged"), [(1, True), (3, True), (1, False), (4, False)])
def test_level_zero_follows_the_base(
    num_moves: int, exchanged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kolmogorov's tests with Bonferroni's correction. False alarms: 1e-3 a case."""
    assert base_p_value(num_moves, exchanged=exchanged, monkeypatch=monkeypatch) > ALPHA


def test_base_check_fails_where_exchanges_make_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(state: LangevinState, betas: Tensor, generator: torch.Generator) -> tuple:
        return exchange(state, torch.zeros_like(betas), generator)

    monkeypatch.setattr(tempering, "exchange", always)
    assert base_p_value(1, exchanged=True, monkeypatch=monkeypatch) < CERTAIN


@pytest.mark.parametrize("target", [0.574, 0.75])
def test_each_level_above_the_base_adapts_its_step(target: float) -> None:
    """Acceptance over the last 20 of 220 refreshes, 8,000 tests a level: standard error < 0.01.

    Level 0 has no proposals: its acceptance is 1, and its step size stays. In the metric of its
    curvature each other level is a round Gaussian, so that their steps end near each other.
    """
    pool = TemperedPool(4, 400, num_moves=1, kernel=MALA(target), step_size=0.03)
    ebm = frozen_ebm(pool, 20.0 * PRECISION)
    rates = []
    for refresh in range(220):
        pool.refresh(ebm)
        assert pool.acceptance[0] == 1.0 and pool.step_size[0] == torch.tensor(0.03)
        if refresh == 0:
            assert (pool.acceptance[1:] - target).abs().max() > 0.1
        if refresh >= 200:
            rates.append(pool.acceptance[1:])
    assert (torch.stack(rates).mean(0) - target).abs().max() < 0.04
    steps = pool.step_size.flatten()[1:]
    assert steps.min() > 10.0 * 0.03 and steps.max() < 1.5 * steps.min()


def test_each_level_needs_its_own_step_without_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ladder, "inverse_root", lambda m, _: torch.eye(m.shape[-1]).to(m).expand_as(m)
    )
    pool = TemperedPool(4, 400, num_moves=1, step_size=0.03)
    ebm = frozen_ebm(pool, 20.0 * PRECISION)
    for _ in range(220):
        pool.refresh(ebm)
    steps = pool.step_size.flatten()
    assert steps[1] > 1.5 * steps[2] > 1.5 * 1.5 * steps[3]


# --- the metric -----------------------------------------------------------------------------

NARROW = torch.tensor([400.0, 20.0, 0.5], dtype=torch.float64)
"""Precisions along axes that no coordinate follows."""
AXES = torch.linalg.qr(normal((3, 3), 41)).Q
ILL = (AXES * NARROW) @ AXES.T


def metric_errors(precision: Tensor, dtype: torch.dtype, looks: tuple[int, ...]) -> list[Tensor]:
    """Largest |eigenvalue − 1| (3,) of the running means of ∇E ∇Eᵀ after so many refreshes.

    Each is seen in the exact curvature's metric.
    """
    pool = TemperedPool(4, 300, num_moves=2, step_size=0.3, seed=4)
    ebm = frozen_ebm(pool, precision, LINEAR, dtype)
    equilibrate(ebm, 11, precision, LINEAR)
    curvatures = torch.stack([level(b, precision, LINEAR)[0] for b in pool.betas[1:].double()])
    assert pool.fisher.shape == curvatures.shape
    pool.fisher = 3.0 * curvatures.to(dtype)  # wrong, so that something has to be learnt
    errors = []
    for refresh in range(max(looks)):
        pool.refresh(ebm)
        if refresh + 1 in looks:
            assert pool.fisher.dtype == dtype
            betas = pool.betas[1:].double()
            curvatures = torch.stack([level(b, precision, LINEAR)[0] for b in betas])
            root = torch.linalg.inv(torch.linalg.cholesky(curvatures))
            white = root @ pool.fisher.double() @ root.mT
            errors.append((torch.linalg.eigvalsh(white) - 1.0).abs().amax(-1))
    return errors


@pytest.mark.parametrize(("precision", "dtype"), [(PRECISION, torch.float64), (ILL, torch.float32)])
def test_metric_converges_to_the_curvature_of_each_level(
    precision: Tensor, dtype: torch.dtype
) -> None:
    """E[∇E ∇Eᵀ] = P_β at every level above the base.

    The running mean holds 39 refreshes of 300 chains: an entry has a standard error of about 0.013
    if they are independent. A start that is three times as large is forgotten by e^-8.
    """
    early, late = metric_errors(precision, dtype, (5, 160))
    assert late.max() < 0.15
    assert early.min() > 1.0


def test_metric_is_a_running_mean_of_the_last_chains() -> None:
    """Five per cent of the newest outer products at each refresh, under the θ of that refresh."""
    pool = TemperedPool(3, 50, num_moves=2)
    ebm = frozen_ebm(pool, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(pool.fisher, eye.expand(2, -1, -1))
    expected = pool.fisher
    for factor in (1.0, 2.0, 2.0):
        ebm.f.set_precision(factor * PRECISION, LINEAR)
        pool.refresh(ebm)
        curvatures = [level(b, factor * PRECISION, LINEAR) for b in pool.betas[1:]]
        grad = torch.stack([u @ p + b for u, (p, b) in zip(pool.u[1:], curvatures, strict=True)])
        expected = 0.95 * expected + 0.05 * grad.mT @ grad / 50
        torch.testing.assert_close(pool.fisher, expected)


def test_draw_scale_is_that_of_the_model() -> None:
    pool = TemperedPool(3, 40)
    ebm = frozen_ebm(pool, dtype=torch.float64)
    for _ in range(3):
        pool.refresh(ebm)
    scale = pool.draw_scale()
    n = 40 / 0.05
    off = pool.fisher[-1] * n / (n + 3)
    shrunk = off - off.diagonal().diag() + pool.fisher[-1].diagonal().diag()
    torch.testing.assert_close(scale @ scale.T, torch.linalg.inv(shrunk))


def ill_p_values(refreshes: int) -> tuple[float, float]:
    """p-values of log Z and of weighted moments of an ill-conditioned energy, over pools."""
    linear = AXES @ torch.tensor([8.0, -2.0, 0.3], dtype=torch.float64)
    log_zs, moments = [], []
    for seed in range(8):
        pool = TemperedPool(5, 200, num_moves=2, step_size=0.3, seed=seed)
        ebm = frozen_ebm(pool, ILL, linear)
        equilibrate(ebm, 700 + seed, ILL, linear)
        chain = []
        for refresh in range(refreshes):
            pool.refresh(ebm)
            if refresh >= refreshes // 4:
                chain.append((pool.log_partition.double(), weighted_moments(pool)))
        log_zs.append(torch.stack([c[0] for c in chain]).mean())
        moments.append(torch.stack([c[1] for c in chain]).mean(0))
    return (
        mean_p_value(torch.stack(log_zs), gaussian_log_partition(ILL, linear)),
        mean_p_value(torch.stack(moments), exact_moments(ILL, linear)),
    )


def test_log_partition_and_moments_of_an_ill_conditioned_energy() -> None:
    """Condition number 800, 8 pools. False alarms: 2e-3."""
    assert min(ill_p_values(16)) > ALPHA


def test_ill_conditioned_check_fails_without_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langevin, "_log_acceptance", lambda old, *_: torch.zeros_like(old[0]))
    assert ill_p_values(16)[1] < CERTAIN


def spread_along_the_model(num_refreshes: int, seed: int) -> float:
    """Mean square of the slowest direction of chains at β = 1 that started at its mean."""
    pool = TemperedPool(2, 300, num_moves=1, step_size=0.3, seed=seed)
    ebm = frozen_ebm(pool, ILL, torch.zeros(3))
    pool.u = torch.zeros_like(pool.u)
    for _ in range(num_refreshes):
        pool.refresh(ebm)
    return float((pool.u[-1].double() @ AXES[:, 2]).square().mean())


def test_chains_reach_the_width_of_an_ill_conditioned_energy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slow direction has variance 2. A plain step is bounded by the narrow directions.

    A variance of 300 chains has a standard error of 8 %: five of them are 0.4.
    """
    monkeypatch.setattr(tempering, "exchange", lambda s, b, _: (s, torch.zeros(len(b) - 1)))
    assert spread_along_the_model(120, 1) == pytest.approx(2.0, rel=0.4)
    monkeypatch.setattr(
        ladder, "inverse_root", lambda m, _: torch.eye(m.shape[-1]).to(m).expand_as(m)
    )
    assert spread_along_the_model(120, 1) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metric_of_a_new_dimension(dtype: torch.dtype) -> None:
    pool = TemperedPool(4, 10).to(dtype)
    assert pool.fisher.shape == (3, 0, 0)
    pool.initialise(5)
    assert pool.fisher.dtype == dtype
    assert torch.equal(pool.fisher, torch.eye(5, dtype=dtype).expand(3, -1, -1))
    assert torch.equal(pool.draw_scale(), torch.eye(5, dtype=dtype))


# --- the temperatures -----------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", [2, 3, 12])
def test_the_ladder_rises_from_the_base_to_the_model(num_levels: int) -> None:
    betas = TemperedPool(num_levels, 5).betas
    assert betas.shape == (num_levels,) and betas[0] == 0.0 and betas[-1] == 1.0
    assert (betas.diff() > 0.0).all()


@given(
    rates=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8),
    rate=st.sampled_from([0.05, 0.5, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_gaps_grow_where_exchanges_are_frequent(
    rates: list[float], rate: float, dtype: torch.dtype, seed: int
) -> None:
    """Two gaps change by a ratio of exp(rate (s_i − s_j)); order and end points stay."""
    s = torch.tensor(rates, dtype=torch.float64)
    gaps = 0.05 + torch.rand(len(s), generator=seeded(seed), dtype=torch.float64)
    betas = torch.cat([torch.zeros(1), gaps.cumsum(0) / gaps.sum()]).to(dtype)
    betas[-1] = 1.0
    new = adapt_ladder(betas, s.to(dtype), rate)
    assert new.dtype == dtype and new.shape == betas.shape
    assert new[0] == 0.0 and new[-1] == 1.0 and (new.diff() > 0.0).all()
    growth = (new.double().diff() / betas.double().diff()).log()
    expected = rate * (s - s[0])
    torch.testing.assert_close(growth - growth[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_levels", [2, 3, 9])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0, math.nan])
def test_a_ladder_stays_where_rates_are_equal_or_unknown(
    rate: float, num_levels: int, dtype: torch.dtype
) -> None:
    betas = (torch.linspace(0.0, 1.0, num_levels) ** 1.5).to(dtype)
    new = adapt_ladder(betas, torch.full((num_levels - 1,), rate, dtype=dtype))
    torch.testing.assert_close(new, betas)


def exponential_rates(betas: Tensor) -> Tensor:
    """Exact exchange rates where f has the density λ exp(−λ f), λ = β + 1/49, at each level.

    It has, up to a constant, where two directions have precision 50. With λ < λ' of neighbours,
    E min(1, exp((β' − β)(f' − f))) = 2 λ / (λ + λ').
    """
    scale = betas.double() + 1.0 / 49.0
    return 2.0 * scale[:-1] / (scale[:-1] + scale[1:])


def adapted(num_levels: int, rate: float) -> Tensor:
    betas = torch.linspace(0.0, 1.0, num_levels, dtype=torch.float64) ** 1.5
    for _ in range(1500):
        betas = adapt_ladder(betas, exponential_rates(betas), rate)
    return betas


@pytest.mark.parametrize(("num_levels", "rate"), [(3, 0.05), (5, 0.2), (8, 0.2)])
def test_a_ladder_comes_to_rest_at_equal_rates(num_levels: int, rate: float) -> None:
    """Exponential f has equal rates where the ladder is geometric in λ."""
    steps = torch.arange(num_levels, dtype=torch.float64) / (num_levels - 1)
    expected = (50.0**steps - 1.0) / 49.0
    torch.testing.assert_close(adapted(num_levels, rate), expected, rtol=0, atol=2e-3)
    assert (adapted(num_levels, -rate) - expected).abs().max() > 0.1


def spreads(num_levels: int, dtype: torch.dtype, num_refreshes: int) -> tuple[float, float]:
    """Largest difference of exact exchange rates on a ladder, at first and after refreshes."""
    precision = torch.tensor([50.0, 50.0, 1.0]).diag()
    pool = TemperedPool(num_levels, 100, num_moves=1, step_size=0.05, seed=num_levels)
    ebm = frozen_ebm(pool, precision, torch.zeros(3), dtype)
    ladders = [pool.betas]
    for _ in range(num_refreshes):
        pool.refresh(ebm)
    ladders.append(pool.betas)
    rates = [exponential_rates(betas) for betas in ladders]
    return tuple(float(r.max() - r.min()) for r in rates)


@pytest.mark.parametrize(("num_levels", "dtype"), [(3, torch.float64), (7, torch.float32)])
def test_a_pool_evens_out_its_exchange_rates(
    num_levels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spread falls from 0.4 or more to 0.07 or less, with a deviation of 0.007 over seeds.

    The limit, a third of the first, is ten deviations away: false alarms below 1e-6.
    """
    first, last = spreads(num_levels, dtype, 200)
    assert first > 0.4 and last < first / 3.0
    monkeypatch.setattr(ladder, "adapt_ladder", lambda betas, s: adapt_ladder(betas, -s))
    first, last = spreads(num_levels, dtype, 20)
    assert last > first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemperedPool(1, 10), "num_levels must be at least 2; got 1"),
        (lambda: TemperedPool(3, 10, kernel=ULA()), "needs MALA"),
        (lambda: TemperedPool(3, 10, kernel=ULA(0.9)), "needs MALA"),
    ],
)
def test_impossible_ladders_are_refused(make: Callable[[], TemperedPool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- exchange -------------------------------------------------------------------------------

BETAS = torch.tensor([0.0, 0.15, 0.4, 0.7, 1.0], dtype=torch.float64)
CURVATURE = torch.tensor([6.0, -0.6], dtype=torch.float64)


def quadratic(u: Tensor) -> tuple[Tensor, Tensor]:
    a = CURVATURE.to(u.dtype)
    return 0.5 * (a * u * u).sum(-1), a * u


def ladder_state(num_levels: int, n: int, seed: int, dtype: torch.dtype) -> LangevinState:
    """Exact draws of each level, N(0, 1 / (1 + β a))."""
    betas = BETAS[:num_levels, None, None]
    u = normal((num_levels, n, 2), seed) / (1.0 + betas * CURVATURE).sqrt()
    return init_state(quadratic, u.to(dtype))


def exchange_p_values(claimed: Tensor, num_levels: int, dtype: torch.dtype) -> tuple:
    """p-values of the marginals of all levels, and of the products of squares of neighbours."""
    state = ladder_state(num_levels, 8000, 31, dtype)
    generator = seeded(32)
    for _ in range(3):
        state, _ = exchange(state, claimed[:num_levels].to(dtype), generator)
    variance = 1.0 / (1.0 + BETAS[:num_levels, None] * CURVATURE)
    u = state.u.double().transpose(0, 1)  # (n, L, 2)
    centred = u**2 / variance - 1.0
    return (
        variance_p_value(u.reshape(8000, -1), variance.reshape(-1)),
        mean_p_value(centred[:, 1:] * centred[:, :-1], 0.0),
    )


LADDERS = pytest.mark.parametrize(
    ("num_levels", "dtype"), [(2, torch.float64), (4, torch.float32), (5, torch.float64)]
)


@LADDERS
def test_exchange_leaves_the_joint_law_invariant(num_levels: int, dtype: torch.dtype) -> None:
    """Exact draws stay exact and levels independent. False alarms: 2e-3 a case."""
    assert min(exchange_p_values(BETAS, num_levels, dtype)) > ALPHA


@LADDERS
def test_exchange_check_fails_for_a_wrong_test(num_levels: int, dtype: torch.dtype) -> None:
    always = torch.zeros_like(BETAS)
    for claimed in (always, -BETAS):
        assert exchange_p_values(claimed, num_levels, dtype)[0] < CERTAIN


@LADDERS
def test_exchange_permutes_chains_with_their_energies(num_levels: int, dtype: torch.dtype) -> None:
    state = ladder_state(num_levels, 500, 33, dtype)
    kept = [part.clone() for part in state]
    new, rate = exchange(state, BETAS[:num_levels].to(dtype), seeded(34))
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    f, grad = quadratic(new.u)
    assert torch.equal(new.f, f) and torch.equal(new.grad, grad)
    assert torch.equal(new.f.sort(0).values, state.f.sort(0).values)  # in each column
    assert (new.u != state.u).any(-1).float().mean() > 0.3
    assert rate.shape == (num_levels - 1,) and rate.dtype == dtype
    assert (rate > 0.0).all() and (rate < 1.0).all()


def rate_p_value(claimed: Tensor) -> float:
    """p-value of the reported rate of the pair (β_0, β_1), in one dimension, by quadrature."""
    a, low, high = 6.0, 0.2, 0.9
    grid, _ = plane_grid(8.0, 1001)
    log_p = -0.5 * (1 + low * a) * grid[:, 0] ** 2 - 0.5 * (1 + high * a) * grid[:, 1] ** 2
    log_alpha = (high - low) * 0.5 * a * (grid[:, 1] ** 2 - grid[:, 0] ** 2)
    exact = (torch.softmax(log_p, 0) * log_alpha.clamp(max=0.0).exp()).sum()
    betas = torch.tensor([low, high], dtype=torch.float64)
    u = normal((50, 2, 400, 1), 35) / (1.0 + betas[:, None, None] * a).sqrt()
    rates = [
        exchange(LangevinState(v, 0.5 * a * v.squeeze(-1) ** 2, a * v), claimed, seeded(k))[1]
        for k, v in enumerate(u)
    ]
    return mean_p_value(torch.stack(rates), exact)


def test_swap_rate_is_that_of_quadrature() -> None:
    """False alarms: 1e-3. A rate at other temperatures is rejected."""
    assert rate_p_value(torch.tensor([0.2, 0.9], dtype=torch.float64)) > ALPHA
    assert rate_p_value(torch.tensor([0.2, 0.8], dtype=torch.float64)) < CERTAIN
