# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from missing_data import draws_of_x, observed_log_density, with_holes
from pyro import poutine
from pyro.optim import Adam
from referee import ALPHA, CERTAIN, global_seed, mean_p_value, normal, variance_p_value
from scipy import stats
from small_models import condition, exact_joint, plate_model, quadratic_ebm, tiny_pool, warm
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    LogPartition,
    PriorProposal,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    log_evidence,
    log_partition,
    lvebm,
)
from pyro_lvebm.bases.completion import Completion
from pyro_lvebm.bases.fitting import fit_incomplete
from pyro_lvebm.latents import energy as local_energy_module
from pyro_lvebm.latents.program import Program
from pyro_lvebm.model import imputation
from pyro_lvebm.sites.distributions import MissingSite

pytestmark = pytest.mark.usefixtures("global_rng_untouched", "brief_brackets")


def at_exact_log_z(ebm: LVEBM) -> LogPartition:
    cheap = log_partition(ebm, num_particles=16, num_runs=2, num_refreshes=1)
    exact = float(ebm.f.log_partition().detach())
    return cheap.__class__(
        **{
            **cheap.__dict__,
            "estimate": exact,
            "std_error": 0.0,
            "lower": exact,
            "upper": exact,
        }
    )


# --- coordinates ----------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (5,), (2, 1)])
def test_coordinates_and_densities_belong_together(lead: tuple[int, ...]) -> None:
    ebm = quadratic_ebm()
    x = with_holes(normal((20, 3), 1))
    completion = Completion(ebm.base_x, x, ~x.isnan())
    v = normal((*lead, 20, 3), 2)
    value = completion.unwhiten(v)
    torch.testing.assert_close(completion.whiten(value), v)
    standard = -0.5 * (v * v).sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(completion.log_prob(value), standard - completion.log_det)
    whole = completion.complete(value)
    assert torch.equal(whole[..., ~x.isnan()], x[~x.isnan()].expand(*lead, -1))
    # base_x(x_o) base_x(x_m | x_o) = base_x(x), whatever the missing entries are.
    parts = completion.log_base() + completion.log_prob_missing(value)
    torch.testing.assert_close(parts, ebm.base_x.log_prob(whole))
    columns = torch.arange(3)
    u, slope = completion.whitened(columns)
    torch.testing.assert_close(u + (v[..., None, :] @ slope)[..., 0, :], ebm.base_x.whiten(whole))


def test_draws_follow_the_conditional_of_the_base() -> None:
    ebm = quadratic_ebm()
    x = normal((1, 3), 1)
    x[0, 1] = math.nan
    fn = MissingSite(Completion(ebm.base_x, x, ~x.isnan()))
    with global_seed(0):
        draws = fn.sample(torch.Size((4000,)))[:, 0, 1]
    tril = ebm.base_x.scale
    law = condition(MultivariateNormal(ebm.base_x.loc, scale_tril=tril), [0, 2], x[:, [0, 2]])
    white = (draws[:, None] - law.mean) / law.stddev
    assert mean_p_value(white, 0.0) > ALPHA and variance_p_value(white, 1.0) > ALPHA
    assert variance_p_value((draws[:, None] - law.mean) / tril[1].norm(), 1.0) < CERTAIN  # marginal


# --- the sites ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 4])
def test_three_sites_add_up_to_the_joint_density(size: int | None) -> None:
    ebm = quadratic_ebm()
    x = with_holes(draws_of_x(ebm, 12, 1))
    rows = torch.arange(12 if size is None else size)
    z, entries = normal((len(rows), 2), 2), normal((len(rows), 3), 3)
    values = {"scene_z": z, "scene_missing": entries, "data": rows}
    model = poutine.condition(plate_model(ebm, size), data=values)
    with ebm.frozen():
        trace = poutine.trace(poutine.do(model, {})).get_trace(x)
    index = trace.nodes["data"]["value"]
    trace.compute_log_prob()
    seen = ~x[index].isnan()
    whole = torch.where(seen, x[index], entries)
    dummy = trace.nodes["scene_missing"]["fn"].completion
    log_z = ebm.log_partition - ebm.f.log_partition().detach()
    expected = exact_joint(ebm).log_prob(torch.cat([whole, z], -1)).detach() - log_z
    expected = expected + dummy.log_prob(entries) - dummy.log_prob_missing(entries)
    found = sum(trace.nodes[name]["log_prob"] for name in ("scene", "scene_z", "scene_missing"))
    scale = 1.0 if size is None else 12 / size
    torch.testing.assert_close(found, scale * expected)
    torch.testing.assert_close(trace.nodes["_RETURN"]["value"][0], whole)


