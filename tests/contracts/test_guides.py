# SPDX-License-Identifier: Apache-2.0
"""What every guide promises. A new one gets these tests by a line in `GUIDES`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import discrete_model, trace_of
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD, ClippedAdam
from referee import ALPHA, global_seed, normal
from scipy import stats
from shaped_models import shaped_ebm
from small_models import data_of, quadratic_ebm, same, snapshot, warm
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
    Saddle,
    TemperedPool,
    compare_elbo,
    lvebm,
)
from pyro_lvebm.guides.encoder import AmortisedGuide
from pyro_lvebm.sites.traces import vectorise

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

GUIDES: dict[str, Callable[..., Any]] = {
    "particles": partial(AutoParticles, num_particles=3),
    "one particle": partial(AutoParticles, num_particles=1),
    "per datum": AutoPerDatumMultivariateNormal,
    "per datum, low rank": AutoPerDatumLowRankMultivariateNormal,
    "per datum, rank two": partial(AutoPerDatumLowRankMultivariateNormal, rank=2),
    "per datum, IAF": partial(AutoPerDatumIAFNormal, hidden=(8,), context_dim=3),
    "amortised": partial(AutoAmortisedNormal, hidden=(9,)),
    "amortised, two layers": partial(AutoAmortisedNormal, hidden=(9, 8)),
    "amortised, full": partial(AutoAmortisedMultivariateNormal, hidden=(9,)),
}

every = pytest.mark.parametrize("name", GUIDES)
N, BATCH = 23, 5  # no other axis has 23 entries


def is_encoder(guide: Any) -> bool:
    """Encoders are for the latent of one LVEBM, with any number of rows; others are for these."""
    return isinstance(guide, AmortisedGuide)


def sharp_ebm() -> LVEBM:
    """f = 4 |z + Bx|² / 2 in whitened coordinates: posteriors narrower than the base, and apart."""
    ebm = quadratic_ebm(pool=TemperedPool(3, 48, num_moves=2))
    lines = 2.0 * torch.cat([normal((2, 3), 8), torch.eye(2).double()], 1)
    ebm.f.set_precision(torch.eye(5).double() + lines.T @ lines)
    return ebm


class Recorded:
    """A model of N data that remembers the rows of its last run."""

    def __init__(self, size: int | None = BATCH, constrained: bool = False, shaped: bool = False):
        self.ebm = warm(shaped_ebm() if shaped else sharp_ebm(), 2)
        self.size, self.constrained = size, constrained
        self.x = normal((N, 2), 7) if constrained else data_of(self.ebm, N)
        self.rows = torch.arange(0)

    def __call__(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=self.size) as i:
            self.rows = i
            if not self.constrained:
                lvebm("scene", self.ebm, obs=x[i])
                return
            z = pyro.sample("z", dist.Gamma(torch.tensor([2.0, 4.0]).to(x), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z.log(), 0.5).to_event(1), obs=x[i])


def built(name: str, model: Recorded, seed: int = 0, **options: Any) -> Any:
    """A guide that has seen the model once, with parameters far from the first ones."""
    guide = GUIDES[name](model, **options)
    with global_seed(seed), torch.no_grad():
        guide(model.x)
        for k, p in enumerate(guide.parameters()):
            p.add_(0.1 * normal(tuple(p.shape), 100 * seed + k, p.dtype))
    return guide


def models_for(name: str) -> list[Recorded]:
    """The models that a guide is for: an LVEBM, and a latent with bounds unless it encodes."""
    models = [Recorded()]
    if not is_encoder(GUIDES[name](models[0])):
        models.append(Recorded(constrained=True))
    return models


# --- what it samples ------------------------------------------------------------------------


@every
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("size", [None, BATCH])
def test_samples_have_the_shape_of_the_plate(name: str, size: int | None, shaped: bool) -> None:
    """Alone and under vectorised particles; the latent has shape (2,), or (2, 1)."""
    model = Recorded(size, shaped=shaped)
    guide = built(name, model)
    rows, event = (N if size is None else size,), tuple(model.ebm.z_shape)
    with global_seed(1), torch.no_grad():
        for lead, fn in (((), guide), ((4,), vectorise(guide, 4, 1))):
            trace = trace_of(fn, model.x)
            trace.compute_log_prob()
            node = trace.nodes["scene_z"]
            assert node["value"].shape == (*lead, *rows, *event)
            assert node["log_prob"].isfinite().all()
            assert torch.Size((*lead, *rows)) == torch.broadcast_shapes(
                node["log_prob"].shape, rows
            )
        assert guide(model.x)["scene_z"].shape == (*rows, *event)


@every
def test_rows_are_those_of_the_minibatch(name: str) -> None:
    """The guide and the model are at the same data, by Pyro's replay."""
    model = Recorded()
    guide = built(name, model)
    with global_seed(1):
        trace = trace_of(guide, model.x)
        poutine.replay(model, trace=trace)(model.x)
    assert torch.equal(trace.nodes["data"]["value"], model.rows) and len(model.rows) == BATCH


