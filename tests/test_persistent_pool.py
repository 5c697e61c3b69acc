# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pool_models import EYE, LINEAR, LOG_Z, PRECISION, frozen_ebm
from referee import (
    ALPHA,
    CERTAIN,
    gaussian_draws,
    gaussian_log_partition,
    gaussian_moments,
    mean_p_value,
    normal,
    variance_p_value,
)
from small_models import quadratic_ebm, same, snapshot
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_lvebm import LVEBM, MALA, ULA, PersistentPool, QuadraticEnergy, langevin, persistent_pool

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


# --- Jarzynski's weights --------------------------------------------------------------------


def standard_ebm(pool: PersistentPool, dim: int, dtype: torch.dtype) -> LVEBM:
    """A quadratic energy on a standard base, equal to the base at first."""
    bases = [dist.Normal(torch.zeros(k, dtype=dtype), 1.0).to_event(1) for k in (dim - 1, 1)]
    return LVEBM(QuadraticEnergy(dim - 1, 1).to(dtype), *bases, pool=pool)


class Path(NamedTuple):
    """A line of `length` values of θ from the base to a Gaussian, and pools that follow it."""

    precision: Tensor
    linear: Tensor
    length: int
    num_chains: int
    num_moves: int
    step_size: float
    replicates: int
    dtype: torch.dtype

    def follow(self, pool: PersistentPool) -> LVEBM:
        ebm = standard_ebm(pool, len(self.linear), self.dtype)
        eye = torch.eye(len(self.linear), dtype=torch.float64)
        for k in range(1, self.length + 1):
            t = k / self.length
            precision, linear = eye + t * (self.precision - eye), t * self.linear
            ebm.f.set_precision(precision.to(self.dtype), linear.to(self.dtype))
            pool.refresh(ebm)
        return ebm


PATHS = {
    "long": Path(PRECISION, LINEAR, 8, 1000, 8, 0.2, 40, torch.float32),
    "wide": Path(
        torch.tensor([0.4, 0.7, 1.0, 1.8, 3.0], dtype=torch.float64).diag(),
        torch.tensor([0.5, -0.3, 0.0, 0.8, -1.0], dtype=torch.float64),
        *(6, 300, 6, 0.25, 24, torch.float64),
    ),
    "abrupt": Path(PRECISION[:2, :2], LINEAR[:2], 2, 100, 12, 0.2, 80, torch.float64),
}


def path_moments_p_value(path: Path, kernel: ULA | MALA, jarzynski: bool) -> float:
    """p-value of Ẑ/Z and of Ẑ/Z Σ W g(u), g the means, squares and a product, over replicates.

    Their means are 1 and E_p[g] for any number of chains: no bias is left to allow for.
    """
    log_z = gaussian_log_partition(path.precision, path.linear)
    estimates = []
    for seed in range(path.replicates):
        pool = PersistentPool(
            path.num_chains,
            num_moves=path.num_moves,
            kernel=kernel,
            step_size=path.step_size,
            seed=seed,
            jarzynski=jarzynski,
        )
        path.follow(pool)
        u, log_w = (part.double() for part in pool.negatives())
        g = torch.cat([torch.ones_like(u[:, :1]), u, u**2, u[:, [0]] * u[:, [1]]], -1)
        estimates.append((pool.log_partition.double() - log_z).exp() * (log_w.exp() @ g))
    mean, covariance = gaussian_moments(path.precision, path.linear)
    second = covariance + np.outer(mean, mean)
    exact = np.array([1.0, *mean, *second.diagonal(), second[0, 1]])
    return mean_p_value(torch.stack(estimates), exact)


class Still(MALA):
    """MALA at a step size that does not adapt, as unbiasedness asks for."""

    def adapt(self, step_size: Tensor, acceptance: Tensor, rate: float = 0.1) -> Tensor:
        return step_size


EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


