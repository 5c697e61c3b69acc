# SPDX-License-Identifier: Apache-2.0
"""Samples of a model and of the Langevin flow towards it, whitened."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.model import LVEBM
from pyro_lvebm.rng import Stream, derive_seed, generator_for
from pyro_lvebm.sampling import ULA, init_state

_REFRESHES_PER_SAMPLE = 4

_DRAW_MOVES = 20


def whitened_draws(ebm: LVEBM, draws: Tensor, size: tuple[int, int, int]) -> np.ndarray:
    """Draws of the model (m, entries of x and z) as whitened samples (*size, d).

    Raises:
        ValueError: If they are too few, or of another shape.
    """
    needed = math.prod(size)
    k = ebm.x_shape.numel()  # on a simplex more than whitened x has
    entries = k + ebm.z_shape.numel()
    if draws.dim() != 2 or draws.shape[1] != entries or len(draws) < needed:
        raise ValueError(
            f"draws has shape {tuple(draws.shape)}; expected (m, {entries}) with m at least "
            f"2 num_replicates num_chains = {needed}"
        )
    x = draws[:needed, :k].reshape(needed, *ebm.x_shape)
    z = draws[:needed, k:].reshape(needed, *ebm.z_shape)
    return to_numpy(ebm.whiten(x, z)).reshape(*size, ebm.dim)


def model_draws(
    ebm: LVEBM, size: tuple[int, int, int], num_refreshes: int, seed: int
) -> np.ndarray:
    """Draw (*size, d) from a copy of the pool, each sample from refreshes of its own."""
    pool = ebm.pool.copy_for(derive_seed(seed, Stream.RATE_POOL, ebm.pool.seed))
    generator = generator_for(seed, Stream.RATE_DRAWS, device=ebm.base_x.loc.device)
    for _ in range(num_refreshes):
        pool.refresh(ebm)
    samples = []
    for _ in range(size[0] * size[1]):
        parts = []
        for _ in range(_REFRESHES_PER_SAMPLE):
            pool.refresh(ebm)
            count = -(-size[2] // _REFRESHES_PER_SAMPLE)
            parts.append(pool.draw(ebm, count, num_moves=_DRAW_MOVES, generator=generator))
        samples.append(torch.cat(parts)[: size[2]])
    return to_numpy(torch.stack(samples)).reshape(*size, ebm.dim)


def langevin_flow(
    ebm: LVEBM,
    size: tuple[int, int, int],
    num_times: int,
    stride: int,
    step_size: float,
    seed: int,
) -> list[np.ndarray]:
    """Positions (*size, d) of chains from the base at each time, `stride` steps apart.

    Raises:
        ValueError: If chains diverge.
    """
    generator = generator_for(seed, Stream.RATE_FLOW, device=ebm.base_x.loc.device)
    kernel = ULA()
    u = ebm.base.draw((*size, ebm.dim), ebm.base_x.loc, generator)
    state, flow = init_state(ebm.residual_and_grad, u), [to_numpy(u)]
    for k in range(1, num_times):
        for _ in range(stride):
            state, _ = kernel.step(
                ebm.residual_and_grad, state, step_size, base=ebm.base, generator=generator
            )
        bad = int((~torch.isfinite(state.u).all(-1)).sum())
        if bad:
            raise ValueError(
                f"{bad} of {math.prod(size)} chains diverged by t = {k * stride * step_size:g}; "
                "lower step_size, or see check_dissipativity"
            )
        flow.append(to_numpy(state.u))
    return flow


def to_numpy(u: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array in double precision."""
    return u.detach().cpu().double().numpy()
