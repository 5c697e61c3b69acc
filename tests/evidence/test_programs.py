# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import assert_unchanged, draw_x, make_model, make_quadratic, z_p_value
from pyro import poutine
from referee import ALPHA, CERTAIN, mean_p_value, normal
from scipy import stats
from small_models import exact_posterior
from torch import Tensor

from pyro_lvebm import LVEBM, TemperedPool, lvebm
from pyro_lvebm.evidence import programs as model_evidence
from pyro_lvebm.evidence.programs import Terms, missed_log_z, model_log_evidence
from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import Sweep

RUNS = 6

# --- terms ----------------------------------------------------------------------------------


def test_the_mean_of_terms_and_its_errors() -> None:
    value, error = normal((50,), 1), 0.1 + normal((50,), 2).abs()
    terms = Terms(value.float(), error.float())
    mean, std_error = terms.mean()
    assert mean == pytest.approx(value.mean().item(), rel=1e-5)
    assert std_error == pytest.approx(np.sqrt((error.numpy() ** 2).sum()) / 50, rel=1e-5)
    assert terms.mean_std_error() == pytest.approx(stats.sem(value.numpy()), rel=1e-5)
    assert math.isnan(Terms(value[:1], error[:1]).mean_std_error())


# --- the sweep over data --------------------------------------------------------------------


