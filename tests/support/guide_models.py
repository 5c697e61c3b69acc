# SPDX-License-Identifier: Apache-2.0
"""Models and referees for guides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from referee import normal
from small_models import exact_posterior, plate_model, quadratic_ebm
from torch import Tensor
from torch.distributions import kl_divergence


def gamma_model(y: Tensor, size: int | None = None) -> None:
    with pyro.plate("data", len(y), subsample_size=size) as i:
        z = pyro.sample("z", dist.Gamma(2.0, 1.5))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y[i])


def trace_of(fn: Callable[..., Any], *args: Any) -> poutine.Trace:
    return poutine.trace(fn).get_trace(*args)


def gaussian_gap(guide: Any, x: Tensor, q_of: Callable[[], Any], ebm: Any, steps: int) -> float:
    """Mean KL(q ‖ p(z | x)) over data after SVI of the guide at frozen θ."""
    model = plate_model(ebm)
    with ebm.frozen():
        loss = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
        optim = ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / steps), "betas": (0.8, 0.99)})
        svi = SVI(model, guide, optim, loss)
        torch.manual_seed(0)
        for _ in range(steps):
            svi.step(x)
    with torch.no_grad():
        return float(kl_divergence(q_of(), exact_posterior(ebm, x)).mean())


def correlated_ebm() -> Any:
    ebm = quadratic_ebm(2, 2, seed=3)
    precision = torch.eye(4).double()
    precision[2:, 2:] = torch.tensor([[1.5, 1.0], [1.0, 1.4]])
    precision[:2, 2:] = torch.tensor([[0.4, -0.3], [0.2, 0.3]])
    precision[2:, :2] = precision[:2, 2:].T.clone()
    ebm.f.set_precision(precision)
    return ebm


def discrete_model() -> None:
    with pyro.plate("data", 3):
        pyro.sample("k", dist.Poisson(2.0))


def randomise(guide: Any, seed: int = 0) -> None:
    """Give the last layers weights, so that outputs depend on the row."""
    with torch.no_grad():
        for network in (guide.encoder, guide.completer):
            network[-1].weight.copy_(0.5 * normal(tuple(network[-1].weight.shape), seed))
            network[-1].bias.copy_(0.5 * normal(tuple(network[-1].bias.shape), seed + 1))
