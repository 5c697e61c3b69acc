# SPDX-License-Identifier: Apache-2.0
"""The loop over all data of a Pyro model, in minibatches of its own size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sites import (
    GIVEN,
    CheapLatents,
    GivenRows,
    Model,
    Node,
    at_minibatch,
    plate_nesting,
    sample_nodes,
    subsample_nodes,
    vectorise,
    will_be_enumerated,
)


@dataclass(frozen=True)
class Minibatch:
    """One choice of data, of the size that the model's own minibatches have."""

    nodes: dict[str, Node]  # for `at_minibatch`
    plate: str | None  # the plate that subsamples, if one does
    dim: int  # its batch dimension, negative
    rows: Tensor  # data indices
    num_new: int  # as many at the front are in no earlier minibatch

    def take_rows(self, value: Tensor, event_dim: int) -> Tensor:
        """Return the rows of this minibatch of a value (*, *full_batch, *event)."""
        if self.plate is None:
            return value
        return value.index_select(self.dim - event_dim, self.rows)

    def drop_repeats(self, value: Tensor, event_dim: int) -> Tensor:
        """Return a value (*, *batch, *event) without rows that an earlier minibatch had."""
        if self.plate is None:
            return value
        return value.narrow(self.dim - event_dim, 0, self.num_new)


def cover(trace: Trace) -> Iterator[Minibatch]:
    """Yield minibatches that together visit every datum; the last may repeat data of the first.

    Without subsampling there is one, of all data; where the model is given its rows, as in
    `pyro.plate(..., subsample=ids)`, there is one, of these.

    Args:
        trace: A trace of the model, under `GivenRows`, for its plates.

    Raises:
        ValueError: If more than one plate subsamples.
    """
    choices = subsample_nodes(trace)
    free = {name: node for name, node in choices.items() if GIVEN not in node["infer"]}
    small = {k: n for k, n in free.items() if len(n["value"]) < n["fn"].size}
    if len(small) > 1:
        raise ValueError(
            f"plates {sorted(small)} all subsample; going through all data needs at most one "
            "subsampled plate. Give the others their full size"
        )
    if not small:
        yield Minibatch(dict(choices), None, 0, torch.empty(0), 0)
        return
    ((name, node),) = small.items()
    size, batch = node["fn"].size, len(node["value"])
    frames = [f for n in sample_nodes(trace).values() for f in n["cond_indep_stack"]]
    dim = next(f.dim for f in frames if f.name == name)
    for start in range(0, size, batch):
        index = torch.arange(start, start + batch, device=node["value"].device) % size
        nodes = {**choices, name: {**node, "value": index}}
        yield Minibatch(nodes, name, dim, index, min(batch, size - start))


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
        if batch.plate in {frame.name for frame in node["cond_indep_stack"]}:
            self._axes[name] = batch.dim - event_dim
            parts.append(batch.drop_repeats(value, event_dim))
        elif not parts:
            parts.append(value)

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
    """A model and its arguments, to go through all data in minibatches of the model's own size."""

    model: Model
    prototype: Trace
    probe: AutoParticles  # names the latents; its one particle is not used
    seed: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Model, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sweep:
        """Run the model once, and name its latents."""
        with CheapLatents():
            prototype = poutine.trace(GivenRows()(model)).get_trace(*args, **kwargs)
            probe = AutoParticles(poutine.block(model, hide_fn=will_be_enumerated), 1)
            probe(*args, **kwargs)
        return cls(model, prototype, probe, seed, args, kwargs)

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
        particles = self.probe if particles is None else particles
        guide = particles if guide is None else guide
        nesting = plate_nesting(self.prototype)
        values: list[Tensor] = []
        for number, batch in enumerate(cover(self.prototype)):
            fixed = at_minibatch(guide, batch.nodes)
            vectorised = vectorise(fixed, particles.num_particles, nesting)
            guide_trace = poutine.trace(vectorised).get_trace(*self.args, **self.kwargs)
            blocks, _ = latent_blocks(
                self.model, particles, guide_trace, nesting, self.args, self.kwargs
            )
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
