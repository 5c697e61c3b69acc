# SPDX-License-Identifier: Apache-2.0
"""Minibatches and their rows from a DataLoader, in place of Pyro's own subsampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, make_quadratic
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import SGD, Adam, ClippedAdam
from referee import ALPHA, CERTAIN, mean_p_value, variance_p_value
from small_models import (
    data_of,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
    whitened,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    log_evidence_of,
    lvebm,
    to_arviz,
)
from pyro_lvebm.sites.given_rows import find_rows
from pyro_lvebm.training.fit import endless

PER_DATUM = [
    AutoPerDatumMultivariateNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumIAFNormal,
]
Model = Callable[..., Any]


def loader_model(ebm: LVEBM, size: int, *, ignore_ids: bool = False) -> Model:
    """A model of a minibatch x with rows `ids` of `size`; the broken one takes the first rows."""

    def model(x: Tensor, ids: Tensor) -> None:
        rows = torch.arange(len(ids)) if ignore_ids else ids
        with pyro.plate("data", size, subsample=rows):
            lvebm("scene", ebm, obs=x)

    return model


def plates_of(size: int) -> Callable[..., Any]:
    return lambda x, ids: pyro.plate("data", size, subsample=ids)


def loader(x: Tensor, batch_size: int, seed: int = 0) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    rows = TensorDataset(x, torch.arange(len(x)))
    return DataLoader(rows, batch_size=batch_size, shuffle=True, generator=generator)


def still(rate: float = 0.0) -> SGD:
    """An optimiser without momentum, which moves what has a gradient and nothing else."""
    return SGD({"lr": rate})


def rows_of(guide: Any) -> Tensor:
    """What a guide holds for every datum, (N, ...)."""
    if isinstance(guide, AutoParticles):
        return guide.particles("scene_z").transpose(0, 1).clone()
    parts = [getattr(guide, group) for group in ("locs", "scales", "scale_trils", "cov_factors")
             if hasattr(guide, group)]  # fmt: skip
    values = [part.scene_z.detach() for part in parts]
    return torch.cat([v.flatten(1) for v in values], 1).clone()


def changed_rows(before: Tensor, after: Tensor) -> list[int]:
    return torch.nonzero((before != after).flatten(1).any(1))[:, 0].tolist()


# --- the rows of a step ---------------------------------------------------------------------


def step_moves_its_rows(make: Any, *, ignore_ids: bool = False) -> bool:
    """Whether every step of an epoch, with a smaller last batch, moves its rows and no others."""
    ebm = quadratic_ebm()
    x = data_of(ebm, 14)
    guide = make(loader_model(ebm, 14, ignore_ids=ignore_ids))
    saddle = Saddle(loader_model(ebm, 14, ignore_ids=ignore_ids), guide, still(1e-3))
    batches = list(loader(x, 4))
    assert [len(ids) for _, ids in batches] == [4, 4, 4, 2]
    saddle.prepare(tuple(batches[0]), {})
    right = []
    for x_batch, ids in batches:
        before = rows_of(guide)
        saddle.step(x_batch, ids)
        right.append(changed_rows(before, rows_of(guide)) == sorted(ids.tolist()))
    return all(right)


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("make", [AutoParticles, *PER_DATUM])
def test_a_step_moves_exactly_the_rows_of_its_minibatch(make: Any) -> None:
    assert step_moves_its_rows(make)


@pytest.mark.parametrize("make", [AutoParticles, *PER_DATUM])
def test_the_check_of_rows_fails_where_ids_are_ignored(make: Any) -> None:
    assert not step_moves_its_rows(make, ignore_ids=True)


def test_rows_without_a_visit_keep_their_particles() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 12)
    model = loader_model(ebm, 12)
    guide = AutoParticles(model, 3)
    saddle = Saddle(model, guide, ClippedAdam({"lr": 1e-2}))
    seen = torch.tensor([7, 2, 10, 5])
    saddle.step(x[seen], seen)
    first = rows_of(guide)
    for ids in (seen, seen[:3], seen.flip(0)):
        saddle.step(x[ids], ids)
    never = [i for i in range(12) if i not in seen.tolist()]
    assert torch.equal(first[never], rows_of(guide)[never])
    assert changed_rows(first, rows_of(guide)) == sorted(seen.tolist())


def test_steps_are_those_of_subsampling_with_the_same_rows() -> None:
    """Loss, with its scale N / B, particles and parameters, from the same start."""
    x = data_of(quadratic_ebm(), 20)
    chosen: list[Tensor] = []

    def subsampled(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=6) as i:
            chosen.append(i)
            lvebm("scene", ebm, obs=x[i])

    ebm = quadratic_ebm()
    saddle = Saddle(subsampled, AutoParticles(subsampled, 3), ClippedAdam({"lr": 1e-2}))
    saddle.prepare((x,), {})
    start = snapshot(ebm), snapshot(saddle.guide)
    losses, rows = [], []
    for _ in range(4):
        losses.append(saddle.step(x))
        rows.append(chosen[-1])
    end = snapshot(ebm.f), snapshot(saddle.guide)

    ebm = quadratic_ebm()
    model = loader_model(ebm, 20)
    saddle = Saddle(model, AutoParticles(model, 3), ClippedAdam({"lr": 1e-2}))
    saddle.prepare((x[:6], torch.arange(6)), {})
    ebm.load_state_dict(start[0])
    saddle.guide.load_state_dict(start[1])
    assert [saddle.step(x[i], i) for i in rows] == pytest.approx(losses, rel=1e-9)
    for found, expected in zip((snapshot(ebm.f), snapshot(saddle.guide)), end, strict=True):
        assert all(torch.allclose(found[k], expected[k], rtol=1e-9) for k in expected)


def particles_p_value(*, ignore_ids: bool = False) -> float:
    """p-value of the particles of 160 rows after epochs in shuffled minibatches, at fixed θ."""
    ebm = warm(make_quadratic(pool=tiny_pool()), 3)
    x = draw_x(ebm, 160, 1)
    model = loader_model(ebm, 160, ignore_ids=ignore_ids)
    saddle = Saddle(model, AutoParticles(model, 1), still(), seed=3)
    saddle.fit(num_steps=60, batches=loader(x, 70), progress=False)
    z = saddle.particles.particles("scene_z")
    white = whitened(z, exact_posterior(ebm, x))
    return min(1.0, 2.0 * min(mean_p_value(white, 0.0), variance_p_value(white, 1.0)))


def test_particles_follow_the_posteriors_of_their_own_rows() -> None:
    """Student's and chi-square tests over 160 rows. False alarms: 1e-3."""
    assert particles_p_value() > ALPHA


