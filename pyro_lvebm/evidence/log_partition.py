# SPDX-License-Identifier: Apache-2.0
"""The log partition function of an LVEBM, as a bracket."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_lvebm.evidence.bracket import (
    CONFIDENCE,
    Bracket,
    Runs,
    both_directions,
    bracket,
    each_end,
    surprise,
)
from pyro_lvebm.model import LVEBM, warn_of_falling
from pyro_lvebm.pools import Pool
from pyro_lvebm.rng import Stream, derive_seed, generator_for
from pyro_lvebm.sampling import (
    MALA,
    STANDARD_NORMAL,
    RoughEnergyError,
    Schedule,
    anneal,
    ess,
    init_state,
    log_mean_exp,
    log_mean_std_error,
    pilot,
)
from pyro_lvebm.validation import check_at_least, warn_of_training

_REJUVENATION_MOVES = 20

_REFRESHES_PER_RUN = 8

_ROUNDING = 1e-3
"""Nats by which directions may differ because energies are in single precision."""

_MAX_ELEMENTS = 2**22
"""Numbers kept for all runs that are annealed side by side; bounds the memory."""


@dataclass(frozen=True)
class LogPartition(Bracket[float]):
    """An estimate of log Z with a bracket, in nats."""

    ess: float  # of the forward runs' final particles, weighted by the Ẑ of their run
    num_temperatures: int
    num_runs: int
    max_width: float  # the bracket that was asked for
    missed: float = 0.0  # by how much annealing from a Gaussian ends above the bracket otherwise
    too_rough: bool = False  # whether that path could not be followed, and says nothing

    def times(self, count: int) -> LogPartition:
        """Return the bracket of log Z counted so often, for an LVEBM that stands at many sites."""
        scaled = each_end(lambda end: count * end, self)
        missed, max_width = count * self.missed, count * self.max_width
        return replace(self, **scaled, max_width=max_width, missed=missed)

    @property
    def is_reliable(self) -> bool:
        """Whether both directions agree, and the bracket is as narrow as was asked."""
        return self._failure is None

    @property
    def verdict(self) -> str:
        """What the runs say about each other, in one sentence."""
        agreement = (
            f"forward and reverse agree within {self.upper - self.lower:.3f} nats; of a mode that "
            "neither the base nor the pool has visited they cannot know"
        )
        if self.too_rough:
            agreement += "; the path from a Gaussian was too rough to look for one"
        return self._failure or agreement

    @property
    def _failure(self) -> str | None:
        if self.missed > 0.0:
            return (
                f"annealing from a Gaussian finds {self.missed:.2f} nats more than from the "
                "mixture that is the base, and from the pool: both miss a mode, so draws and "
                "gradients are wrong; train with base='gaussian', or a mixture of your own"
            )
        difference = self.reverse - self.forward
        slack = _ROUNDING
        if self.std_error > 0.0:
            slack = max(slack, surprise(self.num_runs) * self.std_error)
        inside = self.lower - slack <= self.estimate <= self.upper + slack
        if self.reverse_limit < self.lower - _ROUNDING or not inside:
            return (
                f"forward and reverse differ by {difference:.2f} nats: the pool misses a mode "
                "that annealing from the base finds, so its draws and its gradients are wrong; "
                "give the TemperedPool more levels or chains, or refresh it more often"
            )
        if self.upper - self.lower > self.max_width:
            return (
                f"forward and reverse differ by {difference:.2f} nats and the bracket is "
                f"{self.upper - self.lower:.2f} wide where {self.max_width:.2f} was asked: "
                "annealing is too fast for this energy, or the base misses a mode that the pool "
                "has found; raise relative_ess, num_moves or num_particles"
            )
        return None

    def __str__(self) -> str:
        text = (
            f"log Z = {self.estimate:.4f} ± {self.std_error:.4f} "
            f"in [{self.lower:.4f}, {self.upper:.4f}]"
        )
        return text if self.is_reliable else f"{text}; NOT RELIABLE: {self.verdict}"


def log_partition(
    ebm: LVEBM,
    *,
    seed: int = 0,
    num_particles: int = 1024,
    num_runs: int = 16,
    num_moves: int = 4,
    relative_ess: float = 0.97,
    num_refreshes: int = 50,
    target_se: float | None = None,
    max_runs: int = 512,
    max_width: float = 0.5,
) -> LogPartition:
    """Bracket log Z by annealing from the base (from below) and from model draws (from above).

    A pilot run finds temperatures, step sizes and covariances. With these fixed, R independent
    sequential Monte Carlo runs from exact base draws give unbiased Ẑ_r, and as many runs from
    model draws back to the base give unbiased estimates of 1/Z if the draws are exact. Then

        lower    = log mean_r Ẑ_r − t s                  as E[log mean Ẑ] ≤ log Z
        upper    = −log mean_r (1/Ẑ_r^reverse) + t s'    as its mean is ≥ log Z for exact draws,
                   and no less than log mean_r Ẑ_r + t s
        estimate = mean_r Σ_k c_rk

    with s and s' the standard errors of these logarithms of means, t the 99 % quantile of
    Student's distribution for R − 1 degrees of freedom, so that each end allows for its own Monte
    Carlo error, and c_rk Bennett's acceptance ratio between temperatures k and k + 1 for the
    particles of both directions. The estimate is consistent, but not unbiased; its standard error
    comes from the spread over r, and takes the draws to follow the model. The upper end is a bound
    only to the extent that they do: they come from a copy of the pool, refreshed `num_refreshes`
    times and then on between the runs. A pool and base that both miss a mode give a narrow bracket
    around a wrong value. Where the base is a mixture, a quarter as many forward runs start from the
    Gaussian of all rows, whose broad path finds modes that the mixture lacks; they raise the upper
    end if they find more.

    Args:
        ebm: The LVEBM; unchanged.
        seed: Fixes every random number. Of several LVEBMs whose log Z are to be added, each needs
            its own, or their errors are related.
        num_particles: Particles of each run.
        num_runs: R, independent runs in each direction, at least 2.
        num_moves: MALA steps at each temperature, before one move with a proposal from the base.
        relative_ess: Wanted ESS / n between temperatures in the pilot run, in (0, 1).
        num_refreshes: Refreshes of the copied pool before model draws are taken.
        target_se: Add `num_runs` further runs until `std_error` is at most this, in nats.
        max_runs: Add no runs beyond this number in all.
        max_width: Width of the bracket, in nats, beyond which the verdict says that it failed.

    Returns:
        The bracket, in nats.

    Raises:
        ValueError: If a number is out of range, or the energy is NaN.
        RuntimeError: If the energy is too rough for the pilot run.

    Source:
        Neal (2001), Annealed importance sampling; Del Moral, Doucet and Jasra (2006); Burda,
        Grosse and Salakhutdinov (2015), arXiv 1412.8566 (the reverse direction); Bennett (1976);
        docs/estimators.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, log_partition
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> energy = QuadraticEnergy(2, 1)
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.set_precision(torch.diag(torch.tensor([2.0, 1.0, 0.5])))
        >>> log_z = log_partition(ebm, seed=0, num_particles=256, num_refreshes=10)
        >>> log_z.lower < energy.log_partition().item() < log_z.upper
        True
    """
    check_range(num_particles, num_runs, num_moves, relative_ess)
    for name, value in (("target_se", target_se), ("max_width", max_width)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive; got {value}")
    warn_of_falling(ebm)
    like = ebm.base_x.loc
    generator = generator_for(seed, Stream.LOG_PARTITION, device=like.device)
    pool = ebm.pool.copy_for(derive_seed(seed, Stream.LOG_PARTITION_POOL, ebm.pool.seed))
    with ebm.frozen():
        start = ebm.base.draw((1, 1, 2 * num_particles, ebm.dim), like, generator)
        schedule = pilot(
            ebm.residual_and_grad,
            start,
            base=ebm.base,
            relative_ess=relative_ess,
            num_moves=num_moves,
            precondition=True,
            generator=generator,
        )
        for _ in range(num_refreshes):
            pool.refresh(ebm)
        # Positions, or f at every temperature in both directions and both precisions.
        per_particle = max(ebm.dim, 6 * len(schedule.betas))
        side_by_side = max(1, _MAX_ELEMENTS // (num_particles * per_particle))
        runs: list[Runs] = []
        while True:
            for first in range(0, num_runs, side_by_side):
                count = min(side_by_side, num_runs - first)
                size = (count, num_particles)
                runs.append(_both_directions(ebm, pool, schedule, size, num_moves, generator))
            forward, _, bar = (torch.cat(parts) for parts in zip(*runs, strict=True))
            error = float(bar.std()) / math.sqrt(len(bar))
            if target_se is None or error <= target_se or len(bar) + num_runs > max_runs:
                break
        settings = (num_particles, max(4, num_runs // 4), num_moves, relative_ess)
        other, other_error = _from_gaussian(ebm, *settings, generator)
    ends = bracket(Runs(*(torch.cat(parts) for parts in zip(*runs, strict=True))))
    numbers = each_end(float, ends)
    missed = 0.0 if other == -math.inf else max(0.0, other - other_error - numbers["upper"])
    if missed > 0.0:
        numbers["upper"] = other + other_error
    result = LogPartition(
        **numbers,
        missed=missed,
        too_rough=math.isnan(other_error),
        ess=num_particles * float(ess(forward[:, 0])),
        num_temperatures=len(schedule.betas) - 1,
        num_runs=len(bar),
        max_width=max_width,
    )
    _compare_online(ebm, result)
    return result


def _both_directions(
    ebm: LVEBM,
    pool: Pool,
    schedule: Schedule,
    size: tuple[int, int],
    num_moves: int,
    generator: torch.Generator,
) -> Runs:
    """Anneal `size` = (runs, particles) up from the base and down from draws of the pool."""
    num_runs, num_particles = size
    start = ebm.base.draw((num_runs, 1, num_particles, ebm.dim), ebm.base_x.loc, generator)
    draws = _model_draws(ebm, pool, schedule, size, generator)
    return both_directions(
        ebm.residual_and_grad,
        start,
        draws,
        schedule,
        base=ebm.base,
        num_moves=num_moves,
        generator=generator,
    )


def _from_gaussian(
    ebm: LVEBM,
    num_particles: int,
    num_runs: int,
    num_moves: int,
    relative_ess: float,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return log mean Ẑ of runs from N(0, I) and its Monte Carlo error; −∞ if that is the base.

    The path ends at the same energy, f + U − ½ |u|² relative to N(0, I). Where it is too rough to
    follow it is −∞, too, with the error NaN.
    """
    from scipy import stats

    if ebm.base is STANDARD_NORMAL:
        return -math.inf, 0.0

    def f(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = ebm.residual_and_grad(u)
        energy, slope = ebm.base.energy_and_grad(u)
        return value + energy - STANDARD_NORMAL.energy(u), grad + slope - u

    size, like = (num_particles, ebm.dim), ebm.base_x.loc
    try:
        schedule = pilot(
            f,
            STANDARD_NORMAL.draw((1, 1, *size), like, generator),
            relative_ess=relative_ess,
            num_moves=num_moves,
            precondition=True,
            generator=generator,
        )
    except RoughEnergyError:
        return -math.inf, math.nan
    start = STANDARD_NORMAL.draw((num_runs, 1, *size), like, generator)
    found = anneal(
        f, start, schedule, num_moves=num_moves, independence=True, generator=generator
    ).log_ratio.double()
    t = float(stats.t.ppf(CONFIDENCE, num_runs - 1))
    return float(log_mean_exp(found, 0)), t * float(log_mean_std_error(found, 0))


def _compare_online(ebm: LVEBM, annealed: LogPartition) -> None:
    """Warn where the pool's own log Z, if it belongs to the present θ, contradicts annealing.

    They do where they differ by more than three standard errors, and by more where few runs say
    what that of annealing is (`surprise`).
    """
    if not ebm.pool_is_fresh():
        return
    online, stated = float(ebm.log_partition), ebm.pool.log_partition_std_error
    online_error = 0.0 if stated is None else float(stated)
    error = math.hypot(annealed.std_error, online_error)
    limit = math.hypot(surprise(annealed.num_runs) * annealed.std_error, 3.0 * online_error)
    if abs(online - annealed.estimate) > limit + _ROUNDING:
        warn_of_training(
            f"log Z online is {online:.3f}, annealed {annealed.estimate:.3f} ± {error:.3f}: "
            "the pool does not follow the model, and training had a wrong gradient. Use a "
            "TemperedPool, with more levels, chains or moves if it is one already"
        )


def _model_draws(
    ebm: LVEBM, pool: Pool, schedule: Schedule, size: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Draw from the model, (num_runs, 1, num_particles, d), and leave the pool moved.

    Each run has draws from several refreshes of its own, which average the error of a finite pool
    within a run, and show what is left of it as spread between the runs.
    """
    f, kernel, runs = ebm.residual_and_grad, MALA(), []
    num_runs, num_particles = size
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
    scale = None if schedule.scales is None else schedule.scales[-1]
    for _ in range(_REJUVENATION_MOVES):
        state, _ = kernel.step(
            f, state, schedule.step_sizes[-1], base=ebm.base, scale=scale, generator=generator
        )
    return state.u


def check_range(num_particles: int, num_runs: int, num_moves: int, relative_ess: float) -> None:
    """Raise a ValueError unless the settings of an annealing run make sense."""
    check_at_least(2, num_particles=num_particles, num_runs=num_runs)
    check_at_least(1, num_moves=num_moves)
    if not 0.0 < relative_ess < 1.0:
        raise ValueError(f"relative_ess must lie between 0 and 1; got {relative_ess}")


def total(log_zs: list[LogPartition]) -> LogPartition:
    """Return the bracket of a sum of log Z, with the errors of independent estimates.

    Of no log Z at all it is zero. The ends of a sum of several are those of its terms, added.
    """
    if len(log_zs) == 1:
        return log_zs[0]
    sums = each_end(lambda *ends: float(sum(ends)), *log_zs)
    return LogPartition(
        **sums | {"std_error": math.hypot(*(z.std_error for z in log_zs))},
        max_width=float(sum(z.max_width for z in log_zs)),
        missed=float(sum(z.missed for z in log_zs)),
        too_rough=any(z.too_rough for z in log_zs),
        ess=min((z.ess for z in log_zs), default=math.inf),
        num_temperatures=max((z.num_temperatures for z in log_zs), default=0),
        num_runs=min((z.num_runs for z in log_zs), default=0),
    )


def warn_of_unreliable(log_zs: list[LogPartition]) -> None:
    """Warn of each log Z that cannot be relied on: in a sum, others may hide its width."""
    for number, log_z in enumerate(log_zs):
        if not log_z.is_reliable:
            warn_of_training(f"log Z of LVEBM {number} is not reliable: {log_z.verdict}")
