# SPDX-License-Identifier: Apache-2.0
"""How a file is read as a table, and what was taken for what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pyro_lvebm.data.arrays import read_numpy
from pyro_lvebm.data.cells import SEPARATORS, hint_of, numbers, quoted
from pyro_lvebm.data.frame import MAX_COLUMNS, Frame, kept, place, too_wide
from pyro_lvebm.data.header import (
    check_unnamed,
    counts_on,
    describe_header,
    index_column,
    is_header,
    names_of,
)
from pyro_lvebm.data.table import Table, listed
from pyro_lvebm.data.text import first_cells, parse, text_of, without_comments

SUFFIXES = (".csv", ".tsv", ".npy", ".npz")


_FEWEST_COUNTED = 10  # rows of which it is no chance that a column numbers them


def read_table(path: Path, frame: Frame | None = None) -> Table:
    r"""Read a table of numbers, one row an observation, and say what was taken for what.

    A `.csv` has commas between columns, a `.tsv` tabs. The first row names columns if it holds
    text, or the numbers 0, 1, … that pandas writes for columns without names, or whole numbers
    that count on by one over columns of which none is whole, such as years. A first column labels
    rows if it is called nothing, `index`, `id` or `row`, and holds text or whole numbers of which
    no two are equal. Cells that are empty or marked, such as `NA`, are missing. A `.npy` holds one
    array, and a `.npz` one or one named `x`. Nothing in a file is executed.

    Args:
        path: A file whose name ends in `.csv`, `.tsv`, `.npy` or `.npz`.
        frame: What the file does not say, or says wrongly.

    Raises:
        ValueError: If the file is missing or damaged, or is no such table. The message names the
            file and the offending row and column, shape, type or count.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "heights.csv"
        ...     _ = path.write_text(",left,right\n0,1.5,2\n1,3,NA\n")
        ...     table = read_table(path)
        >>> table.names, table.labels, table.values.tolist()
        (('left', 'right'), ('0', '1'), [[1.5, 2.0], [3.0, nan]])
    """
    frame = Frame() if frame is None else frame
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        expected = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"
        raise ValueError(f"{path}: cannot read the suffix {suffix!r}; expected {expected}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected one of {', '.join(SUFFIXES)}")
    if suffix in (".npy", ".npz"):
        return _from_array(path, read_numpy(path), frame)
    if frame.sep is None:
        frame = replace(frame, sep="\t" if suffix == ".tsv" else ",")
        if frame.sep == frame.decimal:
            raise ValueError(
                f"{path}: with {frame.decimal!r} as the decimal mark, --sep must say what "
                "separates columns, such as ';'"
            )
    return _from_text(path, frame)


def _from_text(path: Path, frame: Frame) -> Table:
    text, encoding = text_of(path, frame)
    text, skipped = without_comments(path, text, frame)
    sep = frame.sep
    assert sep is not None
    if sep == " ":  # as many as there are
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    lines = text.splitlines()
    first = first_cells(path, text, sep)
    header = is_header(first, frame) if frame.header is None else frame.header
    width = len(first)
    others = [s for s in SEPARATORS if s != sep and lines and s in next(filter(str.strip, lines))]
    if width > MAX_COLUMNS and not frame.columns:
        # Before any cell is looked at: a million of them take seconds.
        raise ValueError(too_wide(path, width - len(frame.drop)))
    cells = parse(path, text, sep, others)
    if frame.header is None and not header:
        header = counts_on(first, cells[1:])
    body = cells[1:] if header else cells
    if not len(body):
        raise ValueError(f"{path}: a header and no rows; expected at least one row of numbers")
    names = names_of(first, header)
    notes = [describe_header(first, header, frame)]
    if encoding:
        notes.append(f"the text is {encoding}")
    if skipped:
        notes.append(f"{skipped} lines that begin with {frame.comment!r} are left out")
    hint = hint_of(body, sep, others, frame.decimal)
    index = index_column(path, names, body, header, frame)
    if frame.index is None and index is not None:
        called = f" {names[index]!r}" if header and names[index] != "column 1" else ""
        notes.append(
            f"the first column{called} labels the rows and is no dimension (--index none takes it "
            "as one)"
        )
    check_unnamed(path, first, header, index, frame)
    columns = kept(path, names, index, frame)
    labels = None if index is None else tuple(str(cell) for cell in body[:, index])
    values = np.empty((len(body), len(columns)))
    for j, column in enumerate(columns):
        values[:, j] = numbers(path, body[:, column], names[column], column, header, frame, hint)
    table = Table(
        values,
        tuple(names[c] for c in columns),
        np.arange(1, len(body) + 1),
        labels,
        tuple(notes),
        named=header,
        label_name=names[index] if header and index is not None and first[index] else None,
    )
    return _finish(path, table)


def _from_array(path: Path, values: np.ndarray, frame: Frame) -> Table:
    if frame.header:
        raise ValueError(f"{path}: an array has no header; --header is for text")
    if values.shape[1] > MAX_COLUMNS and not frame.columns:
        raise ValueError(too_wide(path, values.shape[1] - len(frame.drop)))
    names = [f"x[{j}]" for j in range(values.shape[1])]
    index = None if frame.index in (None, "none") else place(path, names, frame.index)
    labels = None if index is None else tuple(f"{v:g}" for v in values[:, index])
    columns = kept(path, names, index, frame)
    table = Table(
        values[:, columns],
        tuple(names[c] for c in columns),
        np.arange(1, len(values) + 1),
        labels,
        ("an array has no names; columns are x[0], x[1], …",),
        named=False,
    )
    return _finish(path, table)


def _finish(path: Path, table: Table) -> Table:
    """Leave out rows without any number, and refuse columns without any."""
    missing = np.isnan(table.values)
    never = [name for name, gone in zip(table.names, missing.all(0), strict=True) if gone]
    if never:
        raise ValueError(
            f"{path}: {'columns' if len(never) > 1 else 'column'} {listed(never)} hold no number; "
            "leave out what is always missing with --drop"
        )
    notes, hollow = list(table.notes), missing.all(1)
    if hollow.any():
        notes.append(f"{int(hollow.sum())} rows hold no number at all and are left out")
        table = table.take(np.flatnonzero(~hollow))
        missing = missing[~hollow]
    gone = {n: int(k) for n, k in zip(table.names, missing.sum(0), strict=True) if k}
    if gone:
        counted = ", ".join(f"{name} {count}" for name, count in list(gone.items())[:8])
        more = f", and {len(gone) - 8} columns more" if len(gone) > 8 else ""
        notes.append(f"{sum(gone.values())} cells are missing: {counted}{more}")
    counting = numbering(table)
    if counting:
        notes.append(
            f"{listed(counting)} numbers the rows and is taken as a dimension (--index "
            f"{quoted(counting[0])} takes it as labels, --drop leaves it out)"
        )
    n, d = table.values.shape
    head = f"{path.name}: {n} rows of {d} columns: {listed(table.names)}"
    return replace(table, notes=(head, *notes))


def numbering(table: Table) -> list[str]:
    """The columns that number the rows, from 0 or 1, in any order."""
    n = len(table)
    if n < _FEWEST_COUNTED:
        return []
    ordered = np.sort(table.values, axis=0)
    counts = (ordered == np.arange(n)[:, None] + ordered[0]).all(0) & np.isin(ordered[0], (0, 1))
    return [name for name, counted in zip(table.names, counts, strict=True) if counted]
