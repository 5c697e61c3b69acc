# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import (
    PlainQuadratic,
    assert_unchanged,
    draw_x,
    make_base,
    make_neural,
    make_quadratic,
)
from referee import ALPHA, CERTAIN, ks_p_value, mean_p_value, normal, variance_p_value
from torch import Tensor

from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool
from pyro_lvebm.model import imputation
from pyro_lvebm.sampling import problems
from pyro_lvebm.sampling.annealing import Annealed
from pyro_lvebm.sampling.langevin import ValueAndGrad

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SAMPLES = 150


@pytest.fixture(autouse=True)
def few_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for Gaussians; several modes need more."""
    monkeypatch.setattr(imputation, "_NUM_PARTICLES", 64)
    monkeypatch.setattr(imputation, "_MAX_PROBLEMS", 2048)


def joint_gaussian(ebm: LVEBM) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x under a linear-Gaussian LVEBM, in data coordinates."""
    precision = ebm.f.precision.detach().double().numpy()
    linear = ebm.f.linear.detach().double().numpy()
    covariance = np.linalg.inv(precision)
    k = ebm.base_x.dim
    scale = ebm.base_x.scale.double().numpy()
    scale = np.diag(scale) if ebm.base_x.diagonal else scale
    mean = ebm.base_x.loc.double().numpy() - scale @ (covariance @ linear)[:k]
    return mean, scale @ covariance[:k, :k] @ scale.T


