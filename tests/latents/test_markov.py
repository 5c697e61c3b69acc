# SPDX-License-Identifier: Apache-2.0
"""`pyro.markov` says what may be enumerated apart; particles are the same with and without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.optim import Adam
from referee import normal
from small_models import data_of, quadratic_ebm
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, lvebm
from pyro_lvebm.latents.predictive import posterior_replicates
from pyro_lvebm.latents.program import Program


def series(loop: Callable[..., Any], scope: Callable[[], Any], label: bool) -> Callable[..., None]:
    """An LVEBM at two times, with a hidden series beside it and two readings of each value."""
    ebm = quadratic_ebm(2, 1, dtype=torch.float32)

    def model(x: Tensor) -> None:
        with pyro.plate("series", len(x)):
            h: Any = 0.0
            for t in loop(range(2)):
                _, z = lvebm(f"x{t}", ebm, obs=x)
                h = pyro.sample(f"h{t}", dist.Normal(0.8 * h + 0.5 * z[..., 0], 0.3))
                for j in loop(range(2)):
                    pyro.sample(f"y{t}{j}", dist.Normal(h, 1.0), obs=x[:, j])
            context = scope()
            with context:
                a = pyro.sample("a", dist.Normal(h, 1.0))
            with context:
                b = pyro.sample("b", dist.Normal(a, 1.0))
            if label:
                c = pyro.sample("c", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(b + c, 1.0), obs=x[:, 0])

    return model


def numbers(model: Callable[..., None], x: Tensor, label: bool) -> list[float]:
    pyro.clear_param_store()
    guide = AutoParticles(poutine.block(model, hide=["c"]), 2)
    loss = TraceEnum_ELBO(max_plate_nesting=1) if label else None
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}), loss, num_moves=2)
    draws = saddle.sample_posterior(x, num_samples=2, num_warmup=2)["h1"]
    losses = [saddle.step(x), saddle.step(x)]
    torch.manual_seed(0)
    latents = {"h1": draws.flatten(0, 1)}
    again = posterior_replicates(Program(model, (x,), {}), latents) if label else {}
    return [*losses, *torch.cat([v.flatten() for v in (draws, *again.values())]).tolist()]


@pytest.mark.parametrize(("history", "label"), [(1, False), (2, True)])
def test_particles_do_not_see_markov(history: int, label: bool) -> None:
    x = data_of(quadratic_ebm(2, 1, dtype=torch.float32), 5)
    plain = numbers(series(lambda steps: steps, nullcontext, label), x, label)
    markov = partial(pyro.markov, history=history)
    assert numbers(series(markov, markov, label), x, label) == plain


def test_markov_without_an_lvebm() -> None:
    y = normal((4, 3), 0, torch.float32)

    def model(loop: Callable[..., Any], y: Tensor) -> None:
        with pyro.plate("series", len(y)):
            h: Any = 0.0
            for t in loop(range(3)):
                h = pyro.sample(f"h{t}", dist.Normal(h, 1.0))
                pyro.sample(f"y{t}", dist.Normal(h, 1.0), obs=y[:, t])

    plain = numbers(partial(model, lambda steps: steps), y, False)
    assert numbers(partial(model, pyro.markov), y, False) == plain
