# SPDX-License-Identifier: Apache-2.0
"""Latents under a mask: where nothing else holds them, they follow their prior."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_lvebm.latents.blocks import BlockAxes
from pyro_lvebm.sites import Node


def is_masked(node: Node) -> bool:
    """Return whether a site is under a mask, of a handler or of its own."""
    return node["mask"] is not None or isinstance(node["fn"], MaskedDistribution)


def hidden_prior(
    nodes: dict[str, Node], names: Iterable[str], axes: BlockAxes, v: Tensor
) -> Tensor:
    """Return what masks take away from the log prior of latents at v (K, *B, D), (K, *B)."""
    hidden = {}
    for name in names:
        node = nodes[name]
        fn = node["fn"]
        while isinstance(fn, MaskedDistribution):
            fn = fn.base_dist
        whole = fn.log_prob(node["value"]) * node["scale"]
        hidden[name] = {**node, "log_prob": whole - node["log_prob"]}
    return axes.total_log_prob(hidden, v, len(v), v.shape[1:-1])


def free_rows(log_p: Tensor, v: Tensor) -> Tensor:
    """Return which rows (*B) nothing holds: log p (K, *B) does not depend on their v (K, *B, D).

    Without a density such particles would walk away for good. A mask that hides a prior because
    something else stands in its place, as `pyro.factor`, leaves no row free.
    """
    if not log_p.requires_grad:
        return torch.ones(v.shape[1:-1], dtype=torch.bool, device=v.device)
    (grad,) = torch.autograd.grad(log_p.sum(), v, allow_unused=True)
    grad = torch.zeros_like(v) if grad is None else grad
    return (grad == 0.0).all(-1).all(0)
