# SPDX-License-Identifier: Apache-2.0
"""Cells as numbers, and what cells say of separators that were not expected."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np

from pyro_lvebm.data.frame import Frame

# What people write for a missing value, in lower case.
MISSING = frozenset({"", "-", "?", "n/a", "na", "nan", "none", "null", "<na>"})

_GROUPING = {
    ",": "Commas",
    ".": "Full stops",
    "'": "Apostrophes",
    "\u2019": "Apostrophes",
    " ": "Spaces",
    "\xa0": "Spaces that do not break",
    "\u202f": "Narrow spaces",
}

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def numbers(
    path: Path,
    cells: np.ndarray,
    name: str,
    column: int,
    header: bool,
    frame: Frame,
    hint: str,
) -> np.ndarray:
    """The numbers of a column, NaN where missing."""
    found = np.full(len(cells), np.nan)
    bad: list[int] = []
    for row, cell in enumerate(cells):
        value = number(cell, frame.decimal, frame.thousands)
        if value is not None and not math.isnan(value):
            found[row] = value
        elif str(cell).strip().lower() not in MISSING:
            bad.append(row)
    bad += np.flatnonzero(np.isinf(found)).tolist()
    if not bad:
        return found
    row = min(bad)
    grouped = _thousands([str(cells[k]).strip() for k in bad[:1000]], frame.decimal)
    cure = (
        ("" if "--sep" in hint else grouped)
        or hint
        or (
            f"Leave the column out with --drop {quoted(name)}, let it label rows with --index "
            f"{quoted(name)}, or correct or remove those rows"
        )
    )
    raise ValueError(
        f"{path}: the cell in row {row + header + 1}, column {column + 1}"
        f"{f' ({name})' if header else ''} holds {str(cells[row])[:40]!r}; expected a finite "
        f"number, or nothing or NA where it is missing. {len(bad)} of {len(cells)} cells of the "
        "column are neither. (Rows are counted from 1, with the header and without blank lines.) "
        f"{cure}"
    )


def hint_of(body: np.ndarray, sep: str, others: list[str], decimal: str) -> str:
    """What the cells say of separators that were not expected."""
    sample = [str(cell).strip() for cell in body[:20].ravel()[:2000]]
    split = next((s for s in others if any(s in cell for cell in sample)), None)
    comma = decimal == "." and sep != "," and any(is_number(c, ",") and "," in c for c in sample)
    if split is None and decimal == ".":
        comma = comma or any(is_number(c, ",") and "," in c for c in sample)
    if split is not None:
        parts = [part.strip() for cell in sample for part in cell.split(split)]
        # Under commas as separators, those of decimals have split the numbers.
        also = (sep == "," and body.shape[1] > 1) or any(
            "," in part and is_number(part, ",") for part in parts
        )
        return (
            f"{SEPARATORS[split].capitalize()} seem to separate columns: give --sep {split!r}"
            + (" --decimal ','" if also else "")
        )
    spaced = (cell.split() for cell in sample)
    if any(len(parts) > 1 and all(is_number(p, decimal) for p in parts) for parts in spaced):
        return "Spaces seem to separate columns: give --sep ' '"
    return "Commas seem to mark decimals: give --decimal ','" if comma else ""


def _thousands(cells: list[str], decimal: str) -> str:
    """What cells that are no numbers say of marks between thousands."""
    for mark in _GROUPING:
        for point in dict.fromkeys((decimal, ".", ",")):
            if mark == point or not any(_grouped(c, point, mark) for c in cells):
                continue
            # 1,234 may be one and a bit; 1,234.5 and 1,234,567 may not.
            sure = (
                mark != ","
                or point != decimal
                or any(point in c or c.count(mark) > 1 for c in cells if _grouped(c, point, mark))
            )
            if point != decimal and not any(point in c for c in cells):
                continue
            also = "" if point == decimal else f" --decimal {point!r}"
            return f"{_GROUPING[mark]} seem to mark thousands: give --thousands {mark!r}{also}" + (
                "" if sure else "; or decimals: give --decimal ','"
            )
    return ""


def _grouped(cell: str, decimal: str, mark: str) -> bool:
    """Say whether the digits of a number are in groups of three."""
    groups = rf"[+-]?\d{{1,3}}(?:{re.escape(mark)}\d{{3}})+(?:{re.escape(decimal)}\d*)?"
    return re.fullmatch(groups, cell.strip()) is not None


def is_number(cell: str, decimal: str, thousands: str | None = None) -> bool:
    """Say whether a cell holds a number, or nan."""
    return number(cell, decimal, thousands) is not None


def number(cell: object, decimal: str = ".", thousands: str | None = None) -> float | None:
    """The number in a cell; None where it holds none."""
    text = str(cell)
    if thousands is not None and _grouped(text, decimal, thousands):
        text = text.replace(thousands, "")
    # Python reads "2020_01" as 202001, which in a table is a label.
    if "_" in text or (decimal != "." and "." in text):
        return None
    try:
        return float(text.replace(decimal, "."))
    except ValueError:
        return None


def quoted(name: str) -> str:
    """A name as the command line takes it."""
    return f"'{name}'" if " " in name else name
