# SPDX-License-Identifier: Apache-2.0
"""First draws of latent sites with plates at their full size, from a trace of one minibatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_lvebm.distributions import LatentSite


def draw_full_size(site: dict[str, Any], sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw a latent site of a trace, (*sample_shape, *full_batch_shape, *event_shape).

    The trace knows the laws of one minibatch only. Those of a subsampled plate are repeated along
    it, as in Pyro's own autoguides; the draws are independent.

    Args:
        site: A sample site inside vectorised plates.
        sample_shape: Shape of further draws.
    """
    fn = site["fn"]
    batch, full = list(fn.batch_shape), list(fn.batch_shape)
    for frame in site["cond_indep_stack"]:
        full[frame.dim] = frame.full_size or frame.size
    if isinstance(fn, LatentSite) and fn.context is not None:
        # Draws at a context cost a run of annealing each, and a first draw need not be exact.
        fn = fn.ebm.base_z.distribution().expand(batch)
    if full == batch or isinstance(fn, LatentSite):  # a LatentSite has the same law everywhere
        draws: Tensor = fn.expand(torch.Size(full)).sample(torch.Size(sample_shape))
        return draws
    repeats = [-(-n // b) for n, b in zip(full, batch, strict=True)]
    draws = fn.sample(torch.Size((*sample_shape, *repeats)))
    lead, depth = len(sample_shape), len(batch)
    paired = [axis for i in range(lead, lead + depth) for axis in (i, i + depth)]
    draws = draws.permute(*range(lead), *paired, *range(lead + 2 * depth, draws.dim()))
    tiled = [r * b for r, b in zip(repeats, batch, strict=True)]
    draws = draws.reshape(*sample_shape, *tiled, *fn.event_shape)
    for axis, n in enumerate(full, start=lead):
        draws = draws.narrow(axis, 0, n)
    return draws.contiguous()
