# SPDX-License-Identifier: Apache-2.0
"""A small convolutional network from z to the mean of an image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.validation import check_at_least


class ConvGenerator(nn.Module):
    """A generator of images: a small map made of z, doubled in size and convolved by turns.

    Sides are halved as long as they are even and stay at 3 or more; from there each doubling
    (nearest neighbour) is followed by a 3 × 3 convolution and SiLU. The last convolution starts at
    0, so that a `GeneratorBase` starts as the factor analysis that it is fitted by.

    Args:
        z_dim: Number of entries of z.
        x_shape: Shape of one image, (height, width) or (channels, height, width).
        channels: Number of channels of the small map; half as many after each doubling, 8 at least.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If x_shape has another number of axes, or a number is less than 1.

    Source:
        Odena, Dumoulin and Olah (2016), Deconvolution and checkerboard artifacts (doubling before
        convolution).

    Example:
        >>> import torch
        >>> ConvGenerator(8, (16, 16))(torch.randn(5, 8)).shape
        torch.Size([5, 16, 16])
    """

    def __init__(
        self, z_dim: int, x_shape: Sequence[int], channels: int = 32, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.z_dim, self.x_shape, self.channels = z_dim, torch.Size(x_shape), channels
        if len(self.x_shape) not in (2, 3):
            raise ValueError(
                "x_shape must be (height, width) or (channels, height, width); got "
                f"{tuple(self.x_shape)}"
            )
        check_at_least(1, z_dim=z_dim, channels=channels, x_entries=self.x_shape.numel())
        height, width = self.x_shape[-2:]
        doublings = 0
        while all(side % 2 == 0 and side >= 6 for side in (height, width)):
            height, width, doublings = height // 2, width // 2, doublings + 1
        self.start = (channels, height, width)
        widths = [max(8, channels >> n) for n in range(doublings + 1)]
        widths[0] = channels
        out_channels = self.x_shape[0] if len(self.x_shape) == 3 else 1
        with isolated_rng(seed, Stream.GENERATOR_WEIGHTS):
            self.first = nn.Linear(z_dim, channels * height * width)
            self.convolutions = nn.ModuleList(
                nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)
            )
            self.out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        assert self.out.bias is not None
        nn.init.zeros_(self.out.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return g(z) (*b, *x_shape) for z (*b, z_dim)."""
        flat = z.reshape(-1, self.z_dim)
        h = nn.functional.silu(self.first(flat)).reshape(-1, *self.start)
        for convolution in self.convolutions:
            h = nn.functional.interpolate(h, scale_factor=2.0, mode="nearest")
            h = nn.functional.silu(convolution(h))
        image: Tensor = self.out(h)
        return image.reshape(*z.shape[:-1], *self.x_shape)