def test_the_check_of_particles_fails_where_ids_are_ignored() -> None:
    assert particles_p_value(ignore_ids=True) < CERTAIN


# --- training -------------------------------------------------------------------------------


def test_training_from_a_loader_reaches_the_exact_mle() -> None:
    """Within 0.003 nats per datum; the exact MLE of half of the rows is not.

    The energy can leave z aside, so that this needs no right rows; `factor_loss` does.
    """
    generator = torch.Generator().manual_seed(1)
    loading = torch.randn(2, 4, generator=generator)
    x = torch.randn(300, 2, generator=generator) @ loading
    x = x + 0.5 * torch.randn(300, 4, generator=generator)
    standard = [dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (4, 2)]
    energy = QuadraticEnergy(4, 2)
    ebm = LVEBM(energy, *standard, pool=TemperedPool(3, 128, num_moves=5, seed=0))

    def fitted_to(rows: Tensor) -> Tensor:
        law = dist.MultivariateNormal(rows.mean(0), torch.cov(rows.T, correction=0))
        return law.log_prob(x).mean()

    mle = fitted_to(x)
    assert mle - energy.log_evidence(x).mean() > 0.1  # the start is not already there
    assert mle - fitted_to(x[:150]) > 0.003
    model = loader_model(ebm, 300)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 2e-2}), num_moves=1)
    saddle.fit(num_steps=100, batches=loader(x, 128), progress=False)
    assert mle - energy.log_evidence(x).mean().detach() < 0.003


