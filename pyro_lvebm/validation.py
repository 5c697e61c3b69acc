# SPDX-License-Identifier: Apache-2.0
"""Checks of data at the doors of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def check_data(x: Tensor, event_shape: torch.Size | None = None) -> None:
    """Raise a ValueError unless x is a non-empty, finite, floating-point tensor of events.

    Args:
        x: Data (*b, *event_shape).
        event_shape: Expected trailing shape; None accepts any with at least one row axis.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a torch.Tensor; got {type(x).__name__}")
    if not x.is_floating_point():
        raise ValueError(
            f"x must be floating point; got {x.dtype}. Dequantise counts and integers first"
        )
    if event_shape is not None:
        trailing = x.shape[max(0, x.dim() - len(event_shape)) :]
        if trailing != event_shape:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected trailing shape {tuple(event_shape)}"
            )
    elif x.dim() < 2:
        raise ValueError(
            f"x must have shape (N, ...) with one row an observation; got {tuple(x.shape)}"
        )
    if x.numel() == 0:
        raise ValueError(f"x is empty: shape {tuple(x.shape)}; expected at least one observation")
    if not torch.isfinite(x).all():
        count = int((~torch.isfinite(x)).sum())
        raise ValueError(
            f"x has {count} NaN or infinite entries of {x.numel()}; all must be finite. Missing "
            "entries are not supported: remove or impute those rows"
        )
