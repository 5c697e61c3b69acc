# SPDX-License-Identifier: Apache-2.0
"""Training end to end: default settings against exact answers and well-known baselines."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import quadrature_log_c
from pyro.optim import Adam
from referee import CERTAIN, mean_p_value
from scipy import stats
from sklearn.datasets import make_moons
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    log_evidence,
    log_partition,
    lvebm,
)
from pyro_lvebm.cli.baselines import evaluate_baselines, gaussian_mixture
from pyro_lvebm.data import load_digits_data

ALPHA = 1e-3


def train(
    ebm: LVEBM, x: Tensor, *, num_steps: int, lr: float, num_particles: int, seed: int
) -> Saddle:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=256) as i:
            lvebm("scene", ebm, obs=x[i])

    saddle = Saddle(model, AutoParticles(model, num_particles), Adam({"lr": lr}), seed=seed)
    saddle.fit(x, num_steps=num_steps, progress=False)
    return saddle


def standard_normal_p_values(r: Tensor) -> tuple[float, float]:
    """P-values that the mean and the second moments of independent rows r (n, d) are 0 and I."""
    n, d = r.shape
    r = r.double()
    mean_stat = float(n * (r.mean(0) ** 2).sum())
    second = r.T @ r / n - torch.eye(d, dtype=r.dtype)
    # The entries are uncorrelated, with variance 2/n on the diagonal and 1/n above it.
    scaled = n * (second.diagonal() ** 2 / 2).sum() + n * (second.triu(1) ** 2).sum()
    return (
        float(stats.chi2.sf(mean_stat, d)),
        float(stats.chi2.sf(float(scaled), d * (d + 1) // 2)),
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_linear_gaussian_reaches_the_exact_mle(seed: int) -> None:
    """Within 0.005 nats/datum of the exact MLE, and particles that follow the exact posterior.

    Slow: the second and third seeds repeat the same fit on other data.

    The posterior test has a false-alarm rate of 2 ALPHA = 0.002 a seed; the particles before
    training, at the trained θ, fail it.
    """
    generator = torch.Generator().manual_seed(seed)
    loading = torch.randn(2, 4, generator=generator)
    x = torch.randn(600, 2, generator=generator) @ loading
    x = x + 0.5 * torch.randn(600, 4, generator=generator)
    standard = [dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (4, 2)]
    energy = QuadraticEnergy(4, 2)
    ebm = LVEBM(energy, *standard, pool=TemperedPool(seed=seed))
    covariance = torch.cov(x.T, correction=0)
    mle = dist.MultivariateNormal(x.mean(0), covariance).log_prob(x).mean()
    assert mle - energy.log_evidence(x).mean() > 0.1  # the start is not already there

    saddle = train(ebm, x, num_steps=120, lr=3e-2, num_particles=4, seed=seed)
    assert mle - energy.log_evidence(x).mean() < 0.005

    posterior = energy.posterior(x)
    draws = saddle.sample_posterior(x, num_samples=1)["scene_z"][:, 0]

    def residuals(z: Tensor) -> Tensor:
        centred = (z - posterior.loc)[..., None]
        white = torch.linalg.solve_triangular(posterior.scale_tril, centred, upper=False)
        return white.squeeze(-1).detach().reshape(-1, 2)

    assert min(standard_normal_p_values(residuals(draws))) > ALPHA
    untrained = torch.randn(draws.shape, generator=generator)
    assert min(standard_normal_p_values(residuals(untrained))) < ALPHA


def log_partition_by_quadrature(ebm: LVEBM, half_width: float, points: int) -> float:
    """log Z by the rectangle rule, exponentially accurate for a smooth, decaying integrand."""
    axis = torch.linspace(-half_width, half_width, points)
    grid = torch.cartesian_prod(*[axis] * ebm.dim)
    with torch.no_grad():
        log_f = torch.cat([-ebm.residual(u) - ebm.base.energy(u) for u in grid.split(2**17)])
    cell = ebm.dim * math.log(2 * half_width / (points - 1))
    return float(torch.logsumexp(log_f.double(), 0)) + cell - 0.5 * ebm.dim * math.log(2 * math.pi)


def test_a_network_learns_two_modes() -> None:
    """KL(truth ‖ fit) by quadrature is below a tenth of the best Gaussian's, which is 0.31 nats.

    Sampling alone makes it about (free parameters) / 2N, some 0.01; other seeds end at 0.002 to
    0.010. A bracket of log Z misses quadrature in 2 % of cases, and Student's test of the estimate
    has a false-alarm rate of ALPHA.
    """
    generator = torch.Generator().manual_seed(0)
    modes = torch.where(torch.rand(2000, 1, generator=generator) < 0.5, -1.0, 1.0)
    x = modes + 0.4 * torch.randn(2000, 1, generator=generator)
    energy = MLPEnergy(1, 1, hidden=(16,))
    pool = TemperedPool(4, 64, num_moves=4)
    ebm = LVEBM.from_data(energy, x, z_dim=1, base="gaussian", pool=pool)
    grid, cell = torch.linspace(-4.0, 4.0, 401)[:, None], 8.0 / 400
    parts = [dist.Normal(m, 0.4).log_prob(grid[:, 0]) for m in (-1.0, 1.0)]
    truth = torch.stack(parts).logsumexp(0) - math.log(2.0)

    def loss(log_density: Tensor) -> float:
        return float((truth.exp() * (truth - log_density)).sum() * cell)

    gaussian = loss(ebm.base_x.log_prob(grid))
    assert gaussian == pytest.approx(0.31, abs=0.02)
    train(ebm, x, num_steps=110, lr=1e-2, num_particles=1, seed=0)
    exact = log_partition_by_quadrature(ebm, 6.0, 121)
    found = quadrature_log_c(ebm, grid, 6.0, 121) - exact
    assert float(found.exp().sum() * cell) == pytest.approx(1.0, abs=1e-3)
    assert loss(found) < 0.1 * gaussian
    log_z = log_partition(ebm, seed=0, num_particles=128, num_runs=8, num_refreshes=10)
    assert log_z.lower < exact < log_z.upper
    assert 2 * stats.t(7).sf(abs(log_z.estimate - exact) / log_z.std_error) > ALPHA
    rows = grid[::10]
    evidence = log_evidence(ebm, rows, seed=0, log_z=log_z, num_particles=64, num_runs=8)
    error = (evidence.value - (quadrature_log_c(ebm, rows, 6.0, 121) - log_z.estimate)).exp()
    assert mean_p_value(error, 1.0) > ALPHA
    assert mean_p_value(error * math.exp(exact), 1.0) < CERTAIN  # as if log Z were 0


@pytest.mark.filterwarnings("ignore:.*the latents carry next to nothing")
@pytest.mark.slow
def test_two_moons() -> None:
    """log Z within 0.05 nats of quadrature, and as good as the best Gaussian mixture − 0.03.

    Slow: 1,200 steps at default sizes, which a mixture of 30 Gaussians asks for.
    """
    rows, _ = make_moons(5000, noise=0.1, random_state=0)
    fit, held_out = rows[:4000], rows[4000:]
    mixtures = [
        gaussian_mixture(fit, held_out, k, "full", seed=0).log_evidence.mean() for k in (10, 20, 30)
    ]
    x, x_test = (torch.tensor(part, dtype=torch.float32) for part in (fit, held_out))
    ebm = LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1)
    train(ebm, x, num_steps=1200, lr=2e-3, num_particles=1, seed=0)
    exact = log_partition_by_quadrature(ebm, 6.0, 121)
    log_z = log_partition(ebm, seed=0)
    assert abs(log_z.estimate - exact) < 0.05
    assert log_z.lower < exact < log_z.upper
    evidence = log_evidence(ebm, x_test, seed=0, log_z=log_z)
    assert evidence.mean > max(mixtures) - 0.03
    # The same with log Z by quadrature, so that no Monte Carlo error helps.
    assert evidence.mean + log_z.estimate - exact > max(mixtures) - 0.03


@pytest.mark.slow
def test_digits_improve_on_their_gaussian_base() -> None:
    """By half a nat in 100 steps (0.8 to 1.1 on four seeds), and by Student's test, p < CERTAIN.

    Slow: fewer steps say nothing of 64 columns. Two modes are learnt above, and the demo of the
    command line trains on the digits.

    An untrained energy is its base row by row, a full Gaussian, so it could not pass.
    """
    digits = load_digits_data(seed=0)
    baselines = evaluate_baselines(digits.train, digits.test, seed=0).set_index("baseline")
    x, x_test = (torch.tensor(a, dtype=torch.float32) for a in (digits.train, digits.test))
    pool = TemperedPool(4, 64)
    energy = MLPEnergy(64, 4, hidden=(64,))
    ebm = LVEBM.from_data(energy, x, z_dim=4, base="gaussian", pool=pool)
    base = ebm.base_x.log_prob(x_test)
    train(ebm, x, num_steps=100, lr=1e-2, num_particles=1, seed=0)
    log_z = log_partition(ebm, seed=0, num_particles=128, num_runs=8, num_refreshes=10)
    evidence = log_evidence(ebm, x_test, seed=0, log_z=log_z, num_particles=32, num_runs=4)
    gain = evidence.lower - base
    assert gain.isfinite().all() and gain.mean() > 0.5
    assert evidence.lower.mean() > baselines.log_evidence["full Gaussian"] + 0.5
    assert mean_p_value(gain[:, None], 0.0) < CERTAIN


@pytest.mark.filterwarnings("ignore:.*the latents carry next to nothing")
@pytest.mark.slow
def test_digits_beat_every_baseline_by_two_nats() -> None:
    """Held-out log p(x), with the upper end of log Z, above Gaussian, factors and mixtures.

    Slow: only a full fit at default sizes is two nats above all of them.
    """
    digits = load_digits_data(seed=0)
    baselines = evaluate_baselines(digits.train, digits.test, seed=0)
    x, x_test = (torch.tensor(a, dtype=torch.float32) for a in (digits.train, digits.test))
    ebm = LVEBM.from_data(MLPEnergy(64, 4), x, z_dim=4)
    train(ebm, x, num_steps=1500, lr=3e-3, num_particles=1, seed=0)
    evidence = log_evidence(ebm, x_test, seed=0)
    assert np.isfinite(evidence.value.numpy()).all()
    assert float(evidence.lower.mean()) > baselines["log_evidence"].max() + 2.0
