# SPDX-License-Identifier: Apache-2.0
"""The log partition functions log Z(c) of a conditional LVEBM, as brackets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.evidence.bracket import Bracket, Runs, both_directions, bracket, each_end
from pyro_lvebm.evidence.log_partition import LogPartition, check_range
from pyro_lvebm.model import LVEBM, Density, as_context, context_rows
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import (
    MALA,
    Annealed,
    Schedule,
    anneal,
    ess,
    init_state,
    pilot,
    systematic_resample,
)

_REJUVENATION_MOVES = 20

_MAX_ELEMENTS = 2**22
"""Numbers kept for all contexts that are annealed side by side; bounds the memory."""


@dataclass(frozen=True)
class ConditionalLogPartition(Bracket[Tensor]):
    """Estimates of log Z(c_i) with brackets (N,), in nats, for the rows of a set of contexts."""

    rows: Tensor  # (N,), for each row the number of its context among the distinct ones
    ess: float  # of the forward runs' Ẑ, as a share, the least of all contexts
    num_temperatures: int
    num_runs: int

    def mean(self, max_width: float = 0.5) -> LogPartition:
        """Return the bracket of the mean over the rows.

        Errors of distinct contexts are independent, so the ends allow for less of them than those
        of one context do.

        Args:
            max_width: Width of the bracket, in nats, beyond which the verdict says that it failed.
        """
        counts = torch.bincount(self.rows).double()
        share = counts / len(self.rows)
        first = torch.empty_like(counts, dtype=torch.long).scatter_(
            0, self.rows, torch.arange(len(self.rows), device=self.rows.device)
        )

        def error_of_mean(error: Tensor) -> float:
            return float((share * error.double()[first]).square().sum().sqrt())

        low, high = float(self.forward.double().mean()), float(self.reverse.double().mean())
        limit = high + error_of_mean(self.upper.clamp(min=self.reverse) - self.reverse)
        lower = low - error_of_mean(self.forward - self.lower)
        means = each_end(lambda end: float(end.double().mean()), self)
        means |= {"lower": lower, "upper": max(2 * low - lower, limit), "reverse_limit": limit}
        return LogPartition(
            **means | {"std_error": error_of_mean(self.std_error)},
            ess=self.ess,
            num_temperatures=self.num_temperatures,
            num_runs=self.num_runs,
            max_width=max_width,
        )


def conditional_log_partition(
    ebm: LVEBM,
    context: Tensor | np.ndarray,
    *,
    seed: int = 0,
    num_particles: int = 64,
    num_runs: int = 8,
    num_moves: int = 2,
    relative_ess: float = 0.9,
) -> ConditionalLogPartition:
    """Bracket log Z(c_i) of every context by annealing in both directions.

    This is `log_partition` for many contexts side by side, with one difference: the model draws
    from which the reverse runs start are the ends of further forward runs, resampled by the Ẑ of
    their run and moved on by MALA. The upper ends are bounds to the extent that these draws are
    exact. Each distinct context is annealed once. `log_partition(ebm.at(c))` takes more particles,
    and a pool, for one context.

    Args:
        ebm: The conditional LVEBM; unchanged.
        context: Contexts (N, *context_shape).
        seed: Fixes every random number.
        num_particles: Particles of each run.
        num_runs: Independent runs in each direction for each context, at least 2.
        num_moves: MALA steps at each temperature, before one move with a proposal from the base.
        relative_ess: Wanted ESS / n between temperatures in the pilot run, in (0, 1).

    Returns:
        Estimates and brackets of the rows, in nats.

    Raises:
        ValueError: If the LVEBM is not conditional, contexts are not finite or of another shape,
            or a number is out of range.
        RuntimeError: If the energy is too rough for the pilot run.

    Source:
        As `log_partition`; docs/estimators.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, conditional_log_partition
        >>> draw = torch.Generator().manual_seed(0)
        >>> c, x = (torch.randn(100, 2, generator=draw) for _ in range(2))
        >>> energy = QuadraticEnergy(2, 1, context_dim=2)
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1, context=c)
        >>> with torch.no_grad():
        ...     _ = energy.by_context.fill_(0.3)
        >>> found = conditional_log_partition(ebm, c[:5])
        >>> exact = energy.log_partition(c[:5])
        >>> bool(((found.lower < exact) & (exact < found.upper)).all())
        True
    """
    check_range(num_particles, num_runs, num_moves, relative_ess)
    context = as_context(context, ebm.base_x.loc)
    if len(context_rows(context, ebm.context_shape)) != 1:
        raise ValueError(
            f"context has shape {tuple(context.shape)}; expected (N, *{ebm.context_shape}), with "
            "exactly one row axis, of a conditional LVEBM"
        )
    distinct, rows = torch.unique(context.flatten(1), dim=0, return_inverse=True)
    distinct = distinct.reshape(-1, *context.shape[1:])
    generator = generator_for(seed, Stream.CONDITIONAL_LOG_PARTITION, device=context.device)
    found: list[Bracket[Tensor]] = []
    least, most = math.inf, 0
    with ebm.frozen(), torch.no_grad():
        for part in _side_by_side(distinct, num_runs * num_particles * ebm.dim):
            runs, temperatures = _runs_of(
                ebm.given(part[:, None]),
                (len(part), num_particles, ebm.dim),
                ebm.base_x.loc,
                num_runs=num_runs,
                num_moves=num_moves,
                relative_ess=relative_ess,
                generator=generator,
            )
            found.append(bracket(runs))
            least = min(least, float(ess(runs.forward.T).min()) / num_runs)
            most = max(most, temperatures)
    return ConditionalLogPartition(
        **each_end(lambda *parts: torch.cat(parts).to(context)[rows], *found),
        rows=rows,
        ess=least,
        num_temperatures=most,
        num_runs=num_runs,
    )


def _side_by_side(distinct: Tensor, per_context: int) -> Iterator[Tensor]:
    yield from distinct.split(max(1, _MAX_ELEMENTS // (8 * per_context)))


def _runs_of(
    density: Density,
    shape: tuple[int, int, int],
    like: Tensor,
    *,
    num_runs: int,
    num_moves: int,
    relative_ess: float,
    generator: torch.Generator,
) -> tuple[Runs, int]:
    """Run both directions for (problems, particles, d); return them, and how many temperatures."""
    f, base = density.residual_and_grad, density.base
    moves: dict[str, Any] = {"base": base, "num_moves": num_moves, "generator": generator}
    start = base.draw((1, *shape), like, generator)
    schedule = pilot(f, start, relative_ess=relative_ess, **moves)
    starts = [base.draw((num_runs, *shape), like, generator) for _ in range(2)]
    ends = anneal(f, starts[0], schedule, **moves)
    draws = _model_draws(density, ends, schedule, generator)
    return both_directions(f, starts[1], draws, schedule, **moves), len(schedule.betas) - 1


def _model_draws(
    density: Density, ends: Annealed, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """Resample the ends of all runs of a problem by their weights, and move them by MALA."""
    log_weights = ends.log_weights + (ends.log_ratio - _level(ends.log_weights))[..., None]
    runs, problems, particles, d = ends.state.u.shape
    index = systematic_resample(log_weights.transpose(0, 1).reshape(problems, -1), generator)
    # Systematic resampling leaves copies of one particle side by side; runs shall share them.
    index = index.reshape(problems, particles, runs).permute(2, 0, 1)
    pooled = ends.state.u.transpose(0, 1).reshape(problems, -1, d).expand(runs, -1, -1, -1)
    state = ends.state._replace(u=pooled.gather(2, index[..., None].expand(-1, -1, -1, d)))
    f = density.residual_and_grad
    state = init_state(f, state.u)
    scale = None if schedule.scales is None else schedule.scales[-1]
    for _ in range(_REJUVENATION_MOVES):
        state, _ = MALA().step(
            f, state, schedule.step_sizes[-1], base=density.base, scale=scale, generator=generator
        )
    return state.u


def _level(log_weights: Tensor) -> Tensor:
    return torch.logsumexp(log_weights, -1)
