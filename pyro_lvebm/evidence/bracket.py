# SPDX-License-Identifier: Apache-2.0
"""Brackets of log normalising constants, by annealing in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_lvebm.sampling import (
    STANDARD_NORMAL,
    Base,
    Schedule,
    ValueAndGrad,
    anneal,
    bar_log_ratio,
    log_mean_exp,
    log_mean_std_error,
)

Value = TypeVar("Value", float, Tensor)

CONFIDENCE = 0.99
"""One-sided confidence level of each end of a bracket."""


class Runs(NamedTuple):
    """Estimates of log Z, log 1/Z and log Z by independent runs, in nats."""

    forward: Tensor  # (runs, problems)
    reverse: Tensor  # (runs, problems)
    bar: Tensor  # (runs, problems), Bennett's acceptance ratio of both


@dataclass(frozen=True)
class Bracket(Generic[Value]):
    """What runs in both directions say of log Z, or of every log Z of several, in nats."""

    estimate: Value  # mean of Bennett's acceptance ratio of both directions
    std_error: Value
    lower: Value  # forward, less its Monte Carlo error
    upper: Value  # reverse_limit, and no less than forward with its error
    forward: Value  # log of the mean Ẑ of runs from the base
    reverse: Value  # −log of the mean 1/Ẑ of runs from model draws
    reverse_limit: Value  # with its Monte Carlo error added


def each_end(of: Callable[..., Any], *brackets: Bracket[Any]) -> dict[str, Any]:
    """Return a function of each number of the brackets, by the name of the number."""
    return {f.name: of(*(getattr(b, f.name) for b in brackets)) for f in fields(Bracket)}


def surprise(num_runs: int) -> float:
    """Return how many standard errors estimated from R runs a normal error's 3 correspond to.

    It is the quantile of Student's distribution for R − 1 degrees of freedom with the same
    probability: 9.2 for 4 runs, 3.6 for 16.

    Args:
        num_runs: R, at least 2.

    Example:
        >>> [round(surprise(n), 1) for n in (4, 16, 1000)]
        [9.2, 3.6, 3.0]
    """
    from scipy import stats

    return float(stats.t.isf(stats.norm.sf(3.0), num_runs - 1))


def both_directions(
    f: ValueAndGrad,
    start: Tensor,
    draws: Tensor,
    schedule: Schedule,
    *,
    base: Base = STANDARD_NORMAL,
    num_moves: int,
    generator: torch.Generator,
) -> Runs:
    """Anneal up from base draws and down from model draws, and combine both by Bennett's ratio.

    The runs down need the independence moves. A region that few model draws are in may have much
    mass at a higher temperature; if only such a draw can bring particles there, 1/Ẑ has heavy
    tails.

    Args:
        f: Residual energy.
        start: Base draws (runs, problems, particles, d).
        draws: Model draws of the same shape.
        schedule: Temperatures and moves, fixed beforehand.
        base: The base.
        num_moves: MALA steps at each temperature, before one independence move.
        generator: Source of randomness.
    """
    up, down = (
        anneal(
            f,
            v,
            path,
            base=base,
            num_moves=num_moves,
            independence=True,
            keep_path=True,
            generator=generator,
        )
        for v, path in ((start, schedule), (draws, schedule.reversed()))
    )
    assert up.f_path is not None and down.f_path is not None
    f_path = torch.cat([up.f_path, down.f_path.flip(0)], -1).double()  # (T + 1, runs, problems, 2n)
    work = schedule.betas.double().diff()[:, None, None, None]
    guess = log_mean_exp(-work * f_path[:-1])
    bar = bar_log_ratio(work * f_path[:-1], work * f_path[1:], guess).sum(0)
    return Runs(up.log_ratio.double(), down.log_ratio.double(), bar)


def bracket(runs: Runs) -> Bracket[Tensor]:
    """Return estimate and ends of every problem; `log_partition` says what they are."""
    from scipy import stats

    forward, reverse, bar = runs
    low, high = log_mean_exp(forward, 0), -log_mean_exp(reverse, 0)
    t = float(stats.t.ppf(CONFIDENCE, len(bar) - 1))
    low_error, high_error = (log_mean_std_error(part, 0) for part in (forward, reverse))
    limit = high + t * high_error
    return Bracket(
        estimate=bar.mean(0),
        std_error=bar.std(0) / math.sqrt(len(bar)),
        lower=low - t * low_error,
        upper=torch.maximum(low + t * low_error, limit),
        forward=low,
        reverse=high,
        reverse_limit=limit,
    )
