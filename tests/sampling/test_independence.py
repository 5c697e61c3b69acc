# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from referee import ALPHA, CERTAIN, ks_p_value, normal, seeded
from scipy import stats
from torch import Tensor

from pyro_lvebm.sampling.annealing import independence_step
from pyro_lvebm.sampling.langevin import init_state

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

LAMBDA, SHIFT = 1.5, 0.8
"""f(u) = ½ λ u² + s u in one dimension, so that p_β is normal."""


def f(u: Tensor) -> tuple[Tensor, Tensor]:
    return (0.5 * LAMBDA * u**2 + SHIFT * u).sum(-1), LAMBDA * u + SHIFT


def target_cdf(beta: float):
    precision = 1.0 + beta * LAMBDA
    return stats.norm(-beta * SHIFT / precision, precision**-0.5).cdf


def after(beta: float, moved_at: float, num_steps: int, dtype: torch.dtype) -> np.ndarray:
    """Exact draws of p_β, moved so often at another inverse temperature."""
    precision = 1.0 + beta * LAMBDA
    u = normal((20_000, 1), 3) / math.sqrt(precision) - beta * SHIFT / precision
    state, generator = init_state(f, u.to(dtype)), seeded(4)
    for _ in range(num_steps):
        state = independence_step(f, state, inverse_temperature=moved_at, generator=generator)
    assert state.u.dtype == state.f.dtype == state.grad.dtype == dtype
    return state.u[:, 0].double().numpy()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_target_is_left_invariant(beta: float, dtype: torch.dtype) -> None:
    """Kolmogorov and Smirnov's test. False alarms: 1e-3 a case."""
    assert ks_p_value(after(beta, beta, 3, dtype), target_cdf(beta)) > ALPHA


def test_invariance_check_fails_at_another_temperature() -> None:
    assert ks_p_value(after(1.0, 0.4, 3, torch.float64), target_cdf(1.0)) < CERTAIN
    assert ks_p_value(after(0.4, 1.0, 3, torch.float64), target_cdf(0.4)) < CERTAIN


def test_any_start_is_forgotten() -> None:
    """From one far place to the target in 60 proposals. False alarms: 1e-3."""
    state, generator = init_state(f, torch.full((20_000, 1), 30.0)), seeded(5)
    for _ in range(60):
        state = independence_step(f, state, inverse_temperature=1.0, generator=generator)
    assert ks_p_value(state.u[:, 0].double().numpy(), target_cdf(1.0)) > ALPHA


def test_state_belongs_to_its_positions_and_the_input_stays() -> None:
    state = init_state(f, normal((3, 50, 2), 6))
    copies = [part.clone() for part in state]
    new = independence_step(f, state, inverse_temperature=0.7, generator=seeded(7))
    assert all(torch.equal(a, b) for a, b in zip(state, copies, strict=True))
    moved = (new.u != state.u).any(-1)
    assert moved.any() and not moved.all()
    for kept, expected in zip(new, init_state(f, new.u), strict=True):
        torch.testing.assert_close(kept, expected)


def test_draws_repeat_by_generator() -> None:
    state = init_state(f, normal((50, 2), 6))
    a, b, c = (
        independence_step(f, state, inverse_temperature=0.7, generator=seeded(seed)).u
        for seed in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_proposals_without_a_finite_energy_are_rejected(bad: float) -> None:
    def walled(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = f(u)
        return value.masked_fill(u[..., 0] > 0, bad), grad

    state, generator = init_state(walled, -normal((2000, 1), 8).abs()), seeded(9)
    for _ in range(5):
        state = independence_step(walled, state, inverse_temperature=0.5, generator=generator)
    assert bool((state.u < 0).all()) and bool(state.f.isfinite().all())