def evidence(
    model: Callable[..., Any],
    ebm: LVEBM,
    *args: Any,
    seed: int = 0,
    log_z: float | None = None,
    **settings: Any,
) -> Terms:
    """`model_log_evidence` with the exact log Z in the pool, and else few particles."""
    kept = ebm.pool.log_partition
    exact = float(ebm.f.log_partition().detach()) if log_z is None else log_z
    ebm.pool.log_partition = torch.full_like(kept, exact)
    settings = {"num_particles": 24, "num_runs": RUNS, **settings}
    try:
        with torch.random.fork_rng(), ebm.frozen(), torch.no_grad(), poutine.block():
            return model_log_evidence(Sweep(Program(model, args, {}), seed), **settings)
    finally:
        ebm.pool.log_partition = kept


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(full_z=True, pool=TemperedPool(3, 16, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, 90, seed=1)


def outlier_p_value(terms: Terms, expected: Tensor) -> float:
    """One-sided binomial test that no more data are beyond 3 standard errors than Student's law
    with RUNS - 1 degrees of freedom has there (3 %); data are independent given the pilot run.
    """
    beyond = ((terms.value - expected).abs() > 3.0 * terms.std_error).sum().item()
    rate = 2.0 * stats.t(RUNS - 1).sf(3.0)
    return float(stats.binom.sf(beyond - 1, len(expected), rate))


def ratio_p_value(terms: Terms, expected: Tensor) -> float:
    """Student's test over data of E[p̂ / p] = 1."""
    return mean_p_value((terms.value - expected).exp()[:, None], 1.0)


@pytest.mark.parametrize("batch", [None, 32])
def test_values_are_those_of_the_closed_form(ebm: LVEBM, x: Tensor, batch: int | None) -> None:
    """In the order of the data, the last minibatch being partly a repeat; false alarm 2e-3."""
    expected = ebm.f.log_evidence(x).detach()
    terms = evidence(make_model(ebm, batch), ebm, x)
    assert expected.std() > 1.0 and terms.value.shape == terms.std_error.shape == (90,)
    assert terms.std_error.median() < 0.2
    assert outlier_p_value(terms, expected) > ALPHA
    assert ratio_p_value(terms, expected) > ALPHA


@pytest.mark.parametrize("fault", ["log Z", "order", "Jacobian"])
def test_the_checks_fail_for_other_values(ebm: LVEBM, x: Tensor, fault: str) -> None:
    """For log Z of the base, data in another order, and a forgotten |dx/du|."""
    expected = ebm.f.log_evidence(x).detach()
    log_z = 0.0 if fault == "log Z" else None
    terms = evidence(make_model(ebm, 32), ebm, x, log_z=log_z)
    if fault == "order":
        expected = expected.flip(0)
    elif fault == "Jacobian":
        expected = expected + ebm.base_x.log_det
    assert outlier_p_value(terms, expected) < CERTAIN


def with_outcome(ebm: LVEBM, batch: int | None) -> Callable[..., None]:
    """y ~ N(zᵀw, 0.6²) beside the LVEBM: another observation of z, with factors of its own."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z[..., 0] - 0.5 * z[..., 1], 0.6), obs=y[i])

    return model


def outcome_law(ebm: LVEBM, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (N,) of y given x."""
    posterior = exact_posterior(ebm, x)
    w = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return posterior.mean @ w, (posterior.covariance_matrix @ w @ w + 0.36).sqrt()


@pytest.mark.parametrize("batch", [None, 32])
def test_other_observations_count(ebm: LVEBM, x: Tensor, batch: int | None) -> None:
    """log p(x, y) = log p(x) + log N(y; wᵀμ(x), wᵀΣw + 0.6²); false alarm 2e-3."""
    mean, std = outcome_law(ebm, x)
    y = mean + std * normal((90,), 5)
    outcome = torch.distributions.Normal(mean, std).log_prob(y)
    expected = ebm.f.log_evidence(x).detach() + outcome
    terms = evidence(with_outcome(ebm, batch), ebm, x, y)
    assert outlier_p_value(terms, expected) > ALPHA
    assert ratio_p_value(terms, expected) > ALPHA
    assert outlier_p_value(terms, expected - outcome) < CERTAIN


@pytest.mark.parametrize("batch", [None, 7, 20])
def test_where_nothing_depends_on_latents_values_are_exact(batch: int | None) -> None:
    """f(x) alone: no Monte Carlo error, whatever the number of particles, for every datum."""
    ebm = make_quadratic(pool=TemperedPool(2, 8))
    precision = ebm.f.precision.detach().clone()
    precision[4:], precision[:, 4:] = 0.0, 0.0
    linear = ebm.f.linear.detach().clone()
    linear[4:] = 0.0
    ebm.f.set_precision(precision + torch.diag(torch.tensor([0.0] * 4 + [1.0] * 2)), linear)
    x = draw_x(ebm, 20, seed=3)
    terms = evidence(make_model(ebm, batch), ebm, x, num_particles=2, num_runs=2)
    torch.testing.assert_close(terms.value, ebm.f.log_evidence(x).detach(), rtol=1e-9, atol=1e-9)
    assert terms.std_error.max() < 1e-9


def test_standard_errors_are_the_spread_over_seeds(ebm: LVEBM, x: Tensor) -> None:
    """Chi-square test over 20 seeds of the error of the mean; false alarm 1e-3."""
    found = [evidence(make_model(ebm, 8), ebm, x[:24], seed=s).mean() for s in range(20)]
    value, error = np.array(found).T
    statistic = value.var(ddof=1) * 19 / (error**2).mean()
    law = stats.chi2(19)
    assert 2.0 * min(law.cdf(statistic), law.sf(statistic)) > ALPHA
    assert len(set(value)) == 20
    mean = float(ebm.f.log_evidence(x[:24]).detach().mean())
    assert z_p_value(value.mean(), value.std() / math.sqrt(20), mean + 0.15) < CERTAIN


def test_the_seed_fixes_the_numbers(ebm: LVEBM, x: Tensor) -> None:
    model = make_model(ebm, 10)
    first, again, other = (evidence(model, ebm, x[:30], seed=s) for s in (3, 3, 4))
    assert torch.equal(first.value, again.value) and torch.equal(first.std_error, again.std_error)
    assert not (first.value == other.value).any()


def test_more_particles_and_runs_are_more_exact(ebm: LVEBM, x: Tensor) -> None:
    model = make_model(ebm)
    few, many = (
        evidence(model, ebm, x[:20], num_particles=n, num_runs=r) for n, r in ((8, 2), (64, 12))
    )
    assert many.std_error.mean() < 0.5 * few.std_error.mean()


def test_only_the_pool_s_log_z_is_used_and_nothing_moves(ebm: LVEBM, x: Tensor) -> None:
    with assert_unchanged(ebm):
        a, b = (evidence(make_model(ebm), ebm, x[:10], log_z=v) for v in (0.0, 2.5))
    torch.testing.assert_close(a.value - b.value, torch.full((10,), 2.5).double())


# --- models that have no evidence by datum --------------------------------------------------


def with_global(x: Tensor, ebm: LVEBM) -> None:
    w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=5) as i:
        _, z = lvebm("scene", ebm, obs=x[i])
        pyro.sample("y", dist.Normal((z * w).sum(-1), 1.0), obs=x[i].sum(-1))


