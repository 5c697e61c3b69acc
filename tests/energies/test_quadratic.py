# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from referee import gaussian_log_partition, normal, plane_grid
from torch import Tensor

from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.energies.quadratic import QuadraticEnergy

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def make_base(event_shape: tuple[int, ...], full: bool, seed: int) -> GaussianBase:
    d = math.prod(event_shape)
    std = 0.4 + 2.0 * torch.rand(d, generator=torch.Generator().manual_seed(seed)).double()
    loc = normal(event_shape, seed)
    if not full:
        return GaussianBase(loc, std.reshape(event_shape))
    return GaussianBase(loc, normal((d, d), seed + 1).tril(-1) + std.diag())


def make_energy(
    x_shape: tuple[int, ...],
    z_shape: tuple[int, ...],
    *,
    full_x: bool = False,
    full_z: bool = False,
    seed: int = 0,
) -> QuadraticEnergy:
    k, m = math.prod(x_shape), math.prod(z_shape)
    energy = QuadraticEnergy(k, m).double()
    energy.bind(make_base(x_shape, full_x, seed), make_base(z_shape, full_z, seed + 10))
    root = 0.6 * normal((k + m, k + m), seed + 20)
    energy.set_precision(
        root @ root.T + 0.5 * torch.eye(k + m, dtype=torch.float64), normal((k + m,), seed + 30)
    )
    return energy


def torch_law(base: GaussianBase) -> torch.distributions.Distribution:
    """The base over flattened events, written with torch alone."""
    if base.diagonal:
        return torch.distributions.Independent(torch.distributions.Normal(base.loc, base.scale), 1)
    return torch.distributions.MultivariateNormal(base.loc, scale_tril=base.scale)


def log_unnormalised(energy: QuadraticEnergy, x: Tensor, z: Tensor) -> Tensor:
    """log base_x(x) + log base_z(z) - f(x, z) on flat events, without the closed forms."""
    x_event = x.reshape(*x.shape[:-1], *energy.base_x.event_shape)
    z_event = z.reshape(*z.shape[:-1], *energy.base_z.event_shape)
    with torch.no_grad():
        f = energy(x_event, z_event)
    return torch_law(energy.base_x).log_prob(x) + torch_law(energy.base_z).log_prob(z) - f


BASES = pytest.mark.parametrize(("full_x", "full_z"), [(False, False), (True, False), (True, True)])


# --- quadrature in one and one dimensions ---------------------------------------------------


@BASES
@pytest.mark.parametrize("seed", [0, 3])
def test_log_partition_is_that_of_quadrature(full_x: bool, full_z: bool, seed: int) -> None:
    energy = make_energy((1,), (1,), full_x=full_x, full_z=full_z, seed=seed)
    w, cell = plane_grid(14.0, 601)
    x, z = energy.base_x.unwhiten(w[:, :1]), energy.base_z.unwhiten(w[:, 1:])
    area = cell * torch.exp(energy.base_x.log_det + energy.base_z.log_det)
    expected = torch.logsumexp(log_unnormalised(energy, x, z), 0) + torch.log(area)
    assert abs(expected) > 0.05
    torch.testing.assert_close(energy.log_partition(), expected, rtol=1e-9, atol=1e-9)


@BASES
@pytest.mark.parametrize("seed", [0, 3])
def test_conditionals_are_those_of_quadrature(full_x: bool, full_z: bool, seed: int) -> None:
    energy = make_energy((1,), (1,), full_x=full_x, full_z=full_z, seed=seed)
    x = energy.base_x.unwhiten(torch.tensor([[-1.5], [0.0], [0.4], [2.0]], dtype=torch.float64))
    z_line = energy.base_z.unwhiten(torch.linspace(-20, 20, 4001, dtype=torch.float64)[:, None])
    spacing = (z_line[1, 0] - z_line[0, 0]).abs()
    density = log_unnormalised(energy, x[:, None].expand(-1, 4001, -1), z_line.expand(4, -1, -1))
    log_marginal = torch.logsumexp(density, -1) + torch.log(spacing)
    torch.testing.assert_close(
        energy.log_evidence(x), log_marginal - energy.log_partition(), rtol=1e-9, atol=1e-9
    )
    weight = torch.softmax(density, -1)
    mean = weight @ z_line
    variance = (weight * (z_line.T - mean) ** 2).sum(-1)
    posterior = energy.posterior(x)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(posterior.variance.squeeze(-1), variance, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        energy.mean_field_gap(), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-12
    )


