# SPDX-License-Identifier: Apache-2.0
"""The cells of a text, each as text."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from pyro_lvebm.data.cells import SEPARATORS
from pyro_lvebm.data.frame import Frame
from pyro_lvebm.data.header import is_header


def text_of(path: Path, frame: Frame) -> tuple[str, str]:
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


def without_comments(path: Path, text: str, frame: Frame) -> tuple[str, int]:
    """The text without lines that are comments, and how many there were.

    Raises:
        ValueError: If some lines, but not all rows, begin with # or %, and `frame` does not say
            what they are. A first line that names the columns of the others is no comment, as
            `numpy.savetxt` writes it.
    """
    if frame.comment == "none":
        return text, 0
    lines = text.splitlines(keepends=True)
    if frame.comment is not None:
        rows = [line for line in lines if not line.lstrip().startswith(frame.comment)]
        if not any(map(str.strip, rows)):
            raise ValueError(f"{path}: every line begins with {frame.comment!r}; no rows are left")
        return "".join(rows), len(lines) - len(rows)
    for mark in "#%":
        marked = [k for k, line in enumerate(lines) if line.lstrip().startswith(mark)]
        plain = [line for k, line in enumerate(lines) if k not in set(marked) and line.strip()]
        if marked and plain and not _are_rows(path, lines, marked, plain, frame):
            numbers = ", ".join(str(k + 1) for k in marked[:5]) + ", …" * (len(marked) > 5)
            raise ValueError(
                f"{path}: lines ({numbers}) begin with {mark!r}, the first being "
                f"{lines[marked[0]].strip()[:40]!r}. If they are comments, --comment {mark!r} "
                "leaves them out; --comment none takes them as rows"
            )
    return text, 0


def _are_rows(
    path: Path, lines: list[str], marked: list[int], plain: list[str], frame: Frame
) -> bool:
    """Say whether marked lines are a header above all rows, or all rows under a header."""
    if len(plain) == 1 and marked[0] > lines.index(plain[0]):
        return True
    if any(map(str.strip, lines[: marked[0]])) or len(marked) > 1:
        return False
    sep = frame.sep or ","
    above, below = (first_cells(path, line, sep) for line in (lines[marked[0]], plain[0]))
    return len(above) == len(below) and not is_header(below, frame)


def first_cells(path: Path, text: str, sep: str) -> list[str]:
    """The cells of the first row that is not blank."""
    try:
        with_cells = (row for row in csv.reader(text.splitlines(), delimiter=sep) if row)
        return [cell.strip() for cell in next(with_cells, [""])]
    except csv.Error as error:
        raise ValueError(f"{path}: not a table: {error}") from error


def parse(path: Path, text: str, sep: str, others: list[str]) -> np.ndarray:
    """Cells (rows, columns) as text."""
    import io

    import pandas as pd

    found = ""
    if others:
        decimal = " --decimal ','" * (sep == "," and re.search(r"\d,\d", text) is not None)
        found = f" The first row has {SEPARATORS[others[0]]}: give --sep {others[0]!r}{decimal}?"
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
