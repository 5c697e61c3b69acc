# SPDX-License-Identifier: Apache-2.0
"""The progress of a fit: a bar on a terminal or in a notebook, and lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any

from tqdm.auto import trange

_EVERY = 5.0
"""Seconds from one line to the next."""

_LINE = "{desc}: {n_fmt}/{total_fmt} steps, {elapsed} so far, {remaining} left{postfix}\n"


def look_of_a_bar() -> dict[str, Any]:
    """Return options of `tqdm`: where standard error is no terminal, a line every few seconds.

    A bar would fill the log of a batch job.
    """
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return {}
    return {"bar_format": _LINE, "mininterval": _EVERY, "maxinterval": 2.0 * _EVERY}


def step_bar(num_steps: int, progress: bool, description: str, done: int = 0) -> Any:
    """Return the steps done, …, num_steps − 1 as a `tqdm` iterator, which says how far it is."""
    return trange(
        done,
        num_steps,
        initial=done,
        total=num_steps,
        disable=not progress,
        desc=description,
        unit="step",
        **look_of_a_bar(),
    )
