# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
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
    plane_grid,
    seeded,
    variance_p_value,
)
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    MALA,
    ULA,
    PersistentPool,
    QuadraticEnergy,
    TemperedPool,
    tempered_pool,
)
from pyro_lvebm.langevin import LangevinState, init_state
from pyro_lvebm.pool import Pool
from pyro_lvebm.reweighting import mbar
from pyro_lvebm.tempered_pool import exchange

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

EYE = torch.eye(3, dtype=torch.float64)
PRECISION = torch.tensor([[2.5, 0.6, 0.0], [0.6, 0.6, -0.3], [0.0, -0.3, 1.5]]).double()
LINEAR = torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)
LOG_Z = gaussian_log_partition(PRECISION, LINEAR)


def frozen_ebm(
    pool: Pool,
    precision: Tensor = PRECISION,
    linear: Tensor = LINEAR,
    dtype: torch.dtype = torch.float32,
) -> LVEBM:
    """x 2-D with a full base, z 1-D, and a quadratic energy that is not trained."""
    energy = QuadraticEnergy(2, 1).to(dtype)
    energy.set_precision(precision.to(dtype), linear.to(dtype))
    tril = torch.tensor([[2.0, 0.0], [-0.7, 0.4]], dtype=dtype)
    return LVEBM(
        energy,
        dist.MultivariateNormal(torch.tensor([1.0, -3.0], dtype=dtype), scale_tril=tril),
        dist.Normal(torch.tensor([0.5], dtype=dtype), 1.7).to_event(1),
        pool=pool,
    )


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].nan_to_num(-7.0), b[k].nan_to_num(-7.0)) for k in a
    )


def weighted_moments(pool: Pool) -> Tensor:
    """Weighted means, squares and one product (7,) of the negatives."""
    u, log_w = (part.double() for part in pool.negatives())
    features = torch.cat([u, u**2, u[:, [0]] * u[:, [1]]], -1)
    return log_w.exp() @ features


def exact_moments(precision: Tensor = PRECISION, linear: Tensor = LINEAR) -> np.ndarray:
    mean, covariance = gaussian_moments(precision, linear)
    second = covariance + np.outer(mean, mean)
    return np.array([*mean, *second.diagonal(), second[0, 1]])


# --- the tempered pool on a Gaussian --------------------------------------------------------


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
    real = pool.mbar

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


# --- the persistent pool --------------------------------------------------------------------


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
    """p-value of log Z at the end of a path of 20 values of θ, over 12 pools."""
    estimates = []
    for seed in range(12):
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
def test_refresh_follows_a_change_of_dtype(make: Callable[[int], Pool]) -> None:
    ebm = refreshed(make(1), 2, torch.float32).double()
    ebm.pool.refresh(ebm)
    assert all(t.dtype == torch.float64 for t in snapshot(ebm).values() if t.is_floating_point())


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


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TemperedPool(1, 10), "num_levels must be at least 2; got 1"),
        (lambda: TemperedPool(3, 1), "num_chains must be at least 2; got 1"),
        (lambda: TemperedPool(3, 10, num_moves=0), "num_moves must be at least 1; got 0"),
        (lambda: TemperedPool(3, 10, step_size=0.0), r"step_size must be positive; got 0\.0"),
        (lambda: TemperedPool(3, 10, kernel=ULA()), "needs MALA"),
        (lambda: TemperedPool(3, 10, kernel=ULA(0.9)), "needs MALA"),
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


@pytest.mark.parametrize("make", [lambda: TemperedPool(3, 40), lambda: PersistentPool(40)])
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
