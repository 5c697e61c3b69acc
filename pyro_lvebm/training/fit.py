# SPDX-License-Identifier: Apache-2.0
"""What a fit needs beside its steps: checked arguments, schedules and endless batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.validation import DataError, check_at_least


def check_fit(
    args: tuple[Any, ...],
    num_steps: int,
    batches: Iterable[Sequence[Any]] | None,
    min_kl: float | None,
    held_out: tuple[Any, ...] | None,
    patience: int | None,
    evaluate_every: int,
    every: int,
) -> None:
    """Refuse arguments of `Saddle.fit` that do not go together.

    Raises:
        ValueError: If a number is out of range, or one argument needs or excludes another.
    """
    check_at_least(1, num_steps=num_steps, every=every)
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
    _check_rows_seen(held_out or ())
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


@contextmanager
def noted(error: BaseException) -> Iterator[None]:
    """Add what cannot be written inside the block to an error that goes on anyway."""
    try:
        yield
    except OSError as failure:
        error.add_note(f"fit: no checkpoint was saved: {failure}")


Schedule = Callable[[float], float]
"""Maps the part of a fit that is done, from 0 to 1, to a factor on the updates."""


def factor_of(schedule: Schedule, progress: float) -> float:
    """Return the factor that a schedule has for an update.

    Raises:
        ValueError: If it is NaN, infinite, negative or no number.
    """
    value = schedule(progress)
    try:
        factor = float(value)
    except (TypeError, ValueError):
        factor = math.nan
    if not 0.0 <= factor < math.inf:
        raise ValueError(
            f"schedule({progress:.4g}) returned {value!r:.80}; expected a finite factor on the "
            "updates that is not negative"
        )
    return factor


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


def _check_rows_seen(held_out: tuple[Any, ...]) -> None:
    """Refuse tables with rows that hold nothing: log p of nothing is 0, and would count."""
    for table in _floating(held_out):
        if not len(table):
            raise DataError("held_out has no rows; give at least one, or leave it out")
        if table.dim() == 1:  # labels, say, of which some may be unknown
            continue
        empty = torch.nonzero(table.isnan().flatten(1).all(1))
        if len(empty):
            raise DataError(
                f"held_out has {len(empty)} rows without an observed entry, the first being row "
                f"{int(empty[0])}; leave them out"
            )


def check_columns_seen(args: tuple[Any, ...]) -> None:
    """Refuse training tables with a column that no row has: nothing is to be learnt of it.

    Raises:
        ValueError: If there is one, or none of the rows holds anything.
    """
    for table in _floating(args):
        if table.dim() == 1 or not len(table):
            continue
        missing = table.isnan().flatten(1)
        unseen = torch.nonzero(missing.all(0)).flatten().tolist()
        if len(unseen) == missing.shape[1]:
            raise DataError(
                f"none of the {len(table)} training rows has an observed entry; give rows that do"
            )
        if unseen:
            raise DataError(
                f"no training row has entries {unseen[:12]} of x (counted from 0): nothing can be "
                "learnt of them. Leave them out of the data and the model, or add rows that have "
                "them"
            )


def _floating(parts: tuple[Any, ...]) -> Iterator[Tensor]:
    """The floating-point tensors and arrays among arguments, as tensors."""
    for part in parts:
        table = torch.as_tensor(part) if isinstance(part, np.ndarray) else part
        if isinstance(table, Tensor) and table.is_floating_point() and table.dim():
            yield table
