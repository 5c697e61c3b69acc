# SPDX-License-Identifier: Apache-2.0
"""The batch axes of a block of latents, and log probabilities of sites summed to them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyro_lvebm.enumeration import check_enumerated, sum_out
from pyro_lvebm.tracing import Node


class BlockAxes:
    """The batch axes of a block, and how the log probabilities of sites reduce to them."""

    def __init__(
        self, latent: str, batch_shape: torch.Size, frames: Collection[Any], nesting: int
    ) -> None:
        self.latent, self.nesting, self.batch_shape = latent, nesting, batch_shape
        self.plates = {frame.name for frame in frames}
        self.own = {frame.dim for frame in frames} | {
            axis - len(batch_shape) for axis, size in enumerate(batch_shape) if size > 1
        }

    def lead(self, num_particles: int, batch: torch.Size) -> tuple[int, ...]:
        """Shape (K, 1, …, *B) with as many axes as the vectorised model has."""
        return (num_particles, *(1,) * (self.nesting - len(batch)), *batch)

    def total_log_prob(
        self, nodes: dict[str, Node], v: Tensor, num_particles: int, batch: torch.Size
    ) -> Tensor:
        """Sum log probabilities of the sites inside the plates, (K, *B), without scale.

        Raises:
            ValueError: If the log probability of a site outside the plates depends on v.
        """
        terms = {"": v.new_zeros(())}
        for name, node in nodes.items():
            missing = self.plates - {frame.name for frame in node["cond_indep_stack"]}
            if not missing:
                terms[name] = sum_other_axes(node["log_prob"], self.own, self.nesting)
            elif depends_on(node["log_prob"], v):
                raise ValueError(
                    f"site '{name}' depends on the local latent '{self.latent}' but lies outside "
                    f"its plate {sorted(missing)}, so that the particles of one datum cannot move "
                    "without those of the others. Move the site into the plate"
                )
        check_enumerated(nodes, terms.values(), self.plates, self.latent)
        total = sum_out(terms, nodes, self.nesting + 1)
        return total.expand(self.lead(num_particles, batch)).reshape(num_particles, *batch)


def depends_on(value: Tensor, v: Tensor) -> bool:
    """Return whether a value depends on v, by autograd."""
    if not value.requires_grad or not v.requires_grad:
        return False
    (grad,) = torch.autograd.grad(value.sum(), v, allow_unused=True, retain_graph=True)
    return grad is not None


def sum_other_axes(log_prob: Tensor, own: set[int], nesting: int) -> Tensor:
    """Sum a vectorised log probability over the plate axes (negative) that are not `own`."""
    axes = range(-min(log_prob.dim(), nesting), 0)
    extra = [axis for axis in axes if axis not in own and log_prob.shape[axis] != 1]
    return log_prob.sum(extra, keepdim=True) if extra else log_prob
