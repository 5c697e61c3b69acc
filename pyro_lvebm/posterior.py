# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of all data by running particles on as Markov chains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import Kernel
from pyro_lvebm.local_energy import LatentBlock, latent_blocks
from pyro_lvebm.missing import Completion
from pyro_lvebm.positive import Chain, run_chains
from pyro_lvebm.rng import generator_for
from pyro_lvebm.tracing import (
    Model,
    at_minibatch,
    cover,
    energy_modules,
    frozen,
    plate_nesting,
    vectorise,
)


class PosteriorDraws(NamedTuple):
    """Draws of every latent site, and what the chains did on the way."""

    samples: dict[str, Tensor]  # site -> (num_particles, num_samples, *batch, *event)
    sample_stats: dict[str, Tensor]  # name -> (num_particles, num_samples, *batch)


def draw_posterior(
    model: Model,
    guide: Model,
    particles: AutoParticles,
    kernel: Kernel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_samples: int,
    num_warmup: int,
    thinning: int,
    seed: int,
) -> PosteriorDraws:
    """Run the particles of every datum on, minibatch by minibatch, at frozen θ.

    Raises:
        ValueError: If a count is too small, or a global latent shares a model with subsampling,
            for which no exact chain exists on minibatches.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("num_warmup", num_warmup, 0),
        ("thinning", thinning, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    with torch.no_grad(), poutine.block():
        prototype = poutine.trace(model).get_trace(*args, **kwargs)
    nesting = plate_nesting(prototype)
    samples: dict[str, Tensor] = {}
    stats: dict[str, Tensor] = {}
    with torch.no_grad(), poutine.block(), frozen(energy_modules(prototype)):
        for number, batch in enumerate(cover(prototype)):
            fixed = at_minibatch(guide, batch.nodes)
            vectorised = vectorise(fixed, particles.num_particles, nesting)
            guide_trace = poutine.trace(vectorised).get_trace(*args, **kwargs)
            blocks, _ = latent_blocks(model, particles, guide_trace, nesting, args, kwargs)
            if len(blocks) > 1:
                groups = [[c.name for c in b.columns] for b in blocks]
                raise ValueError(
                    "sample_posterior needs all particle latents in the same plates; this model "
                    f"has them in {len(blocks)} groups: {groups}"
                )
            if blocks[0].is_global:
                names = [c.name for c in blocks[0].columns]
                raise ValueError(
                    f"the latents {names} lie outside a plate that subsamples, so chains on "
                    "minibatches do not follow their posterior. Run the model with the plate at "
                    "its full size, as with subsample_size=len(x)"
                )
            device = blocks[0].v.device
            chain = run_chains(
                blocks[0],
                particles.step_size(blocks[0].columns[0].name),
                kernel,
                num_samples=num_samples,
                num_warmup=num_warmup,
                thinning=thinning,
                generator=generator_for(seed, 3, number, device=device),
            )
            _collect(samples, stats, blocks[0], chain, particles)
    return PosteriorDraws(samples, stats)


def _collect(
    samples: dict[str, Tensor],
    stats: dict[str, Tensor],
    block: LatentBlock,
    chain: Chain,
    particles: AutoParticles,
) -> None:
    """Write the draws of a minibatch into tensors over all data."""
    values = block.constrain(chain.v)
    for column in block.columns:
        name = column.name
        value = values[name]
        if isinstance(column.gaussian, Completion):
            value = column.gaussian.complete(value)  # rather than noise at observed entries
        part = value.transpose(0, 1)  # (K, num_samples, *B, *event)
        if name not in samples:
            full = particles.particles(name).shape
            samples[name] = part.new_empty(part.shape[:2] + full[1:])
        samples[name][(slice(None), slice(None), *particles.index(name, block.indices))] = part
    first = block.columns[0].name
    for key, value in (("energy", chain.energy), ("acceptance_rate", chain.acceptance)):
        part = value.transpose(0, 1)
        if key not in stats:
            batch_dim = value.dim() - 2
            full = particles.particles(first).shape[1 : 1 + batch_dim]
            stats[key] = part.new_empty(part.shape[:2] + full)
        stats[key][(slice(None), slice(None), *particles.index(first, block.indices))] = part
