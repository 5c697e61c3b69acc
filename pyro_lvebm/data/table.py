# SPDX-License-Identifier: Apache-2.0
"""What a table is: its cells as numbers, the names of its columns, and what was taken for what."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

MAX_COLUMNS = 1000
"""Columns of a table that is fitted: a base has a covariance of all of them."""

SUFFIXES = (".csv", ".tsv", ".npy", ".npz")

# What people write for a missing value, in lower case.
_MISSING = frozenset({"", "-", "?", "n/a", "na", "nan", "none", "null", "<na>"})

_INDEX_NAMES = frozenset({"", "index", "id", "row", "row_id", "row id", "rowid", "rownames"})

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


@dataclass(frozen=True)
class Frame:
    """What a user says of the frame of a table; None leaves it to the file.

    Args:
        sep: What separates columns; a comma, or a tab where the name ends in `.tsv`, if None.
        decimal: What separates the decimals of a number.
        header: Whether the first row names columns.
        index: Name, or number from 1, of the column that labels rows and is no dimension; "none"
            for no such column.
        columns: Names, or numbers from 1, of the columns to take; all if empty.
        drop: Names or numbers of columns to leave out.
        encoding: Encoding of the text; UTF-8, or UTF-16 where a byte order mark says so, if None.
    """

    sep: str | None = None
    decimal: str = "."
    header: bool | None = None
    index: str | None = None
    columns: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    encoding: str | None = None

    def __post_init__(self) -> None:
        """Refuse separators that cannot be told apart."""
        for name, value in (("sep", self.sep), ("decimal", self.decimal)):
            if value is not None and len(value) != 1:
                raise ValueError(f"{name} must be one character; got {value!r}")
        if self.sep == self.decimal:
            raise ValueError(f"sep and decimal are both {self.sep!r}; they must differ")


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
    """

    values: np.ndarray
    names: tuple[str, ...]
    rows: np.ndarray
    labels: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    named: bool = True

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
                f"the table has no column {_listed(absent)}; its columns are {_listed(self.names)}"
            )
        order = [self.names.index(name) for name in names]
        return replace(self, values=self.values[:, order], names=tuple(names))


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
        return _from_array(path, _read_numpy(path), frame)
    if frame.sep is None:
        frame = replace(frame, sep="\t" if suffix == ".tsv" else ",")
        if frame.sep == frame.decimal:
            raise ValueError(
                f"{path}: with {frame.decimal!r} as the decimal mark, --sep must say what "
                "separates columns, such as ';'"
            )
    return _from_text(path, frame)


def _from_text(path: Path, frame: Frame) -> Table:
    text, encoding = _text(path, frame)
    sep = frame.sep
    assert sep is not None
    if sep == " ":  # as many as there are
        text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    lines = text.splitlines()
    first = _first_cells(path, text, sep)
    header = _is_header(first, frame) if frame.header is None else frame.header
    width = len(first)
    others = [s for s in _SEPARATORS if s != sep and lines and s in next(filter(str.strip, lines))]
    if width > MAX_COLUMNS and not frame.columns:
        # Before any cell is looked at: a million of them take seconds.
        raise ValueError(_too_wide(path, width - len(frame.drop)))
    cells = _parse(path, text, sep, others)
    if frame.header is None and not header:
        header = _counts_on(first, cells[1:])
    body = cells[1:] if header else cells
    if not len(body):
        raise ValueError(f"{path}: a header and no rows; expected at least one row of numbers")
    names = _names(first, header)
    notes = [_describe_header(first, header, frame)]
    if encoding:
        notes.append(f"the text is {encoding}")
    hint = _hint(body, sep, others, frame.decimal)
    index = _index(path, names, body, header, frame)
    if frame.index is None and index is not None:
        called = f" {names[index]!r}" if header and names[index] != "column 1" else ""
        notes.append(
            f"the first column{called} labels the rows and is no dimension (--index none takes it "
            "as one)"
        )
    kept = _kept(path, names, index, frame)
    labels = None if index is None else tuple(str(cell) for cell in body[:, index])
    values = np.empty((len(body), len(kept)))
    for j, column in enumerate(kept):
        values[:, j] = _numbers(path, body[:, column], names[column], column, header, frame, hint)
    table = Table(
        values,
        tuple(names[c] for c in kept),
        np.arange(1, len(body) + 1),
        labels,
        tuple(notes),
        named=header,
    )
    return _finish(path, table)


