# SPDX-License-Identifier: Apache-2.0
"""A Metropolis move whose proposals are fresh draws of the base."""

from __future__ import annotations

import torch

from pyro_lvebm.langevin import LangevinState, ValueAndGrad, init_state


def independence_step(
    f: ValueAndGrad,
    state: LangevinState,
    *,
    inverse_temperature: float,
    generator: torch.Generator | None = None,
) -> LangevinState:
    """Propose a new place for every particle by the base, and accept it by Metropolis' rule.

    The proposal v ~ N(0, I) replaces u with probability min(1, exp(−β (f(v) − f(u)))), which leaves
    p_β(u) ∝ exp(−½ |u|² − β f(u)) invariant. Langevin moves do not cross between regions that
    the energy separates; at small β this one does, from anywhere to anywhere. Proposals where f is
    NaN are rejected.

    Args:
        f: Residual energy and gradient.
        state: Positions u (*b, d), f and ∇f.
        inverse_temperature: β.
        generator: Source of randomness; None means torch's global generator.

    Returns:
        The new state.

    Source:
        Tierney (1994), Markov chains for exploring posterior distributions, section 2.3.3.

    Example:
        >>> import torch
        >>> from pyro_lvebm.langevin import init_state, value_and_grad
        >>> f = value_and_grad(lambda u: 0.5 * (u**2).sum(-1))
        >>> g = torch.Generator().manual_seed(0)
        >>> state = init_state(f, torch.full((4096, 1), 9.0))
        >>> for _ in range(20):
        ...     state = independence_step(f, state, inverse_temperature=1.0, generator=g)
        >>> round(state.u.var().item(), 1)
        0.5
    """
    new = init_state(f, torch.empty_like(state.u).normal_(generator=generator))
    threshold = torch.empty_like(state.f).exponential_(generator=generator).neg_()
    accept = threshold < inverse_temperature * (state.f - new.f)
    return LangevinState(
        torch.where(accept[..., None], new.u, state.u),
        torch.where(accept, new.f, state.f),
        torch.where(accept[..., None], new.grad, state.grad),
    )
