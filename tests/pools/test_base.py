# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pool_models import EYE, LINEAR, PRECISION, exact_moments, frozen_ebm
from referee import ALPHA, CERTAIN, gaussian_draws, mean_p_value, seeded
from small_models import same, snapshot
from torch import Tensor

from pyro_lvebm import MALA, PersistentPool, TemperedPool
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


def draw_p_value(*, use_weights: bool, num_moves: int, num_pools: int = 50) -> float:
    """p-value of moments of 300 draws from each of so many pools of weighted wider draws."""
    moments = []
    for seed in range(num_pools):
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
    assert draw_p_value(use_weights=False, num_moves=60, num_pools=16) > ALPHA  # moves alone do


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
