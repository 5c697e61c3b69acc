# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import correlated_ebm, discrete_model, gamma_model, gaussian_gap, trace_of
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGaussian,
    AutoGuideList,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
    init_to_sample,
)
from pyro.optim import ClippedAdam
from referee import ALPHA, CERTAIN, mean_p_value, normal
from shaped_models import base_law, shaped_ebm
from small_models import (
    data_of,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
)
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    Saddle,
    compare_elbo,
    lvebm,
)
from pyro_lvebm.guides.checks import check_guide, find_particles
from pyro_lvebm.latents.minibatches import cover
from pyro_lvebm.sites.traces import vectorise

# --- AutoParticles: what it holds -----------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [None, 4])
def test_particles_are_buffers_for_all_data(count: int, size: int | None) -> None:
    ebm = warm(shaped_ebm(), 2)
    guide = AutoParticles(plate_model(ebm, size), count)
    x = data_of(ebm, 10)
    guide(x)
    assert guide.particles("scene_z").shape == (count, 10, 2, 1)
    assert guide.particles("scene_z").unique().numel() == count * 20
    assert list(guide.parameters()) == []
    assert {tuple(b.shape) for b in guide.buffers()} == {(count, 10, 2, 1), ()}
    assert guide.particles("scene_z").dtype is torch.float64


def test_particles_start_with_draws_of_the_prior() -> None:
    """Moments of 2,000 Gamma(2, 1.5) draws. False alarms: 1e-3."""
    torch.manual_seed(0)
    guide = AutoParticles(gamma_model, 2)
    guide(torch.zeros(1000))
    z = guide.particles("z")
    assert z.shape == (2, 1000) and (z > 0).all()
    moments = torch.stack([z.flatten(), z.flatten() ** 2], -1)
    assert mean_p_value(moments, [2 / 1.5, 2 / 1.5**2 + (2 / 1.5) ** 2]) > ALPHA
    assert mean_p_value(moments, [3 / 1.5, 3 / 1.5**2 + (3 / 1.5) ** 2]) < CERTAIN


def test_read_and_write_are_inverse_and_touch_no_other_datum() -> None:
    def model() -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 5, dim=-1, subsample_size=2):
            pyro.sample("z", dist.Gamma(torch.ones(3), 1.0).to_event(1))

    guide = AutoParticles(model, 2)
    guide()
    indices = {"outer": torch.arange(4), "inner": torch.tensor([3, 1])}
    before = guide.particles("z").clone()
    assert before.shape == (2, 4, 5, 3)
    value = normal((2, 4, 2, 3), 1, torch.float32)
    guide.write("z", indices, value)
    torch.testing.assert_close(guide.read("z", indices), value)
    after = guide.particles("z")
    torch.testing.assert_close(after[:, :, 3], value[:, :, 0].exp())
    torch.testing.assert_close(after[:, :, 1], value[:, :, 1].exp())
    assert torch.equal(after[:, :, [0, 2, 4]], before[:, :, [0, 2, 4]])


def test_state_dict_and_names_with_dots() -> None:
    def model() -> None:
        with pyro.plate("data", 5):
            pyro.sample("a.b", dist.Normal(0.0, 1.0))
            pyro.sample("model", dist.Normal(0.0, 1.0))  # also the name of an attribute

    guide, other = AutoParticles(model, 2), AutoParticles(model, 2)
    guide(), other()
    assert not same(snapshot(guide), snapshot(other))
    other.load_state_dict(guide.state_dict())
    assert torch.equal(guide.particles("a.b"), other.particles("a.b"))
    assert torch.equal(guide.particles("model"), other.particles("model"))


def test_a_prior_that_differs_by_datum_is_drawn_for_all_data() -> None:
    """The laws of one minibatch are repeated along the plate, as in Pyro's own guides."""
    loc = torch.arange(10.0)

    def model() -> None:
        with pyro.plate("data", 10, subsample_size=4) as i:
            pyro.sample("z", dist.Normal(loc[i], 1e-3))

    torch.manual_seed(0)
    guide = AutoParticles(model, 3)
    guide()
    z = guide.particles("z")
    assert z.shape == (3, 10) and len(z.unique()) == 30
    nearest = z.round()
    assert (z - nearest).abs().max() < 0.01  # laws of the minibatch, unmixed
    assert torch.equal(nearest[0], nearest[1]) and len(nearest.unique()) == 4
    assert torch.equal(nearest[:, 4:8], nearest[:, :4])
    assert torch.equal(nearest[:, 8:], nearest[:, :2])


# --- AutoParticles: what it samples ---------------------------------------------------------


