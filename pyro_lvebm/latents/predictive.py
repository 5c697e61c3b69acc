# SPDX-License-Identifier: Apache-2.0
"""Observed values of a Pyro model, and draws of its observed sites given latents, or of all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import FullData
from pyro_lvebm.sites import all_nodes, at_minibatch, observed_sites, will_be_enumerated

_MAX_DRAWS = 2**15
"""Draws of all data that are made at once; annealing p(x | z) keeps sixteen particles for each."""

Samples = dict[str, Tensor]


def observed_values(program: Program) -> Samples:
    """Return the values (*full_batch, *event) of the observed sites of all data.

    Values that latents move, as in `obs=x - shift`, are no data and are left out.
    """
    found, moved = FullData(), set[str]()
    for batch in program.minibatches():
        fixed = at_minibatch(program.model, batch.nodes)
        first, second = (observed_sites(program.trace(fixed)) for _ in range(2))
        for name, node in first.items():
            shape = node["fn"].batch_shape + node["fn"].event_shape
            if not torch.equal(node["value"].nan_to_num(), second[name]["value"].nan_to_num()):
                moved.add(name)
            found.add(batch, node, node["value"].expand(shape))
    return {name: value for name, value in found.joined().items() if name not in moved}


def posterior_replicates(program: Program, latents: Samples) -> Samples:
    """Draw replicates of the observed sites given draws of the latents.

    Enumerated latents are drawn first, from their law given latents and data.

    Args:
        program: The model and its arguments.
        latents: Draws (S, *full_batch, *event) by site.

    Returns:
        Replicates (S, *full_batch, *event) of the observed sites.
    """
    shown = observed_sites(program.prototype)
    enumerated = [name for name, node in program.sites.items() if will_be_enumerated(node)]

    def draw(rows: range) -> Samples:
        few, count = {name: value[rows] for name, value in latents.items()}, len(rows)
        found = FullData()
        for batch in program.minibatches():
            nodes = program.nodes_at(few, batch)
            if enumerated:
                fixed = program.vectorised(program.model, count, nodes)
                inferred = infer_discrete(fixed, first_available_dim=-program.nesting - 2)
                given = all_nodes(program.trace(inferred))
                nodes |= {name: given[name] for name in enumerated}
            blank = program.vectorised(poutine.uncondition(program.model), count, nodes)
            found.add_sites(program, shown, batch, program.trace(blank), count)
        return found.joined()

    return _in_chunks(program, len(next(iter(latents.values()))), draw)


def prior_draws(program: Program, num_draws: int) -> tuple[Samples, Samples]:
    """Draw all sites of a model without its data; the pair of an LVEBM comes from its pool.

    Returns:
        Draws (num_draws, *full_batch, *event) of the latents, and of the observed sites.
    """
    latent, observed = program.latents, observed_sites(program.prototype)

    def draw(rows: range) -> Samples:
        found = FullData()
        for batch, trace in program.traces(poutine.uncondition(program.model), len(rows)):
            found.add_sites(program, latent | observed, batch, trace, len(rows))
        return found.joined()

    both = _in_chunks(program, num_draws, draw)
    return (
        {name: value for name, value in both.items() if name in latent},
        {name: value for name, value in both.items() if name in observed},
    )


def _in_chunks(program: Program, num_draws: int, draw: Callable[[range], Samples]) -> Samples:
    """Draw so that not too many rows are drawn at once."""
    rows = max(node["fn"].batch_shape.numel() for node in program.sites.values())
    size = max(1, _MAX_DRAWS // max(1, rows))
    chunks = [range(k, min(k + size, num_draws)) for k in range(0, num_draws, size)]
    parts = [draw(chunk) for chunk in chunks]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
