# SPDX-License-Identifier: Apache-2.0
"""Amortised guides where entries of x are missing."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import randomise
from missing_data import draws_of_x, observed_log_density, with_holes
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import SGD, ClippedAdam
from referee import ALPHA, CERTAIN, global_seed, mean_p_value, normal
from shaped_models import shaped_ebm
from small_models import (
    data_of,
    exact_joint,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
)
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    ImportanceWeightedELBO,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    lvebm,
)
from pyro_lvebm.bases.completion import Completion
from pyro_lvebm.guides import encoder
from pyro_lvebm.guides.encoder_inputs import features, law_of_entries
from pyro_lvebm.sites.distributions import MissingSite

BOTH = [AutoAmortisedNormal, AutoAmortisedMultivariateNormal]


# --- the law --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("build", [lambda: quadratic_ebm(4, 2), shaped_ebm])
def test_the_first_law_is_that_of_the_site(make: Any, build: Any) -> None:
    ebm = build()
    x = with_holes(data_of(ebm, 10))
    guide = make(plate_model(ebm), hidden=(5,))
    guide(x)
    site = MissingSite(Completion(ebm.base_x, x, ~x.isnan()))
    values = normal((3, *x.shape), 1)
    law = guide.encode_missing(x)
    assert law.batch_shape == (10,) and law.event_shape == ebm.x_shape
    torch.testing.assert_close(law.log_prob(values), site.log_prob(values))
    assert law.sample().shape == x.shape


def test_the_law_is_gaussian_given_the_row_and_the_site_s_own_where_it_is_observed() -> None:
    ebm = quadratic_ebm(4, 2)
    x = with_holes(data_of(ebm, 12), 0.5)
    guide = AutoAmortisedMultivariateNormal(plate_model(ebm), hidden=(5,))
    guide(x)
    randomise(guide)
    completion = Completion(ebm.base_x, x, ~x.isnan())
    inverse = torch.linalg.inv(completion.root)  # x = mean + v R⁻¹
    outputs = guide.completer(features(completion)).detach()
    seen, values = ~x.isnan(), normal(tuple(x.shape), 1)
    for i, law in enumerate(outputs):
        missing = (~seen[i]).double()
        mean, tril = law[:4] * missing, (law[4:8] * missing).exp().diag()
        rows, columns = torch.tril_indices(4, 4, -1)
        tril[rows, columns] = law[8:] * missing[rows] * missing[columns]
        scale = inverse[i].T @ tril
        expected = MultivariateNormal(completion.mean[i] + mean @ inverse[i], scale @ scale.T)
        found = guide.encode_missing(x[i : i + 1]).log_prob(values[i : i + 1])
        torch.testing.assert_close(found[0], expected.log_prob(values[i]))
        if seen[i].any():
            one = int(torch.nonzero(seen[i])[0, 0])
            own = expected.covariance_matrix[one]
            assert own[one] == pytest.approx(float(completion.root[i, one, one]) ** -2)
            assert int((own.abs() > 1e-12).sum()) == 1  # independent of all else


@pytest.mark.parametrize("size", [None, 4])
def test_z_is_encoded_from_the_completed_row(size: int | None) -> None:
    ebm = quadratic_ebm(4, 2)
    x = with_holes(data_of(ebm, 10))
    guide = AutoAmortisedNormal(plate_model(ebm, size), hidden=(5,))
    guide(x)
    randomise(guide)
    vectorised = pyro.plate("num_particles_vectorized", 3, dim=-2)(guide)
    nodes = poutine.trace(vectorised).get_trace(x).nodes
    i = nodes["data"]["value"]
    entries = nodes["scene_missing"]["value"]
    assert entries.shape == (3, size or 10, 4)
    whole = torch.where(x[i].isnan(), entries, x[i])
    torch.testing.assert_close(nodes["scene_z"]["fn"].mean, guide.encode(whole).mean)


# --- the bound ------------------------------------------------------------------------------


def gaps(ebm: LVEBM, x: Tensor, make: Any) -> Tensor:
    """Exact log p(x_o) minus the ELBO, in nats per row, by 40 draws, after a fit at fixed θ."""
    pyro.clear_param_store()
    model = plate_model(ebm)
    guide = make(model, hidden=(32,))
    saddle = Saddle(model, guide, ClippedAdam({"lr": 2e-2}))
    torch.manual_seed(0)  # the same noise for all guides
    with ebm.frozen():
        saddle.fit(x, num_steps=90, progress=False)
        losses = torch.tensor([saddle.evaluate_loss(x) for _ in range(40)])
    off = float(ebm.log_partition) - float(ebm.f.log_partition().detach())
    exact = observed_log_density(exact_joint(ebm), x)
    return exact.mean() + losses / len(x) - off


def test_the_bound_is_below_the_exact_evidence_and_needs_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Student's tests of independent draws. False alarms: 1e-3 each.

    The gap is that of a Gaussian encoder on 200 rows, with its full covariance below 0.015 nats.
    """
    ebm = warm(quadratic_ebm(4, 2, seed=3))
    x = with_holes(draws_of_x(ebm, 200, 1), 0.4)
    gap = gaps(ebm, x, AutoAmortisedMultivariateNormal)
    mean_field = gaps(ebm, x, AutoAmortisedNormal)
    assert gap.mean() < 0.015
    # No gap is negative: neither is significantly below zero.
    for found in (gap, mean_field):
        assert found.mean() > 0 or mean_p_value(found, 0.0) > ALPHA
    assert gap.mean() < mean_field.mean() and mean_p_value(mean_field - gap, 0.0) < CERTAIN

    def blind(completion: Completion) -> Tensor:
        seen = features(completion)
        return torch.cat([seen[:, : completion.dim], torch.zeros_like(completion.mean)], -1)

    monkeypatch.setattr(encoder, "features", blind)
    without = gaps(ebm, x, AutoAmortisedMultivariateNormal)
    assert gap.mean() < without.mean() and mean_p_value(without - gap, 0.0) < CERTAIN


