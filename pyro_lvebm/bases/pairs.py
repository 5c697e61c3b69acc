# SPDX-License-Identifier: Apache-2.0
"""The support of pairs (x, z) as flat vectors, for the joint as one site."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_lvebm.bases.supports import Support


class PairSupport(Constraint):
    """Pairs (x, z), flattened and concatenated, with x on a support and z real.

    Args:
        x: Support of x.
        z_dim: Number of entries of z.
    """

    event_dim = 1
    is_discrete = False

    def __init__(self, x: Support, z_dim: int) -> None:
        self.x, self.z_dim = x, z_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return which values (*b, x entries + z_dim) lie on the support, (*b,)."""
        x, z = self.split(value, self.x.event_shape)
        inside: Tensor = self.x.constraint.check(x).reshape(*value.shape[:-1], -1).all(-1)
        return inside & z.isfinite().all(-1)

    def split(self, value: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the parts (*b, *shape) and (*b, z_dim) of a flat value."""
        part, z = value.split([shape.numel(), self.z_dim], -1)
        return part.reshape(*value.shape[:-1], *shape), z


class PairTransform(Transform):
    """The bijection from (y, z) to (x, z), both flattened and concatenated."""

    bijective = True
    domain = constraints.real_vector

    def __init__(self, pairs: PairSupport) -> None:
        super().__init__()
        self.codomain = self.pairs = pairs

    def _call(self, value: Tensor) -> Tensor:
        y, z = self.pairs.split(value, self.pairs.x.unconstrained_shape)
        return torch.cat([self.pairs.x.constrain(y).reshape(*z.shape[:-1], -1), z], -1)

    def _inverse(self, value: Tensor) -> Tensor:
        x, z = self.pairs.split(value, self.pairs.x.event_shape)
        return torch.cat([self.pairs.x.unconstrain(x).reshape(*z.shape[:-1], -1), z], -1)

    def log_abs_det_jacobian(self, value: Tensor, result: Tensor) -> Tensor:
        """Return log |det dT/dy| (*b,)."""
        y, _ = self.pairs.split(value, self.pairs.x.unconstrained_shape)
        x, _ = self.pairs.split(result, self.pairs.x.event_shape)
        return self.pairs.x.log_abs_det(y, x)

    def forward_shape(self, shape: Any) -> Any:
        """Return the shape of (x, z) for that of (y, z)."""
        added = self.pairs.x.event_shape.numel() - self.pairs.x.unconstrained_shape.numel()
        return (*shape[:-1], shape[-1] + added)

    def inverse_shape(self, shape: Any) -> Any:
        """Return the shape of (y, z) for that of (x, z)."""
        added = self.pairs.x.event_shape.numel() - self.pairs.x.unconstrained_shape.numel()
        return (*shape[:-1], shape[-1] - added)


for _registry in (biject_to, transform_to):  # starting points of NUTS come from the second
    _registry.register(PairSupport, PairTransform)
