# SPDX-License-Identifier: Apache-2.0
"""Checks of data at the doors of the package."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

COUPLED = (
    "Normalise within a row (LayerNorm), or call .eval() on the {} if its statistics are meant to "
    "stay"
)
"""What to do where a network couples the rows of its batch."""


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


def as_like(name: str, value: Tensor | np.ndarray, like: Tensor) -> Tensor:
    """Return a tensor that is ready to meet another: an array in its dtype, a tensor as it is.

    Args:
        name: What the caller's argument is called.
        value: Floating-point numbers. An array has no dtype of its own choosing, most often, and
            takes that of `like`; a tensor has, and must agree.
        like: What `value` will be computed with.

    Raises:
        DataError: If a tensor has another dtype, or it is neither tensor nor array.
    """
    if not isinstance(value, Tensor | np.ndarray):
        raise DataError(f"{name} must be a torch.Tensor or an array; got {type(value).__name__}")
    if isinstance(value, np.ndarray):
        floating = np.issubdtype(value.dtype, np.floating)
    else:
        floating = value.is_floating_point()
    if not floating:
        raise DataError(f"{name} must be floating point; got {value.dtype}")
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if value.dtype != like.dtype:
        raise DataError(
            f"{name} is {value.dtype} where the LVEBM is {like.dtype}; convert {name} by "
            f".to({like.dtype}), or the LVEBM by .to({value.dtype})"
        )
    return value


def as_data(
    x: Tensor | np.ndarray,
    event_shape: torch.Size | None = None,
    *,
    like: Tensor | None = None,
    missing: bool = False,
) -> Tensor:
    """Return x as a tensor, if it is a non-empty, finite, floating-point one of events.

    Args:
        x: Data (*b, *event_shape), a tensor or an array.
        event_shape: Expected trailing shape; None accepts any with at least one row axis.
        like: What x will be computed with; an array takes its dtype and device.
        missing: Whether entries may be NaN.

    Raises:
        DataError: If it is not.
    """
    if isinstance(x, np.ndarray):
        if not np.issubdtype(x.dtype, np.floating):
            raise DataError(
                f"x must be floating point; got an array of {x.dtype}. Dequantise counts and "
                "integers first"
            )
        x = torch.as_tensor(x) if like is None else as_like("x", x, like)
    if not isinstance(x, Tensor):
        raise DataError(f"x must be a torch.Tensor or an array; got {type(x).__name__}")
    if not x.is_floating_point():
        raise DataError(
            f"x must be floating point; got {x.dtype}. Dequantise counts and integers first"
        )
    if like is not None:
        x = as_like("x", x, like)
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
    return x


def as_rows(
    x: Tensor | np.ndarray, event_shape: torch.Size, *, like: Tensor, missing: bool = False
) -> Tensor:
    """Return data with exactly one row axis, (N, *event_shape), as `as_data` does."""
    x = as_data(x, event_shape, like=like, missing=missing)
    if x.dim() != 1 + len(event_shape):
        raise DataError(f"x has shape {tuple(x.shape)}; expected (N, *{tuple(event_shape)})")
    return x


def check_widths(hidden: Sequence[int]) -> None:
    """Refuse widths of hidden layers of which there is none, or one below 1.

    Raises:
        ValueError: If they are such.
    """
    if not hidden or any(width < 1 for width in hidden):
        raise ValueError(f"hidden must name at least one positive width; got {tuple(hidden)}")


def check_at_least(least: int, **values: int) -> None:
    """Raise a ValueError unless every one of the named numbers is at least `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")


def batch_norm_in_training(module: nn.Module) -> str:
    """Return the kind and name of a part that couples the rows of a batch; empty if none does."""
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm) and part.training:
            return f"{type(part).__name__} '{name}'"
    return ""


def close_up_to_rounding(a: Tensor, b: Tensor) -> bool:
    """Whether values agree up to rounding, which differs with the size of a batch."""
    scale = float(a.abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale + 1e-6, equal_nan=True)
