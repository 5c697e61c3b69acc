# SPDX-License-Identifier: Apache-2.0
"""Minibatches of a model's own size that together hold all of its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.sites import GIVEN, Node, sample_nodes, subsample_nodes


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
