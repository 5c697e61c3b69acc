# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of all data by running particles on as Markov chains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.given_rows import GIVEN, GivenRows
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

    Where the model is given the rows of its data, these are the data.

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
        prototype = poutine.trace(GivenRows()(model)).get_trace(*args, **kwargs)
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
            given = {name for name, node in batch.nodes.items() if GIVEN in node["infer"]}
            _collect(samples, stats, blocks[0], chain, particles, given)
    return PosteriorDraws(samples, stats)


def _collect(
    samples: dict[str, Tensor],
    stats: dict[str, Tensor],
    block: LatentBlock,
    chain: Chain,
    particles: AutoParticles,
    given: set[str],
) -> None:
    """Write the draws of a minibatch into tensors over all data, or over those of given rows."""
    first = block.columns[0].name
    batch_dim = chain.energy.dim() - 2
    full = list(particles.particles(first).shape[1 : 1 + batch_dim])
    rows = dict(block.indices)
    for frame in particles.prototype_trace.nodes[first]["cond_indep_stack"]:
        if frame.name in given:
            full[frame.dim] = len(rows[frame.name])
            rows[frame.name] = torch.arange(full[frame.dim])
    index = (slice(None), slice(None), *particles.index(first, rows))

    def write(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
        part = value.transpose(0, 1)  # (K, num_samples, *B, *event)
        if name not in tensors:
            tensors[name] = part.new_empty(*part.shape[:2], *full, *part.shape[2 + batch_dim :])
        tensors[name][index] = part

    values = block.constrain(chain.v)
    for column in block.columns:
        value = values[column.name]
        if isinstance(column.gaussian, Completion):
            value = column.gaussian.complete(value)  # rather than noise at observed entries
        write(samples, column.name, value)
    write(stats, "energy", chain.energy)
    write(stats, "acceptance_rate", chain.acceptance)