def conditional(
    mean: np.ndarray, covariance: np.ndarray, x: np.ndarray, missing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean (N, m) and covariance (m, m) of the missing entries of rows x given the others."""
    seen = ~missing
    slope = covariance[np.ix_(missing, seen)] @ np.linalg.inv(covariance[np.ix_(seen, seen)])
    left = covariance[np.ix_(missing, missing)] - slope @ covariance[np.ix_(seen, missing)]
    return mean[missing] + (x[:, seen] - mean[seen]) @ slope.T, left


def moments_p_value(draws: Tensor, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Tests of draws (S, N, m), whitened by their exact conditional: mean, variances, products."""
    y = (draws.double().numpy() - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    y = y.reshape(-1, y.shape[-1])
    m = y.shape[1]
    checks = [variance_p_value(y, 1.0), mean_p_value(y, 0.0)]
    if m > 1:
        pairs = np.stack([y[:, i] * y[:, j] for i in range(m) for j in range(i)], -1)
        checks.append(mean_p_value(pairs, 0.0))
    return min(1.0, len(checks) * min(checks))


def mask(*missing: int, shape: tuple[int, ...] = (4,)) -> Tensor:
    observed = torch.ones(math.prod(shape), dtype=torch.bool)
    observed[list(missing)] = False
    return observed.reshape(shape)


def diagonal_ebm() -> LVEBM:
    """The linear-Gaussian LVEBM on a base of standard deviations only."""
    ebm = make_quadratic()
    energy = QuadraticEnergy(4, 2).double()
    bases = (make_base(4, full=False, seed=60), make_base(2, full=False, seed=70))
    result = LVEBM(energy, *bases, TemperedPool(2, 8))
    energy.set_precision(ebm.f.precision.detach(), ebm.f.linear.detach())
    return result


# --- the exact conditional of the linear-Gaussian model -------------------------------------


@pytest.mark.parametrize("missing", [(0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("full_x", [True, False])
def test_draws_have_the_exact_moments(full_x: bool, missing: tuple[int, ...]) -> None:
    """150 draws of each of 4 rows, each from a run of its own; false alarm ALPHA.

    Whitened means that are off by 0.2, and variances by a third, would be found.
    """
    ebm = make_quadratic(full_z=True) if full_x else diagonal_ebm()
    x, observed = draw_x(ebm, 4, seed=3), mask(*missing)
    draws = ebm.impute(x, observed, num_samples=SAMPLES, seed=2)
    assert draws.shape == (SAMPLES, 4, 4) and draws.dtype == torch.float64
    law = conditional(*joint_gaussian(ebm), x.numpy(), ~observed.numpy())
    assert moments_p_value(draws[..., ~observed], *law) > ALPHA


def test_moments_check_fails_for_draws_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conditional of the base alone, without annealing to the model."""
    ebm, observed = make_quadratic(full_z=True), mask(1, 2)
    x = draw_x(ebm, 4, seed=3)

    anneal = problems.anneal

    def stay(f: ValueAndGrad, v: Tensor, *args: Any, **options: Any) -> Annealed:
        result = anneal(f, v, *args, **options)
        return result._replace(state=result.state._replace(u=v))

    monkeypatch.setattr(problems, "anneal", stay)
    draws = ebm.impute(x, observed, num_samples=SAMPLES, seed=2)
    law = conditional(*joint_gaussian(ebm), x.numpy(), ~observed.numpy())
    assert moments_p_value(draws[..., ~observed], *law) < CERTAIN


def test_moments_check_fails_for_another_row_or_the_marginal() -> None:
    ebm, observed = make_quadratic(full_z=True), mask(1, 2)
    x = draw_x(ebm, 4, seed=3)
    draws = ebm.impute(x, observed, num_samples=SAMPLES, seed=2)[..., ~observed]
    mean, covariance = joint_gaussian(ebm)
    law = conditional(mean, covariance, x.numpy(), ~observed.numpy())
    assert moments_p_value(draws.roll(1, 1), *law) < CERTAIN
    marginal = draw_x(ebm, 4 * SAMPLES, seed=4).reshape(SAMPLES, 4, 4)[..., ~observed]
    assert moments_p_value(marginal, *law) < CERTAIN


def test_draws_of_a_row_are_independent() -> None:
    """Products of neighbouring whitened draws have mean 0; false alarm ALPHA."""
    ebm, observed = make_quadratic(), mask(0)
    x = draw_x(ebm, 4, seed=3)
    draws = ebm.impute(x, observed, num_samples=SAMPLES, seed=2)[..., 0]
    law = conditional(*joint_gaussian(ebm), x.numpy(), ~observed.numpy())
    y = (draws.numpy() - law[0][:, 0]) / math.sqrt(law[1][0, 0])
    along = (y[1:] * y[:-1]).reshape(-1, 1)
    across = (y[:, 1:] * y[:, :-1]).reshape(-1, 1)
    assert mean_p_value(along, 0.0) > ALPHA / 2 and mean_p_value(across, 0.0) > ALPHA / 2
    assert mean_p_value((y[1:] * y[1:]).reshape(-1, 1), 0.0) < CERTAIN


def test_images_with_missing_pixels() -> None:
    """x of shape (2, 3) and a user's energy, against a Gaussian in closed form; ALPHA."""
    root = 0.4 * normal((7, 7), 8)
    curvature, linear = root @ root.T, 0.5 * normal((7,), 9)
    loc, scale = normal((2, 3), 10), 0.5 + normal((2, 3), 11).abs()
    base_z = dist.Normal(torch.tensor([0.3], dtype=torch.float64), 0.8).to_event(1)
    ebm = LVEBM(
        PlainQuadratic(curvature, linear, 2),
        dist.Normal(loc, scale).to_event(2),
        base_z,
        TemperedPool(2, 8),
    )
    std = torch.cat([scale.flatten(), torch.tensor([0.8], dtype=torch.float64)])
    centre = torch.cat([loc.flatten(), torch.tensor([0.3], dtype=torch.float64)])
    precision = curvature + torch.diag(std**-2)
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (centre / std**2 - linear)
    observed = mask(1, 3, 5, shape=(2, 3))
    x = loc + scale * normal((3, 2, 3), 12)
    draws = ebm.impute(x, observed, num_samples=SAMPLES, seed=1)
    assert draws.shape == (SAMPLES, 3, 2, 3)
    assert torch.equal(draws[..., observed], x[..., observed].expand(SAMPLES, -1, -1))
    law = conditional(
        mean[:6].numpy(),
        covariance[:6, :6].numpy(),
        x.reshape(3, 6).numpy(),
        ~observed.flatten().numpy(),
    )
    assert moments_p_value(draws[..., ~observed], *law) > ALPHA
    assert moments_p_value(draws[..., ~observed].flip(-1), *law) < CERTAIN


def test_neural_energy_against_quadrature(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two entries missing, float32, full bases: Kolmogorov's test; false alarm ALPHA."""
    monkeypatch.setattr(imputation, "_NUM_PARTICLES", 256)
    ebm = make_neural(2, 1, full=True, dtype=torch.float32, seed=1, pool=TemperedPool(2, 8))
    x = ebm.base_x.unwhiten(torch.tensor([[0.4, -0.7]]))
    draws = ebm.impute(x, mask(1, shape=(2,)), num_samples=500, seed=3)
    assert draws.dtype == torch.float32
    spread = float(ebm.base_x.scale[1].norm())
    grid = float(ebm.base_x.loc[1]) + 7.0 * spread * torch.linspace(-1.0, 1.0, 401)
    v = torch.linspace(-7.0, 7.0, 201)
    z = ebm.base_z.unwhiten(v[:, None])
    pairs = torch.stack([x[0, 0].expand(401), grid], -1)
    with torch.no_grad():
        energy = ebm.energy(pairs[:, None].expand(-1, 201, -1), z.expand(401, -1, -1))
    density = torch.logsumexp(-energy.double(), -1)
    cdf = (density - density.max()).exp().cumsum(0).numpy()

    def law(y: np.ndarray, shift: float = 0.0) -> np.ndarray:
        return np.interp(y - shift, grid.numpy(), cdf / cdf[-1])

    assert ks_p_value(draws[..., 1], law) > ALPHA
    assert ks_p_value(draws[..., 1], lambda y: law(y, 0.4 * spread)) < CERTAIN
    base = torch.distributions.Normal(float(ebm.base_x.loc[1]), spread)
    assert ks_p_value(draws[..., 1], lambda y: base.cdf(torch.from_numpy(y)).numpy()) < CERTAIN


# --- what is kept ---------------------------------------------------------------------------


def test_observed_entries_are_kept_to_the_bit() -> None:
    ebm, observed = make_quadratic(dtype=torch.float32), mask(2)
    x = draw_x(ebm, 5, seed=1)
    draws = ebm.impute(x, observed, num_samples=3)
    assert draws.shape == (3, 5, 4)
    assert torch.equal(draws[..., observed], x[:, observed].expand(3, -1, -1))
    assert (draws[..., 2] != x[:, 2]).all()
    assert len(draws[..., 2].unique()) == 15


def test_values_under_the_mask_do_not_matter() -> None:
    ebm, observed = make_quadratic(), mask(1, 3)
    x = draw_x(ebm, 5, seed=1)
    other = torch.where(observed, x, torch.full_like(x, 1e3))
    torch.testing.assert_close(ebm.impute(x, observed), ebm.impute(other, observed))


def test_draws_are_fixed_by_the_seed() -> None:
    ebm, observed = make_quadratic(), mask(1)
    x = draw_x(ebm, 5, seed=1)
    first, again, other = (ebm.impute(x, observed, seed=s) for s in (4, 4, 5))
    assert torch.equal(first, again) and (first[..., 1] != other[..., 1]).all()
    assert first.shape == (1, 5, 4)


def test_the_model_and_the_data_stay_as_they_are() -> None:
    ebm, observed = make_quadratic(pool=TemperedPool(2, 8)), mask(1)
    x = draw_x(ebm, 5, seed=1)
    kept = x.clone()
    ebm.mark_pool(fresh=True)
    with assert_unchanged(ebm):
        draws = ebm.impute(x, observed)
    assert torch.equal(x, kept) and ebm.pool_is_fresh() and not draws.requires_grad


# --- bad input ------------------------------------------------------------------------------


ROWS = torch.zeros(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    ("x", "observed", "message"),
    [
        (ROWS, mask(), "nothing is missing"),
        (ROWS, mask(0).float(), r"boolean mask of shape \(4,\), .*; got torch.float32 of shape"),
        (
            ROWS,
            mask(0, shape=(5,)),
            r"of shape \(4,\), .*; got torch.bool of shape \(5,\)",
        ),
        (ROWS, mask(0).expand(2, 4), r"got torch.bool of shape \(2, 4\)"),
        (ROWS.index_fill(1, torch.tensor(2), math.nan), mask(1), "NaN at entries that `observed`"),
        (ROWS.index_fill(1, torch.tensor(2), math.inf), mask(2), "3 infinite entries of 12"),
        (ROWS, None, "nothing is missing"),
        (torch.zeros(3, 5, dtype=torch.float64), mask(0), r"trailing shape \(4,\)"),
        (ROWS[:0], mask(0), "empty"),
        (ROWS.long(), mask(0), "floating point"),
        (ROWS[0], mask(0), r"shape \(4,\); expected \(N, "),
        (ROWS[None], mask(0), r"shape \(1, 3, 4\); expected \(N, "),
    ],
)
def test_bad_input(x: Tensor, observed: Tensor | None, message: str) -> None:
    ebm = make_quadratic(pool=TemperedPool(2, 8))
    with assert_unchanged(ebm), pytest.raises(ValueError, match=message):
        ebm.impute(x, observed)


@pytest.mark.parametrize("count", [0, -1])
def test_too_few_samples(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples must be at least 1; got {count}"):
        make_quadratic().impute(ROWS, mask(0), num_samples=count)


# --- one draw of every run ------------------------------------------------------------------


def stiff_ebm() -> LVEBM:
    """Missing entries on one long scale beside three stiff ones, which set the step size."""
    diagonal = torch.ones(18, dtype=torch.float64)
    diagonal[1:4], diagonal[8:] = 30.0, 0.4
    linear = torch.full((18,), 0.5, dtype=torch.float64)
    linear[0], linear[1:4] = 0.0, 10.0
    energy = QuadraticEnergy(17, 1).double()
    one = torch.ones((), dtype=torch.float64)
    base_x, base_z = (dist.Normal(torch.zeros(k).double(), one).to_event(1) for k in (17, 1))
    ebm = LVEBM(energy, base_x, base_z, TemperedPool(2, 8))
    energy.set_precision(diagonal.diag(), linear)
    return ebm


def test_the_draw_of_a_run_is_like_any_of_its_particles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw minus mean of the run's particles has mean 0 over 250 runs; false alarm ALPHA.

    The first particle fails: systematic resampling sorts particles by their parents, so that
    particles of low rank have seen less than half of the reweighting.
    """
    ebm = stiff_ebm()
    anneal, particles = problems.anneal, []

    def record(*args: Any, **options: Any) -> Annealed:
        result = anneal(*args, **options)
        particles.append(result.state.u[0, :, :, 1:])
        return result

    monkeypatch.setattr(problems, "anneal", record)
    x = torch.zeros(1, 17, dtype=torch.float64)
    observed = mask(*range(1, 17), shape=(17,))
    draws = ebm.impute(x, observed, num_samples=250, seed=0)[:, 0, 1:]
    assert particles[0].shape == (250, 64, 16)

    def p_value(draws: Tensor) -> float:
        difference = (draws - particles[0].mean(1))[:, 7:].mean(1, keepdim=True)
        return mean_p_value(difference, 0.0)

    assert p_value(draws) > ALPHA
    assert p_value(particles[0][:, 0]) < CERTAIN
