# SPDX-License-Identifier: Apache-2.0
"""Averaged parameters, kept beside the raw ones and used for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class ParameterAverage:
    """An exponential moving average of parameters over the steps of an optimiser.

        θ̄ ← d θ̄ + (1 − d) θ,    d = min(decay, (1 + t) / (10 + t))

    Stochastic gradients keep θ in motion around an optimum; the average is closer to it. The decay
    starts small, so that the first values are soon forgotten.

    Args:
        decay: Weight of the past after many steps, in [0, 1); 0.99 remembers about 100 steps.

    Source:
        Polyak and Juditsky (1992), Acceleration of stochastic approximation by averaging; Tarvainen
        and Valpola (2017), Mean teachers are better role models (exponential weights).

    Example:
        >>> import torch
        >>> theta, average = torch.tensor(0.0), ParameterAverage(decay=0.5)
        >>> for value in (2.0, 4.0):
        ...     _ = theta.fill_(value)
        ...     average.update([theta])
        >>> with average.swapped_in():
        ...     print(round(theta.item(), 2))
        3.64
        >>> theta
        tensor(4.)
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1); got {decay}")
        self.decay = decay
        self.count = 0
        self.values: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def update(self, params: Iterable[Tensor]) -> None:
        """Take the present values of parameters into the average.

        Values are replaced and never written into, so who holds the former ones can put them back.
        """
        d = min(self.decay, (1.0 + self.count) / (10.0 + self.count))
        values = dict(self.values)
        for p in params:
            value = p.detach()
            values[p] = values[p].lerp(value, 1.0 - d) if p in values else value.clone()
        self.values, self.count = values, self.count + 1

    def copy(self) -> dict[Tensor, Tensor]:
        """Return a copy of the averages, by parameter."""
        return {p: value.clone() for p, value in self.values.items()}

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the parameters their averages inside the block, and their own values after it."""
        own = {p: p.detach().clone() for p in self.values}
        assign(self.values)
        try:
            yield
        finally:
            assign(own)


@torch.no_grad()
def assign(values: dict[Tensor, Tensor]) -> None:
    """Set parameters to given values, in place."""
    for p, value in values.items():
        p.copy_(value)