def factor_loss(num_steps: int, *, ignore_ids: bool = False) -> float:
    """Nats per datum below the MLE of factor analysis with known noise, in closed form.

    Source: Tipping and Bishop (1999), Probabilistic principal component analysis, equation 7.
    """
    generator = torch.Generator().manual_seed(0)
    loading = torch.tensor([[1.5, -1.0, 0.5]]).double()
    x = torch.randn(400, 1, generator=generator).double() @ loading
    x = x + 0.5 * torch.randn(400, 3, generator=generator).double()

    def model(x: Tensor, ids: Tensor) -> None:
        w = pyro.param("w", torch.full((3,), 0.1).double())
        rows = torch.arange(len(ids)) if ignore_ids else ids
        with pyro.plate("data", 400, subsample=rows):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, 0.5).to_event(1), obs=x)

    def log_likelihood(w: Tensor) -> float:
        covariance = torch.outer(w, w) + 0.25 * torch.eye(3).double()
        law = dist.MultivariateNormal(torch.zeros(3).double(), covariance)
        return float(law.log_prob(x).mean())

    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    best = log_likelihood((values[-1] - 0.25).sqrt() * vectors[:, -1])
    guide = AutoParticles(model)
    saddle = Saddle(model, guide, ClippedAdam({"lr": 0.03}), num_moves=2)
    saddle.fit(num_steps=num_steps, batches=loader(x, 60), progress=False)
    return best - log_likelihood(pyro.param("w").detach())


def test_a_factor_model_reaches_its_mle() -> None:
    assert factor_loss(200) < 2e-3


def test_the_check_of_the_factor_model_fails_where_ids_are_ignored() -> None:
    """After half of the steps, which take it to 0.1 nats or less with the right rows."""
    assert factor_loss(100, ignore_ids=True) > 0.5


def test_fit_takes_batches_in_turn_and_ends_at_the_averages() -> None:
    x = data_of(quadratic_ebm(), 14)
    losses, ends = [], []
    for fitted in (True, False):
        pyro.clear_param_store()
        ebm = quadratic_ebm()
        model = loader_model(ebm, 14)
        saddle = Saddle(model, AutoParticles(model, 2), ClippedAdam({"lr": 1e-2}))
        batches = loader(x, 4)
        if fitted:
            kept: dict[str, Any] = {"schedule": lambda _: 1.0, "min_kl": 0.0, "progress": False}
            losses.append(saddle.fit(num_steps=6, batches=batches, **kept))
            ends.append(snapshot(ebm.f))
            continue
        epochs = [batch for _ in range(2) for batch in batches]
        losses.append([saddle.step(x_batch, ids) for x_batch, ids in epochs[:6]])
        assert not same(ends[0], snapshot(ebm.f))
        with saddle.averaged():
            ends.append(snapshot(ebm.f))
    assert losses[0] == losses[1] and same(*ends)


@pytest.mark.usefixtures("brief_settling")
def test_fit_stops_on_held_out_rows() -> None:
    """A rate that ruins the model: the parameters of the start come back."""
    ebm = warm(quadratic_ebm())
    x, held_out = data_of(ebm, 12), data_of(ebm, 9, seed=1)
    model = loader_model(ebm, 12)
    saddle = Saddle(model, AutoParticles(model), ClippedAdam({"lr": 1.0}), max_kl=50.0)
    before = snapshot(ebm.f)
    losses = saddle.fit(
        num_steps=8,
        batches=loader(x, 5),
        held_out=(held_out, torch.arange(9)),
        evaluate_every=2,
        patience=1,
        progress=False,
    )
    values = saddle.history["log_evidence"].dropna()
    assert len(losses) == 2 and len(values) == 2 and values.iloc[1] < values.iloc[0]
    assert same(before, snapshot(ebm.f))


@pytest.mark.parametrize(
    ("batches", "args", "message"),
    [
        (lambda b: iter(b), (), "had nothing at pass 2"),
        (lambda b: [], (), "had nothing at pass 1"),
        (lambda b: [x for x, _ in b], (), "must be a tuple or list of arguments"),
        (lambda b: b, (torch.zeros(3),), "got 1 arguments beside batches"),
    ],
)
def test_batches_that_fit_refuses(batches: Any, args: Any, message: str) -> None:
    ebm = quadratic_ebm()
    model = loader_model(ebm, 6)
    saddle = Saddle(model, AutoParticles(model), still())
    items = list(loader(data_of(ebm, 6), 4))
    with pytest.raises(ValueError, match=message):
        saddle.fit(*args, num_steps=3, batches=batches(items), progress=False)


def test_batches_go_on_without_end() -> None:
    stream = endless([(1, 2), [3]])
    assert [next(stream) for _ in range(5)] == [(1, 2), (3,), (1, 2), (3,), (1, 2)]


