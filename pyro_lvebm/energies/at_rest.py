# SPDX-License-Identifier: Apache-2.0
"""Parts of an energy that make it none of (x, z) in training mode."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from pyro_lvebm.validation import COUPLED as TEXT

COUPLED = TEXT.format("energy")


def check_at_rest(energy: nn.Module) -> None:
    """Refuse an energy with batch normalisation, or dropout, in training mode.

    `.train()` on an energy, or on what holds it, puts them there. It costs no evaluation.

    Raises:
        ValueError: If there is such a part.
    """
    for name, part in energy.named_modules():
        if not part.training:
            continue
        if isinstance(part, _BatchNorm):
            raise ValueError(
                f"{type(part).__name__} '{name}' of the energy makes the energy of a row depend on "
                f"the others in its batch, so that it is none of (x, z). {COUPLED}"
            )
        if (isinstance(part, _DropoutNd) and part.p > 0.0) or isinstance(part, nn.RReLU):
            raise ValueError(
                f"{type(part).__name__} '{name}' of the energy is random: two calls differ, and "
                "neither is an energy of (x, z). Call .eval() on the energy"
            )
