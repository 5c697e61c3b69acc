# SPDX-License-Identifier: Apache-2.0
"""What a user says of the frame of a table, and which columns that leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyro_lvebm.data.table import listed

MAX_COLUMNS = 1000
"""Columns of a table that is fitted: a base has a covariance of all of them."""


@dataclass(frozen=True)
class Frame:
    """What a user says of the frame of a table; None leaves it to the file.

    Args:
        sep: What separates columns; a comma, or a tab where the name ends in `.tsv`, if None.
        decimal: What separates the decimals of a number.
        thousands: What groups the digits of a number by three, as the comma of 1,234.5.
        header: Whether the first row names columns.
        index: Name, or number from 1, of the column that labels rows and is no dimension; "none"
            for no such column.
        columns: Names, or numbers from 1, of the columns to take; all if empty.
        drop: Names or numbers of columns to leave out.
        comment: Lines that begin with it are left out; "none" takes all lines as rows. If None,
            lines that look like comments are refused.
        encoding: Encoding of the text; UTF-8, or UTF-16 where a byte order mark says so, if None.
    """

    sep: str | None = None
    decimal: str = "."
    header: bool | None = None
    index: str | None = None
    columns: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    encoding: str | None = None
    thousands: str | None = None
    comment: str | None = None

    def __post_init__(self) -> None:
        """Refuse separators that cannot be told apart."""
        marks = (("sep", self.sep), ("decimal", self.decimal), ("thousands", self.thousands))
        for name, value in marks:
            if value is not None and len(value) != 1:
                raise ValueError(f"{name} must be one character; got {value!r}")
        for name, value in (("sep", self.sep), ("thousands", self.thousands)):
            if value == self.decimal:
                raise ValueError(f"{name} and decimal are both {value!r}; they must differ")
        if self.comment == "":
            raise ValueError("comment is empty; expected what comments begin with, such as '#'")


def place(path: Path, names: list[str], spec: str) -> int:
    """The place of a column that is given by name, or by number from 1."""
    if spec in names:
        return names.index(spec)
    if spec.isdigit() and 1 <= int(spec) <= len(names):
        return int(spec) - 1
    raise ValueError(
        f"{path}: no column {spec!r}; columns are {listed(names)}, or numbers 1 … {len(names)}"
    )


def kept(path: Path, names: list[str], index: int | None, frame: Frame) -> list[int]:
    """The places of the columns to take, in their order.

    Raises:
        ValueError: If there are none, too many, or one is named that is not there.
    """
    chosen = [place(path, names, spec) for spec in frame.columns] or [
        j for j in range(len(names)) if j != index
    ]
    dropped = {place(path, names, spec) for spec in frame.drop}
    kept = [j for j in dict.fromkeys(chosen) if j not in dropped]
    if not kept:
        raise ValueError(f"{path}: no column is left; columns are {listed(names)}")
    if len(kept) > MAX_COLUMNS:
        raise ValueError(too_wide(path, len(kept)))
    return kept


def too_wide(path: Path, width: int) -> str:
    """What to say of a table with too many columns."""
    return (
        f"{path}: has {width} columns; at most {MAX_COLUMNS} are fitted. Take some of them with "
        "--columns, or reduce them, as by principal components"
    )
