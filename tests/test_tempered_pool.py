# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from pool_models import EYE, LOG_Z, PRECISION, exact_moments, frozen_ebm, weighted_moments
from referee import ALPHA, CERTAIN, mean_p_value, normal, plane_grid, seeded, variance_p_value
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MALA, ULA, TemperedPool, tempered_pool
from pyro_lvebm.langevin import LangevinState, init_state
from pyro_lvebm.reweighting import mbar
from pyro_lvebm.tempered_pool import exchange

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# --- on a Gaussian --------------------------------------------------------------------------


def tempered_p_values(make: Callable[[int], TemperedPool], dtype: torch.dtype) -> tuple:
    """p-values of log Z and of weighted moments over 10 pools with their own seeds.

    Each pool is averaged over refreshes 20 to 200. The bias of log Z, half its variance (4e-4), is
    about a quarter of the standard error of the mean.
    """
    log_zs, moments = [], []
    for seed in range(10):
        ebm = frozen_ebm(make(seed), dtype=dtype)
        chain = []
        for refresh in range(200):
            ebm.pool.refresh(ebm)
            if refresh >= 20:
                chain.append((ebm.pool.log_partition.double(), weighted_moments(ebm.pool)))
            assert (ebm.pool.swap_rate >= 0).all() and (ebm.pool.swap_rate <= 1 + 1e-6).all()
            assert 1.0 <= ebm.pool.ess <= ebm.pool.log_weights.numel() + 1e-2
        log_zs.append(torch.stack([c[0] for c in chain]).mean())
        moments.append(torch.stack([c[1] for c in chain]).mean(0))
        assert int(ebm.pool.refreshes) == 200
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

    monkeypatch.setattr(tempered_pool, "exchange", always)
    p_values = tempered_p_values(
        lambda seed: TemperedPool(4, 256, num_moves=1, seed=seed), torch.float32
    )
    assert max(p_values) < CERTAIN


def test_tempered_check_fails_without_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tempered_pool.mbar

    def unweighted(f: Tensor, betas: Tensor, log_z: Tensor, count: int) -> tuple[Tensor, Tensor]:
        log_z, log_w = real(f, betas, log_z, count)
        return 0.7 * log_z, torch.full_like(log_w, -math.log(len(log_w)))

    monkeypatch.setattr(tempered_pool, "mbar", unweighted)
    p_values = tempered_p_values(
        lambda seed: TemperedPool(3, 200, num_moves=1, seed=seed), torch.float32
    )
    assert max(p_values) < CERTAIN


def test_weights_and_log_z_solve_the_equations_of_mbar() -> None:
    """To 1e-3 nats after each refresh, from the first, where log Z itself moves by far more."""
    ebm = frozen_ebm(TemperedPool(4, 128, num_moves=2, seed=1), dtype=torch.float64)
    for _ in range(8):
        before = ebm.pool.log_z.clone()
        ebm.pool.refresh(ebm)
        log_z, log_w = mbar(ebm.pool.f, ebm.pool.betas, ebm.pool.log_z, 1000)
        torch.testing.assert_close(ebm.pool.log_z, log_z, rtol=0, atol=1e-3)
        torch.testing.assert_close(ebm.pool.log_weights, log_w, rtol=0, atol=1e-3)
        assert (ebm.pool.log_z - before).abs().max() > 0.005
        assert ebm.pool.log_partition == ebm.pool.log_z[-1]


class TwoWells(nn.Module):
    """A user energy on data coordinates with two modes, far apart in z."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 2.0 * (z[..., 0] ** 2 - 4.0) ** 2 / 16.0 + 0.5 * z[..., 0] * x[..., 0]


def two_wells_p_value(shift: float) -> float:
    base_x, base_z = dist.Normal(0.3, 0.8), dist.Normal(-0.4, 2.0)
    grid, cell = plane_grid(15.0, 601)
    x, z = grid[:, :1], grid[:, 1:]
    log_z = torch.logsumexp(
        base_x.log_prob(x[:, 0]) + base_z.log_prob(z[:, 0]) - TwoWells()(x, z), 0
    ) + math.log(cell)
    estimates = []
    for seed in range(8):
        ebm = LVEBM(
            TwoWells(),
            base_x.expand([1]).to_event(1),
            base_z.expand([1]).to_event(1),
            pool=TemperedPool(5, 200, num_moves=1, seed=seed),
        )
        chain = []
        for refresh in range(60):
            ebm.pool.refresh(ebm)
            if refresh >= 20:
                chain.append(ebm.pool.log_partition)
        estimates.append(torch.stack(chain).mean())
    return mean_p_value(torch.stack(estimates), log_z + shift)


def test_tempered_pool_on_two_modes() -> None:
    """Quadrature in 1 + 1 dimensions, 8 pools. False alarms: 1e-3.

    The check finds an error of 0.1 nats.
    """
    assert two_wells_p_value(0.0) > ALPHA
    assert two_wells_p_value(0.1) < CERTAIN


# --- the ladder -----------------------------------------------------------------------------


def test_level_zero_is_drawn_from_the_base_at_each_refresh() -> None:
    """Where f = 0 all exchanges happen, and level 1 gets the new draws. False alarms: 1e-3."""
    ebm = frozen_ebm(TemperedPool(2, 2000, num_moves=1), EYE, torch.zeros(3), torch.float64)
    ebm.pool.u.fill_(100.0)
    ebm.pool.refresh(ebm)
    assert torch.equal(ebm.pool.swap_rate, torch.ones(1).double())
    assert ebm.pool.log_partition.item() == 0.0 and ebm.pool.ess.item() == pytest.approx(4000.0)
    old, new = ebm.pool.u
    assert variance_p_value(new, torch.ones(3)) > ALPHA
    assert variance_p_value(old, torch.ones(3)) < CERTAIN and old.min() > 50.0


@pytest.mark.parametrize("target", [0.574, 0.75])
def test_each_level_adapts_its_step(target: float) -> None:
    """Acceptance over the last 20 of 220 refreshes, 8,000 tests a level: standard error < 0.01."""
    pool = TemperedPool(3, 400, num_moves=1, kernel=MALA(target), step_size=0.03)
    ebm = frozen_ebm(pool, 20.0 * PRECISION)
    rates = []
    for refresh in range(220):
        pool.refresh(ebm)
        if refresh == 0:
            assert (pool.acceptance - target).abs().max() > 0.1
        if refresh >= 200:
            rates.append(pool.acceptance)
    assert (torch.stack(rates).mean(0) - target).abs().max() < 0.04
    steps = pool.step_size.flatten()
    assert steps[0] > 3.0 * steps[1] > 3.0 * steps[2]


@pytest.mark.parametrize("num_levels", [2, 3, 12])
def test_the_ladder_rises_from_the_base_to_the_model(num_levels: int) -> None:
    betas = TemperedPool(num_levels, 5).betas
    assert betas.shape == (num_levels,) and betas[0] == 0.0 and betas[-1] == 1.0
    assert (betas.diff() > 0.0).all()


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
