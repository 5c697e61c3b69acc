# SPDX-License-Identifier: Apache-2.0
"""What a fit needs beside its steps: schedules, endless batches, and the best parameters so far."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_lvebm.model import LVEBM
from pyro_lvebm.training.averaging import ParameterAverage
from pyro_lvebm.training.step import pool_snapshot
from pyro_lvebm.validation import check_at_least


@dataclass
class BestSoFar:
    """The parameters and pools that were best by held-out log evidence, and how to go back."""

    value: float  # log evidence, nats per datum
    values: dict[Tensor, Tensor]  # by parameter
    put_pools_back: Callable[[], None]
    misses: int = 0  # evaluations in a row that were not better

    def offer(self, value: float, average: ParameterAverage, ebms: list[LVEBM]) -> None:
        """Take the present averages and pools if they are as good.

        Where only a guide is trained the evidence stays, and the last one is the best.
        """
        self.misses = 0 if value > self.value else self.misses + 1
        if value >= self.value:
            self.value, self.values = value, average.copy()
            self.put_pools_back = pool_snapshot(ebms)

    def put_back(self, average: ParameterAverage) -> None:
        """Give the pools and the averages of trained parameters their best values."""
        self.put_pools_back()
        average.values = {p: v for p, v in self.values.items() if p in average.values}


def check_fit(
    args: tuple[Any, ...],
    num_steps: int,
    batches: Iterable[Sequence[Any]] | None,
    min_kl: float | None,
    held_out: tuple[Any, ...] | None,
    patience: int | None,
    evaluate_every: int,
) -> None:
    """Refuse arguments of `Saddle.fit` that do not go together.

    Raises:
        ValueError: If a number is out of range, or one argument needs or excludes another.
    """
    check_at_least(1, num_steps=num_steps)
    if evaluate_every < 1 or (patience is not None and patience < 1):
        raise ValueError(
            f"evaluate_every and patience must be at least 1; got {evaluate_every} and {patience}"
        )
    if held_out is None and patience is not None:
        raise ValueError("patience needs held-out data: give held_out=(x_held_out,)")
    if held_out is not None and not isinstance(held_out, tuple):
        raise ValueError(
            "held_out must be a tuple of arguments of the model, as in held_out=(x,); got "
            f"{type(held_out).__name__}"
        )
    if min_kl is not None and not min_kl >= 0:
        raise ValueError(f"min_kl must not be negative; got {min_kl}")
    check_batches(args, batches)


def check_batches(args: tuple[Any, ...], batches: Iterable[Sequence[Any]] | None) -> None:
    """Refuse batches beside arguments.

    Raises:
        ValueError: If there are both.
    """
    if batches is not None and args:
        raise ValueError(
            f"give batches, or arguments of the model, and not both; got {len(args)} arguments "
            "beside batches"
        )


def endless(batches: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Go through batches again and again.

    Args:
        batches: Tuples or lists of arguments; every new iteration starts again, as that of a
            `DataLoader`.

    Raises:
        ValueError: If an iteration has nothing, as the second one of a generator, or an item is
            no tuple or list.
    """
    for epoch in itertools.count():
        empty = True
        for batch in batches:
            if not isinstance(batch, tuple | list):
                raise ValueError(
                    "every item of batches must be a tuple or list of arguments of the model, as "
                    f"from DataLoader(TensorDataset(x, ids)); got {type(batch).__name__}"
                )
            empty = False
            yield tuple(batch)
        if empty:
            raise ValueError(
                f"batches had nothing at pass {epoch + 1}, before the last step. Give an iterable "
                "that starts again, such as a DataLoader or a list, and not a generator"
            )


Schedule = Callable[[float], float]
"""Maps the part of a fit that is done, from 0 to 1, to a factor on the updates."""


def half_cosine(progress: float) -> float:
    """Return a factor that falls from 1 to 1/50 along a half cosine.

        0.51 + 0.49 cos(π progress)

    Args:
        progress: Part of the fit that is done, from 0 to 1.

    Source:
        Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts,
        equation 5, without restarts.

    Example:
        >>> [round(half_cosine(p), 2) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.51, 0.02]
    """
    return 0.51 + 0.49 * math.cos(math.pi * progress)
