# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of all data by running particles on as Markov chains."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.guide_draws import held_latents
from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import Kernel
from pyro_lvebm.local_energy import LatentBlock, latent_blocks
from pyro_lvebm.missing import Completion
from pyro_lvebm.positive import Kept, chain_draws
from pyro_lvebm.rng import generator_for
from pyro_lvebm.tracing import (
    FullData,
    Model,
    Node,
    at_minibatch,
    cover,
    energy_modules,
    frozen,
    plate_nesting,
    vectorise,
)


class PosteriorDraws(NamedTuple):
    """Draws of every latent site of the particles, and what the chains did on the way.

    The statistics are `energy`, `acceptance_rate` and `step_size`. Where latents lie in several
    groups of plates, each group has its own, and their names end in `_<first site>`.
    """

    samples: dict[str, Tensor]  # site -> (num_particles, num_samples, *batch, *event)
    sample_stats: dict[str, Tensor]  # name -> (num_particles, num_samples, *batch)
    held: dict[str, Tensor]  # latents of other guides, one value a chain: (num_particles, *batch…)
    sites: dict[str, str]  # statistic -> a site in the same plates


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

    Latents outside the plates and inside them take turns (`chain_draws`). Latents that other
    guides hold beside the particles are drawn once for every chain, and stay.

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
    draws = PosteriorDraws({}, {}, {}, {})
    step_sizes: dict[str, Tensor] = {}
    held, fixed_nodes = FullData(), dict[str, Node]()
    with torch.no_grad(), poutine.block(), frozen(energy_modules(prototype)):
        for number, batch in enumerate(cover(prototype)):
            fixed = at_minibatch(guide, fixed_nodes | batch.nodes)
            vectorised = vectorise(fixed, particles.num_particles, nesting)
            guide_trace = poutine.trace(vectorised).get_trace(*args, **kwargs)
            moving = frozenset(particles.prototype_trace.stochastic_nodes)
            fixed_nodes |= held_latents(
                guide_trace, prototype, batch, held, particles.num_particles, moving
            )
            blocks, _ = latent_blocks(model, particles, guide_trace, nesting, args, kwargs)
            _check_exact(blocks)
            if len(blocks) > 1:
                blocks, _ = latent_blocks(
                    model, particles, guide_trace, nesting, args, kwargs, traced=True
                )
            device = blocks[0].v.device
            kept = chain_draws(
                blocks,
                [particles.step_size(block.columns[0].name) for block in blocks],
                kernel,
                num_samples=num_samples,
                num_warmup=num_warmup,
                thinning=thinning,
                generator=generator_for(seed, 3, number, device=device),
            )
            for draw, parts in enumerate(kept):
                for block, part in zip(blocks, parts, strict=True):
                    suffix = f"_{block.columns[0].name}" if len(blocks) > 1 else ""
                    _collect(draws, step_sizes, num_samples, draw, block, part, particles, suffix)
    lead = (particles.num_particles, num_samples)
    stats = {name: value.expand(*lead, *value.shape) for name, value in step_sizes.items()}
    return draws._replace(sample_stats=draws.sample_stats | stats, held=held.joined())


def _check_exact(blocks: list[LatentBlock]) -> None:
    for block in blocks:
        if block.is_global:
            names = [c.name for c in block.columns]
            raise ValueError(
                f"the latents {names} lie outside a plate that subsamples, so chains on "
                "minibatches do not follow their posterior. Run the model with the plate at "
                "its full size, as with subsample_size=len(x)"
            )


def _collect(
    draws: PosteriorDraws,
    step_sizes: dict[str, Tensor],
    num_samples: int,
    draw: int,
    block: LatentBlock,
    kept: Kept,
    particles: AutoParticles,
    suffix: str,
) -> None:
    """Write one draw of a minibatch into tensors over all data.

    Each draw is written at once, for a list of all draws would take as much memory again.
    """
    values = block.constrain(kept.v)
    for column in block.columns:
        name = column.name
        value = values[name]
        if isinstance(column.gaussian, Completion):
            value = column.gaussian.complete(value)  # rather than noise at observed entries
        full = particles.particles(name).shape
        if name not in draws.samples:
            draws.samples[name] = value.new_empty((full[0], num_samples, *full[1:]))
        draws.samples[name][(slice(None), draw, *particles.index(name, block.indices))] = value
    first = block.columns[0].name
    batch = full[1 : 1 + kept.step_size.dim()]
    rows = particles.index(first, block.indices)
    for key, value in (("energy", kept.energy), ("acceptance_rate", kept.acceptance)):
        if key + suffix not in draws.sample_stats:
            shape = (full[0], num_samples, *batch)
            draws.sample_stats[key + suffix] = value.new_empty(shape)
        draws.sample_stats[key + suffix][(slice(None), draw, *rows)] = value
    sizes = step_sizes.setdefault(f"step_size{suffix}", kept.step_size.new_empty(batch))
    sizes[rows] = kept.step_size
    for key in ("energy", "acceptance_rate", "step_size"):
        draws.sites[key + suffix] = first