def test_the_guide_gives_all_particles_to_a_vectorised_elbo() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 10)
    guide = AutoParticles(plate_model(ebm, 4), 3)
    guide(x)
    trace = trace_of(vectorise(guide, 3, 1), x)
    i = trace.nodes["data"]["value"]
    node = trace.nodes["scene_z"]
    assert torch.equal(node["value"], guide.particles("scene_z")[:, i])
    trace.compute_log_prob()
    assert isinstance(node["fn"], dist.Delta) and node["log_prob_sum"] == 0
    # Two nestings more leave room for them.
    wide = trace_of(vectorise(guide, 3, 3), x)
    i = wide.nodes["data"]["value"]
    assert torch.equal(wide.nodes["scene_z"]["value"][:, 0, 0], guide.particles("scene_z")[:, i])


def choices(guide: AutoParticles, value: Tensor, rows: Tensor) -> Tensor:
    """Which particle each row of a draw (*s, B, d) is; fails if it is another datum's."""
    held = guide.particles("scene_z")[:, rows]  # (K, B, d)
    equal = (value.unsqueeze(-3) == held).all(-1)  # (*s, K, B)
    assert (equal.sum(-2) == 1).all()
    return equal.int().argmax(-2)


def test_otherwise_each_datum_gets_a_random_one_of_its_own_particles() -> None:
    """Counts of 4 particles over 60 draws of 25 data; chi-square. False alarms: 1e-3."""
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 25)
    torch.manual_seed(0)
    guide = AutoParticles(plate_model(ebm), 4)
    rows = torch.arange(25)
    picks = torch.stack([choices(guide, guide(x)["scene_z"], rows) for _ in range(60)])
    indicator = torch.nn.functional.one_hot(picks, 4).double()[..., :3]
    assert mean_p_value(indicator.flatten(0, 1), 0.25) > ALPHA
    # Data are independent: how often neighbours agree.
    agree = (picks[:, 1:] == picks[:, :-1]).double()
    assert mean_p_value(agree.flatten(), 0.25) > ALPHA
    biased = torch.nn.functional.one_hot(picks.clamp(min=1), 4).double()[..., 1:]
    assert mean_p_value(biased.flatten(0, 1), 0.25) < CERTAIN  # the first is never chosen


def test_another_number_of_vectorised_particles_picks_at_random() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 10)
    torch.manual_seed(0)
    guide = AutoParticles(plate_model(ebm, 5), 4)
    trace = trace_of(vectorise(guide, 30, 1), x)
    value = trace.nodes["scene_z"]["value"]
    assert value.shape == (30, 5, 2)
    picks = choices(guide, value, trace.nodes["data"]["value"])
    assert (picks.unique() == torch.arange(4)).all()
    assert all(len(picks[:, k].unique()) > 1 for k in range(5))


def test_predictive_draws_from_the_particles() -> None:
    ebm = warm(quadratic_ebm(), 2)

    def model(x: Tensor | None = None) -> None:
        with pyro.plate("data", 6):
            lvebm("scene", ebm, obs=x)

    torch.manual_seed(0)
    guide = AutoParticles(model, 3)
    guide()
    out = Predictive(model, guide=guide, num_samples=40, return_sites=("scene", "scene_z"))()
    assert out["scene"].shape == (40, 6, 3)
    picks = choices(guide, out["scene_z"], torch.arange(6))
    assert all(len(picks[:, k].unique()) == 3 for k in range(6))


def test_predictive_in_parallel_draws_anew() -> None:
    ebm = warm(quadratic_ebm(), 2)
    torch.manual_seed(0)
    model = plate_model(ebm)
    x = data_of(ebm, 6)
    guide = AutoParticles(model, 3)
    guide(x)
    predictive = Predictive(
        model, guide=guide, num_samples=40, parallel=True, return_sites=("scene_z",)
    )
    picks = choices(guide, predictive(x)["scene_z"], torch.arange(6))
    assert all(len(picks[:, k].unique()) == 3 for k in range(6))


