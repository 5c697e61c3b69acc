# SPDX-License-Identifier: Apache-2.0
"""Amortised guides of conditional LVEBMs, and masks that only the model knows."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from conditional_models import C_DIM, X_DIM, linear_ebm, model_of
from guide_models import randomise
from missing_data import with_holes
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam, ClippedAdam
from referee import normal
from small_models import data_of, quadratic_ebm, same, snapshot
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    Saddle,
    compare_elbo,
    lvebm,
)
from pyro_lvebm.guides.encoder import AmortisedGuide

BOTH = [AutoAmortisedNormal, AutoAmortisedMultivariateNormal]


# --- contexts -------------------------------------------------------------------------------


def gap(ebm: LVEBM, x: Tensor, c: Tensor, num_steps: int) -> float:
    """Mean KL(q ‖ p(z | x, c)) after SVI of an encoder on minibatches at frozen θ."""
    pyro.clear_param_store()
    model = model_of(ebm, 20)
    guide = AutoAmortisedNormal(model, hidden=(16,))
    loss = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    optim = ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / num_steps), "betas": (0.8, 0.99)})
    with ebm.frozen(), torch.random.fork_rng():
        torch.manual_seed(0)
        svi = SVI(model, guide, optim, loss)
        for _ in range(num_steps):
            svi.step(x, c)
    with torch.no_grad():
        q, exact = guide.encode(x, c), ebm.f.posterior(x, c)
        exact = torch.distributions.Normal(exact.mean, exact.variance.sqrt())
        return float(kl_divergence(q.base_dist, exact).sum(-1).mean())


def test_the_encoder_reaches_the_exact_posterior_given_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """z has one entry, so its KL is 0, up to 1e-2; blind to contexts it is ten times that."""
    ebm, x, c = linear_ebm()
    with torch.no_grad():
        ebm.f.by_context.mul_(3.0)
    assert 0 <= gap(ebm, x, c, 250) < 1e-2
    real = AmortisedGuide._beside

    def blind(self: AmortisedGuide, seen: Tensor, context: Tensor | None) -> Tensor:
        assert context is not None
        return real(self, seen, self.context_loc.expand_as(context))

    monkeypatch.setattr(AmortisedGuide, "_beside", blind)
    assert gap(ebm, x, c, 150) > 0.1


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("rows", ["all", "drawn", "given"])
def test_a_row_is_encoded_with_its_own_context(make: Any, rows: str) -> None:
    ebm, x, c = linear_ebm()
    ids = torch.tensor([3, 8, 20, 31])
    model = model_of(ebm, None if rows == "all" else 4)
    args: tuple[Any, ...] = (x, c)
    if rows == "given":

        def model(x: Tensor, c: Tensor, ids: Tensor) -> None:
            with pyro.plate("data", 40, subsample=ids):
                lvebm("scene", ebm, obs=x, context=c)

        args = (x[ids], c[ids], ids)
    guide = make(model, hidden=(6,))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        guide(*args)
        width = guide.encoder[-1].weight.shape
        with torch.no_grad():
            guide.encoder[-1].weight.copy_(normal(tuple(width), 3))
        for _ in range(2):
            nodes = poutine.trace(guide).get_trace(*args).nodes
            i = ids if rows == "given" else nodes["data"]["value"]
            mean = nodes["scene_z"]["fn"].mean
            assert mean.shape == (40 if rows == "all" else 4, 1)
            torch.testing.assert_close(mean, guide.encode(x[i], c[i]).mean)
            assert not torch.allclose(mean, guide.encode(x[i], c[i].flip(0)).mean)


def test_contexts_are_standardised_by_those_of_the_first_minibatch() -> None:
    ebm, x, c = linear_ebm()
    c = torch.stack([5.0 * c[:, 0] + 30.0, torch.ones(40).double()], -1)  # one entry is constant
    guide = AutoAmortisedNormal(model_of(ebm), hidden=(6,))
    with torch.random.fork_rng():
        guide(x, c)
    torch.testing.assert_close(guide.context_loc, c.mean(0))
    torch.testing.assert_close(
        guide.context_scale, torch.stack([c[:, 0].std(correction=0), c[0, 1]])
    )
    before = guide.context_loc.clone()
    with torch.random.fork_rng():
        guide(x[:5], c[:5])
    assert torch.equal(guide.context_loc, before)


def test_missing_entries_are_drawn_given_the_context() -> None:
    """With a plate of particles around it."""
    ebm, x, c = linear_ebm()
    x = with_holes(x)
    guide = AutoAmortisedMultivariateNormal(model_of(ebm, 10), hidden=(6,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        guide(x, c)
        randomise(guide)
        vectorised = pyro.plate("num_particles_vectorized", 3, dim=-2)(guide)
        nodes = poutine.trace(vectorised).get_trace(x, c).nodes
    i = nodes["data"]["value"]
    entries, law = nodes["scene_missing"]["value"], guide.encode_missing(x[i], c[i])
    assert entries.shape == (3, 10, X_DIM) and guide.completer[0].in_features == 2 * X_DIM + C_DIM
    torch.testing.assert_close(
        nodes["scene_missing"]["fn"].log_prob(entries), law.log_prob(entries)
    )
    other = guide.encode_missing(x[i], c[i].flip(0)).log_prob(entries)
    assert not torch.allclose(other, law.log_prob(entries))
    whole = torch.where(x[i].isnan(), entries, x[i])
    torch.testing.assert_close(nodes["scene_z"]["fn"].mean, guide.encode(whole, c[i]).mean)


def test_the_table_and_a_checkpoint_take_the_guide(tmp_path: Any) -> None:
    ebm, x, c = linear_ebm()
    model = model_of(ebm, 20)
    saddle = Saddle(model, AutoAmortisedNormal(model, hidden=(6,)), Adam({"lr": 1e-2}), seed=4)
    for _ in range(3):
        saddle.step(x, c)
    saddle.save(tmp_path / "saddle")
    expected = [saddle.step(x, c) for _ in range(2)]
    pyro.clear_param_store()
    ebm, x, c = linear_ebm()
    model = model_of(ebm, 20)
    guide = AutoAmortisedNormal(model, hidden=(6,))
    # Other contexts at the first call: those of the file count.
    again = Saddle.load(tmp_path / "saddle", model, guide, Adam({"lr": 1e-2}), x, 2.0 * c + 1.0)
    torch.testing.assert_close(guide.context_loc, saddle.guide.context_loc)
    assert [again.step(x, c) for _ in range(2)] == expected
    table = compare_elbo(model, {"guide": guide}, x, c, num_samples=8)
    assert math.isfinite(table.rows["elbo"].iloc[0])


def test_contexts_that_do_not_fit_are_refused() -> None:
    ebm, x, c = linear_ebm()
    guide = AutoAmortisedNormal(model_of(ebm), hidden=(6,))
    with torch.random.fork_rng():
        guide(x, c)
    with pytest.raises(ValueError, match="this LVEBM is conditional: give context"):
        guide.encode(x)
    with pytest.raises(ValueError, match="expected trailing shape"):
        guide.encode(x, c[:, :1])

    # With the site of the rows hidden the model would take those of another minibatch.
    hidden = poutine.block(model_of(ebm, 10), expose=["scene_z"])
    blind = AutoAmortisedNormal(hidden, hidden=(6,))
    for _ in range(2):
        with torch.random.fork_rng(), pytest.raises(ValueError, match="hides which rows"):
            blind(x, c)
    assert blind.prototype_trace is None


# --- masks ----------------------------------------------------------------------------------


def masked_model(ebm: LVEBM, batch: int | None = None) -> Any:
    def model(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            lvebm("scene", ebm, obs=x[i], observed=seen[i])

    return model


@pytest.mark.parametrize("batch", [None, 4])
def test_a_mask_that_hides_more_than_nan_is_refused(batch: int | None) -> None:
    ebm = quadratic_ebm(4, 2)
    x = with_holes(data_of(ebm, 12), 0.4)
    seen = ~x.isnan()
    hides_more = seen & ~with_holes(torch.zeros_like(x), 0.5, seed=1).isnan()
    assert bool(x.isnan().any(1).sum() > 6) and not torch.equal(seen, hides_more)
    guide = AutoAmortisedNormal(masked_model(ebm, batch), hidden=(5,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(2):  # the same refusal again, and not a half-built guide
            with pytest.raises(ValueError, match="AutoAmortisedNormal sees is not where"):
                guide(x, hides_more)
        assert guide.prototype_trace is None and not hasattr(guide, "encoder")
        guide(x, seen)
        before = snapshot(guide)
        with pytest.raises(ValueError, match=r"entries differ, and an encoder .* observations="):
            guide(x, hides_more)
        assert same(before, snapshot(guide))
        guide(x.masked_fill(~hides_more, math.nan), hides_more)
    shown = AutoAmortisedNormal(
        masked_model(ebm, batch),
        observations=lambda x, seen: x.masked_fill(~seen, math.nan),
        hidden=(5,),
    )
    with torch.random.fork_rng():
        assert set(shown(x, hides_more)) == {"scene_missing", "scene_z"}


def test_a_guide_that_hides_more_than_the_model_is_refused() -> None:
    ebm = quadratic_ebm(4, 2)
    x = with_holes(data_of(ebm, 12), 0.4)
    guide = AutoAmortisedNormal(
        masked_model(ebm), observations=lambda x, _: torch.full_like(x, math.nan), hidden=(5,)
    )
    with torch.random.fork_rng(), pytest.raises(ValueError, match="sees is not where"):
        guide(x, ~x.isnan())
