# SPDX-License-Identifier: Apache-2.0
"""What moves and annealing need of a base: its energy at u, and draws."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Base(Protocol):
    """A law of u ∈ R^d with density exp(−U(u)) / (2π)^(d/2), U its base energy.

    The factor is that of a standard normal, whose base energy is ½ |u|².
    """

    def energy(self, u: Tensor) -> Tensor:
        """Return U (*b,) at u (*b, d), in nats, with a graph."""

    def energy_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return U (*b,) and ∇U (*b, d) at u (*b, d), without a graph."""

    def draw(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return independent draws u of a shape (*b, d), with the dtype and device of `like`."""


class StandardNormal:
    """The base N(0, I) in any number of dimensions."""

    def energy(self, u: Tensor) -> Tensor:
        """Return ½ |u|² (*b,)."""
        return 0.5 * (u * u).sum(-1)

    def energy_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return ½ |u|² (*b,) and u itself."""
        return self.energy(u.detach()), u.detach()

    def draw(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return N(0, 1) draws of a shape."""
        return standard_normal(shape, like, generator)


STANDARD_NORMAL = StandardNormal()


def standard_normal(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return N(0, 1) draws of a shape, with the dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).normal_(generator=generator)
