# SPDX-License-Identifier: Apache-2.0
"""Runs of annealing for many problems, from where each is best begun, fixed after a pilot."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.sampling.annealing import Annealed, anneal, pilot
from pyro_lvebm.sampling.base import STANDARD_NORMAL, Base
from pyro_lvebm.sampling.gauss_newton import Residuals, start_near
from pyro_lvebm.sampling.langevin import ValueAndGrad


def anneal_problems(
    f: ValueAndGrad,
    r: Residuals | None,
    shape: tuple[int, int, int],
    like: Tensor,
    *,
    num_runs: int = 1,
    num_moves: int = 4,
    pilot_moves: int = 2,
    relative_ess: float = 0.9,
    generator: torch.Generator | None,
) -> Annealed:
    """Anneal every problem by independent runs, whose schedule and base a pilot run has fixed.

    Args:
        f: Residual energy relative to N(0, I), on v (runs, problems, particles, d).
        r: r(v) on the same v with ½ |r|² the main part of ½ |v|² + f, if there is one: runs then
            begin at the modes of the problems, too (`start_near`), and move in their curvature.
        shape: (problems, particles, d).
        like: Fixes dtype and device.
        num_runs: Independent runs.
        num_moves: MALA steps at each temperature.
        pilot_moves: The same in the pilot run.
        relative_ess: Wanted ESS / n between temperatures in the pilot run.
        generator: Source of randomness; None means torch's global generator.

    Returns:
        The runs; `log_ratio` is log Ĉ, with C = E_{N(0,I)}[exp(−f)] and Ĉ unbiased.
    """
    base: Base = STANDARD_NORMAL
    if r is not None:
        f, base = start_near(f, r, shape, like, generator)
    schedule = pilot(
        f,
        base.draw((1, *shape), like, generator),
        base=base,
        relative_ess=relative_ess,
        num_moves=pilot_moves,
        precondition=r is not None,
        generator=generator,
    )
    start = base.draw((num_runs, *shape), like, generator)
    return anneal(f, start, schedule, base=base, num_moves=num_moves, generator=generator)
