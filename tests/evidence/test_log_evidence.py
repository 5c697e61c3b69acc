# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import (
    PlainQuadratic,
    Unadjusted,
    assert_unchanged,
    draw_x,
    make_neural,
    make_quadratic,
    quadrature_log_c,
    quadrature_log_partition,
)
from referee import ALPHA, CERTAIN, bracket, mean_p_value, normal
from scipy import stats
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    LogEvidence,
    LogPartition,
    MLPEnergy,
    PersistentPool,
    TemperedPool,
    log_evidence,
    log_partition,
)
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.model.conditionals import given_x
from pyro_lvebm.model.density import Density
from pyro_lvebm.sampling import annealing
from pyro_lvebm.sampling.langevin import ValueAndGrad
from pyro_lvebm.validation import TrainingWarning

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# The function hides the module of its name in the package.
MODULE = sys.modules["pyro_lvebm.evidence.log_evidence"]

RUNS = 8
SETTINGS = {"num_particles": 48, "num_runs": RUNS, "num_moves": 3, "relative_ess": 0.85}


def known(log_z: float) -> LogPartition:
    return bracket(log_z)


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(full_z=True, pool=TemperedPool(3, 32, num_moves=2, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, 400, seed=1)


def evidence_at_exact_log_z(ebm: LVEBM, x: Tensor, seed: int = 0) -> LogEvidence:
    log_z = known(float(ebm.f.log_partition().detach()))
    return log_evidence(ebm, x, seed=seed, log_z=log_z, **SETTINGS)


def outlier_p_value(result: LogEvidence, expected: Tensor) -> float:
    """One-sided binomial test that no more rows are beyond 3 standard errors than Student's law
    with RUNS - 1 degrees of freedom has there (2.0 %); rows are independent given the pilot run.
    """
    beyond = ((result.value - expected).abs() > 3.0 * result.std_error).sum().item()
    rate = 2.0 * stats.t(RUNS - 1).sf(3.0)
    return float(stats.binom.sf(beyond - 1, len(expected), rate))


def mean_of_ratio_p_value(result: LogEvidence, expected: Tensor) -> float:
    """Student's test over rows of E[Ĉ / C] = 1, where log Z is exact."""
    return mean_p_value((result.value - expected).exp()[:, None], 1.0)


# --- the linear-Gaussian model --------------------------------------------------------------


def test_rows_are_within_three_standard_errors(ebm: LVEBM, x: Tensor) -> None:
    """400 rows; false alarm ALPHA. The exact values vary over rows by 2 nats."""
    expected = ebm.f.log_evidence(x).detach()
    result = evidence_at_exact_log_z(ebm, x)
    assert expected.std() > 1.0
    assert result.value.shape == result.std_error.shape == (400,)
    assert result.std_error.median() < 0.1
    assert outlier_p_value(result, expected) > ALPHA


def test_estimates_are_unbiased_on_the_scale_of_densities(ebm: LVEBM, x: Tensor) -> None:
    """False alarm ALPHA."""
    result = evidence_at_exact_log_z(ebm, x)
    assert mean_of_ratio_p_value(result, ebm.f.log_evidence(x).detach()) > ALPHA


@pytest.mark.usefixtures("brief_brackets")
def test_mean_is_within_three_standard_errors(ebm: LVEBM, x: Tensor) -> None:
    """With brackets of its own. One seed of four may be beyond: false alarm 5e-4 (Student, 15).

    The Monte Carlo error of the mean is that of log Z and, of the rows, the independent part.
    """
    rows = x[:150]
    expected = float(ebm.f.log_evidence(rows).detach().mean())
    differences, errors = [], []
    for seed in range(4):
        log_z = log_partition(ebm, seed=seed, num_particles=128, num_refreshes=5)
        result = log_evidence(ebm, rows, seed=seed, num_particles=64, num_moves=3, log_z=log_z)
        of_rows = (result.std_error.square() - log_z.std_error**2).sum().sqrt() / len(rows)
        differences.append(result.mean - expected)
        errors.append(math.hypot(log_z.std_error, float(of_rows)))
    error = np.array(errors)
    assert error.max() < 0.03
    assert (np.abs(differences) > 3.0 * error).sum() <= 1
    # As if log Z were that of another model.
    assert (np.abs(np.array(differences) - 0.15) > 3.0 * error).sum() >= 3


@pytest.mark.usefixtures("coarse_brackets")
def test_default_settings(ebm: LVEBM, x: Tensor) -> None:
    """The door without settings, over 25 rows, whose error is mostly that of log Z.

    The bracket of log Z is coarse here; its own settings have a test of their own.
    """
    result = log_evidence(ebm, x[:25])
    assert isinstance(result, LogEvidence) and result.log_partition.num_temperatures > 2
    assert result.log_partition == log_partition(ebm, seed=0)
    errors = (result.value - ebm.f.log_evidence(x[:25]).detach()) / result.std_error
    assert errors.abs().median() < 3.0
    assert result.std_error.max() < 0.3


def test_checks_fail_for_the_posterior_of_another_row(
    ebm: LVEBM, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(density: Density, w_x: Tensor) -> ValueAndGrad:
        return given_x(density, w_x.roll(1, 0))

    monkeypatch.setattr(MODULE, "given_x", shifted)
    result, expected = evidence_at_exact_log_z(ebm, x), ebm.f.log_evidence(x).detach()
    assert outlier_p_value(result, expected) < CERTAIN


def test_checks_fail_for_a_kernel_with_another_target(
    ebm: LVEBM, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its Metropolis test a kernel has another stationary law."""
    monkeypatch.setattr(annealing, "_KERNEL", Unadjusted())
    result, expected = evidence_at_exact_log_z(ebm, x), ebm.f.log_evidence(x).detach()
    assert mean_of_ratio_p_value(result, expected) < CERTAIN


def test_checks_fail_where_the_standard_error_is_too_small(ebm: LVEBM, x: Tensor) -> None:
    result, expected = evidence_at_exact_log_z(ebm, x), ebm.f.log_evidence(x).detach()
    small = replace(result, std_error=result.std_error / math.sqrt(RUNS))
    assert outlier_p_value(small, expected) < CERTAIN


def test_rows_keep_their_order_in_chunks(
    ebm: LVEBM, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 90 rows, the last of 40; false alarm ALPHA."""
    sizes: list[int] = []

    def count(f: ValueAndGrad, shape: tuple[int, int, int], *args: object, **options: object):  # type: ignore[no-untyped-def]
        sizes.append(shape[0])
        return anneal_latents(f, shape, *args, **options)

    anneal_latents: Callable[..., Tensor] = MODULE.anneal_latents
    monkeypatch.setattr(MODULE, "anneal_latents", count)
    monkeypatch.setattr(MODULE, "MAX_PARTICLES", 90 * 48 * RUNS + 5)
    result = evidence_at_exact_log_z(ebm, x)
    assert sizes == [90, 90, 90, 90, 40]
    assert outlier_p_value(result, ebm.f.log_evidence(x).detach()) > ALPHA
    # Chunks do not share random numbers: equal rows get different answers.
    twice = evidence_at_exact_log_z(ebm, x[:90].repeat(2, 1))
    assert not torch.equal(twice.value[:90], twice.value[90:])


def test_a_single_run_of_two_particles_and_of_one_row(ebm: LVEBM, x: Tensor) -> None:
    """The smallest numbers that are allowed still give E[Ĉ] = C; false alarm ALPHA."""
    row, exact = x[:1], ebm.f.log_evidence(x[:1]).detach()
    log_z = known(float(ebm.f.log_partition().detach()))
    ratios = [
        log_evidence(ebm, row, seed=s, num_particles=2, num_runs=2, num_moves=1, log_z=log_z).value
        - exact
        for s in range(150)
    ]
    assert mean_p_value(torch.stack(ratios).exp(), 1.0) > ALPHA


# --- what the result says -------------------------------------------------------------------


def test_summaries_of_the_result() -> None:
    log_z = bracket(1.0, 0.3, 0.8, 1.25)
    value = torch.tensor([-1.0, -2.0, -6.0])
    result = LogEvidence(
        value, torch.full((3,), 0.1), log_z, torch.tensor(log_z.upper - log_z.estimate)
    )
    torch.testing.assert_close(result.lower, value - 0.25)
    assert result.mean == pytest.approx(-3.0)
    assert result.mean_std_error == pytest.approx(math.hypot(math.sqrt(7.0 / 3.0), 0.3))


def test_lower_uses_the_upper_end_of_log_z_and_errors_add_up(ebm: LVEBM, x: Tensor) -> None:
    exact = float(ebm.f.log_partition().detach())
    sharp = evidence_at_exact_log_z(ebm, x[:50])
    log_z = bracket(exact + 0.5, 0.2, exact - 0.1, exact + 0.7)
    rough = log_evidence(ebm, x[:50], log_z=log_z, **SETTINGS)
    torch.testing.assert_close(rough.value, sharp.value - 0.5)
    torch.testing.assert_close(rough.lower, sharp.value - 0.7)
    torch.testing.assert_close(rough.std_error, torch.hypot(sharp.std_error, torch.tensor(0.2)))
    assert rough.log_partition is log_z


def test_a_log_z_that_is_not_reliable_is_heard(ebm: LVEBM, x: Tensor) -> None:
    good = bracket(1.0, 0.02, 0.9, 1.1)
    bad = replace(good, upper=1.3, max_width=0.3)
    assert good.is_reliable and not bad.is_reliable
    found = log_evidence(ebm, x[:2], log_z=good, num_particles=2, num_runs=2)
    assert found.is_reliable and "NOT RELIABLE" not in str(found)
    with pytest.warns(TrainingWarning, match="log Z of LVEBM 0 is not reliable: forward and rev"):
        found = log_evidence(ebm, x[:2], log_z=bad, num_particles=2, num_runs=2)
    assert not found.is_reliable
    assert str(found).startswith(f"mean log p(x) = {found.mean:.4f} ± ")
    assert "of 2 rows, with log Z = 1.0000" in str(found) and "NOT RELIABLE" in str(found)


# --- neural energies and other shapes -------------------------------------------------------


NEURAL = {
    "1+1, diagonal bases": lambda: make_neural(1, 1, pool=TemperedPool(3, 32), seed=1),
    "2+1, full bases, float32, persistent pool": lambda: make_neural(
        2, 1, full=True, dtype=torch.float32, pool=PersistentPool(64), seed=1
    ),
    "1+2, full bases": lambda: make_neural(1, 2, full=True, pool=TemperedPool(3, 32), seed=0),
    "2+1, diagonal bases, rough": lambda: make_neural(2, 1, pool=TemperedPool(3, 32), seed=2),
}


@pytest.mark.parametrize("name", NEURAL)
def test_neural_energies_agree_with_quadrature(name: str) -> None:
    """60 rows; false alarm 2 · ALPHA."""
    ebm = NEURAL[name]()
    log_z = quadrature_log_partition(ebm)
    x = ebm.base_x.unwhiten(1.2 * normal((60, ebm.base_x.dim), 3, ebm.base_x.loc.dtype))
    expected = quadrature_log_c(ebm, x, count=121) - log_z
    result = log_evidence(ebm, x, seed=1, log_z=known(log_z), **SETTINGS)
    assert result.value.dtype == ebm.base_x.loc.dtype
    assert outlier_p_value(result, expected) > ALPHA
    assert mean_of_ratio_p_value(result, expected) > ALPHA
    without_z_base = replace(result, value=result.value - ebm.base_z.log_det)
    assert mean_of_ratio_p_value(without_z_base, expected) < CERTAIN


def test_event_shapes_of_any_rank() -> None:
    """x of shape (2, 2), an energy that is no WhitenedEnergy; false alarm ALPHA."""
    root = 0.5 * normal((5, 5), 8)
    curvature, linear = root @ root.T, normal((5,), 9)
    loc, scale = normal((2, 2), 10), 0.5 + normal((2, 2), 11).abs()
    base_z = dist.Normal(torch.tensor([0.3], dtype=torch.float64), 0.8).to_event(1)
    ebm = LVEBM(
        PlainQuadratic(curvature, linear, 2),
        dist.Normal(loc, scale).to_event(2),
        base_z,
        TemperedPool(3, 16),
    )
    x = loc + scale * normal((60, 2, 2), 12)
    result = log_evidence(ebm, x, seed=1, log_z=known(0.0), **SETTINGS)
    assert outlier_p_value(result, quadrature_log_c(ebm, x)) > ALPHA


def test_an_untrained_energy_gives_the_base_exactly() -> None:
    x = normal((40, 3), 0, torch.float32)
    ebm = LVEBM.from_data(
        MLPEnergy(3, 2, hidden=(8,)), x, z_dim=2, base="gaussian", pool=TemperedPool(2, 8)
    )
    result = log_evidence(ebm, x[:7], num_particles=2, num_runs=2, num_moves=1, log_z=known(0.0))
    base = GaussianBase.fit(x).distribution()
    torch.testing.assert_close(result.value, base.log_prob(x[:7]), rtol=1e-4, atol=1e-4)
    assert result.std_error.eq(0.0).all()


# --- reproducible, and nothing moves --------------------------------------------------------


def test_results_are_fixed_by_the_seed(ebm: LVEBM, x: Tensor) -> None:
    first, again, other = (evidence_at_exact_log_z(ebm, x[:20], seed) for seed in (3, 3, 4))
    assert torch.equal(first.value, again.value)
    assert torch.equal(first.std_error, again.std_error)
    assert (first.value != other.value).all()


@pytest.mark.usefixtures("coarse_brackets")
def test_the_model_its_pool_and_x_stay_as_they_are(ebm: LVEBM, x: Tensor) -> None:
    ebm.mark_pool(fresh=True)
    rows = x[:5].clone()
    with assert_unchanged(ebm):
        result = log_evidence(ebm, rows, seed=1, num_particles=4, num_runs=2)
    assert ebm.pool_is_fresh() and torch.equal(rows, x[:5])
    assert not result.value.requires_grad and not result.std_error.requires_grad


# --- bad input ------------------------------------------------------------------------------


INFINITE_ROW = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, math.inf, 0.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3, 5, dtype=torch.float64), r"shape \(3, 5\); expected trailing shape \(4,\)"),
        (torch.zeros(4, dtype=torch.float64), r"shape \(4,\); expected \(N, "),
        (torch.zeros(2, 3, 4, dtype=torch.float64), r"shape \(2, 3, 4\); expected \(N, "),
        (torch.zeros(0, 4, dtype=torch.float64), "empty"),
        (torch.zeros(3, 4, dtype=torch.long), "floating point"),
        (INFINITE_ROW, "1 infinite entries of 8"),
        (torch.full((1, 4), math.inf, dtype=torch.float64), "4 infinite"),
    ],
)
def test_rows_that_cannot_be_used(ebm: LVEBM, rows: Tensor, message: str) -> None:
    with assert_unchanged(ebm), pytest.raises(ValueError, match=message):
        log_evidence(ebm, rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_particles", 1), ("num_runs", 1), ("num_moves", 0), ("relative_ess", 1.0)],
)
def test_settings_out_of_range(ebm: LVEBM, x: Tensor, name: str, value: float) -> None:
    with assert_unchanged(ebm), pytest.raises(ValueError, match=f"{name} must .*{value}"):
        log_evidence(ebm, x[:2], **{name: value})
