# SPDX-License-Identifier: Apache-2.0
"""Contexts of conditional LVEBMs: their shapes, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor


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


def check_context(context: Tensor, x: Tensor) -> torch.Size:
    """Return the shape of one context of rows x (N, *x_shape).

    Raises:
        ValueError: If contexts are not finite, not floating point, or not one for each row.
    """
    check_contexts_finite(context, x)
    if context.dim() < 2 or len(context) != len(x):
        raise ValueError(
            f"context has shape {tuple(context.shape)}; expected ({len(x)}, *context_shape), one "
            "row for each row of x"
        )
    return context.shape[1:]


def check_contexts_finite(context: Tensor, like: Tensor) -> None:
    """Raise a ValueError unless contexts are a finite tensor of the same dtype as another."""
    if not isinstance(context, Tensor) or not context.is_floating_point():
        what = context.dtype if isinstance(context, Tensor) else type(context).__name__
        raise ValueError(
            f"context must be a floating-point tensor; got {what}. Encode classes one-hot, as by "
            "torch.nn.functional.one_hot(labels).float()"
        )
    if context.dtype != like.dtype:
        raise ValueError(
            f"context has dtype {context.dtype} where x and the LVEBM have {like.dtype}; convert "
            f"it by context.to({like.dtype})"
        )
    if not bool(context.isfinite().all()):
        raise ValueError("context has NaN or infinite entries; contexts cannot be missing")