def with_two_plates(x: Tensor, ebm: LVEBM) -> None:
    with pyro.plate("data", len(x)):
        lvebm("scene", ebm, obs=x)
    with pyro.plate("others", 3):
        z = pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))


@pytest.mark.parametrize("model", [with_global, with_two_plates])
def test_latents_outside_the_plate_of_the_data_are_refused(
    model: Callable[..., None], ebm: LVEBM, x: Tensor
) -> None:
    with pytest.raises(ValueError, match="latents all lie in the same plates; this one has them"):
        evidence(model, ebm, x[:10], ebm)


def test_two_subsampled_plates_are_refused(ebm: LVEBM, x: Tensor) -> None:
    def model(x: Tensor) -> None:
        for name in ("first", "second"):
            with pyro.plate(name, len(x), subsample_size=4) as i:
                lvebm(f"scene_{name}", ebm, obs=x[i])

    with pytest.raises(ValueError, match="all subsample"):
        evidence(model, ebm, x[:10])


def test_estimates_are_collected_over_minibatches_in_order(ebm: LVEBM, x: Tensor) -> None:
    """Any estimate, with a generator for each minibatch, and each datum once."""
    model, draws = make_model(ebm, 8), []

    def estimate(block: Any, generator: torch.Generator) -> Tensor:
        draws.append(torch.rand(1, generator=generator).item())
        (index,) = block.indices.values()
        return torch.stack([index.double(), 0.5 * index.double()])

    with torch.random.fork_rng(), ebm.frozen(), torch.no_grad(), poutine.block():
        sweep = Sweep(Program(model, (x[:21],), {}), 5)
        found = sweep.over_data(estimate, 0)
        first = list(draws)
        sweep.over_data(estimate, 1)
        sweep.over_data(estimate, 0)
    assert found[0].tolist() == list(range(21))
    assert found[1].tolist() == [0.5 * k for k in range(21)]
    assert len(set(draws[:6])) == 6 and draws[6:] == first


# --- log Z that the pool has missed ---------------------------------------------------------


def missed(
    ebm: LVEBM, x: Tensor, shift: float, seeds: range, model: Callable[..., Any] | None = None
) -> list[float]:
    """What annealing adds to a pool that claims log Z + shift, with no error of its own."""
    model = make_model(ebm) if model is None else model
    pool, exact = ebm.pool, float(ebm.f.log_partition().detach())
    kept = pool.log_partition, pool.log_z_variance.clone()
    pool.log_partition = torch.full_like(kept[0], exact + shift)
    pool.log_z_variance.zero_()
    try:
        with torch.random.fork_rng(), ebm.frozen(), torch.no_grad(), poutine.block():
            sweeps = [Sweep(Program(model, (x,), {}), seed) for seed in seeds]
            return [missed_log_z(sweep, ebm) for sweep in sweeps]
    finally:
        pool.log_partition, pool.log_z_variance = kept


def test_mass_that_the_pool_has_missed_is_found_and_no_other(ebm: LVEBM, x: Tensor) -> None:
    """An exact pool is contradicted in 0.13 % of cases, in two of 30 by a false alarm of 8e-4."""
    assert np.count_nonzero(missed(ebm, x[:4], 0.0, range(30))) < 2
    assert missed(ebm, x[:4], 1.0, range(5)) == [0.0] * 5  # too much is not missed
    # The standard error of 2,048 particles is 0.036 nats over seeds.
    assert missed(ebm, x[:4], -2.0, range(5)) == pytest.approx([2.0] * 5, abs=0.15)


def test_what_the_pool_has_missed_counts_at_every_site(ebm: LVEBM, x: Tensor) -> None:
    """The error of twice a log Z is twice that of one."""

    def twice(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("a", ebm, obs=x)
            lvebm("b", ebm, obs=-x)

    assert missed(ebm, x[:4], -2.0, range(2), twice) == pytest.approx([4.0] * 2, abs=0.3)


def test_the_check_fails_where_few_runs_count_as_many(
    ebm: LVEBM, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_evidence, "surprise", lambda num_runs: 0.5)
    assert np.count_nonzero(missed(ebm, x[:4], 0.0, range(30))) >= 2
