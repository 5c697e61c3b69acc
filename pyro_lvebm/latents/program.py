# SPDX-License-Identifier: Apache-2.0
"""A Pyro model with its arguments: what is in it, and its runs at rest over all data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents.minibatches import Minibatch, cover
from pyro_lvebm.model import LVEBM
from pyro_lvebm.rng import Stream, device_of, isolated_rng
from pyro_lvebm.sites import (
    CheapLatents,
    GivenRows,
    Model,
    Node,
    all_nodes,
    at_minibatch,
    energy_modules,
    frozen,
    plate_nesting,
    plates_of,
    sample_nodes,
    vectorise,
    will_be_enumerated,
)


@dataclass(frozen=True)
class Program:
    """A Pyro model and the arguments of one call.

    What is in it is known from one run of the model, made when it is first asked for, from Pyro's
    random state at that time. Another random state, or another θ, takes another Program.
    """

    model: Model
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    batch_dims: int | None = None  # of model and guide, where known beforehand

    def trace(self, fn: Model) -> Trace:
        """Trace a model or guide at the arguments."""
        return poutine.trace(fn).get_trace(*self.args, **self.kwargs)

    @cached_property
    def prototype(self) -> Trace:
        """A trace of the model; its values are not used, so no latent is annealed for it."""
        with torch.no_grad(), poutine.block(), CheapLatents():
            return self.trace(GivenRows()(self.model))

    @cached_property
    def probe(self) -> AutoParticles:
        """Particles of all continuous latents, for their names; the one particle is not used."""
        probe = AutoParticles(poutine.block(self.model, hide_fn=will_be_enumerated), 1)
        with torch.no_grad(), poutine.block(), CheapLatents():
            probe(*self.args, **self.kwargs)
        return probe

    @cached_property
    def sites(self) -> dict[str, Node]:
        """The sample sites by name, in the run that is kept."""
        return sample_nodes(self.prototype)

    @property
    def latents(self) -> dict[str, Node]:
        """The sites that are not observed."""
        return {name: node for name, node in self.sites.items() if not node["is_observed"]}

    def integrated(self) -> set[str]:
        """Names of the latents that an evidence integrates over: all but enumerated ones."""
        return {name for name, node in self.latents.items() if not will_be_enumerated(node)}

    def check_particles(self, particles: AutoParticles) -> list[str]:
        """Return the sites of particles that hold all latents.

        Raises:
            ValueError: If there are no particles yet, or latents are held by another guide.
        """
        if particles.prototype_trace is None:
            raise ValueError("this Saddle has not taken a step, so it has no particles yet; fit it")
        names = [name for name, _ in particles.prototype_trace.iter_stochastic_nodes()]
        others = self.integrated() - set(names)
        if others:
            raise ValueError(
                f"the latents {sorted(others)} are not particles of this Saddle; an estimate from "
                "its particles needs all latents of the model to be particles"
            )
        return names

    @cached_property
    def ebms(self) -> list[LVEBM]:
        """The distinct LVEBMs, in order."""
        return energy_modules(self.prototype)

    @cached_property
    def nesting(self) -> int:
        """Number of batch dimensions."""
        return plate_nesting(self.prototype) if self.batch_dims is None else self.batch_dims

    @property
    def device(self) -> torch.device:
        """That of the first tensor among the arguments."""
        return device_of(self.args, self.kwargs)

    @contextmanager
    def quiet(
        self, seed: int, stream: Stream, *counters: int, device: torch.device | None = None
    ) -> Iterator[None]:
        """Draw from a stream of its own inside the block, unseen by handlers around, without grad.

        Args:
            seed: With stream and counters, fixes Pyro's draws.
            stream: What they are for.
            counters: Which of several such draws.
            device: Where draws are made, if not where the arguments are.
        """
        noise = isolated_rng(seed, stream, *counters, device=device or self.device)
        with noise, poutine.block(), torch.no_grad():
            yield

    @contextmanager
    def at_rest(
        self, seed: int, stream: Stream, *counters: int, device: torch.device | None = None
    ) -> Iterator[None]:
        """As `quiet`, with θ of all LVEBMs held fixed."""
        with self.quiet(seed, stream, *counters, device=device), frozen(self.ebms):
            yield

    def vectorised(self, fn: Model, num_particles: int, nodes: dict[str, Node]) -> Model:
        """Run a model or guide under a particle plate, with some sites fixed to given nodes."""
        return at_minibatch(vectorise(fn, num_particles, self.nesting), nodes)

    def minibatches(self) -> Iterator[Minibatch]:
        """Go through all data, or those whose rows the model is given; see `cover`."""
        return cover(self.prototype)

    def traces(self, fn: Model, num_particles: int) -> Iterator[tuple[Minibatch, Trace]]:
        """Trace a model or guide under a particle plate for all data, minibatch by minibatch.

        Sites outside the plate that subsamples have the values of the first minibatch in all, so
        that what is drawn together is one draw of the joint law.
        """
        shared: dict[str, Node] = {}
        for batch in self.minibatches():
            trace = self.trace(self.vectorised(fn, num_particles, shared | batch.nodes))
            shared |= {
                name: node
                for name, node in sample_nodes(trace).items()
                if name in self.sites and batch.plate not in plates_of(self.sites[name])
            }
            yield batch, trace

    def nodes_at(self, values: dict[str, Tensor], batch: Minibatch) -> dict[str, Node]:
        """Nodes of a minibatch, vectorised, at draws (S, *full_batch, *event) by site."""
        nodes = dict(batch.nodes)
        for name, value in values.items():
            node = all_nodes(self.prototype)[name]
            if batch.plate in plates_of(node):
                value = batch.take_rows(value, len(node["fn"].event_shape))
            ones = (1,) * (self.nesting - len(node["fn"].batch_shape))
            wide = value.reshape(len(value), *ones, *value.shape[1:])
            nodes[name] = {**node, "value": value[0] if len(value) == 1 else wide}
        return nodes
