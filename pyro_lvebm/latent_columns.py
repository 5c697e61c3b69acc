# SPDX-License-Identifier: Apache-2.0
"""How the unconstrained values of a latent site become coordinates for Langevin moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.distributions import LatentSite
from pyro_lvebm.missing import Completion, MissingSite


@dataclass(frozen=True)
class LatentColumns:
    """How the unconstrained values of one latent site fill columns of v."""

    name: str
    transform: Transform
    event_shape: torch.Size  # unconstrained
    gaussian: GaussianBase | Completion | None  # the law that whitens the values, if one does

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.event_shape.numel()

    def to_columns(self, value: Tensor) -> Tensor:
        """Return (*b, dim) for unconstrained values (*b, *event_shape)."""
        if self.gaussian is not None:
            return self.gaussian.whiten(value)
        return value.reshape(*value.shape[: value.dim() - len(self.event_shape)], self.dim)

    def from_columns(self, columns: Tensor) -> Tensor:
        """Return unconstrained values (*b, *event_shape) for (*b, dim)."""
        if self.gaussian is not None:
            return self.gaussian.unwhiten(columns)
        return columns.reshape(*columns.shape[:-1], *self.event_shape)

    def log_abs_det(self, columns: Tensor) -> Tensor:
        """Return log |dz/dv| (*b,), in nats."""
        total = columns.new_zeros(())
        if self.gaussian is not None:
            total = self.gaussian.log_det.expand(columns.shape[:-1])
            if self.gaussian.support.is_real:
                return total
        value = self.from_columns(columns)
        jacobian: Tensor = self.transform.log_abs_det_jacobian(value, self.transform(value))
        return total + jacobian.reshape(*columns.shape[:-1], -1).sum(-1)


def whitening(fn: Any, nesting: int) -> GaussianBase | Completion | None:
    """Return the Gaussian whose coordinates the values of a site take, if there is one."""
    if isinstance(fn, LatentSite):
        return fn.ebm.base_z
    # Where latents move x, observed entries differ between particles, and so would coordinates.
    fixed = isinstance(fn, MissingSite) and len(fn.completion.batch_shape) <= nesting
    return fn.completion if fixed else None