@EVERY_PATH
@pytest.mark.parametrize("kernel", [ULA(), Still()], ids=["ula", "mala"])
def test_weighted_z_and_moments_are_unbiased_on_a_path(path: Path, kernel: ULA | MALA) -> None:
    """Student's test over independent pools. False alarms: 1e-3 a case.

    With steps for which the variance of ULA is up to 1.6 times too large.
    """
    assert path_moments_p_value(path, kernel, jarzynski=True) > ALPHA


@EVERY_PATH
def test_path_check_fails_without_weights(path: Path) -> None:
    assert path_moments_p_value(path, ULA(), jarzynski=False) < CERTAIN


_log_acceptance = langevin._log_acceptance


@pytest.mark.parametrize("path", ["long", "wide"])
@pytest.mark.parametrize("factor", [-1.0, 0.0], ids=["flipped", "dropped"])
def test_path_check_fails_for_wrong_increments(
    monkeypatch: pytest.MonkeyPatch, path: str, factor: float
) -> None:
    monkeypatch.setattr(langevin, "_log_acceptance", lambda *a: factor * _log_acceptance(*a))
    assert path_moments_p_value(PATHS[path], ULA(), jarzynski=True) < CERTAIN


def test_path_check_fails_where_resampling_only_drops_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        persistent_pool, "systematic_resample", lambda log_w, _: torch.arange(len(log_w))
    )
    assert path_moments_p_value(PATHS["long"], ULA(), jarzynski=True) < CERTAIN


def training_error(num_chains: int, seed: int, jarzynski: bool) -> Tensor:
    """Fit a Gaussian by gradient steps on the pool's chains; return the error of log Z."""
    pool = PersistentPool(num_chains, num_moves=3, step_size=0.2, seed=seed, jarzynski=jarzynski)
    ebm = standard_ebm(pool, 3, torch.float64)
    data = gaussian_draws(torch.tensor([0.6, 1.0, 2.0]).diag(), 0.5 * LINEAR, (500,), seed=70)
    optimiser = torch.optim.SGD(ebm.f.parameters(), lr=0.2)
    for _ in range(12):
        optimiser.zero_grad()
        (ebm.residual(data).mean() + ebm.log_norm()).backward()
        optimiser.step()
    pool.refresh(ebm)
    return pool.log_partition - ebm.f.log_partition().detach()


def training_p_values(jarzynski: bool) -> tuple[float, float]:
    """p-values of an error of mean zero, of 100 chains and extrapolated from 100 and 500."""
    few, many = (
        torch.stack([training_error(n, seed, jarzynski) for seed in range(15)]) for n in (100, 500)
    )
    return mean_p_value(few, 0.0), mean_p_value((5.0 * many - few) / 4.0, 0.0)


def test_error_of_weighted_log_z_in_training_falls_with_the_number_of_chains() -> None:
    """Chains that choose θ leave a bias of log Z; being O(1/n), it cancels in the extrapolation.

    Without weights an error remains that no number of chains removes. False alarms: 1e-3.
    """
    of_few, extrapolated = training_p_values(jarzynski=True)
    assert of_few < CERTAIN and extrapolated > ALPHA
    assert training_p_values(jarzynski=False)[1] < CERTAIN


def kl_p_value(jarzynski: bool) -> float:
    """p-value of `kl_to` of a pool that ULA has moved, over 12 pools with a bias O(1/4000)."""
    path = PATHS["long"]._replace(num_chains=4000, dtype=torch.float64)
    other = path.precision + 0.4 * EYE, path.linear - 0.3
    laws = [
        MultivariateNormal(-torch.linalg.solve(p, b), precision_matrix=p)
        for p, b in ((path.precision, path.linear), other)
    ]
    estimates = []
    for seed in range(12):
        pool = PersistentPool(4000, step_size=0.2, seed=seed, jarzynski=jarzynski)
        ebm = path.follow(pool)
        assert ebm.kl_of_update().item() == pytest.approx(0.0, abs=1e-9)
        ebm.f.set_precision(*other)
        estimates.append(ebm.kl_of_update())
    return mean_p_value(torch.stack(estimates), kl_divergence(*laws))