@BASES
def test_posterior_and_gap_of_two_latents_are_those_of_quadrature(
    full_x: bool, full_z: bool
) -> None:
    energy = make_energy((1,), (2,), full_x=full_x, full_z=full_z, seed=5)
    x = energy.base_x.unwhiten(torch.tensor([0.7], dtype=torch.float64))
    w, cell = plane_grid(12.0, 401)
    z = energy.base_z.unwhiten(w)
    log_density = log_unnormalised(energy, x.expand(len(z), -1), z)
    log_area = math.log(cell) + energy.base_z.log_det
    log_marginal = torch.logsumexp(log_density, 0) + log_area
    torch.testing.assert_close(
        energy.log_evidence(x), log_marginal - energy.log_partition(), rtol=1e-9, atol=1e-9
    )
    p = torch.softmax(log_density, 0)
    mean = p @ z
    covariance = ((z - mean) * p[:, None]).T @ (z - mean)
    posterior = energy.posterior(x)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(posterior.covariance_matrix, covariance, rtol=1e-8, atol=1e-8)
    # KL of the best factorised Gaussian, by its own sum over the grid.
    std = torch.linalg.inv(covariance).diagonal().rsqrt()

    def kl(scale: Tensor) -> Tensor:
        log_q = torch.distributions.Normal(mean, scale).log_prob(z).sum(-1)
        q = torch.softmax(log_q, 0)
        return (q * (log_q - log_density + log_marginal)).sum()

    gap = energy.mean_field_gap()
    assert gap > 0.01
    torch.testing.assert_close(gap, kl(std), rtol=1e-6, atol=1e-8)
    for factors in ([1.05, 1.0], [0.95, 1.0], [1.0, 1.05], [1.04, 0.97]):
        assert kl(std * torch.tensor(factors)) > gap + 1e-4  # it is the best


def test_gap_depends_on_the_coordinates_of_z() -> None:
    """Without the base's factor L the gap would be another one."""
    energy = make_energy((1,), (2,), full_z=True, seed=5)
    block = energy.precision[1:, 1:]
    careless = 0.5 * (block.diagonal().log().sum() - torch.logdet(block))
    assert abs(careless - energy.mean_field_gap()) > 0.01


# --- identities in more dimensions ----------------------------------------------------------

SHAPES = pytest.mark.parametrize(
    ("x_shape", "z_shape"), [((4,), (2,)), ((2, 3), (1,)), ((1,), (2, 2)), ((2, 2), (3,))]
)


