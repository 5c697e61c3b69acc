# SPDX-License-Identifier: Apache-2.0
"""A table of numbers: its cells, the names of its columns, and what is known of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Table:
    """A table of numbers, with what is known of its rows and columns.

    Attributes:
        values: Entries (N, D), float64, NaN where missing.
        names: Names of the columns (D,).
        rows: Numbers of the rows (N,) in the file, from 1, without header and blank lines.
        labels: Labels of the rows (N,) where the file has some; else None.
        notes: What was taken for what, for people.
        named: Whether the names are those of the file.
        label_name: Name of the column that the labels are from, if it had one.
    """

    values: np.ndarray
    names: tuple[str, ...]
    rows: np.ndarray
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    named: bool = True
    label_name: str | None = None

    def __len__(self) -> int:
        return len(self.values)

    def row_labels(self) -> np.ndarray:
        """Labels of the rows (N,), or their numbers where they have none."""
        return self.rows if self.labels is None else np.array(self.labels, dtype=str)

    def take(self, index: np.ndarray) -> Table:
        """Return the table of some rows, by their places (n,)."""
        labels = None if self.labels is None else tuple(self.labels[i] for i in index)
        return replace(self, values=self.values[index], rows=self.rows[index], labels=labels)

    def select(self, names: Sequence[str]) -> Table:
        """Return the table of columns with these names, in this order.

        Raises:
            ValueError: If one is not there.
        """
        absent = [name for name in names if name not in self.names]
        if absent:
            raise ValueError(
                f"the table has no column {listed(absent)}; its columns are {listed(self.names)}"
            )
        order = [self.names.index(name) for name in names]
        return replace(self, values=self.values[:, order], names=tuple(names))


def listed(names: Sequence[str]) -> str:
    """Names for a message, of which the first twelve are shown."""
    shown = ", ".join(map(str, names[:12]))
    return shown + (f", … ({len(names)})" if len(names) > 12 else "")
