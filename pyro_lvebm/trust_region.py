# SPDX-License-Identifier: Apache-2.0
"""Shrinking a parameter update until it is acceptable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_HALVINGS = 20
"""An update that is still too large after as many is undone."""

_MAX_LENGTHENING = 8.0
"""Largest factor on an update that is too short."""


@torch.no_grad()
def scale_update(params: Sequence[Tensor], before: Sequence[Tensor], factor: float) -> None:
    """Replace each update by `factor` times itself, θ ← θ_old + factor (θ − θ_old), in place."""
    if factor != 1.0:
        for p, old in zip(params, before, strict=True):
            p.copy_(old + factor * (p - old))


@torch.no_grad()
def restore(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Set each parameter to its former value, in place."""
    for p, old in zip(params, before, strict=True):
        p.copy_(old)


def lengthening(divergence: float, least: float) -> float:
    """Return the factor on an update that moves the model by `least`, at most 8.

    How far the model moves grows with the square of a short update.

    Args:
        divergence: How far the update moves the model, such as KL(p_old ‖ p_new) in nats.
        least: How far it is to move it.

    Returns:
        The factor; 1 where the update is long enough, moves nothing, or is NaN.

    Example:
        >>> lengthening(0.01, 0.04), lengthening(0.05, 0.04), lengthening(1e-9, 0.04)
        (2.0, 1.0, 8.0)
    """
    if not 0.0 < divergence < least:
        return 1.0
    return min(math.sqrt(least / divergence), _MAX_LENGTHENING)


def shrink_to_trust_region(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    divergence: Callable[[], Tensor],
    max_divergence: float,
    max_halvings: int = MAX_HALVINGS,
) -> tuple[int, float]:
    """Halve an update until the model has moved by at most `max_divergence`.

    An update that is still too large, or NaN, after `max_halvings` is undone.

    Args:
        params: Parameters after the update, changed in place.
        before: Their values before it.
        divergence: Returns how far the model has moved, such as KL(p_old ‖ p_new) in nats.
        max_divergence: The radius of the trust region.
        max_halvings: Give up and undo the update after this many.

    Returns:
        Number of halvings, where max_halvings + 1 means that the update was undone; and how far
        the model has moved in the end.

    Example:
        >>> import torch
        >>> p, old = torch.tensor(8.0), torch.tensor(0.0)
        >>> shrink_to_trust_region([p], [old], lambda: p**2, 5.0)
        (2, 4.0)
        >>> p
        tensor(2.)
    """
    for halvings in range(max_halvings + 1):
        moved = float(divergence())
        if moved <= max_divergence:
            return halvings, moved
        scale_update(params, before, 0.5)
    restore(params, before)
    return max_halvings + 1, 0.0