@pytest.mark.parametrize("order", [0, 1])
def test_particles_share_a_model_with_a_guide_for_its_global_latent(order: int) -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 30)
    y = normal((30,), 1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=10) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal((z * w).sum(-1), 0.5), obs=y[i])

    parts = [
        AutoNormal(poutine.block(model, expose=["w"])),
        AutoParticles(poutine.block(model, hide=["w"]), 3),
    ]
    guide = AutoGuideList(model)
    for k in (order, 1 - order):
        guide.append(parts[k])
    saddle = Saddle(model, guide, ClippedAdam({"lr": 0.02}), num_moves=2)
    assert saddle.particles is parts[1] and find_particles(guide) is parts[1]
    saddle.step(x, y)
    before = [parts[0].locs.w.detach().clone(), parts[1].particles("scene_z").clone()]
    first_theta = snapshot(ebm.f)
    losses = [saddle.step(x, y) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(before[0], parts[0].locs.w)
    assert not torch.equal(before[1], parts[1].particles("scene_z"))
    assert not same(first_theta, snapshot(ebm.f))


# --- a step and its minibatch ---------------------------------------------------------------


def test_each_datum_has_particles_of_its_own_posterior() -> None:
    """With data far apart, a wrong index would show at once."""
    y = torch.cat([torch.full((8,), 6.0), torch.full((8,), 1.0)])
    y = y[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    model = partial(gamma_model, size=8)
    saddle = Saddle(model, AutoParticles(model, 2), ClippedAdam({"lr": 0.01}), num_moves=10)
    for _ in range(50):
        saddle.step(y)
    z = saddle.particles.particles("z")
    assert ((z > 3.3) == (y == 6.0)).all()


# --- AutoPerDatumMultivariateNormal ---------------------------------------------------------


def test_the_full_covariance_guide_reaches_the_exact_posterior() -> None:
    """Its KL is 0 to 5e-3, where the best mean-field Gaussian keeps a known gap."""
    ebm = warm(correlated_ebm(), 2)
    x = data_of(ebm, 12)
    model = plate_model(ebm)
    per_datum = AutoPerDatumMultivariateNormal(model)
    per_datum(x)

    def q() -> dist.MultivariateNormal:
        return dist.MultivariateNormal(
            per_datum.locs.scene_z.double(), scale_tril=per_datum.scale_trils.scene_z.double()
        )

    assert gaussian_gap(per_datum, x, q, ebm, 250) < 5e-3
    mean_field = AutoNormal(model, init_scale=0.5)
    mean_field(x)

    def q_diagonal() -> dist.MultivariateNormal:
        loc, scale = mean_field.locs.scene_z, mean_field.scales.scene_z
        return dist.MultivariateNormal(loc.double(), scale_tril=scale.double().diag_embed())

    gap = gaussian_gap(mean_field, x, q_diagonal, ebm, 250)
    precision = torch.linalg.inv(exact_posterior(ebm, x).covariance_matrix[0])
    known = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert known > 0.1  # so that the check above would fail for a guide without correlations
    assert gap == pytest.approx(float(known), abs=0.02)


def test_pyros_full_covariance_guide_reaches_it_too_without_subsampling() -> None:
    ebm = warm(correlated_ebm(), 2)
    x = data_of(ebm, 6)
    guide = AutoMultivariateNormal(plate_model(ebm), init_scale=0.5)
    guide(x)

    def q() -> dist.MultivariateNormal:
        whole = guide.get_posterior()
        blocks = whole.covariance_matrix.reshape(6, 2, 6, 2)[range(6), :, range(6)]
        return dist.MultivariateNormal(whole.loc.reshape(6, 2), blocks)

    assert gaussian_gap(guide, x, q, ebm, 300) < 0.02


def test_per_datum_parameters_have_the_size_of_the_data() -> None:
    ebm = warm(shaped_ebm(), 2)
    guide = AutoPerDatumMultivariateNormal(plate_model(ebm, 4), init_scale=0.3)
    x = data_of(ebm, 10)
    trace = trace_of(guide, x)
    i = trace.nodes["data"]["value"]
    assert trace.nodes["scene_z"]["value"].shape == (4, 2, 1)
    assert guide.locs.scene_z.shape == (10, 2) and guide.scale_trils.scene_z.shape == (10, 2, 2)
    q = trace.nodes["scene_z_unconstrained"]["fn"]
    assert torch.equal(q.loc, guide.locs.scene_z[i])
    torch.testing.assert_close(q.scale_tril, 0.3 * torch.eye(2).double().expand(4, 2, 2))


def test_on_the_half_line_the_guide_is_gaussian_in_the_logarithm() -> None:
    """The density of the guide's site, with its auxiliary, is that of a log-normal."""
    guide = AutoPerDatumMultivariateNormal(gamma_model, init_scale=0.4)
    y = torch.ones(6)
    trace = trace_of(guide, y)
    trace.compute_log_prob()
    z = trace.nodes["z"]["value"]
    total = trace.nodes["z"]["log_prob"] + trace.nodes["z_unconstrained"]["log_prob"]
    expected = torch.distributions.LogNormal(guide.locs.z.squeeze(-1), 0.4).log_prob(z)
    torch.testing.assert_close(total, expected)
    assert trace.nodes["z_unconstrained"]["infer"]["is_auxiliary"]


# --- AutoAmortisedNormal --------------------------------------------------------------------


@pytest.mark.parametrize("full_z", [False, True])
def test_the_first_amortised_guide_is_base_z(full_z: bool) -> None:
    ebm = shaped_ebm()
    if full_z:
        tril = torch.tensor([[0.8, 0.0], [0.5, 1.3]]).double()
        base_z = dist.MultivariateNormal(torch.tensor([1.0, -1.0]).double(), scale_tril=tril)
        ebm = LVEBM(MLPEnergy(4, 2).double(), ebm.base_x, base_z, pool=tiny_pool())
    guide = AutoAmortisedNormal(plate_model(ebm), hidden=(5,))
    x = data_of(ebm, 4)
    guide(x)
    q = guide.encode(x)
    assert q.batch_shape == (4,) and q.event_shape == ebm.z_shape
    z = normal((4, *ebm.z_shape), 1)
    torch.testing.assert_close(q.log_prob(z), base_law(ebm.base_z).log_prob(z.flatten(1)))
    with torch.no_grad():
        guide.encoder[-1].bias.copy_(torch.tensor([0.5, -1.0, 0.2, -0.7]))
    q = guide.encode(x)
    scale = ebm.base_z.scale.reshape(2, -1) if full_z else ebm.base_z.scale.diag()
    loc = ebm.base_z.loc + scale @ torch.tensor([0.5, -1.0]).double()
    covariance = scale @ torch.tensor([0.4, -1.4]).double().exp().diag() @ scale.T
    expected = torch.distributions.MultivariateNormal(loc, covariance)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z.flatten(1)))


