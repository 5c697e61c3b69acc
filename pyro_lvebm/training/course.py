# SPDX-License-Identifier: Apache-2.0
"""How far a fit is, so that one that was broken off goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_lvebm.model import LVEBM
from pyro_lvebm.training.averaging import ParameterAverage
from pyro_lvebm.training.step import pool_snapshot


@dataclass
class BestSoFar:
    """The parameters and pools that were best by held-out log evidence, and how to go back."""

    value: float  # log evidence, nats per datum
    values: dict[Tensor, Tensor]  # by parameter
    put_pools_back: Callable[[], None]
    misses: int = 0  # evaluations in a row that were not better
    evaluated: int = 0  # steps of the Saddle at the last evaluation

    def offer(self, value: float, average: ParameterAverage, ebms: list[LVEBM], step: int) -> None:
        """Take the present averages and pools if they are as good.

        Where only a guide is trained the evidence stays, and the last one is the best.
        """
        self.misses = 0 if value > self.value else self.misses + 1
        if value >= self.value:
            self.value, self.values = value, average.copy()
            self.put_pools_back = pool_snapshot(ebms)
        self.evaluated = step

    def put_back(self, average: ParameterAverage) -> None:
        """Give the pools and the averages of trained parameters their best values."""
        self.put_pools_back()
        average.values = {p: v for p, v in self.values.items() if p in average.values}


@dataclass
class Course:
    """A fit under way, or one that has ended."""

    start: int  # steps of the Saddle before it
    settings: dict[str, Any]  # arguments of `Saddle.fit` that must be the same when it goes on
    best: BestSoFar | None = None
    ended: int | None = None  # steps of the Saddle at its end

    def is_due(self, step: int) -> bool:
        """Whether held-out data are to be evaluated after this step of the Saddle."""
        taken, best = step - self.start, self.best
        if best is None or not taken or best.evaluated == step:
            return False
        num_steps: int = self.settings["num_steps"]
        every: int = self.settings["evaluate_every"]
        return taken % every == 0 or taken == num_steps

    def is_stuck(self) -> bool:
        """Whether patience is used up."""
        patience: int | None = self.settings["patience"]
        return patience is not None and self.best is not None and self.best.misses >= patience


def course_of(known: Course | None, resume: bool, step: int, settings: dict[str, Any]) -> Course:
    """Return the course of a fit: a new one, or that of a fit that goes on.

    Args:
        known: The last fit of this Saddle, or of the file that it was loaded from.
        resume: Whether that one is to go on.
        step: Steps of the Saddle so far.
        settings: Arguments of `Saddle.fit`.

    Raises:
        ValueError: If there is none to go on with, or the arguments are others.
    """
    if not resume or (known is None and step == 0):
        return Course(step, settings)
    if known is None:
        raise ValueError(
            f"there is no fit to go on with: this Saddle has taken {step} steps outside of one, or "
            "its last fit ended at its averages. Load what fit(checkpoint=...) has saved, or "
            "leave resume out, which starts a new fit"
        )
    other = [
        f"{name} is {value}, and was {known.settings[name]}"
        for name, value in settings.items()
        if known.settings[name] != value
    ]
    if other:
        raise ValueError("a fit goes on with the arguments that it began with: " + "; ".join(other))
    if known.ended not in (None, step):
        raise ValueError(
            f"the fit ended after step {known.ended}, and now {step} have been taken; leave resume "
            "out, which starts a new fit"
        )
    return known
