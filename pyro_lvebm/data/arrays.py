# SPDX-License-Identifier: Apache-2.0
"""The array in a file of NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_numpy(path: Path) -> np.ndarray:
    """Return the one array (N, D) of a file, or the one named x, as float64.

    Raises:
        ValueError: If there is none, or it holds something else than numbers, or an infinite one.
    """
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
    bad = np.argwhere(np.isinf(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{path}: {len(bad)} of {values.size} values are infinite, first at row {row}, "
            f"column {column} (counted from 0); expected finite numbers, or NaN where one is "
            "missing. Remove those rows"
        )
    return values