def test_kl_of_an_update_uses_the_weights() -> None:
    """False alarms: 1e-3."""
    assert kl_p_value(jarzynski=True) > ALPHA
    assert kl_p_value(jarzynski=False) < CERTAIN


@pytest.mark.parametrize(
    ("x_dim", "z_dim", "eta", "moves", "dtype"),
    [
        (3, 2, 0.1, 5, torch.float64),
        (1, 1, 0.4, 1, torch.float64),
        (6, 3, 0.04, 12, torch.float32),
        (2, 1, 0.15, 3, torch.float32),
    ],
)
def test_weights_of_moves_on_a_quadratic_have_their_closed_form(
    x_dim: int, z_dim: int, eta: float, moves: int, dtype: torch.dtype
) -> None:
    """On a quadratic log α = (η/4)(|∇E(u)|² − |∇E(v)|²), so that moves telescope."""
    pool = PersistentPool(400, num_moves=moves, step_size=eta, jarzynski=True)
    ebm = quadratic_ebm(x_dim, z_dim, pool=pool, dtype=dtype)
    start = gaussian_draws(ebm.f.precision.detach(), ebm.f.linear, (1, 400), seed=60).to(dtype)
    pool.u, pool.f = start, ebm.residual_and_grad(start)[0]
    error = 1e-10 if dtype == torch.float64 else 2e-4

    def squared_gradient() -> Tensor:
        grad = ebm.residual_and_grad(pool.u)[1] + pool.u
        return grad.square().sum(-1).squeeze(0)

    first = squared_gradient()
    for _ in range(3):
        pool.refresh(ebm)
        log_w = pool.log_weights + pool.log_partition + math.log(400)
        expected = 0.25 * pool.step_size.item() * (first - squared_gradient())
        torch.testing.assert_close(log_w, expected, rtol=0, atol=error)
        assert expected.std() > 0.1 and pool.ess > 200.0  # nothing was resampled


def second_moment_p_value(moves: int, claimed: int, dtype: torch.dtype) -> float:
    """p-value of E[w²] of chains that start in p, with 40,000 chains on E = ½ λ u² each.

    log w = (ηλ²/4)(u² − v²) with v | u ~ N((1 − ηλ)^K u, s² / λ) after K moves; Gaussian integrals
    give, with r = ηλ and ρ = (1 − r)^2K,

        s² = (1 − ρ) / (1 − r/2),    E[w²] = ((1 + r s²)(1 − r (1 − ρ / (1 + r s²))))^-½

    which is finite for r < 1; w² has a finite variance for r < ½.
    """
    r, lam = 0.35, 1.6
    energies = torch.tensor([lam, 1.0], dtype=dtype).diag()  # f = 0 in the second coordinate
    pool = PersistentPool(40000, num_moves=moves, step_size=r / lam, seed=3, jarzynski=True)
    ebm = standard_ebm(pool, 2, dtype)
    ebm.f.set_precision(energies)
    pool.u = normal((1, 40000, 2), 61, dtype) / energies.diagonal().sqrt()
    pool.f = ebm.residual(pool.u).detach()
    pool.refresh(ebm)
    log_w = pool.log_weights.double() + pool.log_partition.double() + math.log(40000)

    def exact(r: float) -> float:
        rho = (1.0 - r) ** (2 * claimed)
        a = 1.0 + r * (1.0 - rho) / (1.0 - 0.5 * r)
        return (a * (1.0 - r * (1.0 - rho / a))) ** -0.5

    return mean_p_value((2.0 * log_w).exp(), exact(r) * exact(r / lam))


