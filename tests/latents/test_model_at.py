# SPDX-License-Identifier: Apache-2.0
"""Models that run for one particle and not for all at once, and those that need one only."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.optim import SGD, Adam
from referee import normal
from small_models import data_of, quadratic_ebm
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, lvebm

X = normal((5, 3), 2, torch.float32)


def decoder(z_dim: int, take: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    """A reading y of the latent, taken out of it in some way."""
    ebm = quadratic_ebm(3, z_dim)
    x = data_of(ebm, 5)

    def model() -> None:
        with pyro.plate("data", 5):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal(take(z), 1.0), obs=x[:, 0])

    return model


@pytest.mark.parametrize(
    ("z_dim", "take", "message"),
    [
        (2, lambda z: z[:, 0], "runs for one particle, and fails for 4 at once.*z\\[\\.\\.\\., 0"),
        (2, lambda z: z.reshape(5, 2).sum(-1), "runs for one particle, and fails for 4 at once"),
        (1, lambda z: z[:, 0], "'y' has another log probability for the first of 4 particles"),
        (2, lambda z: z.sum(1).mean(-1, True), "'y' has another log probability"),
    ],
    ids=["entry", "reshape", "silent entry", "silent sum"],
)
def test_axes_counted_from_the_left_are_named(
    z_dim: int, take: Callable[[Tensor], Tensor], message: str
) -> None:
    model = decoder(z_dim, take)
    saddle = Saddle(model, AutoParticles(model, 4), Adam({"lr": 1e-3}))
    with pytest.raises(ValueError, match=message):
        saddle.step()


def test_what_fails_alone_too_is_raised_as_it_is() -> None:
    model = decoder(2, lambda z: z[..., 7])
    saddle = Saddle(model, AutoParticles(model, 4), Adam({"lr": 1e-3}))
    with pytest.raises(IndexError, match="index 7 is out of bounds"):
        saddle.step()


def linear(x: Tensor, y: Tensor) -> None:
    """A regression whose `linear` takes no particles beside the entries of its weights."""
    w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    mean = torch.nn.functional.linear(x, w).squeeze(-1) + b
    with pyro.plate("data", len(x)):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        assert s.shape == (5,)
        pyro.sample("y", dist.Normal(mean + s, 1.0), obs=y)


def test_one_particle_needs_no_vectorised_model() -> None:
    """Its loss is that of `SVI` at the same point, and its chains follow the posterior."""
    y = X.sum(-1)
    guide = AutoParticles(linear, num_particles=1)
    saddle = Saddle(linear, guide, Adam({"lr": 0.01}))
    loss = saddle.step(X, y)
    point = {name: guide.particles(name)[0] for name in ("w", "b", "s")}
    trace = poutine.trace(poutine.condition(linear, point)).get_trace(X, y)
    assert loss == pytest.approx(-float(trace.log_prob_sum()), rel=1e-5)
    draws = saddle.sample_posterior(X, y, num_samples=3, num_warmup=3)
    assert {name: value.shape for name, value in draws.items()} == {
        "w": (1, 3, 1, 3),
        "b": (1, 3),
        "s": (1, 3, 5),
    }
    four = Saddle(linear, AutoParticles(linear, 4), Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match="runs for one particle, and fails for 4 at once"):
        four.step(X, y)


def test_one_particle_beside_a_gaussian_follows_the_draws_that_the_loss_sees() -> None:
    y = X.sum(-1)
    guide = AutoGuideList(linear)
    guide.append(AutoParticles(poutine.block(linear, hide=["b"]), num_particles=1))
    guide.append(AutoNormal(poutine.block(linear, expose=["b"])))
    saddle = Saddle(linear, guide, SGD({"lr": 0.0}))
    assert torch.isfinite(torch.tensor([saddle.step(X, y), saddle.step(X, y)])).all()
