# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from referee import ALPHA, CERTAIN, normal, variance_p_value
from torch import Tensor, nn

from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.energies.mlp import MLPEnergy
from pyro_lvebm.energies.whitened import WhitenedEnergy

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def trained(energy: MLPEnergy, seed: int = 0) -> MLPEnergy:
    """The energy in float64 with a last layer that is not zero."""
    energy = energy.double()
    with torch.no_grad():
        energy.out.weight.copy_(normal(tuple(energy.out.weight.shape), seed))
        energy.out.bias.fill_(0.7)
    return energy


def diagonal_base(*event_shape: int) -> GaussianBase:
    loc = normal(event_shape, 1)
    return GaussianBase(loc, 0.5 + normal(event_shape, 2).abs())


def full_base(*event_shape: int) -> GaussianBase:
    d = math.prod(event_shape)
    scale = normal((d, d), 3).tril(-1) + torch.diag(0.3 + normal((d,), 4).abs())
    return GaussianBase(normal(event_shape, 5), scale)


# --- the untrained network ------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([None, 0, 5]), st.integers(0, 99))
def test_untrained_energy_is_zero_everywhere(
    x_dim: int, z_dim: int, fourier_features: int | None, seed: int
) -> None:
    energy = MLPEnergy(x_dim, z_dim, (7,), fourier_features, seed=seed)
    u = 5.0 * normal((3, 2, x_dim + z_dim), seed, torch.float32)
    value, grad = energy.value_and_grad(u)
    assert torch.equal(energy.whitened(u), torch.zeros(3, 2))
    assert torch.equal(energy(u[..., :x_dim], u[..., x_dim:]), torch.zeros(3, 2))
    assert torch.equal(value, torch.zeros(3, 2)) and torch.equal(grad, torch.zeros_like(u))


def test_the_untrained_energy_can_learn() -> None:
    energy = MLPEnergy(3, 2, (6, 5), seed=1)
    energy.whitened(normal((10, 5), 1, torch.float32)).sum().backward()
    assert energy.out.weight.grad.abs().min() > 0
    assert [name for name, _ in energy.named_parameters()] == [
        f"{layer}.{part}"
        for layer in ("hidden.0", "hidden.1", "out")
        for part in ("weight", "bias")
    ]


@pytest.mark.parametrize(
    ("x_dim", "z_dim", "asked", "columns"),
    [(6, 2, None, 32), (7, 2, None, 0), (64, 4, None, 0), (64, 4, 3, 3), (1, 1, 0, 0)],
)
def test_fourier_features_suit_the_dimension(
    x_dim: int, z_dim: int, asked: int | None, columns: int
) -> None:
    energy = MLPEnergy(x_dim, z_dim, (4,), asked)
    assert energy.frequencies.shape == (x_dim, columns)
    assert energy.hidden[0].in_features == 2 * x_dim + z_dim + 2 * columns


def bandwidth_p_value(x_dim: int, std: float, seed: int) -> float:
    frequencies = MLPEnergy(x_dim, 1, (2,), 3000, seed=seed).frequencies
    return variance_p_value(frequencies.T, torch.full((x_dim,), std**2))


@pytest.mark.parametrize(("x_dim", "std"), [(1, 1.5), (2, 1.5), (8, 0.375), (18, 1.5 / 9)])
def test_frequencies_have_their_bandwidth(x_dim: int, std: float) -> None:
    """N(0, 1.5² min(1, 2/d_x)²). False alarms: 1e-3 a case; 1.2 times the bandwidth is found."""
    assert bandwidth_p_value(x_dim, std, 3) > ALPHA
    assert bandwidth_p_value(x_dim, 1.2 * std, 3) < CERTAIN


@pytest.mark.parametrize(("columns", "context_dim"), [(0, 0), (5, 0), (5, 2), (0, 2)])
def test_inputs_are_whitened_standardised_and_bounded(columns: int, context_dim: int) -> None:
    """φ of a bound energy: ½ u_x, 2 tanh(u_z / 2), 2 (x − μ) / s, half sines and cosines, c."""
    tril = torch.tensor([[2.0, 0.0], [1.5, 0.5]])
    energy = MLPEnergy(2, 1, (4,), columns, context_dim=context_dim)
    loc = torch.tensor([1.0, -3.0])
    base_x, base_z = GaussianBase(loc, tril), GaussianBase(torch.zeros(1), torch.ones(1))
    energy.bind(base_x, base_z)
    u = normal((7, 3), 1, torch.float32)
    context = (normal((7, context_dim), 2, torch.float32),) if context_dim else ()
    x = base_x.unwhiten(u[:, :2])
    std = (tril @ tril.T).diagonal().sqrt()
    phase = u[:, :2] @ energy.frequencies
    expected = [0.5 * u[:, :2], 2.0 * torch.tanh(0.5 * u[:, 2:]), 2.0 * (x - loc) / std]
    expected += [0.5 * torch.sin(phase), 0.5 * torch.cos(phase), *context]
    with torch.no_grad():
        energy.out.weight.fill_(1.0)
        first = energy.hidden[0]
        direct = nn.functional.silu(first(torch.cat(expected, 1))).sum(-1)
        torch.testing.assert_close(energy.whitened(u, *context), direct)


