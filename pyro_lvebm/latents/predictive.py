# SPDX-License-Identifier: Apache-2.0
"""Observed values of a Pyro model, and draws of its observed sites given latents, or of all."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.latents.sweep import FullData, Minibatch, cover
from pyro_lvebm.sites import (
    Model,
    Node,
    all_nodes,
    at_minibatch,
    observed_sites,
    plate_nesting,
    sample_nodes,
    unvectorise,
    vectorise,
    will_be_enumerated,
)

_MAX_DRAWS = 2**15
"""Draws of all data that are made at once; annealing p(x | z) keeps sixteen particles for each."""

Samples = dict[str, Tensor]


def observed_values(
    model: Model, prototype: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Samples:
    """Return the values (*full_batch, *event) of the observed sites of all data.

    Values that latents move, as in `obs=x - shift`, are no data and are left out.
    """
    found, moved = FullData(), set[str]()
    for batch in cover(prototype):
        fixed = at_minibatch(model, batch.nodes)
        traces = [poutine.trace(fixed).get_trace(*args, **kwargs) for _ in range(2)]
        first, second = map(observed_sites, traces)
        for name, node in first.items():
            shape = node["fn"].batch_shape + node["fn"].event_shape
            if not torch.equal(node["value"].nan_to_num(), second[name]["value"].nan_to_num()):
                moved.add(name)
            found.add(batch, node, node["value"].expand(shape))
    return {name: value for name, value in found.joined().items() if name not in moved}


def posterior_replicates(
    model: Model,
    prototype: Trace,
    latents: Samples,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Samples:
    """Draw replicates of the observed sites given draws of the latents.

    Enumerated latents are drawn first, from their law given latents and data.

    Args:
        model: The Pyro model.
        prototype: A trace of it.
        latents: Draws (S, *full_batch, *event) by site.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        Replicates (S, *full_batch, *event) of the observed sites.
    """
    nesting = plate_nesting(prototype)
    num_draws = len(next(iter(latents.values())))
    shown = set(observed_sites(prototype))
    parts = []
    for rows in _chunks(num_draws, prototype):
        few = {name: value[rows] for name, value in latents.items()}
        found = FullData()
        for batch in cover(prototype):
            nodes = dict(batch.nodes) | _nodes_at(few, prototype, batch, nesting)
            count = len(rows)
            if _enumerated(prototype):
                inferred = infer_discrete(
                    at_minibatch(vectorise(model, count, nesting), nodes),
                    first_available_dim=-nesting - 2,
                )
                trace = poutine.trace(inferred).get_trace(*args, **kwargs)
                nodes |= {name: all_nodes(trace)[name] for name in _enumerated(prototype)}
            blank = vectorise(poutine.uncondition(model), count, nesting)
            trace = poutine.trace(at_minibatch(blank, nodes)).get_trace(*args, **kwargs)
            _add_sites(found, batch, trace, shown, prototype, count)
        parts.append(found.joined())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def prior_draws(
    model: Model, prototype: Trace, num_draws: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Samples, Samples]:
    """Draw all sites of a model without its data; the pair of an LVEBM comes from its pool.

    Returns:
        Draws (num_draws, *full_batch, *event) of the latents, and of the observed sites.
    """
    nesting = plate_nesting(prototype)
    sites = sample_nodes(prototype)
    observed = set(observed_sites(prototype))
    latent = {name for name, node in sites.items() if not node["is_observed"]}
    parts = []
    for rows in _chunks(num_draws, prototype):
        found, shared = FullData(), dict[str, Node]()
        for batch in cover(prototype):
            blank = vectorise(poutine.uncondition(model), len(rows), nesting)
            fixed = at_minibatch(blank, shared | batch.nodes)
            trace = poutine.trace(fixed).get_trace(*args, **kwargs)
            _add_sites(found, batch, trace, latent | observed, prototype, len(rows))
            # Latents of all data are the same in every minibatch of a draw.
            shared |= {
                name: node
                for name, node in sample_nodes(trace).items()
                if batch.plate not in {f.name for f in sites[name]["cond_indep_stack"]}
            }
        parts.append(found.joined())
    both = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return (
        {name: value for name, value in both.items() if name in latent},
        {name: value for name, value in both.items() if name in observed},
    )


def _enumerated(trace: Trace) -> list[str]:
    return [name for name, node in sample_nodes(trace).items() if will_be_enumerated(node)]


def _chunks(num_draws: int, prototype: Trace) -> list[range]:
    """Split draws so that not too many rows are drawn at once."""
    rows = max(node["fn"].batch_shape.numel() for node in sample_nodes(prototype).values())
    size = max(1, _MAX_DRAWS // max(1, rows))
    return [range(k, min(k + size, num_draws)) for k in range(0, num_draws, size)]


def _nodes_at(
    latents: Samples, prototype: Trace, batch: Minibatch, nesting: int
) -> dict[str, Node]:
    """Nodes of the latents at draws (S, *full_batch, *event), for the vectorised model."""
    nodes = {}
    for name, value in latents.items():
        node = all_nodes(prototype)[name]
        inside = batch.plate in {frame.name for frame in node["cond_indep_stack"]}
        part = batch.take_rows(value, len(node["fn"].event_shape)) if inside else value
        ones = (1,) * (nesting - len(node["fn"].batch_shape))
        nodes[name] = {**node, "value": part.reshape(len(part), *ones, *part.shape[1:])}
    return nodes


def _add_sites(
    found: FullData,
    batch: Minibatch,
    trace: Trace,
    names: set[str],
    prototype: Trace,
    num_draws: int,
) -> None:
    """Add values (num_draws, *batch, *event) of some sites of a vectorised trace."""
    nodes, nesting = sample_nodes(trace), plate_nesting(prototype)
    for name, site in sample_nodes(prototype).items():
        if name in names:
            value = unvectorise(nodes[name]["value"], site, num_draws, nesting)
            found.add(batch, site, value)
