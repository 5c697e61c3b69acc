# SPDX-License-Identifier: Apache-2.0
"""A perceptron from z to the mean of x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.validation import check_at_least, check_widths

_MAX_LOG_FACTOR = 4.0
"""Noise that varies with z is between exp(−4) and exp(4) times its level."""


class MLPGenerator(nn.Module):
    """A generator with SiLU layers whose last layer starts at 0.

        g_φ(z) = W_L silu(… silu(W_1 z + b_1) …) + b_L,    W_L = b_L = 0 at first

    so that a `GeneratorBase` starts as the factor analysis that it is fitted by.

    Args:
        z_dim: Number of entries of z.
        x_shape: Shape of what it returns: that of one x, unconstrained if x is bounded.
        hidden: Widths of the layers.
        scale: Also return a log factor on the standard deviation of the noise of each entry, which
            then varies with z: 4 tanh(h / 4) of a last layer h. Without a bound it would run away
            where no data have taken z, and take the gradients of guides with it.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If a dimension or a width is less than 1.

    Example:
        >>> import torch
        >>> generator = MLPGenerator(2, (3,), hidden=(16,))
        >>> x = generator(torch.ones(5, 2))
        >>> x.shape, bool(x.any())
        (torch.Size([5, 3]), False)
    """

    def __init__(
        self,
        z_dim: int,
        x_shape: Sequence[int],
        hidden: Sequence[int] = (64, 64),
        *,
        scale: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.z_dim, self.x_shape, self.scale = z_dim, torch.Size(x_shape), scale
        check_at_least(1, z_dim=z_dim, x_entries=self.x_shape.numel())
        check_widths(hidden)
        widths = [z_dim, *hidden]
        with isolated_rng(seed, Stream.GENERATOR_WEIGHTS):
            self.hidden = nn.ModuleList(map(nn.Linear, widths[:-1], widths[1:]))
            self.out = nn.Linear(widths[-1], self.x_shape.numel() * (2 if scale else 1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return g(z) (*b, *x_shape) for z (*b, z_dim), and the log factor if there is one."""
        h = z
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        out: Tensor = self.out(h)
        parts = [p.reshape(*z.shape[:-1], *self.x_shape) for p in out.chunk(1 + self.scale, -1)]
        if not self.scale:
            return parts[0]
        return parts[0], _MAX_LOG_FACTOR * torch.tanh(parts[1] / _MAX_LOG_FACTOR)