@SHAPES
@BASES
def test_joint_density_is_evidence_times_posterior(
    x_shape: tuple[int, ...], z_shape: tuple[int, ...], full_x: bool, full_z: bool
) -> None:
    """log p(x) + log p(z | x) = -E(x, z) - log Z at any point."""
    energy = make_energy(x_shape, z_shape, full_x=full_x, full_z=full_z, seed=7)
    x, z = 2.0 * normal((3, 5, energy.x_dim), 8), 2.0 * normal((3, 5, energy.z_dim), 9)
    x_event = x.reshape(3, 5, *x_shape)
    posterior = energy.posterior(x_event)
    assert posterior.batch_shape == (3, 5) and posterior.event_shape == (energy.z_dim,)
    torch.testing.assert_close(
        energy.log_evidence(x_event) + posterior.log_prob(z),
        log_unnormalised(energy, x, z) - energy.log_partition(),
        rtol=1e-9,
        atol=1e-9,
    )


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_partition_is_that_of_linear_algebra(
    x_shape: tuple[int, ...], z_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    energy = make_energy(x_shape, z_shape, seed=11)
    expected = gaussian_log_partition(energy.precision, energy.linear)
    tolerance = 1e-10 if dtype is torch.float64 else 1e-5
    assert energy.to(dtype).log_partition().item() == pytest.approx(expected, rel=tolerance)


def test_gradient_of_log_partition_is_minus_the_mean_gradient() -> None:
    """∇_θ log Z = -E[∇_θ f], with E f = ½ tr((P - I) S) + b·m for fixed moments S and m."""
    energy = make_energy((3,), (2,), seed=13)
    params = [energy.raw_tril, energy.linear]
    expected = torch.autograd.grad(energy.log_partition(), params)
    with torch.no_grad():
        covariance = torch.linalg.inv(energy.precision)
        mean = -covariance @ energy.linear
        second = covariance + torch.outer(mean, mean)
    residual = energy.precision - torch.eye(5, dtype=torch.float64)
    mean_f = 0.5 * (residual * second).sum() + energy.linear @ mean
    for exact, ours in zip(torch.autograd.grad(-mean_f, params), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
    assert expected[0].tril(-1).abs().max() > 0.01 and expected[0].triu(1).abs().max() == 0
    # Draws of the base in place of the model would give another gradient.
    wrong = 0.5 * (energy.precision.diagonal() - 1.0).sum()
    (other,) = torch.autograd.grad(-wrong, [energy.raw_tril])
    assert (other - expected[0]).abs().max() > 0.1


# --- parameters -----------------------------------------------------------------------------


def test_the_untrained_energy_is_zero() -> None:
    energy = QuadraticEnergy(3, 2)
    energy.bind(GaussianBase(torch.ones(3), 2 * torch.ones(3)), energy.base_z)
    x, z = normal((4, 3), 1, torch.float32), normal((4, 2), 2, torch.float32)
    assert torch.equal(energy(x, z), torch.zeros(4))
    assert energy.log_partition().item() == 0.0 and energy.mean_field_gap().item() == 0.0
    torch.testing.assert_close(energy.log_evidence(x), energy.base_x.log_prob(x))
    torch.testing.assert_close(energy.posterior(x).mean, torch.zeros(4, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_set_precision_is_read_back(dtype: torch.dtype) -> None:
    energy = QuadraticEnergy(2, 2).to(dtype)
    root = normal((4, 4), 21, dtype)
    precision = root @ root.T + torch.eye(4, dtype=dtype)
    linear = normal((4,), 22, dtype)
    energy.set_precision(precision, linear)
    torch.testing.assert_close(energy.precision.detach(), precision)
    assert torch.equal(energy.linear.detach(), linear)
    energy.set_precision(2.0 * precision)
    torch.testing.assert_close(energy.precision.detach(), 2.0 * precision)
    assert torch.equal(energy.linear.detach(), linear)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (torch.eye(2), r"precision has shape \(2, 2\); expected \(3, 3\)"),
        (torch.ones(3), r"precision has shape \(3,\); expected \(3, 3\)"),
        (-torch.eye(3), "positive definite"),
        (torch.ones(3, 3), "positive definite"),
        (torch.full((3, 3), math.nan), "positive definite"),
    ],
)
def test_an_impossible_precision_changes_nothing(precision: Tensor, message: str) -> None:
    energy = QuadraticEnergy(2, 1)
    energy.set_precision(2.0 * torch.eye(3), torch.ones(3))
    with pytest.raises(ValueError, match=message):
        energy.set_precision(precision, torch.zeros(3))
    torch.testing.assert_close(energy.precision.detach(), 2.0 * torch.eye(3))
    assert energy.linear.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("linear", [torch.zeros(2), torch.tensor(1.0), torch.zeros(3, 1)])
def test_a_linear_term_of_another_shape_changes_nothing(linear: Tensor) -> None:
    energy = QuadraticEnergy(2, 1)
    with pytest.raises(ValueError, match="linear has shape"):
        energy.set_precision(2.0 * torch.eye(3), linear)
    assert torch.equal(energy.precision.detach(), torch.eye(3))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="z_dim must be at least 0; got -1"):
        QuadraticEnergy(2, -1)
