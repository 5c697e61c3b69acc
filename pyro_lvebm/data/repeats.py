# SPDX-License-Identifier: Apache-2.0
"""Columns whose values repeat: a density of them has no upper bound, so it must be asked for."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np

from pyro_lvebm.data.table import Table
from pyro_lvebm.rng import Stream, derive_seed

_SHARE = 0.1
"""Share of the rows with one value from which on it is a spike."""

_LEAST = 5
"""Rows that a value must have to count as a spike, and mean rows by value of a coarse column."""

_TIED = 0.2
"""Share of rows with a value that others have, too, from which on a warning is due."""


class Repeats(NamedTuple):
    """How the values of one column repeat."""

    name: str
    what: str  # for people
    severe: bool  # whether a density of the column is meaningless


def find_repeats(table: Table) -> list[Repeats]:
    """Return the columns whose values repeat, in their order.

    A column is severe where one value holds a tenth of the rows, or where a value holds five rows
    on average: a model gains without bound by a spike on each. Other ties are those of rounding.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.stack([rng.normal(size=90), rng.integers(1, 5, 90)], 1)
        >>> find_repeats(Table(x, ("sales", "quarter"), np.arange(90)))
        [Repeats(name='quarter', what='takes 4 values only, whole numbers', severe=True)]
    """
    found = []
    for name, column in zip(table.names, table.values.T, strict=True):
        seen = column[~np.isnan(column)]
        values, counts = np.unique(seen, return_counts=True)
        if len(values) < 2:
            continue  # constant columns are refused in any case
        n, most = len(seen), int(counts.max())
        whole = bool((seen == np.floor(seen)).all())
        tied = counts[counts > 1].sum() / n
        spike = most >= max(_LEAST, _SHARE * n)
        coarse = n >= _LEAST * len(values)
        if not (spike or coarse or (n >= 20 and tied >= _TIED) or (whole and n >= 20 and tied)):
            continue
        kind = ", whole numbers" if whole else ""
        if len(values) <= 20:
            what = f"takes {len(values)} values only{kind}"
        elif spike and not coarse:
            what = f"is {values[counts.argmax()]:g} in {most} of {n} rows"
        else:
            what = f"takes {len(values)} values in {n} rows{kind}"
        found.append(Repeats(name, what, bool(spike or coarse)))
    return found


def check_repeats(table: Table, *, allow: bool = False) -> None:
    """Refuse columns of which a density is meaningless, and warn of milder ties and equal rows.

    Args:
        table: What was read.
        allow: Warn in all cases.

    Raises:
        ValueError: If a column is severe; see `find_repeats`.
    """
    found = find_repeats(table)
    severe = [column for column in found if column.severe]
    names = ",".join(column.name for column in severe)
    cure = (
        "values repeat there, and log p(x) then grows without bound by spikes on them. Spread "
        f"values over what they were rounded to (--dequantise '{names}'), leave columns out "
        f"(--drop '{names}'), or condition on them (context=… of LVEBM.from_data)"
    )
    said = "; ".join(f"column {column.name} {column.what}" for column in severe)
    if severe and not allow:
        raise ValueError(f"{said}: {cure}. --allow-repeats fits them as they are")
    if severe:
        warnings.warn(f"{said}: {cure}", UserWarning, stacklevel=2)
    mild = [column for column in found if not column.severe]
    if mild:
        said = "; ".join(f"column {column.name} {column.what}" for column in mild)
        warnings.warn(
            f"{said}: values repeat, as by rounding. log p(x) means little where it is higher than "
            "rounding allows; --dequantise spreads them",
            UserWarning,
            stacklevel=2,
        )
    copies = len(table) - len(np.unique(table.values, axis=0, equal_nan=True))
    if copies and not found:
        warnings.warn(
            f"{copies} of {len(table)} rows are copies of others, so that rows held out are no "
            "test of what was learnt. Remove copies",
            UserWarning,
            stacklevel=2,
        )


def resolution(column: np.ndarray) -> float:
    """Return the step of the grid that the values of a column (N,) lie on, its widest.

    Raises:
        ValueError: If they lie on no grid, or are all alike.
    """
    values = np.unique(column[~np.isnan(column)])
    if len(values) < 2:
        raise ValueError("a constant column has no resolution")
    width = float(values[-1] - values[0])
    step = 0.0
    for gap in np.diff(values).tolist():  # Euclid's algorithm, but for rounding
        while gap > 1e-7 * width:
            step, gap = gap, abs(step - round(step / gap) * gap)
    if step < 1e-5 * width:
        raise ValueError("its values lie on no grid of equal steps")
    return step


def dequantise(values: np.ndarray, steps: np.ndarray, seed: int) -> np.ndarray:
    """Return values (N, D) plus uniform noise over the step (D,) of each column, 0 for none.

    The mean log density of what is returned, plus Σ log steps, is at most the mean log probability
    of the values on their grid.

    Source:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models,
        section 3.1.

    Example:
        >>> dequantise(np.array([[3.0, 0.1]]), np.array([1.0, 0.0]), seed=0)[0, 1].item()
        0.1
    """
    rng = np.random.default_rng(derive_seed(seed, Stream.DEQUANTISATION, 1))
    noise: np.ndarray = values + (rng.random(values.shape) - 0.5) * steps
    return np.where(steps > 0, noise, values)
