# SPDX-License-Identifier: Apache-2.0
"""Low-rank and flow guides, and what all guides with parameters for every datum share.

The referee of densities and losses is quadrature on a grid of the plane.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import discrete_model, gaussian_gap, trace_of
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from referee import ALPHA, CERTAIN, mean_p_value, normal, plane_grid
from shaped_models import shaped_ebm
from small_models import data_of, exact_posterior, plate_model, quadratic_ebm, warm
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedMultivariateNormal,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
    QuadraticEnergy,
    Saddle,
    compare_elbo,
)
from pyro_lvebm.guides.per_datum import TransformedPoint, attribute_names
from pyro_lvebm.sites.distributions import LatentSite, Pairing
from pyro_lvebm.sites.traces import vectorise

FAMILIES = {
    "full": AutoPerDatumMultivariateNormal,
    "low rank": AutoPerDatumLowRankMultivariateNormal,
    "IAF": partial(AutoPerDatumIAFNormal, hidden=(8,), context_dim=3),
}
Y = torch.tensor([-1.0, 0.0, 0.5, 1.0], dtype=torch.float64)


def banana_model(y: Tensor, size: int | None = None) -> None:
    """A posterior along the parabola z_1 = z_0² + y."""
    with pyro.plate("data", len(y), subsample_size=size) as i:
        scale = torch.tensor([1.0, 2.0]).to(y)
        z = pyro.sample("z", dist.Normal(torch.zeros(2).to(y), scale).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.3), obs=y[i])


def positive_model(y: Tensor, size: int | None = None) -> None:
    with pyro.plate("data", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Gamma(torch.tensor([2.0, 4.0]).to(y), 2.0).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0] - z[..., 1], 1.5), obs=y[i])


MODELS = {"real": banana_model, "positive": positive_model}


def log_joint(model: Callable[..., Any], y: Tensor, z: Tensor) -> Tensor:
    """Log p(y_i, z) (S, N) at points z (S, 2) of the support."""
    at = poutine.condition(vectorise(model, len(z), 1), {"z": z[:, None].expand(-1, len(y), -1)})
    trace = trace_of(at, y)
    trace.compute_log_prob()
    return trace.nodes["z"]["log_prob"] + trace.nodes["y"]["log_prob"]


def log_density(guide: Any, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Points z (S, 2) of the support for unconstrained u (S, 2), and log q(z | i) (S, N) there."""
    names = trace_of(guide, y).nodes
    site = "z_unconstrained" if "z_unconstrained" in names else "z"
    values = u[:, None].expand(-1, len(y), -1)
    trace = trace_of(poutine.condition(vectorise(guide, len(u), 1), {site: values}), y)
    trace.compute_log_prob()
    log_q = sum(trace.nodes[name]["log_prob"] for name in {site, "z"})
    return trace.nodes["z"]["value"][:, 0], log_q


def scattered(family: str, support: str) -> Any:
    """A guide with parameters of its own for every datum, far from the first ones."""
    torch.manual_seed(0)
    guide = FAMILIES[family](MODELS[support], init_scale=0.3)
    guide(Y)
    seeds = {"locs": 1, "scales": 2, "scale_trils": 3, "cov_factors": 4, "contexts": 5, "flows": 6}
    with torch.no_grad():
        for name, param in guide.named_parameters():
            group = name.split(".")[0]
            if group == "locs":
                param.copy_(0.5 + 0.3 * normal(tuple(param.shape), 1))
            else:
                size = 0.4 if group == "flows" else 0.2
                param.add_(size * normal(tuple(param.shape), seeds[group]))
    return guide


def volume(z: Tensor, support: str) -> Tensor:
    """Log volume (S, 1) of dz for du, at z = exp(u) or z = u."""
    return (z.log() if support == "positive" else 0.0 * z).sum(-1, keepdim=True)


# --- densities and losses, against quadrature -----------------------------------------------