@every
def test_latents_with_bounds_stay_inside_or_are_refused(name: str) -> None:
    model = Recorded(constrained=True)
    if is_encoder(GUIDES[name](model)):
        for _ in range(2):  # the same refusal again, and not a half-built guide
            with global_seed(0), pytest.raises(ValueError, match="only latents are the z of one"):
                GUIDES[name](model)(model.x)
        return
    guide = built(name, model)
    with global_seed(1), torch.no_grad():
        z = trace_of(vectorise(guide, 50, 1), model.x).nodes["z"]["value"]
    assert z.shape[-2:] == (BATCH, 2) and (z > 0.0).all() and z.isfinite().all()


@every
def test_discrete_latents_are_refused(name: str) -> None:
    guide = GUIDES[name](discrete_model)
    message = "only latents are the z" if is_encoder(guide) else "site 'k' is discrete"
    for _ in range(2):
        with global_seed(0), pytest.raises(ValueError, match=message):
            guide()


@every
def test_other_data_sizes_are_refused_or_encoded(name: str) -> None:
    model = Recorded(None)
    guide = built(name, model)
    with global_seed(1):
        if is_encoder(guide):
            assert guide(model.x[:7])["scene_z"].shape == (7, 2)
        else:
            with pytest.raises(ValueError, match=rf"made for {N} rows .* give the plate 7"):
                guide(model.x[:7])
        assert guide(model.x)["scene_z"].shape == (N, 2)


# --- what fixes it --------------------------------------------------------------------------


def draw(guide: Any, model: Recorded, seed: int) -> Tensor:
    with global_seed(seed), torch.no_grad():
        return guide(model.x)["scene_z"]


