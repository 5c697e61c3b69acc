# SPDX-License-Identifier: Apache-2.0
"""What is done to a table before it is x, as JSON in the model file, and back again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyro_lvebm.data.observations import dequantise_logit, logit_to_levels
from pyro_lvebm.data.repeats import dequantise, resolution
from pyro_lvebm.data.table import Table

Transforms = Sequence[Mapping[str, Any]]


def dequantisation(table: Table, columns: Sequence[str]) -> dict[str, Any]:
    """Return the transform that spreads the values of some columns over their grids.

    Args:
        table: What was read.
        columns: Names of columns; "all" for every column whose values lie on a grid.

    Raises:
        ValueError: If a column is not there, or its values lie on no grid.
    """
    everything = list(columns) == ["all"]
    table.select([] if everything else list(columns))
    steps: dict[str, float] = {}
    for name, column in zip(table.names, table.values.T, strict=True):
        if not everything and name not in columns:
            continue
        try:
            steps[name] = resolution(column)
        except ValueError as error:
            if not everything:
                raise ValueError(f"--dequantise {name}: {error}") from None
    return {"name": "dequantise", "steps": steps}


def logit_of_levels(num_levels: int) -> dict[str, Any]:
    """Return the transform `dequantise_logit`."""
    return {"name": "logit of levels", "num_levels": num_levels}


def apply(
    transforms: Transforms, values: np.ndarray, names: Sequence[str], seed: int
) -> np.ndarray:
    """Return x (N, D) for values (N, D) of a table.

    Raises:
        ValueError: If a transform is unknown, or does not fit the values.
    """
    for transform in transforms:
        if transform["name"] == "dequantise":
            values = dequantise(values, _steps(transform, names), seed)
        elif transform["name"] == "logit of levels":
            values = dequantise_logit(values, int(transform["num_levels"]), seed)
        else:
            raise ValueError(f"no transform is called {transform['name']!r}")
    return values


def undo(transforms: Transforms, x: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Return values (N, D) of a table for x (N, D): rounded to the grids that they had.

    Example:
        >>> undo([{"name": "dequantise", "steps": {"a": 0.5}}], np.array([[1.2, 1.2]]), ["a", "b"])
        array([[1. , 1.2]])
    """
    for transform in reversed(transforms):
        if transform["name"] == "dequantise":
            steps = _steps(transform, names)
            safe = np.where(steps > 0, steps, 1.0)
            x = np.where(steps > 0, np.round(x / safe) * safe, x)
        elif transform["name"] == "logit of levels":
            levels = int(transform["num_levels"])
            x = np.clip(np.floor(logit_to_levels(x, levels)), 0, levels - 1)
        else:
            raise ValueError(f"no transform is called {transform['name']!r}")
    return x


def _steps(transform: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    return np.array([float(transform["steps"].get(name, 0.0)) for name in names])
