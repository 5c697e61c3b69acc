# SPDX-License-Identifier: Apache-2.0
"""Checks of data at the doors of the package."""

from __future__ import annotations

import inspect
import warnings

import torch
from torch import Tensor


class DataError(ValueError):
    """Observations that no model can use; parameters have no part in it."""


class TrainingWarning(UserWarning):
    """Training goes on, but its numbers are not to be trusted; the text says what to do."""


def warn_of_training(text: str) -> None:
    """Warn that numbers are not to be trusted, at the line outside this package that led here."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").startswith("pyro_lvebm"):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, TrainingWarning, stacklevel=level)


def check_data(x: Tensor, event_shape: torch.Size | None = None, *, missing: bool = False) -> None:
    """Raise a DataError unless x is a non-empty, finite, floating-point tensor of events.

    Args:
        x: Data (*b, *event_shape).
        event_shape: Expected trailing shape; None accepts any with at least one row axis.
        missing: Whether entries may be NaN.
    """
    if not isinstance(x, Tensor):
        raise DataError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise DataError(
            f"x must be floating point; got {x.dtype}. Dequantise counts and integers first"
        )
    if event_shape is not None:
        trailing = x.shape[max(0, x.dim() - len(event_shape)) :]
        if trailing != event_shape:
            raise DataError(
                f"x has shape {tuple(x.shape)}; expected trailing shape {tuple(event_shape)}"
            )
    elif x.dim() < 2:
        raise DataError(
            f"x must have shape (N, ...) with one row an observation; got {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise DataError(f"x is empty: shape {tuple(x.shape)}; expected at least one observation")
    bad = x.isinf() if missing else ~x.isfinite()
    if bad.any():
        raise DataError(
            f"x has {int(bad.sum())} {'' if missing else 'NaN or '}infinite entries of "
            f"{x.numel()}; remove those rows, or set entries that are missing to NaN where NaN "
            "is welcome, as in lvebm(...), LVEBM.from_data and log_evidence"
        )


def check_rows(x: Tensor, event_shape: torch.Size, *, missing: bool = False) -> None:
    """Raise a DataError unless x is data with exactly one row axis, (N, *event_shape)."""
    check_data(x, event_shape, missing=missing)
    if x.dim() != 1 + len(event_shape):
        raise DataError(f"x has shape {tuple(x.shape)}; expected (N, *{tuple(event_shape)})")


def check_at_least(least: int, **values: int) -> None:
    """Raise a ValueError unless every one of the named numbers is at least `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