@pytest.mark.usefixtures("brief_brackets")
def test_the_table_has_the_elbo_of_the_losses() -> None:
    """Within four standard errors."""
    # With tiny_pool() log Z online may be off by more than annealing allows, which warns.
    ebm = warm(quadratic_ebm(4, 2, pool=TemperedPool(4, 128, num_moves=4)))
    x = with_holes(data_of(ebm, 20))
    model = plate_model(ebm)
    guide = AutoAmortisedNormal(model, hidden=(5,))
    guide(x)
    randomise(guide)
    torch.manual_seed(0)
    table = compare_elbo(model, {"guide": guide}, x, num_samples=64)
    elbo = table.terms["guide"].mean(1)
    with ebm.frozen(), torch.no_grad():
        losses = torch.tensor([Trace_ELBO().loss(model, guide, x) for _ in range(64)]) / len(x)
    assert abs(elbo.mean() + losses.mean()) < 4 * math.hypot(elbo.std(), losses.std()) / 8
    assert table.rows["kl_gap"].iloc[0] > 0.1


def test_losses_of_pyro_agree() -> None:
    """`TraceMeanField_ELBO` has the expectation of `Trace_ELBO`. False alarms: 1e-3."""
    ebm = warm(quadratic_ebm(4, 2))
    x = with_holes(data_of(ebm, 20))
    model = plate_model(ebm)
    guide = AutoAmortisedNormal(model, hidden=(5,))
    guide(x)
    randomise(guide)
    torch.manual_seed(0)
    losses = {}
    with ebm.frozen(), torch.no_grad(), warnings.catch_warnings():
        # The order of the sites is the guide's own: z depends on the entries.
        warnings.filterwarnings("ignore", "Failed to verify mean field restriction")
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO(), ImportanceWeightedELBO(16)):
            found = [elbo.loss(model, guide, x) for _ in range(80)]
            losses[type(elbo).__name__] = torch.tensor(found)
    plain, analytic, weighted = losses.values()
    assert mean_p_value(plain - analytic, 0.0) > ALPHA
    # One standard deviation is 6 standard errors of the difference of 80 independent losses.
    assert mean_p_value(plain + plain.std() - analytic, 0.0) < CERTAIN
    assert weighted.mean() < plain.mean() - 3 * plain.std() / math.sqrt(80)


