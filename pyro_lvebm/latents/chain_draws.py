# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of all data by running particles on as Markov chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.bases import Completion
from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents.blocks import BlockAxes, LatentBlock
from pyro_lvebm.latents.chains import ChainSettings, Kept, chain_draws
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.latents.minibatches import Minibatch
from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import FullData
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import Kernel
from pyro_lvebm.sites import GIVEN, Model, sample_nodes


class PosteriorDraws(NamedTuple):
    """Draws of every latent site, and what the chains did on the way."""

    samples: dict[str, Tensor]  # site -> (num_particles, num_samples, *batch, *event)
    sample_stats: dict[str, Tensor]  # name -> (num_particles, num_samples, *batch); without batch
    # where latents lie in different plates: energy of all, mean acceptance rate and step size
    sites: dict[str, str]  # statistic -> a site in its plates
    held: dict[str, Tensor]  # latent of another guide -> (num_particles, *batch, *event)


def draw_posterior(
    program: Program,
    guide: Model,
    particles: AutoParticles,
    kernel: Kernel,
    settings: ChainSettings,
    seed: int,
) -> PosteriorDraws:
    """Run the particles of every datum on, minibatch by minibatch, for a program at rest.

    Latents that other guides hold beside the particles are drawn once for every chain, and stay.

    Raises:
        ValueError: If chains on minibatches are not exact.
    """
    draws, held = PosteriorDraws({}, {}, {}, {}), FullData()
    others = program.latents.keys() - set(particles.prototype_trace.stochastic_nodes)
    traces = program.traces(guide, particles.num_particles)
    for number, (batch, guide_trace) in enumerate(traces):
        held.add_sites(program, others, batch, guide_trace, particles.num_particles)
        blocks, _ = latent_blocks(program, particles, guide_trace)
        _check_exact(blocks, batch)
        steps = [particles.step_size(block.columns[0].name) for block in blocks]
        device = blocks[0].v.device
        generator = generator_for(seed, Stream.POSTERIOR_CHAINS, number, device=device)
        kept = chain_draws(blocks, steps, kernel, settings, generator)
        given = {name for name, node in batch.nodes.items() if GIVEN in node["infer"]}
        targets = [_Target.of(b, particles, given, settings.num_samples) for b in blocks]
        for draw, parts in enumerate(kept):
            for block, part, target in zip(blocks, parts, targets, strict=True):
                _write_values(draws.samples, draw, block, part, target)
            _write_stats(draws, draw, blocks, parts, targets)
    return draws._replace(held=held.joined())


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
    """Where the draws of a minibatch belong in tensors over all data, or those of given rows.

    Each draw is written at once, for a list of all draws would take as much memory again.
    """

    num_samples: int
    full: tuple[int, ...]
    index: tuple[slice | Tensor, ...]

    @classmethod
    def of(
        cls, block: LatentBlock, particles: AutoParticles, given: set[str], num_samples: int
    ) -> _Target:
        if block.rows:
            return cls(num_samples, (), ())  # all rows of its plates move together
        first = block.columns[0].name
        batch_dim = block.v.dim() - 2
        full = list(particles.particles(first).shape[1 : 1 + batch_dim])
        rows = dict(block.indices)
        for frame in particles.prototype_trace.nodes[first]["cond_indep_stack"]:
            if frame.name in given:
                full[frame.dim] = len(rows[frame.name])
                rows[frame.name] = torch.arange(full[frame.dim])
        return cls(num_samples, tuple(full), particles.index(first, rows))

    def write(self, tensors: dict[str, Tensor], name: str, draw: int, value: Tensor) -> None:
        """Write value (K, *B, *event), one draw of a variable."""
        event = value.shape[1 + len(self.full) :]
        if name not in tensors:
            shape = (len(value), self.num_samples, *self.full, *event)
            tensors[name] = value.new_empty(shape)
        tensors[name][(slice(None), draw, *self.index)] = value


def _write_values(
    samples: dict[str, Tensor], draw: int, block: LatentBlock, kept: Kept, target: _Target
) -> None:
    values = block.constrain(kept.v)
    for column in block.columns:
        value = values[column.name]
        if isinstance(column.gaussian, Completion):
            value = column.gaussian.complete(value)  # rather than noise at observed entries
        target.write(samples, column.name, draw, value)


def _write_stats(
    draws: PosteriorDraws,
    draw: int,
    blocks: list[LatentBlock],
    parts: list[Kept],
    targets: list[_Target],
) -> None:
    if len(blocks) == 1 and not blocks[0].rows:
        (kept,), (target,) = parts, targets
        step_size = kept.step_size.expand(kept.energy.shape)
        stats = {
            "energy": kept.energy,
            "acceptance_rate": kept.acceptance,
            "step_size": step_size,
        }
        draws.sites.update(dict.fromkeys(stats, blocks[0].columns[0].name))
    else:
        target = _Target(targets[0].num_samples, (), ())
        stats = {"energy": _joint_energy(blocks, parts)}
        for key, values in (
            ("acceptance_rate", [kept.acceptance for kept in parts]),
            ("step_size", [kept.step_size.expand(kept.energy.shape) for kept in parts]),
        ):
            means = [value.reshape(len(value), -1).mean(-1) for value in values]
            stats[key] = torch.stack(means).mean(0)
    for key, value in stats.items():
        target.write(draws.sample_stats, key, draw, value)


def _joint_energy(blocks: list[LatentBlock], parts: list[Kept]) -> Tensor:
    """Energies (K,) of all data and latents together, where the chains now are."""
    at, name = blocks[0].at, blocks[0].columns[0].name
    whole = BlockAxes(name, torch.Size(), (), at.nesting)
    v = parts[-1].v
    trace = at.trace(len(v))
    trace.compute_log_prob()
    nodes = sample_nodes(trace)
    log_p = whole.total_log_prob(nodes, v, len(v), torch.Size())
    return -log_p / torch.as_tensor(nodes[name]["scale"])
