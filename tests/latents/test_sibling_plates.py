# SPDX-License-Identifier: Apache-2.0
"""A latent in one plate that sites outside it read, as varying intercepts: linear, so exact."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from latent_models import blocks_of
from pyro import poutine
from pyro.optim import SGD, Adam
from referee import normal
from small_models import data_of, quadratic_ebm
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, lvebm

GROUP = torch.tensor([0, 0, 1, 2, 2, 2, 1, 0, 2, 2])
Y = normal((10,), 3) + torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)[GROUP]
NOISE = 0.6


def intercepts(y: Tensor, size: int | None = None) -> None:
    """A mean, an intercept of each of three groups, and rows of y in another plate."""
    zero = torch.zeros((), dtype=torch.float64)
    mu = pyro.sample("mu", dist.Normal(zero, 2.0))
    with pyro.plate("groups", 3):
        a = pyro.sample("a", dist.Normal(zero, 1.0))
    with pyro.plate("data", 10, subsample_size=size) as i:
        pyro.sample("y", dist.Normal(mu + a[..., GROUP[i]], NOISE), obs=y[i])


def exact() -> tuple[Tensor, Tensor]:
    """Mean (4,) and covariance (4, 4) of mu and a given y."""
    design = torch.cat([torch.ones(10, 1), torch.eye(3)[GROUP]], 1).double()
    prior = torch.tensor([0.25, 1.0, 1.0, 1.0], dtype=torch.float64).diag()
    covariance = torch.linalg.inv(prior + design.T @ design / NOISE**2)
    return covariance @ design.T @ Y / NOISE**2, covariance


def test_particles_of_a_plate_that_others_read_follow_their_posterior() -> None:
    """Means and widths within a fifth of a standard deviation of the exact ones."""
    saddle = Saddle(intercepts, AutoParticles(intercepts, 60), SGD({"lr": 0.0}))
    draws = saddle.sample_posterior(Y, num_samples=25, num_warmup=30, thinning=1)
    assert draws["a"].shape == (60, 25, 3)
    both = torch.cat([draws["mu"][..., None], draws["a"]], -1).flatten(0, 1)
    mean, covariance = exact()
    sd = covariance.diagonal().sqrt()
    torch.testing.assert_close((both.mean(0) - mean) / sd, torch.zeros_like(mean), atol=0.2, rtol=0)
    torch.testing.assert_close(both.std(0) / sd, torch.ones_like(mean), atol=0.2, rtol=0)
    assert torch.corrcoef(both.T)[0, 1] < -0.5  # as the exact one, −0.75


def test_rows_that_read_may_be_subsampled() -> None:
    saddle = Saddle(intercepts, AutoParticles(intercepts, 8), SGD({"lr": 0.0}), num_moves=8)
    for _ in range(15):
        saddle.step(Y, 5)
    centre = saddle.particles.particles("a") + saddle.particles.particles("mu")[:, None]
    mean, _ = exact()
    assert (centre.mean(0) - mean[1:] - mean[0]).abs().max() < 0.5


def test_latents_of_an_lvebm_that_a_site_outside_reads() -> None:
    """The energy of all rows as one vector is that of the model, and positive latents count."""
    ebm = quadratic_ebm(2, 1)
    x = data_of(ebm, 4)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 4):
            _, z = lvebm("scene", ebm, obs=x)
            s = pyro.sample("s", dist.Gamma(torch.tensor(2.0).double(), 1.0))
        total = (z[..., 0] * s).sum(-1, keepdim=True)
        pyro.sample("total", dist.Normal(total, 0.5), obs=x[:1, 0])

    (block,), _ = blocks_of(model, x, num_particles=3)
    assert block.v.shape == (3, 8) and block.rows == (4,)
    values = block.constrain(block.v)
    base = dist.Normal(0.0, 1.0).log_prob(block.v).sum(-1)
    ours = base - block.f(block.v)[0] - block.log_abs_det(block.v)
    for k in range(3):
        alone = poutine.condition(model, {name: value[k] for name, value in values.items()})
        expected = poutine.trace(alone).get_trace(x).log_prob_sum()
        torch.testing.assert_close(ours[k], expected.detach())
    saddle = Saddle(model, AutoParticles(model, 3), Adam({"lr": 1e-3}), num_moves=2)
    assert math.isfinite(saddle.step(x))
    assert saddle.sample_posterior(x, num_samples=2, num_warmup=2)["scene_z"].shape == (3, 2, 4, 1)
