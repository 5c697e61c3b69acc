# SPDX-License-Identifier: Apache-2.0
"""Contexts of conditional LVEBMs: their shapes, and what is refused."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.validation import as_like


def check_unconditional(ebm: object, what: str) -> None:
    """Refuse a conditional LVEBM where one law of (x, z) is needed.

    Args:
        ebm: The LVEBM.
        what: Name of the function that needs it.

    Raises:
        ValueError: If it is conditional, or not an LVEBM.
    """
    if not hasattr(ebm, "context_shape"):
        raise ValueError(f"{what} needs an LVEBM; got {type(ebm).__name__}")
    if ebm.context_shape is not None:
        raise ValueError(
            f"this LVEBM is conditional, and {what} needs the one law of a context: call it with "
            f"ebm.at(context), for a context of shape {tuple(ebm.context_shape)}"
        )


def expand_context(
    context: Tensor | None, context_shape: torch.Size | None, batch: torch.Size
) -> tuple[Tensor, ...]:
    """Return the context expanded to (*batch, *context_shape), as a tuple of one or none.

    Raises:
        ValueError: As in `context_rows`.
    """
    rows = context_rows(context, context_shape)
    if context is None or context_shape is None:
        return ()
    fits = len(rows) <= len(batch) and all(
        n in (1, m) for n, m in zip(rows[::-1], batch[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"contexts of batch shape {tuple(rows)} do not expand to {tuple(batch)}, that of what "
            "they belong to"
        )
    return (context.expand(*batch, *context_shape),)


def context_rows(context: Tensor | None, context_shape: torch.Size | None) -> torch.Size:
    """Return the batch shape of contexts (*b, *context_shape), empty where there are none.

    Raises:
        ValueError: If there is a context and should be none, the other way round, or its shape
            does not fit.
    """
    if context_shape is None:
        if context is not None:
            raise ValueError(
                "this LVEBM has no contexts: give context_shape, or from_data(..., context=...), "
                "to build a conditional one"
            )
        return torch.Size()
    if context is None:
        raise ValueError(
            f"this LVEBM is conditional: give context=... of shape (..., *{tuple(context_shape)}), "
            "or use ebm.at(context) for one context"
        )
    num_rows = max(0, context.dim() - len(context_shape))
    if context.shape[num_rows:] != context_shape:
        raise ValueError(
            f"context has shape {tuple(context.shape)}; expected trailing shape "
            f"{tuple(context_shape)}"
        )
    return context.shape[:num_rows]


def as_context_of_rows(context: Tensor | np.ndarray, x: Tensor) -> Tensor:
    """Return contexts of rows x (N, *x_shape) as a tensor (N, *shape of one).

    Raises:
        ValueError: If contexts are not finite, not floating point, or not one for each row.
    """
    context = as_context(context, x)
    if context.dim() < 2 or len(context) != len(x):
        raise ValueError(
            f"context has shape {tuple(context.shape)}; expected ({len(x)}, *context_shape), one "
            "row for each row of x"
        )
    return context


def as_context(context: Tensor | np.ndarray, like: Tensor) -> Tensor:
    """Return contexts as a tensor; refuse any that are not finite or of another dtype."""
    if isinstance(context, np.ndarray) and np.issubdtype(context.dtype, np.floating):
        context = as_like("context", context, like)
    if not isinstance(context, Tensor) or not context.is_floating_point():
        what = getattr(context, "dtype", type(context).__name__)
        raise ValueError(
            f"context must be a floating-point tensor; got {what}. Encode classes one-hot, as by "
            "torch.nn.functional.one_hot(labels).float()"
        )
    context = as_like("context", context, like)
    if not bool(context.isfinite().all()):
        raise ValueError("context has NaN or infinite entries; contexts cannot be missing")
    return context