@pytest.mark.parametrize("support", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_density_of_a_guide_integrates_to_one(family: str, support: str) -> None:
    guide = scattered(family, support)
    u, cell = plane_grid(12.0, 241)
    with torch.no_grad():
        z, log_q = log_density(guide, Y, u)
        mass = (log_q + volume(z, support)).exp().sum(0) * cell
        torch.testing.assert_close(mass, torch.ones(4).double(), rtol=0, atol=1e-4)
        if support == "positive":  # without the Jacobian it does not
            assert (log_q.exp().sum(0) * cell - 1).abs().max() > 0.05
        elif family == "IAF":  # nor without that of the flows
            fn = trace_of(guide, Y).nodes["z"]["fn"]
            base = u[:, None].expand(-1, 4, -1)
            for flow in reversed(fn.transforms):
                base = flow.inv(base)
            assert (fn.base_dist.log_prob(base).exp().sum(0) * cell - 1).abs().max() > 0.05


@pytest.mark.parametrize("support", MODELS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_class", [Trace_ELBO, TraceMeanField_ELBO])
def test_losses_are_those_of_quadrature(loss_class: Any, family: str, support: str) -> None:
    """E_q[log q − log p] of all data. Student's test over 100 draws. False alarms: 1e-3 a case."""
    guide, model = scattered(family, support), MODELS[support]
    u, cell = plane_grid(9.0, 181)
    with torch.no_grad():
        z, log_q = log_density(guide, Y, u)
        weight = (log_q + volume(z, support)).exp() * cell
        exact = float((weight * (log_q - log_joint(model, Y, z))).sum())
        jacobian = float((weight * volume(z, support)).sum())
        elbo = loss_class(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
        losses = torch.tensor([elbo.loss(model, guide, Y) for _ in range(100)])
    assert mean_p_value(losses, exact) > ALPHA
    assert mean_p_value(losses, exact + 3.0 * float(losses.std()) / 4) < CERTAIN
    if support == "positive":  # Pyro's rule for a Delta would lose the Jacobian
        assert mean_p_value(losses, exact + jacobian) < CERTAIN


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_of_a_minibatch_is_scaled_to_all_data(family: str) -> None:
    """Its mean over minibatches is that of the full data. Student's test. False alarms: 1e-3."""
    guide = scattered(family, "real")
    half = FAMILIES[family](partial(banana_model, size=2), init_scale=0.4)
    half(Y)
    half.load_state_dict(guide.state_dict())
    u, cell = plane_grid(9.0, 181)
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        z, log_q = log_density(guide, Y, u)
        terms = (log_q.exp() * cell * (log_q - log_joint(banana_model, Y, z))).sum(0)
        losses = torch.tensor([elbo.loss(half.model, half, Y) for _ in range(100)])
    assert mean_p_value(losses, float(terms.sum())) > ALPHA
    # With the parameters of other data it would not be.
    assert mean_p_value(losses, float(terms.sum()) + 3.0 * float(losses.std()) / 4) < CERTAIN


def test_the_image_of_a_draw_keeps_its_density_under_expansion() -> None:
    point = TransformedPoint(torch.ones(3, 2), torch.arange(3.0), event_dim=1)
    wide = point.expand((4, 3))
    assert isinstance(wide, TransformedPoint)
    prior = dist.Gamma(2.0, torch.ones(2)).to_event(1)
    expected = torch.arange(3.0) - prior.log_prob(torch.ones(2))
    torch.testing.assert_close(kl_divergence(wide, prior), expected.expand(4, 3))


# --- low rank -------------------------------------------------------------------------------


def three_latents() -> Any:
    """A linear-Gaussian LVEBM whose latents all have negative correlations given x.

    W Wᵀ + diag(s²) with one column has off-diagonals w_i w_j, whose product is not negative.
    """
    ebm = quadratic_ebm(2, 3, seed=3)
    precision = torch.eye(5).double()
    precision[2:, 2:] = 0.6 * torch.eye(3) + 0.6
    precision[:2, 2:] = torch.tensor([[0.3, -0.3, 0.2], [0.2, 0.1, -0.2]])
    precision[2:, :2] = precision[:2, 2:].T.clone()
    ebm.f.set_precision(precision)
    return warm(ebm, 2)


def low_rank_gap(rank: int) -> float:
    ebm = three_latents()
    x = data_of(ebm, 8)
    guide = AutoPerDatumLowRankMultivariateNormal(plate_model(ebm), rank=rank)
    torch.manual_seed(0)
    guide(x)
    assert (exact_posterior(ebm, x).covariance_matrix.triu(1).sum((-2, -1)) < 0).all()

    def q() -> dist.MultivariateNormal:
        factor, scale = guide.cov_factors.scene_z.double(), guide.scales.scene_z.double()
        covariance = factor @ factor.mT + (scale**2).diag_embed()
        return dist.MultivariateNormal(guide.locs.scene_z.double(), covariance)

    return gaussian_gap(guide, x, q, ebm, 250)


def test_with_rank_d_minus_one_the_guide_reaches_the_exact_posterior() -> None:
    """Its KL is 0 to 5e-3, where rank one keeps a gap that no training closes."""
    assert low_rank_gap(2) < 5e-3
    pyro.clear_param_store()
    assert low_rank_gap(1) > 0.1


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_first_low_rank_guide_has_the_scale_asked_for(rank: int) -> None:
    guide = AutoPerDatumLowRankMultivariateNormal(banana_model, rank, init_scale=0.3)
    with torch.random.fork_rng():
        guide(Y)
        fn = trace_of(guide, Y).nodes["z"]["fn"]
    assert guide.cov_factors.z.shape == (4, 2, min(rank, 2))
    torch.testing.assert_close(fn.stddev, torch.full((4, 2), 0.3).double())
    assert (guide.cov_factors.z.abs() > 1e-4).all()  # its gradient is zero at zero
    assert (guide.scales.z >= 0.3 / math.sqrt(2) - 1e-9).all()


@pytest.mark.parametrize("full_z", [False, True])
def test_the_low_rank_kl_to_base_z_is_that_of_two_gaussians(full_z: bool) -> None:
    base_z = dist.Normal(torch.ones(3), torch.tensor([0.5, 1.0, 2.0])).to_event(1)
    if full_z:
        tril = torch.tensor([[0.8, 0.0, 0.0], [0.5, 1.3, 0.0], [-0.4, 0.2, 0.7]])
        base_z = dist.MultivariateNormal(torch.ones(3), scale_tril=tril)
    base_x = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    ebm = LVEBM(QuadraticEnergy(2, 3), base_x, base_z).double()
    base = ebm.base_z
    scale = base.scale.diag() if base.diagonal else base.scale
    q = dist.LowRankMultivariateNormal(
        normal((5, 3), 1), normal((5, 3, 2), 2), normal((5, 3), 3).exp()
    )
    p = torch.distributions.MultivariateNormal(base.loc, scale_tril=scale)
    kl = kl_divergence(q, LatentSite(ebm, Pairing(), torch.Size((5,))))
    torch.testing.assert_close(kl, kl_divergence(q, p))
    wide = kl_divergence(q.expand((2, 5)), LatentSite(ebm, Pairing(), torch.Size((2, 5))))
    torch.testing.assert_close(wide, kl.expand(2, 5))


# --- inverse autoregressive flows -----------------------------------------------------------


def banana_gap(guide: Any, steps: int = 300) -> tuple[float, float]:
    """Mean KL(q ‖ p(z | y)) over data after SVI, with its standard error."""
    torch.manual_seed(0)
    guide(Y)
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(banana_model, guide, ClippedAdam({"lr": 0.1, "lrd": 0.05 ** (1 / steps)}), elbo)
    for _ in range(steps):
        svi.step(Y)
    u, cell = plane_grid(8.0, 301)
    evidence = torch.logsumexp(log_joint(banana_model, Y, u), 0).mean() + math.log(cell)
    elbo = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        losses = torch.tensor([elbo.loss(banana_model, guide, Y) for _ in range(8)]) / len(Y)
    return float(evidence + losses.mean()), float(losses.std()) / math.sqrt(8)


def test_the_flow_beats_gaussians_on_a_banana() -> None:
    """Gaps to the evidence by quadrature; differences of ten standard errors and more."""
    flow, flow_se = banana_gap(AutoPerDatumIAFNormal(banana_model, (32,), 1))
    mean_field, mean_field_se = banana_gap(AutoNormal(banana_model, init_scale=0.5))
    assert -4 * flow_se < flow < 0.15
    assert mean_field > 0.3 and mean_field - flow > 10 * math.hypot(flow_se, mean_field_se)


@pytest.mark.usefixtures("global_rng_untouched")
def test_the_first_flow_is_the_base_and_the_seed_fixes_its_networks() -> None:
    weights = []
    for seed in (0, 0, 1):
        pyro.clear_param_store()  # guides of one class share their names in it
        guide = AutoPerDatumIAFNormal(banana_model, (8, 6), 3, init_scale=0.7, seed=seed)
        with torch.random.fork_rng():
            guide(Y)
            node = trace_of(guide, Y).nodes["z"]
        base = dist.Normal(guide.locs.z, 0.7).to_event(1)
        torch.testing.assert_close(node["fn"].log_prob(node["value"]), base.log_prob(node["value"]))
        weights.append(torch.cat([p.detach().flatten() for p in guide.flows.parameters()]))
    assert len(guide.flows.z) == 3 and guide.contexts.z.shape == (4, 4)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_entries_of_a_flow_depend_on_those_before_them() -> None:
    """The order is reversed from each flow to the next."""
    guide = scattered("IAF", "real")
    fn = trace_of(guide, Y).nodes["z"]["fn"]
    for flow, (first, second) in zip(fn.transforms, ((0, 1), (1, 0)), strict=True):
        jacobian = torch.autograd.functional.jacobian(flow, torch.zeros(4, 2).double())
        assert (jacobian[:, first, :, second] == 0).all()
        assert (jacobian[:, second, :, first].diagonal() != 0).all()


def test_a_flow_of_one_entry_is_a_gaussian() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(1).to(y), 1.0).to_event(1))
            pyro.sample("w", dist.Gamma(torch.ones(()).to(y), 1.0))

    guide = AutoPerDatumIAFNormal(model, init_scale=0.3)
    trace = trace_of(guide, Y)
    for name in ("z", "w_unconstrained"):
        fn = trace.nodes[name]["fn"]
        torch.testing.assert_close(fn.stddev, torch.full((4, 1), 0.3).double())
    assert {name.split(".")[0] for name, _ in guide.named_parameters()} == {"locs", "scales"}


# --- names, refusals -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_sites_that_could_clash_do_not(family: str) -> None:
    names = ["a.b", "a__b", "train", "training", "model", "locs", "x_unconstrained", "x_", "_x"]

    def model() -> None:
        with pyro.plate("data", 3):
            for name in names:
                pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = FAMILIES[family](model)
    values = guide()
    assert list(values) == names
    assert len({id(p) for p in guide.locs.parameters()}) == len(names)
    assert guide.train() is guide
    other = FAMILIES[family](model)
    pyro.clear_param_store()
    other()
    other.load_state_dict(guide.state_dict())
    for a, b in zip(guide.locs.parameters(), other.locs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_are_those_of_the_sites_where_they_can_be() -> None:
    assert attribute_names(["scene_z", "a.b", "a__b", "half", "z_unconstrained"]) == {
        "scene_z": "scene_z",
        "a.b": "a__b",
        "a__b": "a__b_",
        "half": "half_",
        "z_unconstrained": "z_unconstrained_",
    }


def test_impossible_families_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        AutoPerDatumLowRankMultivariateNormal(banana_model, 0)
    for hidden in ((), (4, 0)):
        with pytest.raises(ValueError, match="hidden must name at least one positive width"):
            AutoPerDatumIAFNormal(banana_model, hidden)
    with pytest.raises(ValueError, match="num_transforms must be at least 1; got 0"):
        AutoPerDatumIAFNormal(banana_model, num_transforms=0)
    with pytest.raises(ValueError, match="context_dim must be at least 1; got 0"):
        AutoPerDatumIAFNormal(banana_model, context_dim=0)
    narrow = AutoPerDatumIAFNormal(banana_model, (8, 1))
    for _ in range(2):  # the same refusal again, and not a half-built guide
        with pytest.raises(ValueError, match=r"as wide as the 2 entries.*got \(8, 1\)"):
            narrow(Y)
    for make in FAMILIES.values():
        with pytest.raises(ValueError, match="init_scale must be positive; got 0"):
            make(banana_model, init_scale=0)
        guide = make(discrete_model)
        for _ in range(2):
            with pytest.raises(ValueError, match="needs continuous latents; site 'k' is discrete"):
                guide()


# --- together with the rest -----------------------------------------------------------------


@pytest.mark.usefixtures("coarse_brackets")
@pytest.mark.parametrize(
    ("make_ebm", "loss_class"), [(quadratic_ebm, TraceMeanField_ELBO), (shaped_ebm, Trace_ELBO)]
)
def test_saddle_trains_and_compare_elbo_compares(make_ebm: Any, loss_class: Any) -> None:
    """On latents that are vectors, and on latents of shape (2, 1)."""
    ebm = warm(make_ebm())
    model, x = plate_model(ebm, 4), data_of(ebm, 10)
    guides = {
        "low rank": AutoPerDatumLowRankMultivariateNormal(model),
        "IAF": AutoPerDatumIAFNormal(model, (8,)),
        "amortised": AutoAmortisedMultivariateNormal(model, hidden=(8,)),
    }
    with ebm.frozen():
        for guide in guides.values():
            loss = loss_class(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
            saddle = Saddle(model, guide, ClippedAdam({"lr": 0.05}), loss)
            losses = saddle.fit(x, num_steps=3, progress=False)
            assert all(math.isfinite(value) for value in losses)
    rows = compare_elbo(model, guides, x, num_samples=8).to_dataframe()
    assert set(rows.index) == {*guides, "prior"}
    assert rows.kl_gap.apply(math.isfinite).all() and (rows.kl_gap > -0.5).all()