@pytest.mark.parametrize("size", [None, 4])
def test_an_amortised_row_depends_on_its_own_observation(size: int | None) -> None:
    ebm = quadratic_ebm()
    guide = AutoAmortisedNormal(plate_model(ebm, size), hidden=(6, 5), seed=3)
    x = data_of(ebm, 10)
    guide(x)
    with torch.no_grad():
        guide.encoder[-1].weight.copy_(normal((4, 5), 1))
    trace = trace_of(guide, x)
    i = trace.nodes["data"]["value"]
    fn = trace.nodes["scene_z"]["fn"]
    torch.testing.assert_close(fn.mean, guide.encode(x[i]).mean)
    assert len(fn.mean.unique(dim=0)) == len(i)
    other = x.clone()
    other[0] += 5.0
    changed = (guide.encode(x).mean != guide.encode(other).mean).any(-1)
    assert changed.tolist() == [True] + [False] * 9


def test_the_observations_may_be_any_argument() -> None:
    ebm = quadratic_ebm()

    def model(scale: float, data: dict[str, Tensor]) -> None:
        with pyro.plate("data", 10, subsample_size=3) as i:
            lvebm("scene", ebm, obs=data["x"][i] * scale)

    guide = AutoAmortisedNormal(model, observations=lambda scale, data: data["x"] * scale)
    x = data_of(ebm, 10)
    trace = trace_of(guide, 2.0, {"x": x})
    assert trace.nodes["scene_z"]["value"].shape == (3, 2)


# --- refusals -------------------------------------------------------------------------------

MINIBATCH_SIZED = [
    AutoMultivariateNormal,
    AutoDiagonalNormal,
    partial(AutoIAFNormal, hidden_dim=8, num_transforms=1),
    AutoGaussian,
    AutoStructured,
    AutoLaplaceApproximation,
]


@pytest.mark.parametrize("make", MINIBATCH_SIZED)
def test_guides_of_the_size_of_a_minibatch_are_refused(
    make: Callable[..., Any], coarse_brackets: None
) -> None:
    """By `Saddle` and by `compare_elbo`, alone and in a list, before anything has changed."""
    ebm = quadratic_ebm()
    model, x = plate_model(ebm, 4), data_of(ebm, 10)
    name = getattr(make, "func", make).__name__
    message = f"{name}(Dense)? allocates.*the 4 rows.*plate 'data' of latent 'scene_z' has 10"
    before = snapshot(ebm)
    listed = AutoGuideList(model)
    for guide in (make(model), listed):
        if guide is listed:
            listed.append(make(model))
        saddle = Saddle(model, guide, ClippedAdam({"lr": 0.01}))
        with pytest.raises(ValueError, match=message):
            saddle.step(x)
        assert saddle.step_count == 0
    assert same(before, snapshot(ebm))
    with pytest.raises(ValueError, match=message):
        compare_elbo(model, {"it": make(model)}, x, num_samples=2)
    assert same(before, snapshot(ebm))