def _from_array(path: Path, values: np.ndarray, frame: Frame) -> Table:
    if frame.header:
        raise ValueError(f"{path}: an array has no header; --header is for text")
    if values.shape[1] > MAX_COLUMNS and not frame.columns:
        raise ValueError(_too_wide(path, values.shape[1] - len(frame.drop)))
    names = [f"x[{j}]" for j in range(values.shape[1])]
    index = None if frame.index in (None, "none") else _place(path, names, frame.index)
    labels = None if index is None else tuple(f"{v:g}" for v in values[:, index])
    kept = _kept(path, names, index, frame)
    table = Table(
        values[:, kept],
        tuple(names[c] for c in kept),
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
            f"{path}: {'columns' if len(never) > 1 else 'column'} {_listed(never)} hold no number; "
            "leave out what is always missing with --drop"
        )
    notes, hollow = list(table.notes), missing.all(1)
    if hollow.any():
        notes.append(f"{int(hollow.sum())} rows hold no number at all and are left out")
        table = table.take(np.flatnonzero(~hollow))
        missing = missing[~hollow]
    gone = {n: int(k) for n, k in zip(table.names, missing.sum(0), strict=True) if k}
    if gone:
        listed = ", ".join(f"{name} {count}" for name, count in list(gone.items())[:8])
        more = f", and {len(gone) - 8} columns more" if len(gone) > 8 else ""
        notes.append(f"{sum(gone.values())} cells are missing: {listed}{more}")
    n, d = table.values.shape
    head = f"{path.name}: {n} rows of {d} columns: {_listed(table.names)}"
    return replace(table, notes=(head, *notes))


