# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from referee import ALPHA, ks_p_value, seeded
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


def test_any_start_is_forgotten() -> None:
    """From one far place to the target in 60 proposals. False alarms: 1e-3."""
    state, generator = init_state(f, torch.full((20_000, 1), 30.0)), seeded(5)
    for _ in range(60):
        state = independence_step(f, state, inverse_temperature=1.0, generator=generator)
    assert ks_p_value(state.u[:, 0].double().numpy(), target_cdf(1.0)) > ALPHA