def test_a_saved_run_goes_on_as_it_would_have(tmp_path: Any) -> None:
    x = data_of(quadratic_ebm(), 14)
    batches = [tuple(batch) for _ in range(2) for batch in loader(x, 4)]

    def build() -> tuple[LVEBM, Any]:
        pyro.clear_param_store()
        ebm = quadratic_ebm()
        model = loader_model(ebm, 14)
        return ebm, (model, AutoParticles(model, 2), ClippedAdam({"lr": 1e-2}))

    ebm, parts = build()
    saddle = Saddle(*parts)
    for batch in batches[:4]:
        saddle.step(*batch)
    saddle.save(tmp_path / "run")
    expected = [saddle.step(*batch) for batch in batches[4:]]
    end = snapshot(saddle.guide), snapshot(ebm)
    ebm, parts = build()
    loaded = Saddle.load(tmp_path / "run", *parts, *batches[3])  # the smaller one
    assert [loaded.step(*batch) for batch in batches[4:]] == expected
    assert same(end[0], snapshot(loaded.guide)) and same(end[1], snapshot(ebm))


# --- refused rows ---------------------------------------------------------------------------

WRONG_ROWS = {
    "out of range": (torch.tensor([1, 20, 3]), r"must lie in 0 … 19; got 1 … 20"),
    "negative": (torch.tensor([-1, 0, 3]), r"must lie in 0 … 19; got -1 … 3"),
    "twice": (torch.tensor([3, 1, 3]), "was given row 3 more than once"),
    "float": (torch.tensor([1.0, 2.0, 3.0]), r"a torch.LongTensor of shape \(B,\); got .*float32"),
    "a mask": (torch.tensor([True, False, True]), "a torch.LongTensor .*; got torch.bool"),
    "two axes": (torch.tensor([[1, 2, 3]]).T, r"got torch.int64 of shape \(3, 1\)"),
    "a list": ([1, 2, 3], "a torch.LongTensor .*; got list"),
    "none": (torch.tensor([], dtype=torch.int64), "was given no rows"),
    "too many": (torch.tensor([1, 2, 3, 4]), "obs of 'scene' has 3 rows on batch axis -1"),
}


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("case", WRONG_ROWS)
@pytest.mark.parametrize(
    ("make", "trained"),
    [
        (AutoParticles, True),
        (AutoParticles, False),
        (AutoPerDatumMultivariateNormal, True),
        (AutoAmortisedNormal, True),
        (lambda model: AutoNormal(model, create_plates=plates_of(20)), False),
    ],
)
def test_wrong_rows_are_refused_and_nothing_changes(make: Any, trained: bool, case: str) -> None:
    ids, message = WRONG_ROWS[case]
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    model = loader_model(ebm, 20)
    saddle = Saddle(model, make(model), ClippedAdam({"lr": 1e-2}))
    good = torch.tensor([4, 17, 0])
    if trained:
        saddle.step(x[good], good)
        saddle.step(x[good], good)
    before = snapshot(saddle.guide), snapshot(ebm)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            saddle.step(x[:3], ids)
    assert saddle.step_count == 2 * trained
    assert same(before[1], snapshot(ebm))
    assert same(before[0], snapshot(saddle.guide))
    assert math.isfinite(saddle.step(x[good], good))


@pytest.mark.parametrize("make", [AutoParticles, AutoPerDatumMultivariateNormal])
def test_all_rows_come_in_the_order_of_the_data(make: Any) -> None:
    """Pyro does not index parameters by the rows of a plate at its full size."""
    ebm = quadratic_ebm()
    x = data_of(ebm, 6)
    model = loader_model(ebm, 6)
    saddle = Saddle(model, make(model), still())
    ids = torch.tensor([3, 1, 0, 5, 4, 2])
    with pytest.raises(ValueError, match="all of its 6 rows in another order"):
        saddle.step(x[ids], ids)
    order = ids.argsort()
    saddle.step(x[ids][order], ids[order])


# --- other guides ---------------------------------------------------------------------------


def test_a_guide_with_rows_of_its_own_is_refused() -> None:
    """Pyro alone would train on, with the parameters of random rows beside the data of others."""
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])
    model = loader_model(ebm, 20)
    saddle = Saddle(model, AutoNormal(model), still())
    before = snapshot(ebm)
    with pytest.raises(ValueError, match=r"create_plates=.*subsample=ids"):
        saddle.step(x[ids], ids)
    assert same(before, snapshot(ebm)) and not list(saddle.guide.parameters())
    wrong = AutoParticles(model, create_plates=lambda x, ids: plates_of(20)(x, ids - 1))
    with pytest.raises(ValueError, match="the guide has taken others"):
        Saddle(model, wrong, still()).step(x[:2], torch.tensor([4, 17]))


