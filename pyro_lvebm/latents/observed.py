# SPDX-License-Identifier: Apache-2.0
"""The block of a model without latents, whose evidence is its density."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.latents.blocks import BlockAxes, LatentBlock
from pyro_lvebm.latents.model_at import ModelAt
from pyro_lvebm.latents.program import Program
from pyro_lvebm.sites import Node, sample_nodes, subsample_nodes


def observed_block(program: Program, nodes: dict[str, Node]) -> LatentBlock:
    """Return a block without columns at a minibatch, with log p of every datum as its offset.

    Args:
        program: The model, which observes all its sites.
        nodes: Fix the minibatch.

    Raises:
        ValueError: If the model has no sites.
    """
    at = ModelAt(program, nodes, 1)
    with torch.no_grad():
        trace = at.trace(1)
        trace.compute_log_prob()
    sites, choices = sample_nodes(trace), subsample_nodes(trace)
    if not sites:
        raise ValueError("the model has no sample sites, so there is nothing to estimate")
    first = next(iter(sites.values()))
    batch, frames = first["fn"].batch_shape, first["cond_indep_stack"]
    v = first["log_prob"].new_zeros(1, *batch, 0)
    axes = BlockAxes(first["name"], batch, frames, at.nesting)
    offset = axes.total_log_prob(sites, v, 1, batch) / first["scale"]
    indices = {frame.name: choices[frame.name]["value"] for frame in frames}
    return LatentBlock([], indices, v, _zero, offset, False, at)


def _zero(v: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_zeros(v.shape[:-1]), torch.zeros_like(v)
