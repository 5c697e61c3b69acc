# SPDX-License-Identifier: Apache-2.0
"""What is estimated or drawn minibatch by minibatch, put together for all data."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.latents.minibatches import Minibatch
from pyro_lvebm.latents.observed import observed_block
from pyro_lvebm.latents.program import Program
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sites import Model, Node, plates_of, sample_nodes, unvectorise


class FullData:
    """Collects values of sites, minibatch by minibatch, into values of all data."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._axes: dict[str, int] = {}

    def add(
        self, batch: Minibatch, node: Node, value: Tensor, event_dim: int | None = None
    ) -> None:
        """Add a value (*, *batch, *event) of a site in one minibatch.

        Args:
            batch: The minibatch.
            node: The site.
            value: Its value. Outside the plate that subsamples only the first one is kept.
            event_dim: Number of event axes; those of the site if None.
        """
        name = str(node["name"])
        event_dim = len(node["fn"].event_shape) if event_dim is None else event_dim
        parts = self._parts.setdefault(name, [])
        if batch.plate in plates_of(node):
            self._axes[name] = batch.dim - event_dim
            parts.append(batch.drop_repeats(value, event_dim))
        elif not parts:
            parts.append(value)

    def add_sites(
        self, program: Program, names: Collection[str], batch: Minibatch, trace: Trace, count: int
    ) -> None:
        """Add the sites of these names in a trace that was vectorised for `count` draws."""
        for name, node in sample_nodes(trace).items():
            if name in names:
                site = program.sites[name]
                value = unvectorise(node["value"], site, count, program.nesting)
                self.add(batch, site, value)

    def joined(self) -> dict[str, Tensor]:
        """Return values (*, *full_batch, *event) by site."""
        return {
            name: parts[0] if len(parts) == 1 else torch.cat(parts, self._axes[name])
            for name, parts in self._parts.items()
        }


Estimate = Callable[[LatentBlock, torch.Generator], Tensor]
"""Maps the latents of a minibatch to independent log weights (draws, *batch) of every datum."""


@dataclass(frozen=True)
class Sweep:
    """A program, and the seed of what is estimated for each of its data."""

    program: Program
    seed: int

    def over_data(
        self,
        estimate: Estimate,
        stream: Stream,
        particles: AutoParticles | None = None,
        guide: Model | None = None,
    ) -> Tensor:
        """Collect log weights (draws, N) of all data, minibatch by minibatch.

        Args:
            estimate: What to estimate.
            stream: What the random numbers are for.
            particles: Where the latents are; the probe by default.
            guide: The guide that holds the particles, and perhaps more.

        Raises:
            ValueError: If the latents do not all lie in the same plates.
        """
        particles = self.program.probe if particles is None else particles
        guide = particles if guide is None else guide
        traces = self.program.traces(guide, particles.num_particles)
        values: list[Tensor] = []
        for number, (batch, guide_trace) in enumerate(traces):
            if self.program.integrated():
                blocks, _ = latent_blocks(self.program, particles, guide_trace)
            else:
                blocks = [observed_block(self.program, batch.nodes)]
            if len(blocks) != 1 or blocks[0].is_global:
                groups = [[c.name for c in b.columns] for b in blocks]
                raise ValueError(
                    "estimates for every datum need a model whose latents all lie in the same "
                    f"plates; this one has them in the groups {groups}, or outside the subsampled "
                    "plate"
                )
            generator = generator_for(self.seed, stream, number, device=blocks[0].v.device)
            log_weights = batch.drop_repeats(estimate(blocks[0], generator), 0)
            # Latents in no plate belong to all data at once, which are then one datum.
            values.append(log_weights.reshape(len(log_weights), -1))
        return torch.cat(values, 1)