def test_both_networks_train() -> None:
    ebm = warm(quadratic_ebm(4, 2), 2)
    model, x = plate_model(ebm, 4), with_holes(data_of(ebm, 10))
    ebm.expects_missing.fill_(True)
    guide = AutoAmortisedMultivariateNormal(model, hidden=(6,))
    guide(x)
    before = snapshot(guide)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
    with ebm.frozen(), global_seed(0):
        svi.step(x)
        svi.step(x)  # the first gradient of all but the last layers is zero
    after = snapshot(guide)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert {key.split(".")[0] for key in before} == {"encoder", "completer"}


# --- what is refused ------------------------------------------------------------------------


def test_rows_with_nan_where_none_were_missing() -> None:
    ebm = quadratic_ebm(4, 2)
    model, x = plate_model(ebm), data_of(ebm, 10)
    saddle = Saddle(model, AutoAmortisedNormal(model, hidden=(5,)), SGD({"lr": 1e-3}))
    saddle.step(x)
    before = snapshot(saddle.guide), snapshot(ebm)
    with pytest.raises(ValueError, match="x has NaN, and q"):
        saddle.step(with_holes(x))
    assert same(before[0], snapshot(saddle.guide)) and same(before[1], snapshot(ebm))
    with pytest.raises(ValueError, match="x has NaN, and q"):
        saddle.guide.encode(with_holes(x))
    saddle.step(x)


def test_entries_that_only_the_model_knows_to_be_missing() -> None:
    ebm = quadratic_ebm(4, 2)
    x = data_of(ebm, 10)
    seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7

    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x)):
            return lvebm("scene", ebm, obs=x, observed=seen)

    guide = AutoAmortisedNormal(model, hidden=(5,))
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN in what AutoAmortisedNormal sees is not where"):
            guide(x)
    holed = AutoAmortisedNormal(
        model, observations=lambda x: x.masked_fill(~seen, math.nan), hidden=(5,)
    )
    assert set(holed(x)) == {"scene_missing", "scene_z"}


def test_missing_entries_of_another_lvebm() -> None:
    a, b = quadratic_ebm(), quadratic_ebm(seed=5)
    x = with_holes(data_of(a, 6))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("first", a, obs=x.nan_to_num())
            lvebm("second", b, obs=x)

    shown = poutine.block(model, hide=["second_z"])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="and its missing entries; got"):
        AutoAmortisedNormal(shown)(x)


def test_entries_on_a_bounded_support_have_their_jacobian() -> None:
    """Where v ~ N(0, I) the law of the entries is base_x given the observed ones, exactly."""
    x = normal((40, 2), 3).exp()
    x[::2, 1] = torch.nan
    ebm = LVEBM.from_data(
        QuadraticEnergy(2, 1), x, z_dim=1, support=constraints.positive, pool=tiny_pool()
    )
    completion = Completion(ebm.base_x, x, ~x.isnan())
    standard = dist.Normal(torch.zeros(40, 2, dtype=x.dtype), 1.0).to_event(1)
    law, site = law_of_entries(standard, completion), MissingSite(completion)
    value = normal((40, 2), 4).exp()
    assert torch.allclose(law.log_prob(value), site.log_prob(value), atol=1e-10)
    with torch.random.fork_rng():
        assert bool((law.rsample() > 0).all())
