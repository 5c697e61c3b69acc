# SPDX-License-Identifier: Apache-2.0
"""No residual energy: the LVEBM is its base."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.energies.whitened import WhitenedEnergy


class ZeroEnergy(WhitenedEnergy):
    """f = 0, so that p(x, z) is the base and log Z = 0 exactly, without a pool.

    On a `GeneratorBase` it is a decoder model, trained by particles without an encoder.

    Args:
        x_dim: Number of entries of x, unconstrained.
        z_dim: Number of entries of z.

    Source:
        Kuntz, Lim and Johansen (2023), Particle algorithms for maximum likelihood training of
        latent variable models, arXiv 2204.12965.

    Example:
        >>> import torch
        >>> ZeroEnergy(3, 2)(torch.ones(4, 3), torch.ones(4, 2)).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """

    def whitened(self, u: Tensor, *context: Tensor) -> Tensor:
        """Return 0 (*b,) at u (*b, d), with a graph."""
        return 0.0 * u.sum(-1)

    def value_and_grad(self, u: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return 0 (*b,) and 0 (*b, d), without a graph."""
        return u.new_zeros(u.shape[:-1]), torch.zeros_like(u)
