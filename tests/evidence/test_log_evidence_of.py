# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, initialise, make_model, make_quadratic
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import Adam
from referee import ALPHA, bracket
from scipy import stats
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, TemperedPool, log_evidence_of
from pyro_lvebm.evidence import programs as model_evidence
from pyro_lvebm.evidence.log_partition import total

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def two_latents(sd: float, y: Tensor) -> None:
    """y = a + b + noise with a, b ~ N(0, 1), so y ~ N(0, 2 + sd²)."""
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, sd), obs=y)


def exact(sd: float, y: Tensor) -> Tensor:
    return dist.Normal(0.0, math.sqrt(2.0 + sd**2)).log_prob(y)


def p_value(found: Tensor, error: Tensor, expected: Tensor) -> float:
    z = (found - expected) / error
    return float(2 * stats.norm.sf(abs(float(z.mean())) * math.sqrt(len(z))))


@pytest.mark.parametrize("sd", [1.0, 0.3])
def test_a_model_without_an_lvebm(sd: float) -> None:
    """Against the closed form, false alarm ALPHA; a hundredth of a nat off fails by far."""
    y = torch.randn(300, generator=torch.Generator().manual_seed(0))
    found = log_evidence_of(partial(two_latents, sd), y)
    assert p_value(found.value, found.std_error, exact(sd, y)) > ALPHA
    assert p_value(found.value + 0.03, found.std_error, exact(sd, y)) < ALPHA
    assert (found.log_partition.estimate, found.log_partition.std_error) == (0.0, 0.0)


def test_particles_are_a_better_start_for_sharp_posteriors() -> None:
    """From particles the values are right, false alarm ALPHA, and their errors are smaller."""
    sd, y = 0.05, torch.randn(30, generator=torch.Generator().manual_seed(0))
    model = partial(two_latents, sd)
    guide = AutoParticles(model, 2)
    initialise(guide, y)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}), num_moves=50)
    with torch.random.fork_rng():
        for _ in range(8):
            saddle.step(y)
    near, far = (log_evidence_of(model, y, saddle=s, num_particles=32) for s in (saddle, None))
    assert p_value(near.value, near.std_error, exact(sd, y)) > ALPHA
    assert near.std_error.mean() < 0.75 * far.std_error.mean()
    with pytest.raises(ValueError, match="no AutoParticles"):
        log_evidence_of(model, y, saddle=Saddle(model, AutoNormal(model), Adam({"lr": 1e-3})))


def test_an_lvebm_in_a_minibatch_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All data are visited once, in order, with the bracket's log Z and not the pool's."""
    ebm = make_quadratic(pool=TemperedPool(4, 16, seed=0))
    x = draw_x(ebm, 70, seed=1)
    log_z = float(ebm.f.log_partition().detach())
    ebm.pool.log_partition = ebm.pool.log_partition + 0.7
    monkeypatch.setattr(
        model_evidence, "log_partition", lambda *_, **__: bracket(log_z, 0.0, log_z, log_z + 0.2)
    )
    found = log_evidence_of(make_model(ebm, 32), x)
    expected = ebm.f.log_evidence(x).detach()
    assert p_value(found.value, found.std_error, expected) > ALPHA
    torch.testing.assert_close(found.lower, found.value - 0.2)


def test_the_error_of_log_z_is_part_of_that_of_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    ebm = make_quadratic(pool=TemperedPool(4, 16, seed=0))
    x = draw_x(ebm, 6, seed=1)
    errors = []
    for error in (0.0, 0.3):
        known = bracket(0.0, error)
        monkeypatch.setattr(model_evidence, "log_partition", lambda *_, known=known, **__: known)
        errors.append(log_evidence_of(make_model(ebm), x, num_particles=16).std_error)
    torch.testing.assert_close(errors[1], torch.hypot(errors[0], torch.full_like(errors[0], 0.3)))


def test_brackets_of_several_add_up() -> None:
    a, b = bracket(1.0, 0.3, 0.5, 2.0), bracket(2.0, 0.4, 1.0, 2.5)
    both = total([a, b])
    assert (both.estimate, both.lower, both.upper) == (3.0, 1.5, 4.5)
    assert both.std_error == pytest.approx(0.5) and total([a]) is a


def test_a_bracket_that_counts_twice_is_twice_as_wide() -> None:
    """The two are one estimate, so that its errors do not add up as those of two do."""
    twice = bracket(1.0, 0.3, 0.5, 2.0).times(2)
    assert (twice.estimate, twice.std_error, twice.lower, twice.upper) == (2.0, 0.6, 1.0, 4.0)
    assert (twice.forward, twice.reverse, twice.reverse_limit) == (1.0, 4.0, 4.0)


def test_numbers_out_of_range() -> None:
    y = torch.zeros(3)
    for name in ("num_particles", "num_runs"):
        with pytest.raises(ValueError, match=f"{name} must be at least 2; got 1"):
            log_evidence_of(partial(two_latents, 1.0), y, **{name: 1})


def test_a_saddle_whose_particles_are_not_all_latents_is_refused() -> None:
    model, y = partial(two_latents, 1.0), torch.zeros(4)
    guide = AutoGuideList(model)
    guide.append(AutoParticles(poutine.block(model, expose=["a"]), 2))
    guide.append(AutoNormal(poutine.block(model, expose=["b"])))
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}))
    with pytest.raises(ValueError, match="has not taken a step, so it has no particles yet"):
        log_evidence_of(model, y, saddle=saddle)
    saddle.step(y)
    with pytest.raises(ValueError, match=r"the latents \['b'\] are not particles of this Saddle"):
        log_evidence_of(model, y, saddle=saddle)
