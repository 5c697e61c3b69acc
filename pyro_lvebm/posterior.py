# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of all data by running particles on as Markov chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.block_axes import BlockAxes
from pyro_lvebm.chains import Chain, run_chains
from pyro_lvebm.given_rows import GIVEN, GivenRows
from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import Kernel
from pyro_lvebm.local_energy import LatentBlock, latent_blocks
from pyro_lvebm.missing import Completion
from pyro_lvebm.rng import generator_for
from pyro_lvebm.tracing import (
    Minibatch,
    Model,
    at_minibatch,
    cover,
    energy_modules,
    frozen,
    plate_nesting,
    sample_nodes,
    vectorise,
)


class PosteriorDraws(NamedTuple):
    """Draws of every latent site, and what the chains did on the way."""

    samples: dict[str, Tensor]  # site -> (num_particles, num_samples, *batch, *event)
    sample_stats: dict[str, Tensor]  # name -> (num_particles, num_samples, *batch); without batch
    # where latents lie in different plates: energy of all, mean acceptance rate


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

    Latents in different plates, such as weights and latents of single data, take turns. Where the
    model is given the rows of its data, these are the data.

    Raises:
        ValueError: If a count is too small; if a latent lies outside a plate that subsamples, or
            latents lie in different plates and one subsamples, as there is no exact chain then.
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
            _check_exact(blocks, batch)
            chains = run_chains(
                blocks,
                [particles.step_size(block.columns[0].name) for block in blocks],
                kernel,
                num_samples=num_samples,
                num_warmup=num_warmup,
                thinning=thinning,
                generator=generator_for(seed, 3, number, device=blocks[0].v.device),
            )
            given = {name for name, node in batch.nodes.items() if GIVEN in node["infer"]}
            for block, chain in zip(blocks, chains, strict=True):
                target = _Target.of(block, particles, given)
                _write_samples(samples, block, chain, target)
                if len(blocks) == 1:
                    target.write(stats, "energy", chain.energy)
                    target.write(stats, "acceptance_rate", chain.acceptance)
            if len(blocks) > 1:
                stats = _joint_stats(blocks, chains)
    return PosteriorDraws(samples, stats)


def _check_exact(blocks: list[LatentBlock], batch: Minibatch) -> None:
    """Refuse blocks whose chains, on minibatches, would not follow their posterior."""
    cure = "Run the model with the plate at its full size, as with subsample_size=len(x)"
    outside = [c.name for block in blocks if block.is_global for c in block.columns]
    if outside:
        raise ValueError(
            f"the latents {outside} lie outside a plate that subsamples, so chains on minibatches "
            f"do not follow their posterior. {cure}"
        )
    if len(blocks) > 1 and batch.plate is not None:
        groups = [[c.name for c in block.columns] for block in blocks]
        raise ValueError(
            f"the latents lie in different plates, {groups}, so their chains take turns on all "
            f"data at once, but '{batch.plate}' subsamples. {cure}"
        )


@dataclass(frozen=True)
class _Target:
    """Where the draws of a minibatch belong in tensors over all data, or those of given rows."""

    full: tuple[int, ...]
    index: tuple[slice | Tensor, ...]

    @classmethod
    def of(cls, block: LatentBlock, particles: AutoParticles, given: set[str]) -> _Target:
        first = block.columns[0].name
        batch_dim = block.v.dim() - 2
        full = list(particles.particles(first).shape[1 : 1 + batch_dim])
        rows = dict(block.indices)
        for frame in particles.prototype_trace.nodes[first]["cond_indep_stack"]:
            if frame.name in given:
                full[frame.dim] = len(rows[frame.name])
                rows[frame.name] = torch.arange(full[frame.dim])
        return cls(tuple(full), particles.index(first, rows))

    def write(self, tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
        part = value.transpose(0, 1)  # (K, num_samples, *B, *event)
        event = part.shape[2 + len(self.full) :]
        if name not in tensors:
            tensors[name] = part.new_empty(*part.shape[:2], *self.full, *event)
        tensors[name][(slice(None), slice(None), *self.index)] = part


def _write_samples(
    samples: dict[str, Tensor], block: LatentBlock, chain: Chain, target: _Target
) -> None:
    """Write the draws of a minibatch into tensors over all data."""
    values = block.constrain(chain.v)
    for column in block.columns:
        value = values[column.name]
        if isinstance(column.gaussian, Completion):
            value = column.gaussian.complete(value)  # rather than noise at observed entries
        target.write(samples, column.name, value)


def _joint_stats(blocks: list[LatentBlock], chains: list[Chain]) -> dict[str, Tensor]:
    """Energies (K, num_samples) of all data and latents together, and mean acceptance rates."""
    at, name = blocks[0].at, blocks[0].columns[0].name
    whole = BlockAxes(name, torch.Size(), (), at.nesting)
    energies = []
    for positions in zip(*(chain.v for chain in chains), strict=True):
        for block, v in zip(blocks, positions, strict=True):
            block.fix(v)
        trace = at.trace(len(v))
        trace.compute_log_prob()
        nodes = sample_nodes(trace)
        log_p = whole.total_log_prob(nodes, v, len(v), torch.Size())
        energies.append(-log_p / nodes[name]["scale"])
    rates = [chain.acceptance.reshape(*chain.acceptance.shape[:2], -1).mean(-1) for chain in chains]
    return {
        "energy": torch.stack(energies, 1),
        "acceptance_rate": torch.stack(rates).mean(0).T,
    }
