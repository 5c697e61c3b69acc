# SPDX-License-Identifier: Apache-2.0
"""The log partition function of an LVEBM, as a bracket."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from pyro_lvebm.annealing import (
    anneal,
    log_mean_exp,
    log_mean_std_error,
    pilot,
    standard_normal,
)
from pyro_lvebm.langevin import MALA, init_state
from pyro_lvebm.model import LVEBM
from pyro_lvebm.pool import Pool
from pyro_lvebm.rng import generator_for
from pyro_lvebm.tempered_pool import TemperedPool
from pyro_lvebm.validation import TrainingWarning

CONFIDENCE = 0.975
"""One-sided confidence level of each end of a bracket."""

_REJUVENATION_MOVES = 20
_REFRESHES_PER_RUN = 8


@dataclass(frozen=True)
class LogPartition:
    """An estimate of log Z with a bracket, in nats."""

    estimate: float
    std_error: float
    lower: float
    upper: float
    num_temperatures: int

    def __str__(self) -> str:
        return (
            f"log Z = {self.estimate:.4f} ± {self.std_error:.4f} "
            f"in [{self.lower:.4f}, {self.upper:.4f}]"
        )


def log_partition(
    ebm: LVEBM,
    *,
    seed: int = 0,
    num_particles: int = 1024,
    num_runs: int = 16,
    num_moves: int = 4,
    relative_ess: float = 0.95,
    num_refreshes: int = 50,
) -> LogPartition:
    """Bracket log Z by annealing from the base (from below) and from model draws (from above).

    A pilot run finds temperatures and step sizes. With these fixed, `num_runs` independent
    sequential Monte Carlo runs from exact base draws give unbiased Ẑ_r, and as many runs from
    model draws back to the base give unbiased estimates of 1/Z if the draws are exact. Then

        estimate = log mean_r Ẑ_r
        lower    = log mean_r Ẑ_r − t s                as E[log mean Ẑ] ≤ log Z
        upper    = −log mean_r (1/Ẑ_r^reverse) + t s'  as its mean is ≥ log Z for exact draws

    with s and s' the standard errors of these logarithms of means, and t the 97.5 % quantile of
    Student's distribution for R − 1 degrees of freedom, so that each end allows for its own Monte
    Carlo error. Where noise puts the upper end below the
    estimate, the estimate takes its place. The upper end is a bound only as far as the
    draws follow the model: they come from a copy of the pool, refreshed `num_refreshes` times and
    then on between the runs. A pool and base that both miss a mode give a narrow bracket around a
    wrong value.

    Args:
        ebm: The LVEBM; unchanged.
        seed: Fixes every random number.
        num_particles: Particles of each run.
        num_runs: R, independent runs in each direction, at least 2.
        num_moves: MALA steps at each temperature.
        relative_ess: Wanted ESS / n between temperatures in the pilot run, in (0, 1).
        num_refreshes: Refreshes of the copied pool before model draws are taken.

    Returns:
        The bracket, in nats.

    Raises:
        ValueError: If a number is out of range, or the energy is NaN.
        RuntimeError: If the energy is too rough for the pilot run.

    Source:
        Neal (2001), Annealed importance sampling; Del Moral, Doucet and Jasra (2006); Burda,
        Grosse and Salakhutdinov (2015), arXiv 1412.8566 (the reverse direction); docs/maths.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, log_partition
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> energy = QuadraticEnergy(2, 1)
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.set_precision(torch.diag(torch.tensor([2.0, 1.0, 0.5])))
        >>> log_z = log_partition(ebm, seed=0)
        >>> log_z.lower < energy.log_partition().item() < log_z.upper
        True
    """
    check_range(num_particles, num_runs, num_moves, relative_ess)
    like = ebm.base_x.loc
    generator = generator_for(seed, 10, device=like.device)
    f = ebm.residual_and_grad
    pool = copy.deepcopy(ebm.pool)
    with ebm.frozen():
        start = standard_normal((1, 1, 2 * num_particles, ebm.dim), like, generator)
        schedule = pilot(
            f, start, relative_ess=relative_ess, num_moves=num_moves, generator=generator
        )
        shape = (num_runs, 1, num_particles, ebm.dim)
        start = standard_normal(shape, like, generator)
        forward = anneal(f, start, schedule, num_moves=num_moves, generator=generator)
        for _ in range(num_refreshes):
            pool.refresh(ebm)
        draws = _model_draws(ebm, pool, num_runs, num_particles, generator)
        reverse = anneal(f, draws, schedule.reversed(), num_moves=num_moves, generator=generator)
    low, high = forward.log_ratio[:, 0].double(), reverse.log_ratio[:, 0].double()
    t = float(stats.t.ppf(CONFIDENCE, num_runs - 1))
    estimate, std_error = float(log_mean_exp(low, 0)), float(log_mean_std_error(low, 0))
    upper = -float(log_mean_exp(high, 0)) + t * float(log_mean_std_error(high, 0))
    result = LogPartition(
        estimate=estimate,
        std_error=std_error,
        lower=estimate - t * std_error,
        upper=max(estimate, upper),
        num_temperatures=len(schedule.betas) - 1,
    )
    _compare_online(ebm, result)
    return result


def _compare_online(ebm: LVEBM, annealed: LogPartition) -> None:
    """Warn where the pool's own log Z, if it belongs to the present θ, contradicts annealing."""
    if not ebm.pool_is_fresh():
        return
    pool, online = ebm.pool, float(ebm.log_partition)
    online_error = float(pool.log_partition_std_error) if isinstance(pool, TemperedPool) else 0.0
    error = math.hypot(annealed.std_error, online_error)
    if abs(online - annealed.estimate) > 3.0 * error:
        warnings.warn(
            f"log Z online is {online:.3f}, annealed {annealed.estimate:.3f} ± {error:.3f}: "
            "the pool does not follow the model, and training had a wrong gradient. Use a "
            "TemperedPool, with more levels, chains or moves if it is one already",
            TrainingWarning,
            stacklevel=3,
        )


def _model_draws(
    ebm: LVEBM, pool: Pool, num_runs: int, num_particles: int, generator: torch.Generator
) -> Tensor:
    """Draw from the model, (num_runs, 1, num_particles, d), and leave the pool moved.

    Each run has draws from several refreshes of its own, which average the error of a finite pool
    within a run, and show what is left of it as spread between the runs.
    """
    f, kernel, runs = ebm.residual_and_grad, MALA(), []
    for _ in range(num_runs):
        parts = []
        for _ in range(_REFRESHES_PER_RUN):
            pool.refresh(ebm)
            u, log_w = pool.negatives()
            count = -(-num_particles // _REFRESHES_PER_RUN)
            chosen = torch.multinomial(log_w.exp(), count, replacement=True, generator=generator)
            parts.append(u[chosen])
        runs.append(torch.cat(parts)[:num_particles])
    state = init_state(f, torch.stack(runs)[:, None])
    for _ in range(_REJUVENATION_MOVES):
        state, _ = kernel.step(f, state, pool.step_size[-1], generator=generator)
    return state.u


def check_range(num_particles: int, num_runs: int, num_moves: int, relative_ess: float) -> None:
    """Raise a ValueError unless the settings of an annealing run make sense."""
    for name, value, least in (
        ("num_particles", num_particles, 2),
        ("num_runs", num_runs, 2),
        ("num_moves", num_moves, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if not 0.0 < relative_ess < 1.0:
        raise ValueError(f"relative_ess must lie between 0 and 1; got {relative_ess}")
