# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from pyro_lvebm import MLPGenerator


def test_the_factor_on_the_noise_is_bounded() -> None:
    """Near 0 it is what the last layer says, and far out it does not run away."""
    generator = MLPGenerator(2, (3,), (8,), scale=True)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        generator.out.bias[3:] = 0.01
        near = generator(z)[1]
        generator.out.weight.add_(1.0)
        far = generator(1e3 * z)[1]
    torch.testing.assert_close(near, torch.full_like(near, 0.01), rtol=1e-5, atol=0.0)
    assert 3.9 < far.abs().max() <= 4.0
