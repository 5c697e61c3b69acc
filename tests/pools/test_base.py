# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from pool_models import EYE, LINEAR, PRECISION, exact_moments, frozen_ebm
from referee import ALPHA, CERTAIN, gaussian_draws, mean_p_value, seeded
from small_models import same, snapshot
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MALA, ULA, PersistentPool, TemperedPool
from pyro_lvebm.pools.base import Pool

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# --- KL and draws ---------------------------------------------------------------------------

OTHER = (PRECISION + 0.4 * EYE, LINEAR - 0.3)


def gaussian_kl(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    laws = [
        torch.distributions.MultivariateNormal(
            -torch.linalg.solve(precision, linear), precision_matrix=precision
        )
        for precision, linear in (p, q)
    ]
    return torch.distributions.kl_divergence(*laws)


def residual(u: Tensor, precision: Tensor, linear: Tensor) -> Tensor:
    return 0.5 * (u @ (precision - EYE) * u).sum(-1) + u @ linear


def weigh_wider_draws(pool: Pool, seed: int) -> None:
    """Put exact draws of a wider Gaussian into the pool, with importance weights for the model."""
    wider = 0.8 * PRECISION, 0.8 * LINEAR  # weights of finite variance
    pool.u = gaussian_draws(*wider, tuple(pool.u.shape[:2]), seed)
    pool.f = residual(pool.u, PRECISION, LINEAR)
    pool.log_weights = torch.log_softmax((residual(pool.u, *wider) - pool.f).flatten(), 0)


def kl_p_value(expected: Tensor, *, weighted: bool) -> float:
    """p-value of the mean of `kl_to` over 50 pools of 4,000 exact or weighted draws."""
    estimates = []
    for seed in range(50):
        pool = PersistentPool(4000).double()
        if weighted:
            weigh_wider_draws(pool, 200 + seed)
        else:
            pool.u = gaussian_draws(PRECISION, LINEAR, (1, 4000), 200 + seed)
            pool.f = residual(pool.u, PRECISION, LINEAR)
        estimates.append(pool.kl_to(residual(pool.negatives()[0], *OTHER)))
    return mean_p_value(torch.stack(estimates), expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_to_is_that_of_two_gaussians(weighted: bool) -> None:
    """False alarms: 1e-3 a case (the bias, O(1/4000), is a tenth of a standard error).

    The check rejects the divergence in the other direction.
    """
    old, new = (PRECISION, LINEAR), OTHER
    assert kl_p_value(gaussian_kl(old, new), weighted=weighted) > ALPHA
    assert kl_p_value(gaussian_kl(new, old), weighted=weighted) < CERTAIN


def test_kl_to_is_zero_for_the_same_law() -> None:
    ebm = frozen_ebm(TemperedPool(3, 50), dtype=torch.float64)
    for _ in range(3):
        ebm.pool.refresh(ebm)
    f = ebm.residual(ebm.pool.negatives()[0]).detach()
    for constant in (0.0, 40.0, -40.0):
        assert ebm.pool.kl_to(f + constant).item() == pytest.approx(0.0, abs=1e-9)
    assert ebm.pool.kl_to(1.5 * f).item() > 0.01
    assert ebm.kl_of_update().item() == pytest.approx(0.0, abs=1e-9)


def draw_p_value(*, use_weights: bool, num_moves: int) -> float:
    """p-value of moments of 300 draws from each of 80 pools of weighted wider draws."""
    moments = []
    for seed in range(80):
        pool = PersistentPool(3000, kernel=MALA(), step_size=0.2)
        ebm = frozen_ebm(pool, dtype=torch.float64)
        weigh_wider_draws(pool, 300 + seed)
        if not use_weights:
            pool.log_weights = torch.full_like(pool.log_weights, -math.log(3000))
        before = snapshot(pool)
        u = pool.draw(ebm, 300, num_moves=num_moves, generator=seeded(seed))
        assert same(before, snapshot(pool)) and u.shape == (300, 3)
        moments.append(torch.cat([u, u**2, u[:, [0]] * u[:, [1]]], -1).mean(0))
    return mean_p_value(torch.stack(moments), exact_moments())


def test_draws_follow_the_weights_and_the_kernel() -> None:
    """Resampled draws, not moved or moved by MALA. False alarms: 1e-3 each."""
    assert draw_p_value(use_weights=True, num_moves=0) > ALPHA
    assert draw_p_value(use_weights=True, num_moves=5) > ALPHA
    assert draw_p_value(use_weights=False, num_moves=0) < CERTAIN
    assert draw_p_value(use_weights=False, num_moves=60) > ALPHA  # the moves alone get there


# --- state ----------------------------------------------------------------------------------

POOLS = pytest.mark.parametrize(
    "make",
    [
        lambda seed: TemperedPool(3, 20, num_moves=2, seed=seed),
        lambda seed: TemperedPool(2, 11, num_moves=1, kernel=MALA(0.8), step_size=0.5, seed=seed),
        lambda seed: PersistentPool(30, num_moves=3, seed=seed),
        lambda seed: PersistentPool(30, num_moves=3, kernel=MALA(), seed=seed),
        lambda seed: PersistentPool(30, num_moves=3, kernel=ULA(0.95), seed=seed),
    ],
)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def refreshed(pool: Pool, count: int, dtype: torch.dtype) -> LVEBM:
    ebm = frozen_ebm(pool, dtype=dtype)
    for _ in range(count):
        ebm.pool.refresh(ebm)
    return ebm


@POOLS
@BOTH_DTYPES
def test_pools_repeat_by_seed(make: Callable[[int], Pool], dtype: torch.dtype) -> None:
    first, again, other = (refreshed(make(seed), 4, dtype).pool for seed in (5, 5, 6))
    assert same(snapshot(first), snapshot(again))
    assert not torch.equal(first.u, other.u)
    assert all(t.dtype == dtype for t in snapshot(first).values() if t.is_floating_point())
    assert first.refreshes.dtype == torch.long


@POOLS
@BOTH_DTYPES
def test_a_restored_pool_continues_bit_for_bit(
    make: Callable[[int], Pool], dtype: torch.dtype
) -> None:
    original = refreshed(make(5), 3, dtype)
    state = snapshot(original)
    restored = frozen_ebm(make(5), 3.0 * EYE, dtype=dtype)  # θ comes with the state as well
    restored.load_state_dict(state)
    for ebm in (original, restored):
        for _ in range(3):
            ebm.pool.refresh(ebm)
    assert same(snapshot(original), snapshot(restored))
    assert not same(snapshot(original), state)


@POOLS
def test_chains_move_and_carry_their_energy(make: Callable[[int], Pool]) -> None:
    ebm = frozen_ebm(make(1), dtype=torch.float64)
    start = ebm.pool.u.clone()
    assert start.shape[-1] == 3 and ebm.pool.log_partition.item() == 0.0
    ebm.pool.refresh(ebm)
    ebm.pool.refresh(ebm)
    assert (ebm.pool.u != start).any(-1).double().mean() > 0.5
    u, log_w = ebm.pool.negatives()
    torch.testing.assert_close(ebm.pool.f.flatten(), ebm.residual(u).detach())
    assert torch.logsumexp(log_w, 0).item() == pytest.approx(0.0, abs=1e-6)
    assert u.shape == (log_w.numel(), 3)
    assert ((ebm.pool.acceptance > 0.0) & (ebm.pool.acceptance <= 1.0 + 1e-6)).all()


@POOLS
def test_refresh_replaces_buffers_and_writes_into_none(make: Callable[[int], Pool]) -> None:
    ebm = refreshed(make(1), 1, torch.float64)
    buffers, before = dict(ebm.pool.named_buffers()), snapshot(ebm.pool)
    ebm.f.set_precision(3.0 * PRECISION)  # abrupt enough for weights to be resampled
    ebm.pool.refresh(ebm)
    ebm.pool.refresh(ebm)
    assert same(before, buffers)
    assert not same(before, snapshot(ebm.pool))


@POOLS
def test_refresh_follows_a_change_of_dtype(make: Callable[[int], Pool]) -> None:
    ebm = refreshed(make(1), 2, torch.float32).double()
    ebm.pool.refresh(ebm)
    assert all(t.dtype == torch.float64 for t in snapshot(ebm).values() if t.is_floating_point())


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemperedPool(3, 1), "num_chains must be at least 2; got 1"),
        (lambda: TemperedPool(3, 10, num_moves=0), "num_moves must be at least 1; got 0"),
        (lambda: TemperedPool(3, 10, step_size=0.0), r"step_size must be positive; got 0\.0"),
        (lambda: PersistentPool(0), "num_chains must be at least 2; got 0"),
        (lambda: PersistentPool(10, num_moves=-1), "num_moves must be at least 1; got -1"),
        (lambda: PersistentPool(10, step_size=-0.1), r"step_size must be positive; got -0\.1"),
        (lambda: PersistentPool(10, step_size=math.nan), "step_size must be positive; got nan"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Pool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@POOLS
def test_a_nan_energy_leaves_the_pool_alone(make: Callable[[int], Pool]) -> None:
    ebm = refreshed(make(1), 2, torch.float32)
    before = snapshot(ebm.pool)
    good = ebm.f.linear.detach().clone()
    with torch.no_grad():
        ebm.f.linear[0] = math.nan
    count = ebm.pool.f.numel()
    with pytest.raises(
        ValueError, match=rf"NaN or infinite at {count} of {count} negatives.*learning rate"
    ):
        ebm.pool.refresh(ebm)
    assert same(before, snapshot(ebm.pool))
    with torch.no_grad():
        ebm.f.linear.copy_(good)
    ebm.pool.refresh(ebm)
    assert int(ebm.pool.refreshes) == 3


class Hole(nn.Module):
    """NaN where x > 1.2, which draws of the base enter and the first chains do not."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 1.2, math.nan, 0.1 * z[..., 0] ** 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TemperedPool(3, 40),
        lambda: PersistentPool(40),
    ],
)
def test_nan_met_during_a_refresh_does_not_enter_the_pool(make: Callable[[], Pool]) -> None:
    standard = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    ebm = LVEBM(Hole(), standard, standard, pool=make())
    ebm.pool.u.clamp_(max=1.0)
    before = snapshot(ebm.pool)
    try:
        ebm.pool.refresh(ebm)
    except ValueError:
        assert same(before, snapshot(ebm.pool))
    assert torch.isfinite(ebm.pool.f).all() and torch.isfinite(ebm.pool.log_partition)