def _text(path: Path, frame: Frame) -> tuple[str, str]:
    """The text of a file, and its encoding where that is worth a word."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    marked = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = frame.encoding or ("utf-16" if marked else "utf-8-sig")
    try:
        text = raw.decode(encoding)
    except LookupError:
        raise ValueError(f"{path}: no encoding is called {encoding!r}") from None
    except UnicodeError as error:
        what = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{path}: not {what} text ({error}); name its encoding, as in --encoding latin-1, or "
            "save it as UTF-8"
        ) from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected rows of numbers")
    return text, "" if encoding == "utf-8-sig" else encoding.upper()


def _first_cells(path: Path, text: str, sep: str) -> list[str]:
    try:
        with_cells = (row for row in csv.reader(text.splitlines(), delimiter=sep) if row)
        return [cell.strip() for cell in next(with_cells, [""])]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table: {error}") from error


def _parse(path: Path, text: str, sep: str, others: list[str]) -> np.ndarray:
    """Cells (rows, columns) as text."""
    import io

    import pandas as pd

    found = ""
    if others:
        decimal = " --decimal ','" * (sep == "," and re.search(r"\d,\d", text) is not None)
        found = f" The first row has {_SEPARATORS[others[0]]}: give --sep {others[0]!r}{decimal}?"
    try:
        # Text, because pandas would turn ragged rows and marks such as "NA" into NaN unasked.
        cells = pd.read_csv(
            io.StringIO(text), header=None, dtype=str, keep_default_na=False, sep=sep
        ).to_numpy(dtype=object)
    except pd.errors.EmptyDataError:
        raise ValueError(f"{path}: the file is empty; expected rows of numbers") from None
    except pd.errors.ParserError as error:
        raise ValueError(
            f"{path}: not a table: {str(error).strip()}. Every row must have as many cells as the "
            f"first.{found}"
        ) from error
    short = _short_row(text, sep, cells.shape[1])
    if short:
        raise ValueError(
            f"{path}: row {short[0]} has {short[1]} of {cells.shape[1]} cells; a row that is too "
            f"short cannot tell which are missing. Separate empty cells, too.{found}"
        )
    return np.asarray(cells)


def _short_row(text: str, sep: str, width: int) -> tuple[int, int] | None:
    """Number and cells of the first row that is too short, which pandas pads without a word."""
    try:
        rows = [row for row in csv.reader(text.splitlines(keepends=True), delimiter=sep) if row]
    except csv.Error:
        return None
    for number, row in enumerate(rows, 1):
        if len(row) < width and (len(row) > 1 or row[0].strip()):
            return number, len(row)
    return None


def _is_header(first: list[str], frame: Frame) -> bool:
    """Say whether a first row names columns: it has text that does not mark a missing value."""
    numeric = [_number(cell, frame.decimal) is not None for cell in first]
    missing = [cell.lower() in _MISSING for cell in first]
    if not any(numeric) or not all(n or m for n, m in zip(numeric, missing, strict=True)):
        return True
    counted = first[1:] if len(first) > 1 and not first[0] else first
    return len(first) > 1 and counted == [str(k) for k in range(len(counted))]


def _counts_on(first: list[str], rest: np.ndarray) -> bool:
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
    return cell.strip().lower() in _MISSING or cell.strip().lstrip("+-").isdigit()


def _names(first: list[str], header: bool) -> list[str]:
    if not header:
        return [f"column {j + 1}" for j in range(len(first))]
    cleaned = [cell.removeprefix("#").strip() if j == 0 else cell for j, cell in enumerate(first)]
    names: list[str] = []
    for j, name in enumerate(cleaned):
        name = name or f"column {j + 1}"
        copies = names.count(name) + sum(n.startswith(f"{name}.") for n in names)
        names.append(f"{name}.{copies}" if name in names else name)
    return names


def _describe_header(first: list[str], header: bool, frame: Frame) -> str:
    shown = ",".join(first)[:60]
    if frame.header is not None:
        return "the first row names columns" if header else "the first row is data"
    other = "--no-header takes it as data" if header else "--header takes it as names"
    if header:
        return f"the first row, {shown!r}, names columns ({other})"
    return f"the first row, {shown!r}, is data; there are no names ({other})"


def _index(
    path: Path, names: list[str], body: np.ndarray, header: bool, frame: Frame
) -> int | None:
    """The column that labels rows, if there is one."""
    if frame.index == "none":
        return None
    if frame.index is not None:
        return _place(path, names, frame.index)
    named = {name for spec in frame.columns for name in (names[_place(path, names, spec)],)}
    if not header or len(names) < 2 or names[0] in named:
        return None
    plain = names[0].lower()
    if plain not in _INDEX_NAMES | {"column 1"} and not plain.startswith("unnamed: 0"):
        return None
    cells = [str(cell).strip() for cell in body[:, 0]]
    labels = all(cell.isdigit() for cell in cells) or all(
        _number(cell, frame.decimal) is None for cell in cells
    )
    return 0 if labels and len(set(cells)) == len(cells) else None


def _place(path: Path, names: list[str], spec: str) -> int:
    """The place of a column that is given by name, or by number from 1."""
    if spec in names:
        return names.index(spec)
    if spec.isdigit() and 1 <= int(spec) <= len(names):
        return int(spec) - 1
    raise ValueError(
        f"{path}: no column {spec!r}; columns are {_listed(names)}, or numbers 1 … {len(names)}"
    )


def _kept(path: Path, names: list[str], index: int | None, frame: Frame) -> list[int]:
    chosen = [_place(path, names, spec) for spec in frame.columns] or [
        j for j in range(len(names)) if j != index
    ]
    dropped = {_place(path, names, spec) for spec in frame.drop}
    kept = [j for j in dict.fromkeys(chosen) if j not in dropped]
    if not kept:
        raise ValueError(f"{path}: no column is left; columns are {_listed(names)}")
    if len(kept) > MAX_COLUMNS:
        raise ValueError(_too_wide(path, len(kept)))
    return kept


def _too_wide(path: Path, width: int) -> str:
    return (
        f"{path}: has {width} columns; at most {MAX_COLUMNS} are fitted. Take some of them with "
        "--columns, or reduce them, as by principal components"
    )


def _numbers(
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
        value = _number(cell, frame.decimal)
        if value is not None and not math.isnan(value):
            found[row] = value
        elif str(cell).strip().lower() not in _MISSING:
            bad.append(row)
    bad += np.flatnonzero(np.isinf(found)).tolist()
    if not bad:
        return found
    row = min(bad)
    cure = hint or (
        f"Leave the column out with --drop {_quoted(name)}, let it label rows with --index "
        f"{_quoted(name)}, or correct or remove those rows"
    )
    raise ValueError(
        f"{path}: the cell in row {row + header + 1}, column {column + 1}"
        f"{f' ({name})' if header else ''} holds {str(cells[row])[:40]!r}; expected a finite "
        f"number, or nothing or NA where it is missing. {len(bad)} of {len(cells)} cells of the "
        "column are neither. (Rows are counted from 1, with the header and without blank lines.) "
        f"{cure}"
    )


def _hint(body: np.ndarray, sep: str, others: list[str], decimal: str) -> str:
    """What the cells say of separators that were not expected."""
    sample = [str(cell).strip() for cell in body[:20].ravel()[:2000]]
    split = next((s for s in others if any(s in cell for cell in sample)), None)
    comma = decimal == "." and sep != "," and any(_is_number(c, ",") and "," in c for c in sample)
    if split is None and decimal == ".":
        comma = comma or any(_is_number(c, ",") and "," in c for c in sample)
    if split is not None:
        parts = [part.strip() for cell in sample for part in cell.split(split)]
        # Under commas as separators, those of decimals have split the numbers.
        also = (sep == "," and body.shape[1] > 1) or any(
            "," in part and _is_number(part, ",") for part in parts
        )
        return (
            f"{_SEPARATORS[split].capitalize()} seem to separate columns: give --sep {split!r}"
            + (" --decimal ','" if also else "")
        )
    spaced = (cell.split() for cell in sample)
    if any(len(parts) > 1 and all(_is_number(p, decimal) for p in parts) for parts in spaced):
        return "Spaces seem to separate columns: give --sep ' '"
    return "Commas seem to mark decimals: give --decimal ','" if comma else ""


def _is_number(cell: str, decimal: str) -> bool:
    return _number(cell, decimal) is not None


def _number(cell: object, decimal: str = ".") -> float | None:
    """The number in a cell; None where it holds none."""
    text = str(cell)
    # Python reads "2020_01" as 202001, which in a table is a label.
    if "_" in text or (decimal != "." and "." in text):
        return None
    try:
        return float(text.replace(decimal, "."))
    except ValueError:
        return None


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(str, names[:12]))
    return shown + (f", … ({len(names)})" if len(names) > 12 else "")


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
    bad = np.argwhere(np.isinf(values))
    if len(bad):
        row, column = (int(i) for i in bad[0])
        raise ValueError(
            f"{path}: {len(bad)} of {values.size} values are infinite, first at row {row}, "
            f"column {column} (counted from 0); expected finite numbers, or NaN where one is "
            "missing. Remove those rows"
        )
    return values
