# SPDX-License-Identifier: Apache-2.0
"""How benchmarks print their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd


def table(rows: Sequence[Any], columns: Sequence[str]) -> str:
    """Return rows with these attributes, among them `seconds` and `short`, as one table of text."""
    frame = pd.DataFrame([[getattr(row, name) for name in columns] for row in rows])
    frame.columns = pd.Index(columns)
    frame["short"] = ["SHORT" if row.short else "" for row in rows]
    frame["seconds"] = frame["seconds"].round(0)
    return frame.to_string(index=False, na_rep="-", float_format=lambda value: f"{value:.4g}")
