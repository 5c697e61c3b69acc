# SPDX-License-Identifier: Apache-2.0
"""Missing entries of x in an encoder: what it sees of them, and the law that it gives them."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_lvebm.missing import Completion


def features(completion: Completion) -> Tensor:
    """Return what an encoder sees of incomplete rows, (*b, 2 d).

    These are the rows, filled by their means under base_x given the observed entries and
    whitened, and which of their entries are observed.
    """
    seen = completion.observed.to(completion.mean)
    return torch.cat([completion.base.whiten(completion.x), seen], -1)


def law_of_entries(law: dist.TorchDistribution, completion: Completion) -> dist.TorchDistribution:
    """Return the law of x_m = T(m(y_o) + R⁻ᵀ v) for a law of v, over events of the shape of x."""
    moved: dist.TorchDistribution = dist.TransformedDistribution(law, [_Unwhitening(completion)])
    return moved


class _Unwhitening(Transform):
    """From v to the values of a site `{name}_missing`."""

    bijective = True
    domain = constraints.real_vector

    def __init__(self, completion: Completion) -> None:
        super().__init__()
        self.completion = completion
        self.codomain = completion.support.constraint

    def _call(self, v: Tensor) -> Tensor:
        return self.completion.support.constrain(self.completion.unwhiten(v))

    def _inverse(self, value: Tensor) -> Tensor:
        return self.completion.whiten(self.completion.support.unconstrain(value))

    def log_abs_det_jacobian(self, v: Tensor, value: Tensor) -> Tensor:
        y = self.completion.support.unconstrain(value)
        return self.completion.log_det + self.completion.support.log_abs_det(y, value)

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-1], *self.completion.event_shape])

    def inverse_shape(self, shape: Any) -> torch.Size:
        depth = len(self.completion.event_shape)
        return torch.Size([*shape[: len(shape) - depth], self.completion.dim])
