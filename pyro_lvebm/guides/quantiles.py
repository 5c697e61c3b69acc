# SPDX-License-Identifier: Apache-2.0
"""Medians and quantiles of a site whose unconstrained coordinates are Gaussian."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.transforms import IndependentTransform


def median_of(law: dist.TorchDistribution, site: dict[str, Any]) -> Tensor:
    """Return the image of the location of a site, (*full_batch, *event_shape).

    Args:
        law: Law of its flattened, unconstrained coordinates, Gaussian, (*full_batch, d).
        site: The site in a trace.
    """
    return _on_support(law.mean, site)


def quantiles_of(law: dist.TorchDistribution, site: dict[str, Any], levels: Tensor) -> Tensor:
    """Return quantiles of every entry of a site, (Q, *full_batch, *event_shape).

    Args:
        law: Law of its flattened, unconstrained coordinates, Gaussian, (*full_batch, d).
        site: The site in a trace.
        levels: The levels (Q,), between 0 and 1.

    Raises:
        ValueError: If an entry depends on several coordinates, as on a simplex.
    """
    transform = biject_to(site["fn"].support)
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    if transform.domain.event_dim or transform.codomain.event_dim:
        raise ValueError(
            f"entries of '{site['name']}' on the support {site['fn'].support} depend on several "
            "unconstrained coordinates, so that their quantiles have no closed form. Take those of "
            "draws: pyro.infer.Predictive(model, guide=guide, num_samples=...)"
        )
    marginal = dist.Normal(law.mean, law.stddev)
    levels = levels.to(law.mean).reshape(-1, *[1] * law.mean.dim())
    rising, falling = (_on_support(marginal.icdf(q), site) for q in (levels, 1.0 - levels))
    low, high = (_on_support(marginal.icdf(levels.new_tensor(q)), site) for q in (0.25, 0.75))
    # A map such as that to numbers below a bound turns the order around.
    return torch.where(high >= low, rising, falling)


def _on_support(flat: Tensor, site: dict[str, Any]) -> Tensor:
    transform, event = biject_to(site["fn"].support), site["fn"].event_shape
    values: Tensor = transform(flat.reshape(flat.shape[:-1] + transform.inverse_shape(event)))
    return values.clone() if values.data_ptr() == flat.data_ptr() else values
