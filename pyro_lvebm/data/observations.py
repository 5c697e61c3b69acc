# SPDX-License-Identifier: Apache-2.0
"""Observations: as an array, split, and moved from integer levels to the real line."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyro_lvebm.data.reading import numbering, read_table
from pyro_lvebm.data.repeats import check_repeats
from pyro_lvebm.data.table import Table
from pyro_lvebm.rng import Stream, derive_seed

SQUEEZE = 0.05
"""λ of the logit transform. It keeps |y| below 2.95, so that noise on empty pixels has no tails."""


def read_observations(path: Path) -> np.ndarray:
    """Read a table of numbers, one row an observation, as an array.

    It is what `read_table` reads without being told anything of the frame: a header and a column
    that labels rows are left out, and missing cells are NaN.

    Args:
        path: A file whose name ends in `.csv`, `.tsv`, `.npy` or `.npz`.

    Returns:
        The observations (N, D) as float64, N and D at least 1, NaN where missing.

    Raises:
        ValueError: As `read_table`.

    Warns:
        UserWarning: If a named column labels rows and is left out, or one numbers them and is
            not; if values of a column, or whole rows, repeat, with the names of the columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "heights.csv"
        ...     np.savetxt(path, [[1, 2], [3, 4.5]], delimiter=",", header="left,right")
        ...     read_observations(path)
        array([[1. , 2. ],
               [3. , 4.5]])
    """
    table = read_table(path)
    told = "read_table(path, Frame(index=...)) says otherwise"
    if table.label_name is not None:
        what = f"column {table.label_name!r} labels the rows and is left out"
        warnings.warn(f"{path}: {what}; {told}", UserWarning, stacklevel=2)
    for name in numbering(table):
        what = f"column {name!r} numbers the rows and is taken as a dimension"
        warnings.warn(f"{path}: {what}; {told}", UserWarning, stacklevel=2)
    check_repeats(table, allow=True)
    return table.values


def split(
    x: np.ndarray, held_out: float, seed: int, stream: Stream = Stream.HELD_OUT_SPLIT
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows at random into a training part and a held-out part.

    The held-out part has ⌈held_out · N⌉ rows.

    Args:
        x: Observations (N, ...).
        held_out: Fraction of rows to hold out, between 0 and 1, exclusive.
        seed: Fixes the split.
        stream: What the split is for.

    Returns:
        The training rows and the held-out rows, each in random order, as copies.

    Raises:
        ValueError: If the fraction is out of range, or leaves no row for training.

    Example:
        >>> train, test = split(np.arange(10.0)[:, None], held_out=0.3, seed=0)
        >>> len(train), len(test)
        (7, 3)
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out}; expected a fraction between 0 and 1, exclusive")
    # Rounded first, because 0.07 · 100 is a little more than 7 in floating point.
    count = math.ceil(round(held_out * len(x), 9))
    if not 0 < count < len(x):
        raise ValueError(
            f"held_out={held_out} of {len(x)} rows leaves {len(x) - count} rows for training and "
            f"{count} held out; both need at least one. Change held_out or add rows"
        )
    order = np.random.default_rng(derive_seed(seed, stream)).permutation(len(x))
    return x[order[count:]], x[order[:count]]


def dequantise_logit(x: np.ndarray, num_levels: int, seed: int) -> np.ndarray:
    """Move integers 0 … K−1 to the real line, by uniform noise and a logit.

        u = (x + U) / K,    U ~ Uniform[0, 1)
        v = λ + (1 − 2λ) u,    y = logit v,    λ = 0.05

    Log-likelihoods of models of y are densities of y, in nats, and compare only with other
    densities of the same y. A density of u follows by log p(u) = log p(y) + Σ log dy/du, where

        dy/du = (1 − 2λ) / (v (1 − v)),

    and E_U log p(u) − D log K is at most the log probability of the D integers.

    Args:
        x: Integers of any shape, in any real dtype.
        num_levels: K, at least 2.
        seed: Fixes the noise.

    Returns:
        y, float64, in the shape of x.

    Raises:
        ValueError: If K is less than 2, or an entry is not an integer from 0 to K − 1.

    Source:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models,
        section 3.1 (noise); Papamakarios, Pavlakou and Murray (2017), Masked autoregressive flow
        for density estimation (logit).

    Example:
        >>> y = dequantise_logit(np.array([[0, 3], [1, 2]]), num_levels=4, seed=0)
        >>> np.floor(logit_to_levels(y, num_levels=4))
        array([[0., 3.],
               [1., 2.]])
    """
    from scipy.special import logit

    _check_num_levels(num_levels)
    if x.dtype.kind not in "fiu":
        raise ValueError(f"x has type {x.dtype}; expected integers 0 to {num_levels - 1}")
    # A NaN fails every comparison, so it counts as bad.
    bad = ~((x >= 0) & (x <= num_levels - 1) & (x == np.floor(x)))
    if bad.any():
        raise ValueError(
            f"x has {int(bad.sum())} of {x.size} entries that are not integers from 0 to "
            f"{num_levels - 1}, the first {x[bad][0]}; check num_levels={num_levels}, or leave "
            "continuous data as they are"
        )
    noise = np.random.default_rng(derive_seed(seed, Stream.DEQUANTISATION)).random(x.shape)
    u = (x + noise) / num_levels
    # λ > 0 keeps v inside (0, 1) even if u rounds to 0 or 1.
    return np.asarray(logit(SQUEEZE + (1.0 - 2.0 * SQUEEZE) * u), dtype=np.float64)


def logit_to_levels(y: np.ndarray, num_levels: int) -> np.ndarray:
    """Return K u in [0, K], the inverse of `dequantise_logit`, for pictures.

    Its integer part is the integer that was dequantised. A model may draw y outside the range of
    the transform; such values are clipped to 0 or K.

    Args:
        y: Transformed values of any shape.
        num_levels: K, at least 2.

    Raises:
        ValueError: If K is less than 2.

    Example:
        >>> logit_to_levels(np.array([-40.0, 0.0, 40.0]), num_levels=4)
        array([0., 2., 4.])
    """
    from scipy.special import expit

    _check_num_levels(num_levels)
    u = (expit(y) - SQUEEZE) / (1.0 - 2.0 * SQUEEZE)
    return np.asarray(num_levels * np.clip(u, 0.0, 1.0), dtype=np.float64)


def _check_num_levels(num_levels: int) -> None:
    if num_levels < 2:
        raise ValueError(f"num_levels is {num_levels}; expected at least 2")


@dataclass(frozen=True)
class Split:
    """A table, and which of its rows are for what.

    Attributes:
        table: All rows.
        train_rows: Places of the training rows.
        held_out_rows: Places of the rows for evaluation.
        validation_rows: Places of the rows that decide when to stop; None for none.
    """

    table: Table
    train_rows: np.ndarray
    held_out_rows: np.ndarray
    validation_rows: np.ndarray | None = None

    @property
    def train(self) -> Table:
        """The training rows."""
        return self.table.take(self.train_rows)

    @property
    def held_out(self) -> Table:
        """The rows for evaluation."""
        return self.table.take(self.held_out_rows)

    @property
    def validation(self) -> Table | None:
        """The rows that decide when to stop."""
        return None if self.validation_rows is None else self.table.take(self.validation_rows)


def split_table(table: Table, held_out: float, validation: float, seed: int) -> Split:
    """Split the rows of a table at random; see `split`.

    Args:
        table: All rows.
        held_out: Fraction of rows for evaluation.
        validation: Fraction of the others that decides when to stop; 0 for none.
        seed: Fixes the split.
    """
    train, test = split(np.arange(len(table)), held_out, seed)
    if not validation:
        return Split(table, train, test)
    train, chosen = split(train, validation, seed, Stream.VALIDATION_SPLIT)
    return Split(table, train, test, chosen)


def split_of_digits(digits: DigitsData, seed: int, validation: float = 0.0) -> Split:
    """Return the digits as a table, with the split that `load_digits_data` made.

    Args:
        digits: The digits.
        seed: Of that split.
        validation: Fraction of the training rows that decides when to stop; 0 for none.
    """
    n, test = len(digits.train), len(digits.test)
    rows = np.concatenate(split(np.arange(n + test), 0.2, seed)) + 1
    height, width = digits.image_shape
    names = tuple(f"pixel[{i},{j}]" for i in range(height) for j in range(width))
    values = np.concatenate([digits.train, digits.test])
    table = Table(values, names, rows, None, ("the handwritten digits of scikit-learn",))
    train, test_rows = np.arange(n), np.arange(n, n + test)
    if not validation:
        return Split(table, train, test_rows)
    train, chosen = split(train, validation, seed, Stream.VALIDATION_SPLIT)
    return Split(table, train, test_rows, chosen)


class DigitsData(NamedTuple):
    """The handwritten digits in the space of `dequantise_logit`, split.

    Attributes:
        train: Training rows (1437, 64).
        test: Held-out rows (360, 64).
        image_shape: Shape of the picture in a row.
        num_levels: K, for `logit_to_levels`.
    """

    train: np.ndarray
    test: np.ndarray
    image_shape: tuple[int, int]
    num_levels: int


def load_digits_data(seed: int) -> DigitsData:
    """Return the 1,797 handwritten digits of scikit-learn, dequantised and split.

    They come with scikit-learn; nothing is downloaded.

    Args:
        seed: Fixes the noise and the split.

    Source:
        Alpaydin and Kaynak (1998), Optical recognition of handwritten digits, UCI repository; the
        test part.

    Example:
        >>> digits = load_digits_data(seed=0)
        >>> digits.train.shape, digits.test.shape
        ((1437, 64), (360, 64))
    """
    from sklearn.datasets import load_digits

    num_levels = 17
    levels = np.asarray(load_digits().data, dtype=np.float64)
    train, test = split(dequantise_logit(levels, num_levels, seed), held_out=0.2, seed=seed)
    return DigitsData(train, test, (8, 8), num_levels)