def test_pyros_guide_with_create_plates_trains_its_rows() -> None:
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])
    model = loader_model(ebm, 20)
    guide = AutoNormal(model, create_plates=plates_of(20))
    saddle = Saddle(model, guide, still(1e-3))
    saddle.prepare((x[ids], ids), {})
    before = guide.locs.scene_z.detach().clone()
    saddle.step(x[ids], ids)
    assert changed_rows(before, guide.locs.scene_z.detach()) == [0, 4, 17]


@pytest.mark.parametrize("told", [True, False])
def test_particles_beside_another_guide(told: bool) -> None:
    """A list opens the plates of its guides, so that it must know the rows."""
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])

    def model(x: Tensor, ids: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 20, subsample=ids):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal(z[..., 0] * w, 1.0), obs=x[..., 0])

    guide = AutoGuideList(model, create_plates=plates_of(20) if told else None)
    guide.append(AutoParticles(poutine.block(model, hide=["w"])))
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    saddle = Saddle(model, guide, still())
    if not told:
        with pytest.raises(ValueError, match="the AutoGuideList around it, create_plates="):
            saddle.step(x[ids], ids)
        return
    saddle.prepare((x[ids], ids), {})
    before = rows_of(guide[0])
    saddle.step(x[ids[:2]], ids[:2])
    assert changed_rows(before, rows_of(guide[0])) == [4, 17]


@pytest.mark.parametrize("make", PER_DATUM)
def test_svi_and_its_guides_take_the_rows_too(make: Any) -> None:
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])
    model = loader_model(ebm, 20)
    guide = make(model)
    guide(x[ids], ids)
    before = rows_of(guide)
    with ebm.frozen():
        SVI(model, guide, still(1e-3), Trace_ELBO()).step(x[ids[:2]], ids[:2])
    assert changed_rows(before, rows_of(guide)) == [4, 17]


def test_an_encoder_sees_the_rows_of_the_minibatch() -> None:
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])
    guide = AutoAmortisedNormal(loader_model(ebm, 20), hidden=(4,))
    guide(x[ids], ids)
    with torch.no_grad():
        guide.encoder[-1].weight.normal_(generator=torch.Generator().manual_seed(0))
    for part in (ids, ids[:2]):
        with poutine.trace() as seen:
            guide(x[part], part)
        assert torch.equal(seen.trace.nodes["data"]["value"], part)
        fn = seen.trace.nodes["scene_z"]["fn"]
        torch.testing.assert_close(fn.mean, guide.encode(x[part]).mean)


def test_missing_entries_are_those_of_the_rows() -> None:
    ebm = quadratic_ebm()
    x, ids = data_of(ebm, 20), torch.tensor([4, 17, 0])
    x[::2, 0] = math.nan
    model = loader_model(ebm, 20)
    saddle = Saddle(model, AutoParticles(model), still())
    saddle.step(x[ids], ids)
    before = saddle.particles.particles("scene_missing").transpose(0, 1).clone()
    saddle.step(x[ids[:2]], ids[:2])
    after = saddle.particles.particles("scene_missing").transpose(0, 1)
    assert changed_rows(before, after) == [4, 17]


def test_a_look_at_the_rows_ends_where_they_are_known() -> None:
    seen = []

    def model(x: Tensor, ids: Tensor) -> None:
        with pyro.plate("data", 20, subsample=ids):
            seen.append("inside")
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    ids = torch.tensor([4, 17, 0])
    rows = find_rows(model, frozenset({"data"}), (torch.zeros(3), ids), {})
    assert torch.equal(rows["data"], ids) and not seen
    assert find_rows(model, frozenset({"other"}), (torch.zeros(3), ids), {}) == {} and seen


# --- estimates ------------------------------------------------------------------------------