@pytest.mark.parametrize(
    "make",
    [
        AutoMultivariateNormal,
        AutoDiagonalNormal,
        AutoNormal,
        AutoDelta,
        AutoAmortisedNormal,
    ],
)
def test_they_are_welcome_where_nothing_is_subsampled(make: Callable[..., Any]) -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 10)
    saddle = Saddle(model, make(model), ClippedAdam({"lr": 0.01}))
    assert math.isfinite(saddle.step(x)) and saddle.step_count == 1
    assert saddle.particles is None


def test_a_subsampled_plate_without_latents_refuses_nobody() -> None:
    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=4) as i:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[i])

    guide = AutoDiagonalNormal(model)
    check_guide(guide, trace_of(model, torch.zeros(10)))
    check_guide(lambda y: None, trace_of(model, torch.zeros(10)))


def test_guides_sized_by_all_data_are_not_refused() -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm, 4), data_of(ebm, 10)
    trace = trace_of(model, x)
    for make in (AutoNormal, AutoDelta, AutoParticles, AutoAmortisedNormal):
        check_guide(make(model), trace)
    assert len(list(cover(trace))) == 3


def test_impossible_guides_are_refused() -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 4)
    with pytest.raises(ValueError, match="num_particles must be at least 1; got 0"):
        AutoParticles(model, 0)
    with pytest.raises(ValueError, match="init_scale must be positive; got 0"):
        AutoPerDatumMultivariateNormal(model, init_scale=0)
    for hidden in ((), (4, 0)):
        with pytest.raises(ValueError, match="hidden must name at least one positive width"):
            AutoAmortisedNormal(model, hidden=hidden)
    guide = AutoParticles(discrete_model)
    for _ in range(2):  # the same refusal again, and not a half-built guide
        with pytest.raises(ValueError, match="site 'k' is discrete"):
            guide()

    def two(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        model(x)

    with pytest.raises(ValueError, match=r"missing entries; got \['scene_z', 'w"):
        AutoAmortisedNormal(two)(x)
    with pytest.raises(ValueError, match="only latents are the z of one LVEBM"):
        AutoAmortisedNormal(gamma_model)(torch.zeros(3))

    both = AutoGuideList(two)
    both.append(AutoParticles(poutine.block(two, expose=["w"])))
    both.append(AutoParticles(poutine.block(two, hide=["w"])))
    with pytest.raises(ValueError, match="holds 2 AutoParticles"):
        Saddle(two, both, ClippedAdam({"lr": 0.01}))


# --- ELBOs of the guides --------------------------------------------------------------------


@pytest.mark.parametrize(
    "guide_class", ["amortised", "amortised full", "per datum", "low rank", "mean field"]
)
def test_the_losses_of_all_elbos_have_the_same_mean(guide_class: str) -> None:
    """Analytic and sampled KL agree; Student's test over 150 draws. False alarms: 2e-3 a case."""
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 8)
    model = plate_model(ebm)
    guide = {
        "amortised": partial(AutoAmortisedNormal, hidden=(4,)),
        "amortised full": partial(AutoAmortisedMultivariateNormal, hidden=(4,)),
        "per datum": partial(AutoPerDatumMultivariateNormal, init_scale=0.4),
        "low rank": partial(AutoPerDatumLowRankMultivariateNormal, init_scale=0.4),
        "mean field": partial(AutoNormal, init_scale=0.6, init_loc_fn=init_to_sample),
    }[guide_class](model)
    torch.manual_seed(0)
    guide(x)
    with torch.no_grad():
        trace = trace_of(guide, x)
        fn = trace.nodes.get("scene_z_unconstrained", trace.nodes["scene_z"])["fn"]
        mean = fn.mean.double()
        covariance = (
            fn.covariance_matrix.double()
            if hasattr(fn, "covariance_matrix")
            else fn.variance.double().diag_embed()
        )
        q = dist.MultivariateNormal(mean, covariance)
        gap = kl_divergence(q, exact_posterior(ebm, x)).sum()
        error = ebm.log_partition - ebm.f.log_partition()
        exact = gap - (ebm.f.log_evidence(x) - error).sum()
        losses = [
            torch.tensor([loss().loss(model, guide, x) for _ in range(150)])
            for loss in (Trace_ELBO, TraceMeanField_ELBO)
        ]
    for values in losses:
        assert mean_p_value(values, float(exact)) > ALPHA
        assert mean_p_value(values, float(exact) + 3.0 * float(values.std()) / 4) < CERTAIN
