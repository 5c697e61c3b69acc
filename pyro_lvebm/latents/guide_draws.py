# SPDX-License-Identifier: Apache-2.0
"""Draws of latents from Pyro guides, for all data of a model."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.guides import check_guide, own_parameters
from pyro_lvebm.latents.sweep import FullData, Minibatch, cover
from pyro_lvebm.sites import (
    Model,
    Node,
    all_nodes,
    at_minibatch,
    plate_nesting,
    sample_nodes,
    unvectorise,
    vectorise,
)


def draw_guide(
    model: Model,
    guide: Model,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_samples: int,
) -> dict[str, Tensor]:
    """Draw the latents of all data from a guide with parameters, minibatch by minibatch.

    Latents outside a plate that subsamples are drawn once, and shared by all minibatches, so that
    every draw is one of the joint law of the guide.

    Args:
        model: The Pyro model.
        guide: A guide for its latents.
        args: Arguments of model and guide.
        kwargs: Keyword arguments of model and guide.
        num_samples: Independent draws.

    Returns:
        For each latent of the model that the guide has, (num_samples, *batch_shape, *event_shape),
        from Pyro's present random state.

    Raises:
        ValueError: If num_samples < 1, the guide has no latent of the model, or it shares its
            parameters between minibatches.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1; got {num_samples}")
    prototype = poutine.trace(model).get_trace(*args, **kwargs)
    check_guide(guide, prototype)
    nesting = plate_nesting(prototype)
    found, fixed = FullData(), dict[str, Node]()
    for batch in cover(prototype):
        vectorised = vectorise(at_minibatch(guide, fixed | batch.nodes), num_samples, nesting)
        with own_parameters(guide):
            trace = poutine.trace(vectorised).get_trace(*args, **kwargs)
        fixed |= held_latents(trace, prototype, batch, found, num_samples)
    draws = found.joined()
    if not draws:
        raise ValueError("the guide has no site for any latent of the model")
    return draws


def held_latents(
    trace: Trace,
    prototype: Trace,
    batch: Minibatch,
    found: FullData,
    num_draws: int,
    without: frozenset[str] = frozenset(),
) -> dict[str, Node]:
    """Collect the latents of a model from a trace of its vectorised guide in one minibatch.

    Args:
        trace: Trace of the guide under `vectorise`.
        prototype: Trace of the model.
        batch: The minibatch.
        found: Gets values (num_draws, *batch, *event).
        num_draws: Size of the particle plate.
        without: Sites to leave out.

    Returns:
        The nodes of latents that belong to no minibatch, to keep in the next ones.
    """
    shared = {}
    nesting = plate_nesting(prototype)
    latents = {n: d for n, d in sample_nodes(prototype).items() if not d["is_observed"]}
    for name, node in sample_nodes(trace).items():
        if name not in latents or name in without:
            continue
        site = latents[name]
        found.add(batch, site, unvectorise(node["value"], site, num_draws, nesting))
        if batch.plate not in {frame.name for frame in site["cond_indep_stack"]}:
            shared[name] = all_nodes(trace)[name]
    return shared if batch.plate is not None else {}
