# SPDX-License-Identifier: Apache-2.0
"""The base of pairs: x and z independent, whitened and concatenated."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.bases.gaussian import GaussianBase


class JointBase:
    """The law of u = (w_x, w_z) under base_x and base_z.

    Args:
        base_x: The base of x.
        base_z: The base of z.
    """

    def __init__(self, base_x: GaussianBase, base_z: GaussianBase) -> None:
        self.laws, self.split = (base_x.law, base_z.law), base_x.dim

    def energy(self, u: Tensor) -> Tensor:
        """Return U (*b,) at u (*b, d), the sum of both, in nats."""
        x, z = self.laws
        return x.energy(u[..., : self.split]) + z.energy(u[..., self.split :])

    def energy_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return U (*b,) and ∇U (*b, d) at u (*b, d), without a graph."""
        x, z = self.laws
        energy_x, grad_x = x.energy_and_grad(u[..., : self.split])
        energy_z, grad_z = z.energy_and_grad(u[..., self.split :])
        return energy_x + energy_z, torch.cat([grad_x, grad_z], -1)

    def draw(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return independent draws u, of a shape (*b, d)."""
        x, z = self.laws
        batch, d = shape[:-1], shape[-1]
        parts = (
            x.draw((*batch, self.split), like, generator),
            z.draw((*batch, d - self.split), like, generator),
        )
        return torch.cat(parts, -1)