def test_the_site_opens_in_every_minibatch_once_data_have_holes() -> None:
    x = normal((40, 2), 0, torch.float32)
    x[0, 0] = math.nan
    complete = LVEBM.from_data(QuadraticEnergy(2, 1), x[1:], z_dim=1, pool=tiny_pool())
    holed = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, pool=tiny_pool())
    for ebm, expected in ((complete, False), (holed, True)):
        with global_seed(0):
            names = poutine.trace(plate_model(ebm)).get_trace(x[1:]).nodes
        assert ("scene_missing" in names) is expected
    model = plate_model(holed, 5)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-3}))
    assert all(math.isfinite(loss) for loss in saddle.fit(x, num_steps=12, progress=False))


def test_what_stands_at_missing_entries_does_not_matter() -> None:
    ebm = quadratic_ebm()
    x = draws_of_x(ebm, 6, 1)
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.6

    def log_joint(x: Tensor) -> Tensor:
        def model() -> None:
            with pyro.plate("data", 6):
                lvebm("scene", ebm, obs=x, observed=seen)

        values = {"scene_z": normal((6, 2), 2), "scene_missing": normal((6, 3), 3)}
        with ebm.frozen():
            return poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum()

    holed = x.masked_fill(~seen, math.nan)
    assert torch.equal(log_joint(x), log_joint(holed))
    assert not torch.equal(log_joint(x), log_joint(x + 0.1))


@pytest.mark.parametrize(
    ("observed", "message"),
    [
        (torch.ones(4, 3), "must be a boolean mask"),
        (torch.ones(4, 2, dtype=torch.bool), r"or \(4, 3\); got .* \(4, 2\)"),
        (torch.ones(4, 3, dtype=torch.bool), "NaN at entries that `observed` says"),
    ],
)
def test_masks_that_do_not_fit(observed: Tensor, message: str) -> None:
    ebm, x = quadratic_ebm(), torch.zeros(4, 3, dtype=torch.float64)
    x[0, 0] = math.nan
    with pytest.raises(ValueError, match=message), pyro.plate("data", 4):
        lvebm("scene", ebm, obs=x, observed=observed)


def test_a_mask_without_observations() -> None:
    with pytest.raises(ValueError, match="'scene' has no obs"), pyro.plate("data", 4):
        lvebm("scene", quadratic_ebm(), observed=torch.ones(4, 3, dtype=torch.bool))


# --- evidence -------------------------------------------------------------------------------


def test_evidence_of_observed_entries_is_exact() -> None:
    """Of 60 rows, some without any observed entry; false alarm ALPHA."""
    ebm = quadratic_ebm()
    x = with_holes(draws_of_x(ebm, 60, 1), 0.5)
    assert x.isnan().all(1).any() and not x.isnan().any(1).all()
    result = log_evidence(ebm, x, num_particles=64, log_z=at_exact_log_z(ebm))
    z = (result.value - observed_log_density(exact_joint(ebm), x)) / result.std_error
    # Student's t with 7 degrees of freedom has variance 7/5.
    assert abs(z.mean()) < 4 * math.sqrt(1.4 / 60) and z.abs().max() < 12.0
    assert result.std_error.mean() < 0.1


def test_the_table_has_the_evidence_of_observed_entries() -> None:
    """Within four standard errors, and closer than that of filled rows."""
    ebm = warm(quadratic_ebm())
    ebm.mark_pool(fresh=False)  # log Z online of so small a pool is not what is asked here
    x = with_holes(draws_of_x(ebm, 60, 1))
    table = compare_elbo(plate_model(ebm, 20), {"prior": PriorProposal()}, x, num_samples=32)
    upper = table.log_partitions[0].upper - float(ebm.f.log_partition().detach())
    exact = float(observed_log_density(exact_joint(ebm), x).mean()) - upper
    error = table.log_evidence - exact
    assert abs(error) < 4 * table.log_evidence_se + 0.005
    filled = torch.where(x.isnan(), ebm.base_x.loc, x)
    wrong = float(observed_log_density(exact_joint(ebm), filled).mean()) - upper
    assert abs(table.log_evidence - wrong) > 0.3


# --- particles ------------------------------------------------------------------------------


