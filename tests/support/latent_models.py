# SPDX-License-Identifier: Apache-2.0
"""Models with latents in several kinds of plates, and the blocks of their particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from referee import normal
from small_models import data_of, plate_model, quadratic_ebm, tiny_pool, warm
from torch import Tensor, nn

from pyro_lvebm import LVEBM, AutoParticles
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.latents.program import Program
from pyro_lvebm.sites.traces import energy_modules, frozen, plate_nesting, vectorise

Model = Callable[..., Any]


def blocks_of(
    model: Model, *args: Tensor, num_particles: int = 3, guide: Any = None, seed: int = 0
) -> tuple[list[LatentBlock], Trace]:
    """The blocks of a model at the particles of one minibatch, as `Saddle` asks for them."""
    torch.manual_seed(seed)
    guide = AutoParticles(model, num_particles) if guide is None else guide
    particles = next(m for m in guide.modules() if isinstance(m, AutoParticles))
    with torch.no_grad(), poutine.block():
        prototype = poutine.trace(model).get_trace(*args)
        nesting = plate_nesting(prototype)
        guide(*args)
        vectorised = vectorise(guide, num_particles, nesting)
        guide_trace = poutine.trace(vectorised).get_trace(*args)
        with frozen(energy_modules(prototype)):
            return latent_blocks(Program(model, args, {}, nesting), particles, guide_trace)


class BentEnergy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.weight * (x.flatten(-2).sum(-1).sin() * z.flatten(-2).tanh().sum(-1))


def bent_ebm(full_z: bool) -> LVEBM:
    """A user's energy on x (2, 2) and z (2, 1), on bases away from the standard normal."""
    scale = torch.tensor([[0.8, 0.0], [0.5, 1.3]]) if full_z else torch.tensor([[0.8], [1.3]])
    base_x = GaussianBase(normal((2, 2), 1), 0.3 * normal((4, 4), 2).tril(-1) + torch.eye(4))
    base_z = GaussianBase(normal((2, 1), 3), scale.double())
    return LVEBM(BentEnergy(), base_x, base_z, pool=tiny_pool())


def mean_model(size: int) -> Model:
    """A global mean of twelve data."""

    def model(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(torch.tensor(0.0).double(), 2.0))
        with pyro.plate("data", 12, subsample_size=size) as i:
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[i])

    return model


def parts(count: int = 3, size: int | None = 4) -> tuple[Any, AutoParticles, Any]:
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 10)
    model = plate_model(ebm, size)
    with torch.random.fork_rng():
        guide = AutoParticles(model, count)
        guide(x)
        (block,), _ = blocks_of(model, x, num_particles=count, guide=guide)
    return block, guide, ebm
