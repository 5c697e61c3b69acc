# SPDX-License-Identifier: Apache-2.0
"""Runs of a model that are looked at for their sites, and not for their values."""

from __future__ import annotations

from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvebm.distributions import LatentSite


class CheapLatents(Messenger):
    """Draws latents of conditional LVEBMs from their base, not by a run of annealing for each.

    It is for runs whose values are thrown away.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if is_costly(msg["fn"]) and msg["value"] is None:
            msg["value"], msg["done"] = base_draw(msg["fn"]), True


def is_costly(fn: Any) -> bool:
    """Whether a draw of a site takes a run of annealing."""
    return isinstance(fn, LatentSite) and fn.context is not None


def base_draw(fn: LatentSite) -> Tensor:
    """Draw a latent site from its base."""
    value: Tensor = fn.ebm.base_z.distribution().expand(fn.batch_shape).sample()
    return value