@pytest.mark.parametrize(("moves", "dtype"), [(1, torch.float64), (6, torch.float32)])
def test_variance_of_the_weights_of_exact_draws(moves: int, dtype: torch.dtype) -> None:
    """False alarms: 1e-3 a case. The value for another number of moves is rejected."""
    assert second_moment_p_value(moves, moves, dtype) > ALPHA
    assert second_moment_p_value(moves, 7 - moves, dtype) < CERTAIN


@pytest.mark.parametrize("num_chains", [20, 301])
@pytest.mark.parametrize("kernel", [ULA(), MALA()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_are_resampled_below_half_of_the_effective_size(
    num_chains: int, kernel: ULA | MALA, dtype: torch.dtype
) -> None:
    """k chains share all weight, so that ESS = k; the step is so short that copies stay put."""
    for k in (num_chains // 3, (num_chains - 1) // 2, num_chains // 2 + 1):
        pool = PersistentPool(
            num_chains, num_moves=1, kernel=kernel, step_size=1e-9, jarzynski=True
        )
        ebm = quadratic_ebm(2, 1, pool=pool, dtype=dtype)
        start = pool.u[0].clone()
        alive = torch.arange(num_chains) % 3 == 0
        alive = torch.argsort(~alive, stable=True).argsort() < k
        f_new = ebm.residual(pool.u).detach()
        pool.f = f_new + torch.where(alive, 0.5, -60.0).to(dtype)
        pool.refresh(ebm)
        expected = math.log(k / num_chains) + 0.5
        assert pool.log_partition.item() == pytest.approx(expected, abs=1e-3)
        parent = torch.cdist(pool.u[0], start).argmin(1)
        assert (pool.u[0] - start[parent]).abs().max() < 1e-3
        if 2 * k < num_chains:
            assert pool.ess.item() == pytest.approx(num_chains, rel=1e-3)
            copies = torch.bincount(parent, minlength=num_chains)
            assert (copies[~alive] == 0).all()
            # Systematic resampling gives each the number expected of it, rounded up or down.
            assert set(copies[alive].tolist()) <= {num_chains // k, -(-num_chains // k)}
        else:
            assert pool.ess.item() == pytest.approx(k, rel=1e-3)
            assert torch.equal(parent, torch.arange(num_chains))


def test_chains_are_weighted_only_where_asked() -> None:
    assert PersistentPool().jarzynski is False
    pools = {
        jarzynski: PersistentPool(60, step_size=0.3, seed=1, jarzynski=jarzynski)
        for jarzynski in (False, True)
    }
    # So near the base that no weights are so unequal that chains are resampled.
    theta = EYE + 0.2 * (PRECISION - EYE), 0.2 * LINEAR
    ebms = {jarzynski: frozen_ebm(pool, *theta) for jarzynski, pool in pools.items()}
    for jarzynski, pool in pools.items():
        pool.refresh(ebms[jarzynski])
        assert (pool.log_weights.std() > 0.01) == jarzynski
        assert (pool.acceptance < 0.99).item() == jarzynski  # known as soon as α is
    assert 30.0 < pools[True].ess < 59.9
    assert torch.equal(pools[False].u, pools[True].u)  # the weights do not enter the moves
    pools[False].load_state_dict(pools[True].state_dict())
    pools[False].refresh(ebms[False])
    assert pools[False].log_weights.std() < 1e-6


class Kink(nn.Module):
    """Finite everywhere, but the gradient for x < 0 is NaN."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (x[..., 0] * (x[..., 0] > 0.0)).sqrt() + 0.1 * z[..., 0] ** 2


def test_weights_that_are_not_finite_do_not_enter_the_pool() -> None:
    standard = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    pool = PersistentPool(40, num_moves=1, step_size=0.1, jarzynski=True)
    ebm = LVEBM(Kink(), standard, standard, pool=pool)
    pool.u = pool.u.abs() + 0.01
    before = snapshot(pool)
    with pytest.raises(ValueError, match=r"weights are NaN or infinite at \d+ of 40 negatives"):
        pool.refresh(ebm)
    assert same(before, snapshot(pool))
