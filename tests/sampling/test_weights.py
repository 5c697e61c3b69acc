# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from referee import (
    ALPHA,
    CERTAIN,
    fixed_point_mbar,
    gaussian_draws,
    gaussian_log_partition,
    gaussian_moments,
    mean_p_value,
    normal,
    seeded,
)
from scipy import optimize, special, stats
from torch import Tensor

from pyro_lvebm.sampling.weights import (
    bar_log_ratio,
    ess,
    log_mixture,
    mbar_log_z,
    systematic_resample,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

LOG_WEIGHTS = st.lists(st.floats(-60.0, 60.0), min_size=1, max_size=40)

# --- effective sample size ------------------------------------------------------------------


@given(LOG_WEIGHTS, st.floats(-500.0, 500.0))
def test_ess_lies_between_one_and_n_and_ignores_scale(values: list[float], shift: float) -> None:
    log_w = torch.tensor(values, dtype=torch.float64)
    result = ess(log_w).item()
    assert 1.0 - 1e-9 <= result <= len(values) + 1e-9
    w = np.exp(np.array(values) - max(values))
    assert result == pytest.approx(w.sum() ** 2 / (w**2).sum(), rel=1e-9)
    assert ess(log_w + shift).item() == pytest.approx(result, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ess_reaches_its_bounds(dtype: torch.dtype) -> None:
    log_w = torch.full((3, 5), -math.inf, dtype=dtype)
    log_w[0, 2] = 7.0  # one particle
    log_w[1] = -900.0  # all the same
    log_w[2, :2] = 1.0  # two of five
    torch.testing.assert_close(ess(log_w), torch.tensor([1.0, 5.0, 2.0], dtype=dtype))


# --- systematic resampling ------------------------------------------------------------------


@given(LOG_WEIGHTS, st.integers(0, 10_000))
def test_each_index_is_drawn_its_share_rounded(values: list[float], seed: int) -> None:
    log_w = torch.tensor(values, dtype=torch.float64)
    index = systematic_resample(log_w, seeded(seed))
    share = len(values) * torch.softmax(log_w, -1)
    counts = torch.bincount(index, minlength=len(values))
    assert index.shape == log_w.shape and index.dtype == torch.long
    assert (counts >= torch.floor(share - 1e-9)).all()
    assert (counts <= torch.ceil(share + 1e-9)).all()


def offspring_p_value(index: Tensor, log_weights: Tensor) -> float:
    """z-test of mean counts over independent rows (R, n) against n w, Bonferroni over indices.

    A count is floor(n w) or one more, so its variance is known: p (1 - p), p the fraction of n w.
    """
    n = log_weights.shape[-1]
    share = n * torch.softmax(log_weights.double(), -1)
    fraction = share - share.floor()
    counts = torch.nn.functional.one_hot(index, n).sum(1).double()
    z = (counts.mean(0) - share) / (fraction * (1.0 - fraction) / len(index)).sqrt()
    return min(1.0, n * float(2.0 * stats.norm.sf(z.abs().max().item())))


RESAMPLED = torch.tensor([0.3, -1.0, 1.7, 0.0, -3.0, 0.9, 0.2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_is_unbiased(dtype: torch.dtype) -> None:
    """Counts have mean n w over 20,000 rows with their own shifts. False alarms: 1e-3 a case."""
    log_w = RESAMPLED.to(dtype)
    index = systematic_resample(log_w.expand(200, 100, -1), seeded(1)).reshape(-1, 7)
    assert offspring_p_value(index, log_w) > ALPHA


def test_unbiasedness_check_fails_for_other_schemes() -> None:
    log_w = RESAMPLED.double()
    cdf = torch.softmax(log_w, -1).cumsum(-1)
    grid = torch.arange(7, dtype=torch.float64) / 7
    middle = torch.searchsorted(cdf, grid + 0.5 / 7).expand(20000, -1)  # no random shift
    shift = torch.rand(20000, 1, generator=seeded(2), dtype=torch.float64) / 14
    half = torch.searchsorted(
        cdf.expand(20000, -1).contiguous(), grid + shift
    )  # shifts over half a cell
    tempered = systematic_resample(0.95 * log_w.expand(20000, -1), seeded(3))
    for index in (middle, half, tempered):
        assert offspring_p_value(index, log_w) < CERTAIN


def test_rows_are_resampled_by_their_own_weights() -> None:
    log_w = torch.full((3, 4, 6), -math.inf)
    chosen = torch.arange(12).reshape(3, 4) % 6
    log_w.scatter_(-1, chosen[..., None], 2.0)
    assert torch.equal(systematic_resample(log_w, seeded(4)), chosen[..., None].expand(-1, -1, 6))
    assert torch.equal(
        systematic_resample(RESAMPLED.expand(9, -1), seeded(5)),
        systematic_resample(RESAMPLED.expand(9, -1), seeded(5)),
    )


# --- MBAR -----------------------------------------------------------------------------------

BETAS = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
PRECISION = torch.tensor([[3.0, 0.8], [0.8, 0.5]], dtype=torch.float64)
LINEAR = torch.tensor([1.0, -0.4], dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)


def level(beta: Tensor) -> tuple[Tensor, Tensor]:
    """Total precision and linear term of ½ |u|² + β f."""
    return EYE + beta * (PRECISION - EYE), beta * LINEAR


EXACT_LOG_Z = [gaussian_log_partition(*level(beta)) for beta in BETAS]


def residual(u: Tensor) -> Tensor:
    return 0.5 * (u @ (PRECISION - EYE) * u).sum(-1) + u @ LINEAR


def ladder(num_replicates: int, num_chains: int) -> Tensor:
    """Exact draws (replicates, L, n, 2) of every level."""
    shape = (num_replicates, num_chains)
    levels = [gaussian_draws(*level(beta), shape, 50 + k) for k, beta in enumerate(BETAS)]
    return torch.stack(levels, 1)


def ladder_p_values(estimator, dtype: torch.dtype) -> tuple[float, float]:
    """p-values of log Z of all levels, and of weighted first and second moments at β = 1."""
    log_zs, moments = [], []
    for u in ladder(40, 1000):
        f = residual(u).to(dtype)
        log_z, log_w = estimator(f, BETAS.to(dtype), torch.zeros(4, dtype=dtype), 60)
        assert log_z.dtype == log_w.dtype == dtype
        assert torch.logsumexp(log_w, 0).item() == pytest.approx(0.0, abs=1e-5)
        v = u.reshape(-1, 2)
        features = torch.stack([v[:, 0], v[:, 1], *(v**2).T, v[:, 0] * v[:, 1]], -1)
        log_zs.append(log_z[1:])
        moments.append(log_w.double().exp() @ features)
    mean, covariance = gaussian_moments(*level(BETAS[-1]))
    second = covariance + np.outer(mean, mean)
    exact = [*mean, second[0, 0], second[1, 1], second[0, 1]]
    return (
        mean_p_value(torch.stack(log_zs), EXACT_LOG_Z[1:]),
        mean_p_value(torch.stack(moments), exact),
    )


def solve(f: Tensor, betas: Tensor, log_z: Tensor, _: int = 0) -> tuple[Tensor, Tensor]:
    """MBAR as the pool computes it: log Z, and log weights for the last level."""
    log_z = mbar_log_z(f, betas, log_z)
    log_w = -betas[-1] * f.flatten() - log_mixture(f, betas, log_z)
    return log_z, torch.log_softmax(log_w, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mbar_on_exact_draws(dtype: torch.dtype) -> None:
    """log Z and weighted moments over 40 replicates. False alarms: 2e-3 a case.

    The bias of a logarithm, about half a replicate's variance, is a seventh of the standard error.
    """
    assert min(ladder_p_values(solve, dtype)) > ALPHA


def mixture_without_log_z(f: Tensor, betas: Tensor, log_z: Tensor, _: int) -> tuple[Tensor, Tensor]:
    a = -betas[:, None] * f.reshape(1, -1)
    log_mixture = torch.logsumexp(a, 0) + math.log(f.shape[1])
    log_z = torch.logsumexp(a - log_mixture, 1)
    return log_z - log_z[0], torch.log_softmax(a[-1] - log_mixture, 0)


def equal_weights(f: Tensor, betas: Tensor, log_z: Tensor, _: int) -> tuple[Tensor, Tensor]:
    """Every level by importance sampling from the base; all particles weigh the same."""
    log_z = torch.logsumexp(-betas[:, None] * f.reshape(1, -1), 1) - math.log(f.numel())
    return log_z, torch.full((f.numel(),), 1.0 / f.numel(), dtype=f.dtype).log()


@pytest.mark.parametrize("wrong", [mixture_without_log_z, equal_weights])
def test_mbar_check_fails_for_a_wrong_formula(wrong) -> None:
    assert max(ladder_p_values(wrong, torch.float64)) < CERTAIN


def test_mbar_solves_its_equations() -> None:
    """The same root is found by a solver that knows only the mixture likelihood."""
    f = residual(ladder(1, 200)[0])
    log_z, log_w = solve(f, BETAS, torch.zeros(4, dtype=torch.float64), 500)
    a = -(BETAS[:, None] * f.reshape(1, -1)).numpy()

    def negative_log_likelihood(free: np.ndarray) -> float:
        shift = np.concatenate([[0.0], free])
        return float(special.logsumexp(a - shift[:, None], axis=0).sum() + 200 * shift.sum())

    root = optimize.minimize(negative_log_likelihood, np.zeros(3), tol=1e-12)
    np.testing.assert_allclose(log_z[1:].numpy(), root.x, atol=1e-5)
    expected = a[-1] - special.logsumexp(a - log_z.numpy()[:, None], axis=0)
    expected -= special.logsumexp(expected)
    np.testing.assert_allclose(log_w.numpy(), expected, atol=1e-10)
    # A start at the answer stays there; a single iteration from zero is not yet the answer.
    again, _ = fixed_point_mbar(f, BETAS, log_z, 1)
    torch.testing.assert_close(again, log_z, rtol=0, atol=1e-9)
    early, _ = fixed_point_mbar(f, BETAS, torch.zeros(4, dtype=torch.float64), 1)
    assert (early - log_z).abs().max() > 0.01


@given(st.integers(0, 10_000))
def test_mbar_follows_permutations(seed: int) -> None:
    f = residual(ladder(1, 10)[0])
    order = torch.randperm(f.numel(), generator=seeded(seed))
    start = torch.zeros(4, dtype=torch.float64)
    log_z, log_w = solve(f, BETAS, start, 20)
    permuted_z, permuted_w = solve(f.flatten()[order].reshape(f.shape), BETAS, start, 20)
    torch.testing.assert_close(permuted_z, log_z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(permuted_w, log_w[order], rtol=1e-10, atol=1e-10)


@given(st.floats(-200.0, 200.0))
def test_a_constant_shifts_log_z_and_leaves_the_weights(constant: float) -> None:
    f = residual(ladder(1, 10)[0])
    start = torch.zeros(4, dtype=torch.float64)
    log_z, log_w = solve(f, BETAS, start, 400)
    shifted_z, shifted_w = solve(f + constant, BETAS, -BETAS * constant, 400)
    torch.testing.assert_close(shifted_z, log_z - BETAS * constant, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(shifted_w, log_w, rtol=1e-8, atol=1e-8)


# --- Bennett's acceptance ratio -------------------------------------------------------------


@pytest.mark.parametrize("constant", [-30.0, 0.0, 1.5, 60.0])
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_of_a_constant_work_is_exact(
    constant: float, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    work = torch.full(shape, constant, dtype=dtype)
    result = bar_log_ratio(work, work, torch.zeros(shape[:-1], dtype=dtype))
    assert result.shape == shape[:-1] and result.dtype == dtype
    torch.testing.assert_close(result, torch.full(shape[:-1], -constant, dtype=dtype))


def gaussian_work(offset: float, count: int, n: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """W at exact draws (count, n) of two Gaussians, and log Z_1 / Z_0.

    p_0 = N(0, I) and E_1 = ½ vᵀPv + bᵀv + offset in two dimensions.
    """
    u = gaussian_draws(EYE, 0.0 * LINEAR, (count, n), seed)
    v = gaussian_draws(PRECISION, LINEAR, (count, n), seed + 1)
    return residual(u) + offset, residual(v) + offset, EXACT_LOG_Z[-1] - offset


def overlap_error(work_0: Tensor, work_1: Tensor) -> Tensor:
    """Standard error (count,) of Bennett's ratio, from the variance of its estimating equation."""
    n = work_0.shape[-1]
    c = bar_log_ratio(work_0, work_1, torch.zeros(work_0.shape[:-1], dtype=torch.float64))[:, None]
    left, right = torch.sigmoid(-work_0 - c), torch.sigmoid(work_1 + c)
    slope = (left * (1.0 - left) + right * (1.0 - right)).mean(-1)
    return ((left.var(-1) + right.var(-1)) / n).sqrt() / slope


def ratio_z(offset: float, start: float, claimed: float | None = None) -> float:
    """Standard errors between the mean of 400 replicates and the exact or a claimed value."""
    work_0, work_1, exact = gaussian_work(offset, 400, 300, 80)
    c = bar_log_ratio(work_0, work_1, torch.full((400,), start, dtype=torch.float64))
    wanted = exact if claimed is None else claimed
    return float(abs(c.mean() - wanted) / (c.std() / math.sqrt(400)))


@pytest.mark.parametrize(("offset", "start"), [(0.0, 0.0), (-7.0, 3.0), (25.0, -40.0)])
def test_ratio_of_two_gaussians(offset: float, start: float) -> None:
    """Within 4 standard errors of the closed form; Gaussian false alarms 6e-5 a case.

    The bias, of the order of a replicate's variance, is below a third of the standard error. The
    check finds an error of 0.05 nats.
    """
    assert ratio_z(offset, start) < 4.0
    exact = EXACT_LOG_Z[-1] - offset
    for shift in (-0.05, 0.05):
        assert ratio_z(offset, start, exact + shift) > 4.0


def test_errors_of_the_ratio_are_those_of_its_equation() -> None:
    """Errors in units of the delta method's standard error have variance 1. False alarms: 1e-3."""
    work_0, work_1, exact = gaussian_work(0.0, 400, 300, 82)
    c = bar_log_ratio(work_0, work_1, torch.zeros(400, dtype=torch.float64))
    z = ((c - exact) / overlap_error(work_0, work_1)).square().sum().item()
    law = stats.chi2(400)
    assert 2.0 * min(law.cdf(z), law.sf(z)) > ALPHA
    assert 2.0 * min(law.cdf(2.0 * z), law.sf(2.0 * z)) < CERTAIN


def test_exponential_averages_of_the_same_draws_err_more() -> None:
    """Their mean square errors over 400 replicates are 7 to 48 times as large; the limit is 4."""
    work_0, work_1, exact = gaussian_work(0.0, 400, 300, 84)
    c = bar_log_ratio(work_0, work_1, torch.zeros(400, dtype=torch.float64))
    up = torch.logsumexp(-work_0, -1) - math.log(300)
    down = math.log(300) - torch.logsumexp(work_1, -1)
    best = (c - exact).square().mean()
    for other in (up, down, 0.5 * (up + down)):
        assert (other - exact).square().mean() > 4.0 * best


@pytest.mark.parametrize("start", [-60.0, -8.0, 0.0, 5.0, 60.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratio_solves_its_equation_from_any_start(
    start: float, spread: float, dtype: torch.dtype
) -> None:
    """The root is that of bisection, for works that overlap much or little.

    The start is up to 60 nats away from where the first work is centred, in both directions.
    """
    work_0 = (4.0 + spread * normal((2, 6, 50), 86)).to(dtype)
    work_1 = (4.0 - 0.5 * spread + spread * normal((2, 6, 50), 87)).to(dtype)
    c = bar_log_ratio(work_0, work_1, torch.full((2, 6), start, dtype=dtype))
    assert c.dtype == dtype and c.shape == (2, 6)
    for a, b, found in zip(
        work_0.double().flatten(0, 1), work_1.double().flatten(0, 1), c.flatten(), strict=True
    ):

        def excess(guess: float, a: Tensor = a, b: Tensor = b) -> float:
            return float(torch.sigmoid(-a - guess).sum() - torch.sigmoid(b + guess).sum())

        root = optimize.brentq(excess, -500.0, 500.0, xtol=1e-12)
        assert found.item() == pytest.approx(root, abs=1e-4)
        assert abs(excess(found.item())) < 2e-3


@given(st.integers(0, 10_000), st.floats(-20.0, 20.0))
def test_ratio_is_antisymmetric_and_shifts(seed: int, shift: float) -> None:
    """Exchanging the densities changes its sign; a constant in E_1 is subtracted."""
    work_0, work_1, _ = gaussian_work(0.0, 3, 20, seed)
    start = torch.zeros(3, dtype=torch.float64)
    c = bar_log_ratio(work_0, work_1, start)
    swapped = bar_log_ratio(-work_1, -work_0, start)
    torch.testing.assert_close(swapped, -c, rtol=0, atol=1e-5)
    shifted = bar_log_ratio(work_0 + shift, work_1 + shift, start)
    torch.testing.assert_close(shifted, c - shift, rtol=0, atol=1e-5)


def test_rows_of_a_batch_are_solved_alone() -> None:
    offsets = torch.tensor([0.0, 30.0, -11.0], dtype=torch.float64)[:, None]
    work_0, work_1, _ = gaussian_work(0.0, 3, 40, 88)
    start = torch.tensor([0.0, 5.0, -1.0], dtype=torch.float64)
    together = bar_log_ratio(work_0 + offsets, work_1 + offsets, start)
    alone = [
        bar_log_ratio(work_0[[k]] + offsets[k], work_1[[k]] + offsets[k], start[[k]])
        for k in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
