# SPDX-License-Identifier: Apache-2.0
"""What names columns and what labels rows."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pyro_lvebm.data.cells import MISSING, is_number, number
from pyro_lvebm.data.frame import Frame, place
from pyro_lvebm.data.table import listed

_INDEX_NAMES = frozenset({"", "index", "id", "row", "row_id", "row id", "rowid", "rownames"})

_UNNAMED = re.compile(r"|Unnamed: [\d.]+")  # pandas calls columns without a name so


def is_header(first: list[str], frame: Frame) -> bool:
    """Say whether a first row names columns: it has text that does not mark a missing value."""
    numeric = [is_number(cell, frame.decimal, frame.thousands) for cell in first]
    missing = [cell.lower() in MISSING for cell in first]
    if not any(numeric) or not all(n or m for n, m in zip(numeric, missing, strict=True)):
        return True
    counted = first[1:] if len(first) > 1 and not first[0] else first
    return len(first) > 1 and counted == [str(k) for k in range(len(counted))]


def counts_on(first: list[str], rest: np.ndarray) -> bool:
    """Say whether a row of numbers counts on by one, over columns none of which is whole."""
    counted = first[1:] if len(first) > 1 and not first[0] else first
    if not len(rest) or not all(cell.isdigit() for cell in counted):
        return False
    numbers = [int(cell) for cell in counted]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return False
    if len(numbers) == 1 and numbers != [0]:
        return False
    below = rest[:, len(first) - len(counted) :]
    return all(any(not _whole(cell) for cell in column) for column in below.T)


def _whole(cell: str) -> bool:
    return cell.strip().lower() in MISSING or cell.strip().lstrip("+-").isdigit()


def names_of(first: list[str], header: bool) -> list[str]:
    """The names of columns, no two of them equal."""
    if not header:
        return [f"column {j + 1}" for j in range(len(first))]
    cleaned = [cell.removeprefix("#").strip() if j == 0 else cell for j, cell in enumerate(first)]
    names: list[str] = []
    for j, name in enumerate(cleaned):
        name = name or f"column {j + 1}"
        copies = names.count(name) + sum(n.startswith(f"{name}.") for n in names)
        names.append(f"{name}.{copies}" if name in names else name)
    return names


def describe_header(first: list[str], header: bool, frame: Frame) -> str:
    """What the first row was taken for, and the option that says otherwise."""
    shown = ",".join(first)[:60]
    if frame.header is not None:
        return "the first row names columns" if header else "the first row is data"
    other = "--no-header takes it as data" if header else "--header takes it as names"
    if header:
        return f"the first row, {shown!r}, names columns ({other})"
    return f"the first row, {shown!r}, is data; there are no names ({other})"


def index_column(
    path: Path, names: list[str], body: np.ndarray, header: bool, frame: Frame
) -> int | None:
    """The column that labels rows, if there is one."""
    if frame.index == "none":
        return None
    if frame.index is not None:
        return place(path, names, frame.index)
    named = {name for spec in frame.columns for name in (names[place(path, names, spec)],)}
    if not header or len(names) < 2 or names[0] in named:
        return None
    plain = names[0].lower()
    if plain not in _INDEX_NAMES | {"column 1"} and not plain.startswith("unnamed: 0"):
        return None
    cells = [str(cell).strip() for cell in body[:, 0]]
    labels = all(cell.isdigit() for cell in cells) or all(
        number(cell, frame.decimal) is None for cell in cells
    )
    return 0 if labels and len(set(cells)) == len(cells) else None


def check_unnamed(
    path: Path, first: list[str], header: bool, index: int | None, frame: Frame
) -> None:
    """Refuse several first columns without names, as pandas writes the levels of an index.

    Raises:
        ValueError: If there are some, beside others with names, and `frame` says nothing of them.
    """
    unnamed = 0
    while unnamed < len(first) and _UNNAMED.fullmatch(first[unnamed]):
        unnamed += 1
    if not header or not 2 <= unnamed < len(first) or frame.index == "none" or frame.columns:
        return
    names = names_of(first, header)
    dropped = {place(path, names, spec) for spec in frame.drop}
    if all(j == index or j in dropped for j in range(unnamed)):
        return
    others = ",".join(str(j + 1) for j in range(1, unnamed))
    raise ValueError(
        f"{path}: the first {unnamed} columns have no names ({listed(names[:unnamed])}), as pandas "
        f"writes an index of {unnamed} levels, or one that was saved twice. --index 1 --drop "
        f"{others} takes the first as labels of the rows, --drop 1,{others} leaves all out, and "
        "--index none takes them as dimensions"
    )
