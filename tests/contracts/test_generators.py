# SPDX-License-Identifier: Apache-2.0
"""What every generator promises. A new one gets these tests by a line in `GENERATORS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from referee import normal
from small_models import same, snapshot
from torch import Tensor

from pyro_lvebm import ConvGenerator, MLPGenerator
from pyro_lvebm.sampling import jacobian

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Z = 3

GENERATORS: dict[str, tuple[Callable[[int], Any], tuple[int, ...]]] = {
    "MLP": (lambda s: MLPGenerator(Z, (4,), (8, 6), seed=s), (4,)),
    "MLP with two axes": (lambda s: MLPGenerator(Z, (2, 3), (8,), seed=s), (2, 3)),
    "MLP with a scale": (lambda s: MLPGenerator(Z, (4,), (8,), scale=True, seed=s), (4,)),
    "convolutional": (lambda s: ConvGenerator(Z, (6, 12), 8, seed=s), (6, 12)),
    "convolutional, channels": (lambda s: ConvGenerator(Z, (2, 8, 8), 9, seed=s), (2, 8, 8)),
    "convolutional, odd sides": (lambda s: ConvGenerator(Z, (5, 7), seed=s), (5, 7)),
}

every = pytest.mark.parametrize("name", GENERATORS)


def parts(generator: Any, z: Tensor) -> tuple[Tensor, ...]:
    out = generator(z)
    return out if isinstance(out, tuple) else (out,)


def trained(name: str, seed: int = 0) -> Any:
    generator = GENERATORS[name][0](seed).double()
    with torch.no_grad():
        for k, p in enumerate(generator.parameters()):
            p.add_(0.3 * normal(tuple(p.shape), k))
    return generator


@every
@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (0,)])
def test_it_starts_at_zero_with_the_shape_of_x(name: str, batch: tuple[int, ...]) -> None:
    """So that a base starts at its factor analysis."""
    build, shape = GENERATORS[name]
    for part in parts(build(0), torch.ones(*batch, Z)):
        assert part.shape == (*batch, *shape) and not part.any()


@every
def test_each_z_has_a_value_of_its_own(name: str) -> None:
    generator, z = trained(name), normal((4, Z), 1)
    for whole, part in zip(
        parts(generator, z), parts(generator, z[[3, 1]].reshape(2, 1, Z)), strict=True
    ):
        torch.testing.assert_close(whole[[3, 1]], part[:, 0])
        assert (whole[0] - whole[1]).abs().max() > 1e-3


@every
def test_forward_derivatives_are_those_of_backward_ones(name: str) -> None:
    generator, z = trained(name), normal((Z,), 2)

    def mean(v: Tensor) -> Tensor:
        return parts(generator, v)[0].reshape(*v.shape[:-1], -1)

    expected = torch.autograd.functional.jacobian(mean, z)
    torch.testing.assert_close(jacobian(mean, z[None])[1][0], expected)


@every
def test_every_weight_can_learn(name: str) -> None:
    """From a start that is not 0."""
    generator = trained(name)
    sum(p.square().sum() for p in parts(generator, normal((5, Z), 3))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and p.grad.any() for p in generator.parameters())


@every
def test_the_seed_fixes_the_weights(name: str) -> None:
    build, _ = GENERATORS[name]
    one, again, other = (snapshot(build(s)) for s in (1, 1, 2))
    assert same(one, again) and not same(one, other)
    assert same(snapshot(copy.deepcopy(build(1))), one)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLPGenerator(0, (3,)), "z_dim must be at least 1"),
        (lambda: MLPGenerator(2, (0,)), "x_entries must be at least 1"),
        (lambda: MLPGenerator(2, (3,), ()), "at least one positive width"),
        (lambda: ConvGenerator(2, (4,)), "x_shape must be"),
        (lambda: ConvGenerator(2, (4, 4), 0), "channels must be at least 1"),
    ],
)
def test_what_makes_no_network_is_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