# --- the written-out gradient ---------------------------------------------------------------


def test_user_subclasses_get_a_gradient_by_autograd() -> None:
    class Cubic(WhitenedEnergy):
        def whitened(self, u: Tensor) -> Tensor:
            return (u**3).sum(-1)

    u = normal((4, 3), 9)
    value, grad = Cubic(2, 1).value_and_grad(u)
    torch.testing.assert_close(value, (u**3).sum(-1))
    torch.testing.assert_close(grad, 3 * u**2)
    with pytest.raises(NotImplementedError):
        WhitenedEnergy(2, 1).whitened(u)


# --- coordinates ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_x", "base_z"),
    [
        (diagonal_base(3), diagonal_base(2)),
        (full_base(3), diagonal_base(2)),
        (diagonal_base(3), full_base(1, 2)),
        (full_base(1, 3), full_base(2)),
        (diagonal_base(3, 1), full_base(2)),
    ],
)
def test_data_coordinates_are_whitened_first(base_x: GaussianBase, base_z: GaussianBase) -> None:
    energy = trained(MLPEnergy(3, 2, (9,), 4))
    energy.bind(base_x, base_z)
    x = 2.0 * normal((6, *base_x.event_shape), 10)
    z = normal((6, *base_z.event_shape), 11)
    u = torch.cat([base_x.whiten(x), base_z.whiten(z)], -1)
    torch.testing.assert_close(energy(x, z), energy.whitened(u), rtol=1e-12, atol=1e-12)
    assert (
        energy(x, z) - energy.whitened(torch.cat([x.reshape(6, 3), z.reshape(6, 2)], -1))
    ).abs().min() > 1e-6


def test_a_new_energy_has_standard_coordinates() -> None:
    energy = trained(MLPEnergy(2, 1, (5,)))
    u = normal((4, 3), 12)
    torch.testing.assert_close(energy(u[:, :2], u[:, 2:]), energy.whitened(u))


def test_bind_refuses_bases_of_another_size() -> None:
    energy = MLPEnergy(3, 2, (4,))
    for base_x, base_z in [
        (diagonal_base(2), diagonal_base(2)),
        (diagonal_base(3), diagonal_base(3)),
        (diagonal_base(2), diagonal_base(3)),
    ]:
        with pytest.raises(ValueError, match=r"x_dim=3 and z_dim=2, but the bases have . and ."):
            energy.bind(base_x, base_z)
    energy.bind(diagonal_base(3), diagonal_base(2))  # a refusal leaves it free


@pytest.mark.parametrize(
    ("base_x", "base_z"),
    [
        (full_base(3), diagonal_base(2)),
        (diagonal_base(1, 3), diagonal_base(2)),
        (diagonal_base(3), full_base(2)),
        (GaussianBase(diagonal_base(3).loc + 1.0, diagonal_base(3).scale), diagonal_base(2)),
        (GaussianBase(diagonal_base(3).loc, 2.0 * diagonal_base(3).scale), diagonal_base(2)),
    ],
)
def test_bind_refuses_a_second_pair_of_bases(base_x: GaussianBase, base_z: GaussianBase) -> None:
    energy = trained(MLPEnergy(3, 2, (4,)))
    energy.bind(diagonal_base(3), diagonal_base(2))
    x, z = normal((4, 3), 1), normal((4, 2), 2)
    before = energy(x, z)
    with pytest.raises(ValueError, match="already belongs to an LVEBM with other bases"):
        energy.bind(base_x, base_z)
    energy.bind(diagonal_base(3), diagonal_base(2))  # equal bases are no change
    assert torch.equal(energy(x, z), before)


# --- seeds and parameters -------------------------------------------------------------------


def test_the_seed_fixes_weights_and_frequencies() -> None:
    def tensors(seed: int) -> list[Tensor]:
        return [t.clone() for t in MLPEnergy(3, 2, (6, 5), 4, seed=seed).state_dict().values()]

    state = torch.get_rng_state()
    first = tensors(1)
    torch.manual_seed(999)  # must not matter
    assert all(torch.equal(a, b) for a, b in zip(first, tensors(1), strict=True))
    torch.set_rng_state(state)
    other = MLPEnergy(3, 2, (6, 5), 4, seed=2)
    same = MLPEnergy(3, 2, (6, 5), 4, seed=1)
    assert not torch.equal(other.frequencies, same.frequencies)
    assert not torch.equal(other.hidden[1].weight, same.hidden[1].weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_dim": 0, "z_dim": 1}, "x_dim must be at least 1; got 0"),
        ({"x_dim": 1, "z_dim": -2}, "z_dim must be at least 0; got -2"),
        ({"x_dim": 2, "z_dim": 1, "hidden": ()}, r"hidden .* got \(\)"),
        ({"x_dim": 2, "z_dim": 1, "hidden": (8, 0)}, r"hidden .* got \(8, 0\)"),
        ({"x_dim": 2, "z_dim": 1, "fourier_features": -1}, "fourier_features .* got -1"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLPEnergy(**arguments)
