# SPDX-License-Identifier: Apache-2.0
"""The sizes that a convolutional generator goes through."""

from __future__ import annotations

import pytest
import torch

from pyro_lvebm import ConvGenerator


@pytest.mark.parametrize(
    ("shape", "start", "widths"),
    [
        ((16, 16), (32, 4, 4), [32, 16, 8]),
        ((6, 12), (32, 3, 6), [32, 16]),
        ((2, 8, 8), (32, 4, 4), [32, 16]),
        ((5, 7), (32, 5, 7), [32]),
        ((4, 64), (32, 4, 64), [32]),
    ],
)
def test_sides_are_halved_down_to_three(
    shape: tuple[int, ...], start: tuple[int, ...], widths: list[int]
) -> None:
    generator = ConvGenerator(2, shape)
    assert generator.start == start
    found = [generator.out.in_channels]
    found = [layer.in_channels for layer in generator.convolutions] + found
    assert found == widths
    assert generator.out.out_channels == (shape[0] if len(shape) == 3 else 1)


def test_neighbouring_pixels_are_alike() -> None:
    """Each pixel of the small map stands for a patch: what a step of z changes is smooth."""
    generator = ConvGenerator(2, (16, 16), seed=1)
    torch.nn.init.constant_(generator.out.weight, 0.05)
    image = generator(torch.ones(1, 2)) - generator(torch.zeros(1, 2))
    image = image.detach()
    rough = image.diff(dim=-1).square().mean() / image.var()
    assert float(rough) < 0.5
