# SPDX-License-Identifier: Apache-2.0
"""Observations: read from files, split, and moved from integer levels to the real line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from sklearn.datasets import load_digits

from pyro_lvebm.rng import Stream, derive_seed

SQUEEZE = 0.05
"""λ of the logit transform. It keeps |y| below 2.95, so that noise on empty pixels has no tails."""

# What people write for a missing value, in lower case. Beside a number they mark a row of data.
_MISSING = frozenset({"", "-", "?", "n/a", "na", "nan", "none", "null"})


def read_observations(path: Path) -> np.ndarray:
    """Read a table of finite numbers, one row an observation.

    A `.csv` has commas between columns and may have a header. The first row is a header unless it
    holds nothing but numbers and marks of missing values, such as `NA`. A `.npy` holds one array,
    and a `.npz` one array or one named `x`. Nothing in a file is executed.

    Args:
        path: A file whose name ends in `.csv`, `.npy` or `.npz`.

    Returns:
        The observations (N, D) as float64, N and D at least 1.

    Raises:
        ValueError: If the file is missing or damaged, or is no such table. The message names the
            file and the offending row and column, shape, type or count.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = Path(directory) / "heights.csv"
        ...     np.savetxt(path, [[1, 2], [3, 4.5]], delimiter=",", header="left,right")
        ...     read_observations(path)
        array([[1. , 2. ],
               [3. , 4.5]])
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".npy", ".npz"):
        raise ValueError(f"{path}: cannot read the suffix {suffix!r}; expected .csv, .npy or .npz")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a .csv, .npy or .npz file")
    return _read_csv(path) if suffix == ".csv" else _read_numpy(path)


def _read_csv(path: Path) -> np.ndarray:
    try:
        # Text, because pandas would turn ragged rows and marks such as "NA" into NaN unasked.
        frame = pd.read_csv(
            path, header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty; expected rows of numbers") from None
    except pd.errors.ParserError as error:
        raise ValueError(
            f"{path}: not a table: {str(error).strip()}. Every row must have as many cells as the "
            "first"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    cells = [[str(cell) for cell in row] for row in frame.to_numpy(dtype=object)]
    header = int(_is_header(cells[0]))
    if len(cells) == header:
        raise ValueError(f"{path}: a header and no rows; expected at least one row of numbers")
    values = np.array([[_number(cell) for cell in row] for row in cells[header:]], dtype=np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        cell = cells[row + header][column]
        found = f"holds {cell[:40]!r}" if cell.strip() else "is empty, or its row is too short"
        raise ValueError(
            f"{path}: the cell in row {row + header + 1}, column {column + 1} {found}; expected a "
            f"finite number. {len(bad)} of {values.size} cells are not. (Rows are counted from 1, "
            "with the header and without blank lines; commas separate columns.) Remove or impute "
            "those rows"
        )
    return values


def _is_header(row: list[str]) -> bool:
    """Say whether a first row names columns: it has text that does not mark a missing value."""
    numeric = [_is_number(cell) for cell in row]
    missing = [cell.strip().lower() in _MISSING for cell in row]
    is_data = any(numeric) and all(n or m for n, m in zip(numeric, missing, strict=True))
    return not is_data


def _is_number(cell: str) -> bool:
    # Python reads "2020_01" as 202001, which in a table is a label.
    if "_" in cell:
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _number(cell: str) -> float:
    """Return the number in a cell, and NaN where it holds none."""
    return float(cell) if _is_number(cell) else math.nan


def _read_numpy(path: Path) -> np.ndarray:
    try:
        # Opened here, because NumPy leaves a damaged archive open.
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                names = list(loaded.files)
                name = "x" if "x" in names else names[0] if len(names) == 1 else None
                array = None if name is None else loaded[name]
            else:
                names, array = [], loaded
    # A damaged or foreign file raises a dozen types, from zlib's to the parser's.
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as NumPy data: {error}. Expected a numeric array written by "
            "numpy.save or numpy.savez; pickled objects are not read"
        ) from error
    if array is None:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise ValueError(
            f"{path}: holds {len(names)} arrays ({listed}); expected one, or one named x"
        )
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        found = f"type {array.dtype}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(f"{path}: has {found}; expected real or integer numbers")
    if array.ndim != 2:
        hint = ". For one column, save array.reshape(-1, 1)" if array.ndim == 1 else ""
        raise ValueError(
            f"{path}: has shape {array.shape}; expected (N, D), one row an observation{hint}"
        )
    if array.size == 0:
        raise ValueError(f"{path}: is empty: shape {array.shape}; expected at least one value")
    # An extended float may be too large for float64; it then becomes infinite, and is reported.
    with np.errstate(over="ignore"):
        values = array.astype(np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{path}: {len(bad)} of {values.size} values are NaN or infinite, first at row {row}, "
            f"column {column} (counted from 0); expected finite numbers. Remove or impute them"
        )
    return values


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
    _check_num_levels(num_levels)
    u = (expit(y) - SQUEEZE) / (1.0 - 2.0 * SQUEEZE)
    return np.asarray(num_levels * np.clip(u, 0.0, 1.0), dtype=np.float64)


def _check_num_levels(num_levels: int) -> None:
    if num_levels < 2:
        raise ValueError(f"num_levels is {num_levels}; expected at least 2")


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
    num_levels = 17
    levels = np.asarray(load_digits().data, dtype=np.float64)
    train, test = split(dequantise_logit(levels, num_levels, seed), held_out=0.2, seed=seed)
    return DigitsData(train, test, (8, 8), num_levels)
