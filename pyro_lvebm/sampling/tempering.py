# SPDX-License-Identifier: Apache-2.0
"""Moves of chains on a ladder of temperatures, as pure functions of their state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.sampling.base import STANDARD_NORMAL, Base
from pyro_lvebm.sampling.langevin import MALA, LangevinState, ValueAndGrad, check_finite

SNAPSHOT_STRIDE = 2
"""Moves from one snapshot of the chains to the next."""

_FORGETTING = 0.05
"""Weight of the newest chains in the running mean of ∇E ∇Eᵀ."""


class Tempered(NamedTuple):
    """Chains after the moves of one refresh, and what the moves were like."""

    state: LangevinState  # u (L, n, d)
    snapshots: list[LangevinState]  # after every second move, the last one too
    acceptance: Tensor  # (L − 1, 1), mean over the moves, of the levels above the base
    swap_rate: Tensor  # (L − 1,), mean over the moves


def temper(
    f: ValueAndGrad,
    state: LangevinState,
    betas: Tensor,
    step_size: Tensor,
    scale: Tensor,
    *,
    kernel: MALA,
    num_moves: int,
    generator: torch.Generator,
    base: Base = STANDARD_NORMAL,
) -> Tempered:
    """Move chains at all temperatures: draws at level 0, MALA above it, exchange of neighbours.

    Args:
        f: Residual energy.
        state: Chains u (L, n, d) with f and ∇f.
        betas: Inverse temperatures (L,), from 0 to 1.
        step_size: η (L − 1, 1) of the levels above the base.
        scale: Scale of their moves (L − 1, d, d).
        kernel: The MALA kernel.
        num_moves: Number of moves.
        generator: Source of randomness.
        base: The base.

    Raises:
        ValueError: If f or ∇f is NaN or infinite at a chain after the moves.
    """
    swap_rate = torch.zeros_like(betas[1:])
    acceptance = torch.zeros_like(step_size)
    snapshots = []
    for move in range(num_moves):
        state, accepted = move_levels(
            f, state, betas, step_size, scale, kernel=kernel, generator=generator, base=base
        )
        acceptance += accepted.mean(-1, keepdim=True) / num_moves
        state, swapped = exchange(state, betas, generator)
        swap_rate += swapped / num_moves
        if (num_moves - 1 - move) % SNAPSHOT_STRIDE == 0:
            snapshots.append(state)
    check_finite(state.f, state.grad)
    return Tempered(state, snapshots, acceptance, swap_rate)


def move_levels(
    f: ValueAndGrad,
    state: LangevinState,
    betas: Tensor,
    step_size: Tensor,
    scale: Tensor,
    *,
    kernel: MALA,
    generator: torch.Generator,
    base: Base = STANDARD_NORMAL,
) -> tuple[LangevinState, Tensor]:
    """Draw level 0 afresh and move all others once; arguments as in `temper`.

    Returns:
        The new state, and the acceptance probability (L − 1, n) of the levels above the base.
    """
    fresh = base.draw(tuple(state.u[:1].shape), state.u, generator)
    at_fresh: list[Tensor] = []

    def of_proposals(v: Tensor) -> tuple[Tensor, Tensor]:
        # One call for level 0 and all proposals: on small chains the calls are what takes time.
        value, grad = f(torch.cat([fresh, v]))
        at_fresh[:] = [value[:1], grad[:1]]
        return value[1:], grad[1:]

    moved, accepted = kernel.step(
        of_proposals,
        LangevinState(*(part[1:] for part in state)),
        step_size,
        inverse_temperature=betas[1:, None],
        base=base,
        scale=scale,
        generator=generator,
    )
    parts = zip((fresh, *at_fresh), moved, strict=True)
    return LangevinState(*map(torch.cat, parts)), accepted


def running_fisher(
    fisher: Tensor, state: LangevinState, betas: Tensor, base: Base = STANDARD_NORMAL
) -> Tensor:
    """Return the running mean (L − 1, d, d) of ∇E ∇Eᵀ with that of the present chains in it.

    Args:
        fisher: The mean so far.
        state: Chains u (L, n, d) with ∇f.
        betas: Inverse temperatures (L,).
        base: The base.
    """
    grad = base.energy_and_grad(state.u[1:])[1] + betas[1:, None, None] * state.grad[1:]
    return torch.lerp(fisher, grad.mT @ grad / grad.shape[1], _FORGETTING)


def num_gradients(num_chains: int) -> int:
    """Return how many gradients a running mean over refreshes of so many chains holds."""
    return round(num_chains / _FORGETTING)


def adapt_ladder(betas: Tensor, swap_rate: Tensor, rate: float = 0.05) -> Tensor:
    """Widen the gaps that are easily crossed and narrow the others, β_0 = 0 and β_L = 1 fixed.

        β_{l+1} − β_l ∝ (β_{l+1} − β_l) exp(rate (s_l − mean s))

    At rest all neighbours exchange equally often.

    Args:
        betas: Inverse temperatures (L,).
        swap_rate: s, acceptance (L − 1,) of the exchange of each pair; NaN before the first.
        rate: How fast gaps change at each call.

    Source:
        Miasojedow, Moulines and Vihola (2013), An adaptive parallel tempering algorithm, section 3,
        with equal rates in place of a given one.
    """
    s = torch.nan_to_num(swap_rate, nan=0.0)
    gaps = betas.diff() * torch.exp(rate * (s - s.mean()))
    inner = (gaps.cumsum(0) / gaps.sum())[:-1]
    return torch.cat([betas[:1], inner, betas[-1:]])


def exchange(
    state: LangevinState, betas: Tensor, generator: torch.Generator | None = None
) -> tuple[LangevinState, Tensor]:
    """Exchange chains between neighbouring temperatures, even pairs first, then odd pairs.

    Args:
        state: Chains u (L, n, d) with f and ∇f.
        betas: Inverse temperatures (L,).
        generator: Source of randomness; None means torch's global generator.

    Returns:
        The new state, and the mean acceptance probability (L − 1,) of each pair.
    """
    f = state.f.clone()
    level = torch.arange(len(betas), device=f.device)[:, None].repeat(1, f.shape[1])
    gaps, rate = betas.diff(), torch.zeros_like(betas[1:])
    for start in range(min(2, len(gaps))):
        low, high = slice(start, -1, 2), slice(start + 1, None, 2)
        log_alpha = gaps[start::2, None] * (f[high] - f[low])
        accept = torch.empty_like(log_alpha).exponential_(generator=generator).neg_() < log_alpha
        rate[start::2] = log_alpha.clamp(max=0.0).exp().mean(-1)
        for part in (f, level):
            a, b = part[low], part[high]
            part[low], part[high] = torch.where(accept, b, a), torch.where(accept, a, b)
    column = torch.arange(f.shape[1], device=f.device)
    return LangevinState(state.u[level, column], f, state.grad[level, column]), rate