def test_particles_of_missing_entries_follow_their_exact_conditional(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One draw of each of 8 particles of 150 rows; false alarm 2 ALPHA."""
    ebm = quadratic_ebm()
    x = with_holes(draws_of_x(ebm, 150, 1))
    model = plate_model(ebm, 50)
    with ebm.frozen():
        saddle = Saddle(model, AutoParticles(model, 8), Adam({"lr": 1e-3}), seed=0)
        saddle.fit(x, num_steps=45, progress=False)
        draws = saddle.sample_posterior(x, num_samples=1, num_warmup=100)
    entries, z = draws["scene_missing"][:, 0], draws["scene_z"][:, 0]
    white = []
    for i, row in enumerate(x):
        o = torch.nonzero(~row.isnan())[:, 0].tolist()
        m = [k for k in range(3) if k not in o]
        law = condition(exact_joint(ebm), o, row[o])
        both = torch.cat([entries[:, i, m], z[:, i]], -1) - law.mean
        tril = torch.linalg.cholesky(law.covariance_matrix)
        y = torch.linalg.solve_triangular(tril, both.T, upper=False).T.detach()
        white.append(y[:, -2:] if not m else y[:, [0, -1]])
    y = torch.cat(white)
    assert mean_p_value(y, 0.0) > ALPHA and variance_p_value(y, 1.0) > ALPHA
    assert variance_p_value(1.15 * y, 1.0) < CERTAIN


def test_the_direct_energy_is_that_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    ebm = quadratic_ebm()
    x = with_holes(draws_of_x(ebm, 30, 1))
    model = plate_model(ebm)
    guide = AutoParticles(model, 3)
    with torch.no_grad(), global_seed(0):
        guide(x)
        trace = poutine.trace(pyro.plate("num_particles_vectorized", 3, dim=-2)(guide)).get_trace(x)
    arguments = (Program(model, (x,), {}, 1), guide, trace)
    with ebm.frozen():
        (direct,), _ = local_energy_module.latent_blocks(*arguments)
        monkeypatch.setattr(local_energy_module, "_own_part", lambda *_: None)
        (traced,), _ = local_energy_module.latent_blocks(*arguments)
        v = normal((4, 30, 5), 5)
        (f, grad), (g, slow) = direct.f(v), traced.f(v)
    torch.testing.assert_close(f - direct.offset, g - traced.offset)
    torch.testing.assert_close(grad, slow)


# --- training -------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_with_a_third_missing_reaches_the_observed_data_mle() -> None:
    """Within 0.01 nats a row of maximum likelihood by expectation maximisation.

    Slow: fewer steps do not get there. That the density and the particles are those of observed
    entries, of which this is the outcome, is tested exactly above.
    """
    generator = torch.Generator().manual_seed(0)
    loading = torch.randn(2, 4, generator=generator)
    x = torch.randn(1500, 2, generator=generator) @ loading
    x = with_holes(x + 0.5 * torch.randn(1500, 4, generator=generator), 0.3, seed=1)
    mean, cov = fit_incomplete(x.double())
    best = observed_log_density(MultivariateNormal(mean, cov), x).mean()
    standard = [dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (4, 2)]
    energy = QuadraticEnergy(4, 2)
    ebm = LVEBM(energy, *standard, pool=TemperedPool(4, 128, num_moves=3, seed=0))

    def loss() -> float:
        return float(best - observed_log_density(exact_joint(ebm), x).mean())

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=256) as i:
            lvebm("scene", ebm, obs=x[i])

    assert loss() > 0.1  # the start is not already there
    saddle = Saddle(model, AutoParticles(model, 4), Adam({"lr": 2e-2}), seed=0)
    saddle.fit(x, num_steps=150, progress=False)
    assert loss() < 0.01
    filled = torch.where(x.isnan(), x.nanmean(0), x).double()
    wrong = MultivariateNormal(filled.mean(0), torch.cov(filled.T, correction=0))
    assert best - observed_log_density(wrong, x).mean() > 0.03  # filling in means would fail


# --- imputation -----------------------------------------------------------------------------


def test_intervals_of_imputed_entries_have_nominal_coverage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """80 % intervals of 19 draws at rows of the model itself; binomial test at ALPHA."""
    monkeypatch.setattr(imputation, "_NUM_PARTICLES", 64)  # enough for a single mode
    ebm = quadratic_ebm()
    x = draws_of_x(ebm, 150, 1)
    holed = with_holes(x)
    draws = ebm.impute(holed, num_samples=19)
    hidden = holed.isnan()
    assert torch.equal(draws[:, ~hidden], x[~hidden].expand(19, -1))
    # Ranks on 0 … 19; one entry of each row, since those of a row depend on each other.
    first = np.array([(draws[:, i] < x[i]).sum(0)[h][0] for i, h in enumerate(hidden) if h.any()])
    inside = int(((first >= 2) & (first < 18)).sum())
    assert stats.binomtest(inside, len(first), 0.8).pvalue > ALPHA
    base = np.array(
        [float((ebm.base_x.loc[h][0] - x[i][h][0]).abs()) for i, h in enumerate(hidden) if h.any()]
    )
    narrow = int((base < 0.1).sum())
    assert stats.binomtest(narrow, len(first), 0.8).pvalue < CERTAIN
