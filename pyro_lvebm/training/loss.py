# SPDX-License-Identifier: Apache-2.0
"""What a loss returns, in nats: a number, or one for the model and one for the guide."""

from __future__ import annotations

from typing import Any

from pyro.infer import (
    TraceTailAdaptive_ELBO,
)
from pyro.infer.util import torch_item

Loss = float | tuple[float, ...]
"""A tuple where the loss is one, as that of `ReweightedWakeSleep`."""


def as_numbers(value: Any) -> Loss:
    """Return what a loss returned, numbers or tensors with one entry, as plain numbers."""
    if isinstance(value, tuple):
        return tuple(float(torch_item(part)) for part in value)
    return float(torch_item(value))


def total(loss: Loss) -> float:
    """Return the sum over the parts of a loss."""
    return sum(loss) if isinstance(loss, tuple) else loss


def add(loss: Loss, penalty: float) -> Loss:
    """Add a penalty on the model to a loss, to its first part if there are several."""
    return (loss[0] + penalty, *loss[1:]) if isinstance(loss, tuple) else loss + penalty


def check_loss(loss: Any) -> None:
    """Refuse a loss that has no value.

    Raises:
        ValueError: If it has none.
    """
    if isinstance(loss, TraceTailAdaptive_ELBO):
        raise ValueError(
            "TraceTailAdaptive_ELBO has a gradient but no value: Pyro reports it as infinite, by "
            "which Saddle knows a step that failed. Use it in SVI, or RenyiELBO here"
        )