@every
def test_the_global_seed_fixes_the_samples(name: str) -> None:
    """A minibatch of other rows, at least, comes with another."""
    model = Recorded()
    guide = built(name, model)
    first, again, other = (draw(guide, model, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def starts(name: str, global_one: int, **options: Any) -> dict[str, Tensor]:
    """What a guide holds after its first call, but for rows of the data."""
    pyro.clear_param_store()  # guides of one class share their names in it
    model = Recorded()
    guide = GUIDES[name](model, **options)
    with global_seed(global_one):
        guide(model.x)
    return {key: t for key, t in snapshot(guide).items() if N not in t.shape}


SEEDED = [name for name in GUIDES if "seed" in inspect.signature(GUIDES[name]).parameters]


@pytest.mark.parametrize("name", SEEDED)
def test_networks_start_by_the_seed_of_the_guide_alone(name: str) -> None:
    """Not by the global one, which only draws first locations."""
    first = starts(name, 0, seed=3)
    assert first and same(first, starts(name, 1, seed=3))
    assert not same(first, starts(name, 0, seed=4))


@every
def test_a_state_dict_restores_it(name: str) -> None:
    model = Recorded()
    guide = built(name, model, seed=1)
    pyro.clear_param_store()
    other = built(name, model, seed=2)
    assert not same(snapshot(guide), snapshot(other))
    other.load_state_dict(guide.state_dict())
    assert same(snapshot(guide), snapshot(other))
    assert torch.equal(draw(guide, model, 1), draw(other, model, 1))


# --- training -------------------------------------------------------------------------------


def changed_rows(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[Tensor]:
    """For each tensor with a row for every datum, which rows have changed."""
    found = []
    for key, old in before.items():
        if N in old.shape:
            axis = old.shape.index(N)
            change = (old != after[key]).movedim(axis, 0)
            found.append(change.reshape(N, -1).any(1))
    return found


def step(guide: Any, model: Recorded) -> None:
    """One step that nothing but the minibatch takes part in: SGD has no momentum."""
    with global_seed(3), model.ebm.frozen():
        Saddle(model, guide, SGD({"lr": 1e-3}), num_moves=4).step(model.x)


@every
@pytest.mark.parametrize("size", [BATCH, None])
def test_a_step_touches_the_rows_of_its_minibatch_only(name: str, size: int | None) -> None:
    """All rows, where nothing is subsampled. An encoder has no rows."""
    for model in models_for(name):
        model.size = size
        pyro.clear_param_store()
        guide = built(name, model)
        before = snapshot(guide)
        step(guide, model)
        assert not same(before, snapshot(guide))
        touched = changed_rows(before, snapshot(guide))
        assert bool(touched) != is_encoder(guide)
        inside = torch.zeros(N, dtype=torch.bool)
        inside[model.rows] = True
        for rows in touched:
            assert not rows[~inside].any() and rows.sum() >= 0.8 * inside.sum()


@every
def test_pyros_elbo_has_a_finite_gradient(name: str) -> None:
    """Vectorised or not, in every parameter that the guide has."""
    for model in models_for(name):
        pyro.clear_param_store()
        guide = built(name, model)
        for elbo in (
            Trace_ELBO(),
            Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1),
        ):
            guide.zero_grad()
            with global_seed(4), model.ebm.frozen():
                assert torch.isfinite(torch.tensor(elbo.loss_and_grads(model, guide, model.x)))
            for key, p in guide.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


def row_losses(guide: Any, model: Recorded, seed: int) -> Tensor:
    """Mean of log q − log p of each datum over 100 draws."""
    with global_seed(seed), torch.no_grad():
        trace = trace_of(vectorise(guide, 100, 1), model.x)
        replayed = poutine.replay(vectorise(model, 100, 1), trace=trace)
        sums = []
        for part in (trace, trace_of(replayed, model.x)):
            part.compute_log_prob()
            terms = [node["log_prob"] for node in part.nodes.values() if "log_prob" in node]
            sums.append(sum(term.expand(100, N) for term in terms))
    return (sums[0] - sums[1]).mean(0)


def improvement_p_value(name: str, num_steps: int) -> float:
    """Wilcoxon's one-sided test over the data, of their losses before training and after it."""
    pyro.clear_param_store()
    model = Recorded(None)
    guide = built(name, model)
    with torch.no_grad():
        for k, p in enumerate(guide.parameters()):
            p.add_(0.7 * normal(tuple(p.shape), k, p.dtype))
    saddle = Saddle(model, guide, ClippedAdam({"lr": 0.1}), num_moves=4)
    before = row_losses(guide, model, 5)
    with global_seed(6), model.ebm.frozen():
        if num_steps:
            saddle.fit(model.x, num_steps=num_steps, progress=False)
    gain = before - row_losses(guide, model, 7)
    if not gain.any():  # a single particle is always drawn
        return 1.0
    return float(stats.wilcoxon(gain.numpy(), alternative="greater").pvalue)


@every
def test_training_improves_the_loss(name: str) -> None:
    """A guide that is not trained does not. False alarms of that: 1e-3 a guide."""
    assert improvement_p_value(name, 40) < ALPHA
    assert improvement_p_value(name, 0) > ALPHA


@every
def test_two_guides_of_one_class_share_all_or_nothing(name: str) -> None:
    """Pyro's store names guides by their class; no part of a guide may silently go untrained."""
    model, optim = Recorded(None), ClippedAdam({"lr": 0.1})

    def trained() -> tuple[Any, set[str]]:
        guide = GUIDES[name](model)
        with global_seed(7), model.ebm.frozen():
            guide(model.x)
            before = {key: p.detach().clone() for key, p in guide.named_parameters()}
            for _ in range(3 if before else 0):
                SVI(model, guide, optim, Trace_ELBO()).step(model.x)
        after = dict(guide.named_parameters())
        return guide, {key for key in before if torch.equal(before[key], after[key])}

    (first, untrained), (second, also_untrained) = trained(), trained()
    assert not untrained and not also_untrained
    assert all(p is q for p, q in zip(first.parameters(), second.parameters(), strict=True))
    if list(first.parameters()):
        with pytest.raises(ValueError, match="share parameters"):
            compare_elbo(model, {"first": first, "second": second}, model.x, num_samples=2)
    pyro.clear_param_store()
    third, untrained = trained()
    assert not untrained and not any(p is q for p in first.parameters() for q in third.parameters())


@every
def test_a_guide_is_a_module_with_the_model_left_out(name: str) -> None:
    """Its parameters are its own, so that an optimiser for it does not train θ."""
    model = Recorded()
    guide = built(name, model)
    assert isinstance(guide, nn.Module)
    theta = {id(p) for p in model.ebm.parameters()}
    assert not theta & {id(p) for p in guide.parameters()}
