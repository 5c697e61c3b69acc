# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from referee import normal
from torch import Tensor

from pyro_lvebm.sampling.preconditioning import inverse_root, secant_root

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def metrics(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive definite matrices (*shape, d, d) from its last entry d."""
    root = normal((*shape, shape[-1]), seed)
    return (root @ root.mT + 0.1 * torch.eye(shape[-1], dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 4), (2, 3, 8)])
def test_root_is_that_of_the_inverse_where_samples_abound(shape: tuple[int, ...]) -> None:
    metric = metrics(shape, 60)
    root = inverse_root(metric, 10**15)
    assert root.shape == metric.shape
    torch.testing.assert_close(root @ root.mT, torch.linalg.inv(metric), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_samples", [1, 7, 500])
def test_root_shrinks_the_share_of_noise_off_the_diagonal(num_samples: int) -> None:
    """M_ij n / (n + d) for i ≠ j, M_ii as it is."""
    metric = metrics((3, 4), 61)
    eye = torch.eye(4, dtype=torch.float64)
    factor = eye + (1.0 - eye) * num_samples / (num_samples + 4)
    root = inverse_root(metric, num_samples)
    inverse = torch.linalg.inv(factor * metric)
    torch.testing.assert_close(root @ root.mT, inverse, rtol=1e-9, atol=1e-9)
    assert (root @ root.mT - torch.linalg.inv(metric)).abs().max() > 1e-3


@pytest.mark.parametrize("dim", [3, 12])
@pytest.mark.parametrize("num_samples", [2560, 10**9])
def test_root_of_a_metric_of_condition_one_million_in_single_precision(
    dim: int, num_samples: int
) -> None:
    """Rounding of an entry moves the smallest eigenvalue by up to 6e-8 · 1e6 · √d = 0.2."""
    axes = torch.linalg.qr(normal((dim, dim), 62)).Q
    eigenvalues = torch.logspace(0.0, 6.0, dim, dtype=torch.float64)
    metric = (axes * eigenvalues) @ axes.T
    root = inverse_root(metric.float(), num_samples)
    assert root.dtype == torch.float32 and torch.isfinite(root).all()
    exact = inverse_root(metric, num_samples)
    white = torch.linalg.solve(exact, root.double())
    assert (torch.linalg.svdvals(white) - 1.0).abs().max() < 0.15


def test_root_of_fewer_samples_than_dimensions_is_finite() -> None:
    grad = normal((3, 8), 63, torch.float32)
    root = inverse_root(grad.mT @ grad / 3, 3)
    assert torch.isfinite(root).all() and torch.linalg.det(root) > 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_root_keeps_its_dtype_and_leaves_the_metric(dtype: torch.dtype) -> None:
    metric = metrics((2, 3), 64, dtype)
    kept = metric.clone()
    assert inverse_root(metric, 10).dtype == dtype
    assert torch.equal(metric, kept)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_secant_root_is_that_of_the_precision_from_any_cloud(batch: tuple[int, ...]) -> None:
    """On a Gaussian, with clouds that have nothing to do with its covariance."""
    p, c = metrics((*batch, 4), 1), metrics((*batch, 4), 2)
    root = secant_root(c, p @ c @ p, 10**9)
    torch.testing.assert_close(torch.linalg.inv(root @ root.mT), p, rtol=1e-5, atol=1e-6)
    # The outer products of gradients alone would give another metric.
    alone = inverse_root(p @ c @ p, 10**9)
    assert (torch.linalg.inv(alone @ alone.mT) - p).abs().max() > 0.1


def test_a_secant_root_does_not_depend_on_units() -> None:
    unit = torch.tensor([1e-6, 1.0, 1e3, 1e8]).double()
    p, c = metrics((4,), 1), metrics((4,), 2)
    root = secant_root(c, p @ c @ p, 30)
    other = secant_root(unit[:, None] * c * unit, p @ c @ p / unit[:, None] / unit, 30)
    torch.testing.assert_close(other @ other.T, unit[:, None] * (root @ root.T) * unit)


def test_few_samples_shrink_a_secant_root_to_units() -> None:
    p, c = metrics((4,), 1), metrics((4,), 2)
    g = p @ c @ p
    root = secant_root(c, g, 0)
    torch.testing.assert_close(root @ root.T, (c.diagonal() / g.diagonal()).sqrt().diag())
    # Also of fewer positions than dimensions, whose covariances are singular.
    row = normal((1, 4), 3)
    root = secant_root(row.T @ row, (row @ p).T @ (row @ p), 2)
    assert torch.linalg.eigvalsh(root @ root.T)[0] > 0


def test_a_coordinate_that_has_not_moved_keeps_its_unit() -> None:
    p, c = metrics((4,), 1), metrics((4,), 2)
    c[2] = c[:, 2] = 0.0
    g = p @ c @ p
    g[2] = g[:, 2] = 0.0
    root = secant_root(c, g, 1000)
    metric = root @ root.T
    assert torch.isfinite(metric).all() and float(metric[2, 2]) == pytest.approx(1.0)
