# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pool_models import EYE, LINEAR, LOG_Z, PRECISION, frozen_ebm
from referee import (
    ALPHA,
    CERTAIN,
    mean_p_value,
    variance_p_value,
)
from torch import Tensor

from pyro_lvebm import MALA, ULA, PersistentPool

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# --- equal weights --------------------------------------------------------------------------


def persistent_p_value(kernel: ULA | MALA, variance: Tensor, eta: float, dtype) -> float:
    eigenvalues = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    pool = PersistentPool(4000, num_moves=5, kernel=kernel, step_size=eta, seed=4)
    ebm = frozen_ebm(pool, eigenvalues.diag(), torch.zeros(3), dtype)
    for _ in range(math.ceil(1.5 / eta / 0.4)):
        pool.refresh(ebm)
    return variance_p_value(pool.negatives()[0], variance / eigenvalues)


@pytest.mark.parametrize(("eta", "dtype"), [(0.2, torch.float32), (0.5, torch.float64)])
def test_persistent_pool_has_the_variance_of_its_kernel(eta: float, dtype: torch.dtype) -> None:
    """ULA has 1/(λ(1 - ηλ/2)), MALA 1/λ. False alarms: 1e-3 each; each check rejects the other."""
    eigenvalues = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    biased, exact = 1.0 / (1.0 - 0.5 * eta * eigenvalues), torch.ones(3)
    assert persistent_p_value(ULA(), biased, eta, dtype) > ALPHA
    assert persistent_p_value(MALA(), exact, eta, dtype) > ALPHA
    assert persistent_p_value(ULA(), exact, eta, dtype) < CERTAIN
    assert persistent_p_value(MALA(), biased, eta, dtype) < CERTAIN


def test_persistent_pool_is_equally_weighted_and_keeps_the_step_of_ula() -> None:
    pool = PersistentPool(50, step_size=0.07)
    ebm = frozen_ebm(pool)
    for _ in range(3):
        pool.refresh(ebm)
    assert pool.ess.item() == pytest.approx(50.0, rel=1e-5)
    assert pool.step_size.item() == pytest.approx(0.07)
    assert pool.acceptance.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kernel", [ULA(), MALA()])
def test_persistent_log_partition_adds_up_the_changes(kernel: ULA | MALA) -> None:
    pool = PersistentPool(300, kernel=kernel, seed=2)
    ebm = frozen_ebm(pool, dtype=torch.float64)
    first = torch.logsumexp(-ebm.residual(pool.u[0]), 0) - math.log(300)
    pool.refresh(ebm)
    torch.testing.assert_close(pool.log_partition, first.detach())
    pool.refresh(ebm)  # the same θ
    torch.testing.assert_close(pool.log_partition, first.detach(), rtol=0, atol=1e-12)
    before = ebm.residual(pool.u[0]).detach()
    ebm.f.set_precision(2.0 * PRECISION, LINEAR)
    change = torch.logsumexp(before - ebm.residual(pool.u[0]), 0) - math.log(300)
    pool.refresh(ebm)
    torch.testing.assert_close(pool.log_partition, (first + change).detach())


def path_p_value(kernel: ULA | MALA, step_size: float) -> float:
    """p-value of log Z at the end of a path of 20 values of θ, over 9 pools."""
    estimates = []
    for seed in range(9):
        pool = PersistentPool(500, num_moves=12, kernel=kernel, step_size=step_size, seed=seed)
        ebm = frozen_ebm(pool)
        for t in np.linspace(0.05, 1.0, 20):
            ebm.f.set_precision((EYE + t * (PRECISION - EYE)).float(), t * LINEAR.float())
            pool.refresh(ebm)
        estimates.append(pool.log_partition)
    return mean_p_value(torch.stack(estimates), LOG_Z)


def test_persistent_log_partition_follows_a_slow_path() -> None:
    """Chains that keep up with θ. False alarms: 1e-3.

    The check fails for the biased kernel, and for chains that hardly move.
    """
    assert path_p_value(MALA(), 0.4) > ALPHA
    assert path_p_value(ULA(), 0.6) < CERTAIN
    assert path_p_value(ULA(), 0.001) < CERTAIN