@pytest.mark.usefixtures("brief_settling")
def test_estimates_on_all_data_are_those_without_rows() -> None:
    """The model with `torch.arange(N)` gives the numbers of the model without rows."""
    ebm = warm(make_quadratic(pool=tiny_pool()))
    x, rows = draw_x(ebm, 12, 1), torch.arange(12)
    found = []
    for model, args in ((loader_model(ebm, 12), (x, rows)), (plate_model(ebm), (x,))):
        saddle = Saddle(model, AutoParticles(model, 3), still())
        saddle.prepare(args, {})
        with torch.no_grad():
            start = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(0)).double()
            saddle.particles.particles_scene_z.copy_(start)
        draws = saddle.draw_posterior(*args, num_samples=3, num_warmup=3)
        idata = to_arviz(saddle, *args, num_samples=3, num_warmup=3)
        found.append(
            [
                draws.samples["scene_z"],
                draws.sample_stats["energy"],
                torch.as_tensor(idata.posterior["scene_z"].to_numpy()),
                torch.as_tensor(idata.posterior_predictive["scene"].to_numpy()),
                torch.as_tensor(idata.observed_data["scene"].to_numpy()),
                torch.tensor(saddle.log_evidence(*args)),
            ]
        )
    for given, plain in zip(*found, strict=True):
        torch.testing.assert_close(given, plain)


@pytest.mark.usefixtures("brief_settling", "brief_brackets")
def test_estimates_on_some_rows_are_about_these() -> None:
    """Draws start at the particles of the rows, in their order, and fill no others."""
    # With tiny_pool() log Z online may be off by more than annealing allows, which warns.
    ebm = warm(make_quadratic(pool=TemperedPool(4, 128, num_moves=4)), 20)
    x, ids = draw_x(ebm, 12, 1), torch.tensor([7, 2, 9])
    model = loader_model(ebm, 12)
    saddle = Saddle(model, AutoParticles(model, 3), still())
    saddle.step(x[ids], ids)
    particles = saddle.particles
    particles.step_size("scene_z").fill_(1e-16)
    out = saddle.draw_posterior(x[ids], ids, num_samples=2, num_warmup=0)
    expected = particles.particles("scene_z")[:, None, ids].expand(-1, 2, -1, -1)
    torch.testing.assert_close(out.samples["scene_z"], expected, rtol=0, atol=1e-6)
    assert out.sample_stats["energy"].shape == (3, 2, 3)
    assert out.sample_stats["energy"].isfinite().all()
    idata = to_arviz(saddle, x[ids], ids, num_samples=2, num_warmup=2)
    torch.testing.assert_close(torch.as_tensor(idata.observed_data["scene"].to_numpy()), x[ids])
    exact = ebm.f.log_evidence(x).detach()
    some = log_evidence_of(model, x[ids], ids, num_particles=64)
    error = (some.value - exact[ids]) / (some.std_error + 1e-3)
    assert some.value.shape == (3,) and error.abs().max() < 6.0


def test_the_table_indexes_a_guide_by_its_rows(coarse_brackets: None) -> None:
    """At the exact posteriors the gap is zero for any rows, and not for those of others."""
    ebm = warm(make_quadratic(pool=tiny_pool()))
    x, ids = draw_x(ebm, 12, 1), torch.tensor([7, 2, 9])
    model = loader_model(ebm, 12)
    guide = AutoPerDatumMultivariateNormal(model)
    guide(x, torch.arange(12))
    posterior = ebm.f.posterior(x)
    with torch.no_grad():
        guide.locs.scene_z = posterior.mean
        guide.scale_trils.scene_z = posterior.scale_tril.expand(12, -1, -1).contiguous()
    terms = {}
    for name, rows in (("right", ids), ("wrong", ids + 1)):
        table = compare_elbo(model, {"guide": guide}, x[ids], rows, num_samples=8)
        terms[name] = table.terms["guide"]
    assert terms["right"].shape == (8, 3) and float(terms["right"].std(0).max()) < 1e-6
    assert float(terms["wrong"].std(0).max()) > 1e-2


def test_ids_may_index_the_data_inside_the_model() -> None:
    """The model gets rows only, and a second observed site stands beside the LVEBM's."""
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    y = (x[:, 0] > 0).double()

    def model(ids: Tensor) -> None:
        with pyro.plate("data", 20, subsample=ids) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Bernoulli(logits=z[..., 0]), obs=y[i])

    guide = AutoParticles(model)
    saddle = Saddle(model, guide, still())
    ids = torch.tensor([4, 17, 0])
    saddle.step(ids)
    before = rows_of(guide)
    saddle.step(ids[:2])
    assert changed_rows(before, rows_of(guide)) == [4, 17]
