# SPDX-License-Identifier: Apache-2.0
"""Rows under `poutine.mask`: what nothing holds follows its prior, and the rest its posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import SGD, Adam
from referee import normal
from small_models import data_of, exact_posterior, quadratic_ebm, warm
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, lvebm

SEEN = torch.tensor([True, True, False, True, False, False])


def draws_of(model: Callable[[], Any], site: str, count: int = 60) -> Tensor:
    """(count · 20, *batch, *event) after training steps in which free particles could get lost."""
    saddle = Saddle(model, AutoParticles(model, count), SGD({"lr": 0.0}), num_moves=4)
    for _ in range(2):
        saddle.step()
    return saddle.sample_posterior(num_samples=20, num_warmup=30)[site].flatten(0, 1)


def check_law(draws: Tensor, mean: Tensor, sd: Tensor) -> None:
    """Means and widths within a fifth of the standard deviation."""
    zero = torch.zeros_like(mean)
    torch.testing.assert_close((draws.mean(0) - mean) / sd, zero, atol=0.2, rtol=0)
    torch.testing.assert_close(draws.std(0) / sd, zero + 1.0, atol=0.2, rtol=0)


@pytest.mark.parametrize("mask", [SEEN, False], ids=["some rows", "all"])
def test_hidden_rows_of_an_lvebm_follow_base_z(mask: Any) -> None:
    ebm = warm(quadratic_ebm(2, 1), 2)
    x = data_of(ebm, 6)

    def model() -> None:
        with pyro.plate("data", 6), poutine.mask(mask=mask):
            lvebm("scene", ebm, obs=x)

    posterior = exact_posterior(ebm, x)
    seen = (SEEN & torch.as_tensor(mask))[:, None]
    mean = torch.where(seen, posterior.mean, ebm.base_z.loc)
    sd = torch.where(seen, posterior.variance.sqrt(), ebm.base_z.scale)
    check_law(draws_of(model, "scene_z"), mean, sd)


def test_sites_with_masks_of_their_own_and_a_positive_latent() -> None:
    y = normal((6,), 2)

    def model() -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(6).double(), 0.5).mask(SEEN))
            pyro.sample("y", dist.Normal(z.log(), 0.5).mask(SEEN), obs=y)

    mean = torch.where(SEEN, y / 2, 0.0)
    sd = torch.where(SEEN, 0.5 * 0.5**0.5, 0.5).double()
    check_law(draws_of(model, "z").log(), mean, sd)


def test_a_mask_that_hides_a_prior_alone_hides_it() -> None:
    """As Pyro's models do that put a factor in its place; N(y, 0.5²) is what remains."""
    y = normal((6,), 2)

    def model() -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(torch.zeros(6).double(), 0.1).mask(False))
            pyro.factor("likelihood", dist.Normal(y, 0.5).log_prob(z))

    check_law(draws_of(model, "z"), y, torch.full_like(y, 0.5))


def test_a_prediction_among_the_sites_is_called_one() -> None:
    """Observed in training and not afterwards, so that the guide does not have it."""
    x = normal((4,), 3, torch.float32)

    def model(x: Tensor, y: Tensor | None) -> None:
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.1}))
    saddle.step(x, (x > 0).float())
    with pytest.raises(ValueError, match=r"'y' is not observed.*a prediction.*Predictive") as error:
        saddle.sample_posterior(x, None, num_samples=2)
    assert "enumerate" not in str(error.value)
    hidden = poutine.block(model, hide=["y"])
    assert Saddle(hidden, AutoParticles(hidden, 2), Adam({"lr": 0.1})).step(x, None) > 0.0
