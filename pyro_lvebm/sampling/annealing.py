# SPDX-License-Identifier: Apache-2.0
"""Annealing from a base to an energy: normalising constants and draws.

A *problem* is a residual energy f over v ∈ R^d. With the base energy U, ½ |v|² of a standard normal
unless another `Base` is given, the path is

    p_β(v) ∝ exp(−U(v) − β f(v)),    β from 0 to 1,    log C = log E_base[exp(−f)].

Many problems run side by side in tensors v (runs, problems, particles, d). With a schedule fixed
beforehand Ĉ is unbiased, so log Ĉ is low in expectation; a pilot run finds the schedule.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.sampling.base import STANDARD_NORMAL, Base
from pyro_lvebm.sampling.langevin import MALA, LangevinState, ValueAndGrad, init_state, select
from pyro_lvebm.sampling.preconditioning import inverse_root
from pyro_lvebm.sampling.weights import ess, log_mean_exp, systematic_resample

_KERNEL = MALA()

_MIN_STEP = 1e-7


class RoughEnergyError(RuntimeError):
    """An energy changes so much that annealing would need more temperatures than allowed."""


class Schedule(NamedTuple):
    """Inverse temperatures, and the MALA moves at each, of an annealing run."""

    betas: Tensor  # (T + 1,), monotone, from 0 to 1 or from 1 to 0
    step_sizes: Tensor  # (T + 1, problems, 1)
    scales: Tensor | None = None  # (T + 1, problems, d, d), of MALA; None is the identity

    def reversed(self) -> Schedule:
        """Return the same temperatures in the opposite order."""
        scales = None if self.scales is None else self.scales.flip(0)
        return Schedule(self.betas.flip(0), self.step_sizes.flip(0), scales)


class Annealed(NamedTuple):
    """Result of an annealing run."""

    log_ratio: Tensor  # (runs, problems), log of an unbiased estimate of C_end / C_start, nats
    log_weights: Tensor  # (runs, problems, particles), nats; equal where the run resampled
    state: LangevinState  # particles (runs, problems, particles, d) at the end
    f_path: Tensor | None = None  # (T + 1, runs, problems, particles), f after the moves at each β


def pilot(
    f: ValueAndGrad,
    v: Tensor,
    *,
    base: Base = STANDARD_NORMAL,
    relative_ess: float = 0.9,
    num_moves: int = 2,
    max_temperatures: int = 400,
    betas: Tensor | None = None,
    precondition: bool = False,
    generator: torch.Generator | None = None,
) -> Schedule:
    """Find temperatures and step sizes by one adaptive run.

    The next β is the largest for which the mean over problems of ESS / n stays at `relative_ess`;
    step sizes follow the acceptance of each problem.

    Args:
        f: Residual energy and gradient on v (runs, problems, n, d).
        v: Draws of the base, (1, problems, n, d).
        base: The base.
        relative_ess: Wanted ESS / n from one temperature to the next, in (0, 1).
        num_moves: MALA steps at each temperature.
        max_temperatures: Give up beyond this many.
        betas: Temperatures to use (T + 1,) from 0 to 1; only step sizes are then adapted.
        precondition: Let the moves at each temperature follow the mean curvature of the energy
            there (`inverse_root`); this needs more particles than dimensions.
        generator: Source of randomness; None means torch's global generator.

    Raises:
        RoughEnergyError: If β = 1 is not reached within `max_temperatures`.
        ValueError: If f is NaN at v.

    Source:
        Jasra et al. (2011), Inference for Lévy-driven stochastic volatility models via adaptive
        sequential Monte Carlo, section 3 (temperatures by ESS).
    """
    state = _checked_init(f, v)
    beta, step = 0.0, torch.full((v.shape[1], 1), 0.3, dtype=v.dtype, device=v.device)
    used, steps, scales = [0.0], [step], [torch.eye(v.shape[-1]).to(v).expand(v.shape[1], -1, -1)]
    given = None if betas is None else betas.tolist()
    while beta < 1.0:
        if len(used) > max_temperatures:
            raise RoughEnergyError(
                f"annealing stopped at β = {beta:.2g} after {max_temperatures} temperatures; the "
                "energy is too rough for this many: lower relative_ess or raise max_temperatures"
            )
        beta_next = given[len(used)] if given else _next_beta(state.f, beta, relative_ess)
        state = _resample(state, -(beta_next - beta) * state.f, generator)
        beta = beta_next
        scale = _scale_of(state, beta, base) if precondition else None
        for _ in range(num_moves):
            state, accepted = _KERNEL.step(
                f,
                state,
                step,
                inverse_temperature=beta,
                base=base,
                scale=scale,
                generator=generator,
            )
            step = _KERNEL.adapt(step, accepted.mean((0, -1))[:, None], rate=0.5)
        used.append(beta)
        steps.append(step)
        scales += [] if scale is None else [scale]
    temperatures = torch.tensor(used, dtype=v.dtype, device=v.device)
    found = torch.stack(scales) if precondition else None
    return Schedule(temperatures, torch.stack(steps), found)


def _scale_of(state: LangevinState, beta: float, base: Base) -> Tensor:
    """Scales (problems, d, d) from the gradients of one run."""
    grad = base.energy_and_grad(state.u[0])[1] + beta * state.grad[0]
    # Behind a wall of infinite energy there is no gradient, and no particle stays there.
    grad = torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)
    n = grad.shape[-2]
    return inverse_root(grad.mT @ grad / n, n)


def anneal(
    f: ValueAndGrad,
    v: Tensor,
    schedule: Schedule,
    *,
    base: Base = STANDARD_NORMAL,
    num_moves: int = 2,
    resample: bool = True,
    independence: bool = False,
    keep_path: bool = False,
    generator: torch.Generator | None = None,
) -> Annealed:
    """Carry particles along a fixed schedule by reweighting, resampling and MALA moves.

    Args:
        f: Residual energy and gradient on v (runs, problems, n, d).
        v: Draws of p_β at the first β of the schedule, (runs, problems, n, d).
        schedule: Temperatures in either direction, and step sizes.
        base: The base.
        num_moves: MALA steps at each temperature.
        resample: True is sequential Monte Carlo; False is annealed importance sampling, whose
            particles stay independent and carry their own weights.
        independence: Make one `independence_step` after the MALA moves at each temperature.
        keep_path: Return f at every temperature, too.
        generator: Source of randomness; None means torch's global generator.

    Returns:
        log of the estimated ratio of normalising constants (end over start) of every run and
        problem, unbiased on the scale of the ratio if v are exact draws.

    Raises:
        ValueError: If f is NaN at v.

    Source:
        Neal (2001), Annealed importance sampling; Del Moral, Doucet and Jasra (2006), Sequential
        Monte Carlo samplers, equation 14.
    """
    state = _checked_init(f, v)
    log_ratio = v.new_zeros(v.shape[:2])
    log_w = v.new_zeros(v.shape[:3])
    betas, path = schedule.betas.tolist(), [state.f]
    for k, (beta, beta_next) in enumerate(itertools.pairwise(betas), start=1):
        log_w = log_w - (beta_next - beta) * state.f
        scale = None if schedule.scales is None else schedule.scales[k]
        if resample:
            log_ratio = log_ratio + log_mean_exp(log_w)
            state = _resample(state, log_w, generator)
            log_w = torch.zeros_like(log_w)
        for _ in range(num_moves):
            state, _ = _KERNEL.step(
                f,
                state,
                schedule.step_sizes[k],
                inverse_temperature=beta_next,
                base=base,
                scale=scale,
                generator=generator,
            )
        if independence:
            state = independence_step(
                f, state, inverse_temperature=beta_next, base=base, generator=generator
            )
        path += [state.f] if keep_path else []
    f_path = torch.stack(path) if keep_path else None
    return Annealed(log_ratio if resample else log_mean_exp(log_w), log_w, state, f_path)


def pick_draws(state: LangevinState, generator: torch.Generator | None) -> Tensor:
    """Return one random particle (runs, problems, d) of every run at its end.

    Systematic resampling leaves particles in the order of their parents, so none of fixed rank
    would be a draw.
    """
    runs, problems, particles, d = state.u.shape
    index = torch.randint(
        particles, (runs, problems, 1, 1), device=state.u.device, generator=generator
    )
    return state.u.gather(2, index.expand(-1, -1, -1, d)).squeeze(2)


def _checked_init(f: ValueAndGrad, v: Tensor) -> LangevinState:
    state = init_state(f, v)
    if torch.isnan(state.f).any():
        raise ValueError("the energy is NaN at the start of annealing; check it and the data")
    return state


def _next_beta(f: Tensor, beta: float, relative_ess: float) -> float:
    """Largest next β whose mean relative ESS is at least the target, to 0.4 % of the step.

    By bisection of the logarithm of the step from 1e-7, which a run takes at least, or it might
    never end.
    """

    def enough(step: float) -> bool:
        mean_ess = ess(-step * f).mean() / f.shape[-1]
        return bool(mean_ess >= relative_ess)

    if enough(1.0 - beta):
        return 1.0
    low, high = _MIN_STEP, 1.0 - beta
    for _ in range(12):
        mid = math.sqrt(low * high)
        low, high = (mid, high) if enough(mid) else (low, mid)
    return min(1.0, beta + low)


def _resample(
    state: LangevinState, log_weights: Tensor, generator: torch.Generator | None
) -> LangevinState:
    index = systematic_resample(log_weights, generator)
    wide = index[..., None].expand_as(state.u)
    return LangevinState(
        state.u.gather(-2, wide), state.f.gather(-1, index), state.grad.gather(-2, wide)
    )


def independence_step(
    f: ValueAndGrad,
    state: LangevinState,
    *,
    inverse_temperature: float | Tensor,
    base: Base = STANDARD_NORMAL,
    generator: torch.Generator | None = None,
) -> LangevinState:
    """Propose a new place for every particle by the base, and accept it by Metropolis' rule.

    The proposal v from the base replaces u with probability min(1, exp(−β (f(v) − f(u)))), which
    leaves p_β(u) ∝ exp(−U(u) − β f(u)) invariant. Langevin moves do not cross between regions that
    the energy separates; at small β this one does, from anywhere to anywhere. Proposals where f is
    NaN are rejected.

    Args:
        f: Residual energy and gradient.
        state: Positions u (*b, d), f and ∇f.
        inverse_temperature: β, a number or a tensor that broadcasts to (*b,).
        base: The base, with U.
        generator: Source of randomness; None means torch's global generator.

    Returns:
        The new state.

    Source:
        Tierney (1994), Markov chains for exploring posterior distributions, section 2.3.3.

    Example:
        >>> import torch
        >>> from pyro_lvebm.sampling import init_state, value_and_grad
        >>> f = value_and_grad(lambda u: 0.5 * (u**2).sum(-1))
        >>> g = torch.Generator().manual_seed(0)
        >>> state = init_state(f, torch.full((4096, 1), 9.0))
        >>> for _ in range(20):
        ...     state = independence_step(f, state, inverse_temperature=1.0, generator=g)
        >>> round(state.u.var().item(), 1)
        0.5
    """
    new = init_state(f, base.draw(tuple(state.u.shape), state.u, generator))
    threshold = torch.empty_like(state.f).exponential_(generator=generator).neg_()
    return select(threshold < inverse_temperature * (state.f - new.f), new, state)
