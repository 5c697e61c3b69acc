# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from referee import CERTAIN, normal
from scipy import stats
from torch import Tensor

from pyro_lvebm.bases import gaussian as bases
from pyro_lvebm.bases.gaussian import GaussianBase

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def make_base(
    event_shape: tuple[int, ...], full: bool, dtype: torch.dtype = torch.float64, seed: int = 0
) -> GaussianBase:
    """A base with scales from 0.05 to 20 and, if full, strong correlations."""
    d = math.prod(event_shape)
    loc = 3.0 * normal(event_shape, seed, dtype)
    std = torch.logspace(math.log10(0.05), math.log10(20.0), d, dtype=dtype)
    if not full:
        return GaussianBase(loc, std.reshape(event_shape))
    below = normal((d, d), seed + 1, dtype).tril(-1)
    return GaussianBase(loc, std[:, None] * (below + torch.eye(d, dtype=dtype)))


CASES = pytest.mark.parametrize(
    ("event_shape", "full", "dtype"),
    [
        ((1,), False, torch.float64),
        ((3,), False, torch.float32),
        ((2, 3), False, torch.float64),
        ((1,), True, torch.float64),
        ((3,), True, torch.float64),
        ((2, 3), True, torch.float64),
        ((2, 3), True, torch.float32),
    ],
)


def reference(base: GaussianBase) -> torch.distributions.Distribution:
    """The same law over flattened events, from torch alone and in float64."""
    loc, scale = base.loc.double(), base.scale.double()
    if base.diagonal:
        return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)
    return torch.distributions.MultivariateNormal(loc, covariance_matrix=scale @ scale.T)


@CASES
@pytest.mark.parametrize("batch", [(), (7,), (2, 1, 4)])
def test_log_prob_is_that_of_torch(
    event_shape: tuple[int, ...], full: bool, dtype: torch.dtype, batch: tuple[int, ...]
) -> None:
    base = make_base(event_shape, full, dtype)
    x = base.unwhiten(1.5 * normal((*batch, base.dim), 5, dtype))
    tight = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    expected = reference(base).log_prob(x.double().reshape(*batch, -1))
    result = base.log_prob(x)
    assert x.shape == (*batch, *event_shape)
    assert result.dtype == dtype and result.shape == batch
    torch.testing.assert_close(result.double(), expected, **tight)
    # `distribution()` has flat events where the covariance is full.
    law = base.distribution()
    event = x if base.diagonal else x.reshape(*batch, -1)
    assert law.event_shape == (event_shape if base.diagonal else (base.dim,))
    torch.testing.assert_close(law.log_prob(event).double(), expected, **tight)
    assert base.log_det.item() == pytest.approx(
        np.linalg.slogdet(base.scale.double().diag() if base.diagonal else base.scale)[1],
        rel=1e-5,
        abs=1e-5,
    )


# --- construction ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale_shape", [(2,), (4,), (2, 3), (3, 3, 3), ()])
def test_scale_of_another_shape_is_refused(scale_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"scale has shape .*expected \(3,\) .*\(3, 3\)"):
        GaussianBase(torch.zeros(3), torch.ones(scale_shape))


@pytest.mark.parametrize(
    ("loc", "scale"),
    [
        (torch.zeros(2), torch.tensor([1.0, 0.0])),
        (torch.zeros(2), torch.tensor([1.0, -1.0])),
        (torch.zeros(2), torch.tensor([1.0, math.nan])),
        (torch.zeros(2), torch.tensor([1.0, math.inf])),
        (torch.tensor([0.0, math.nan]), torch.ones(2)),
        (torch.tensor([0.0, math.inf]), torch.ones(2)),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [0.5, -1.0]])),
        (torch.zeros(2), torch.tensor([[1.0, 0.0], [math.nan, 1.0]])),
    ],
)
def test_improper_numbers_are_refused(loc: Tensor, scale: Tensor) -> None:
    with pytest.raises(ValueError, match="finite, and scales positive"):
        GaussianBase(loc, scale)


def test_a_scale_that_is_not_triangular_is_refused() -> None:
    with pytest.raises(ValueError, match="triangular"):
        GaussianBase(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))


def test_the_arguments_are_copied_without_their_graph() -> None:
    loc, scale = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    base = GaussianBase(loc, scale)
    with torch.no_grad():
        loc.fill_(5.0)
        scale.fill_(5.0)
    assert base.loc.tolist() == [0.0, 0.0] and base.scale.tolist() == [1.0, 1.0]
    assert not base.log_prob(torch.ones(2)).requires_grad


# --- from_distribution ----------------------------------------------------------------------

TRIL = torch.tensor([[2.0, 0.0], [-0.7, 0.4]])


@pytest.mark.parametrize(
    ("law", "event_shape"),
    [
        (dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1), (2,)),
        (dist.Normal(torch.tensor([[1.0], [2.0]]), 3.0).to_event(2), (2, 1)),
        (dist.Normal(1.0, 2.0).expand([2, 3]).to_event(2), (2, 3)),
        (dist.Normal(torch.zeros(2, 3), 2.0).to_event(1).to_event(1), (2, 3)),
        (dist.MultivariateNormal(torch.tensor([1.0, 2.0]), scale_tril=TRIL), (2,)),
        (dist.MultivariateNormal(torch.zeros(2), covariance_matrix=TRIL @ TRIL.T), (2,)),
        (dist.MultivariateNormal(torch.zeros(2), precision_matrix=TRIL @ TRIL.T), (2,)),
        (torch.distributions.MultivariateNormal(torch.zeros(2), scale_tril=TRIL), (2,)),
    ],
)
def test_gaussians_are_read(law: torch.distributions.Distribution, event_shape: tuple) -> None:
    base = GaussianBase.from_distribution(law, "base_x")
    assert base.event_shape == event_shape
    x = 2.0 * normal((6, *event_shape), 2, torch.float32)
    torch.testing.assert_close(base.log_prob(x), law.log_prob(x), rtol=1e-5, atol=1e-5)


def test_a_base_is_returned_as_it_is() -> None:
    base = make_base((3,), True)
    assert GaussianBase.from_distribution(base, "base_z") is base


@pytest.mark.parametrize(
    ("law", "message"),
    [
        (dist.Poisson(torch.ones(3)).to_event(1), r"got Poisson with a discrete support; dequant"),
        (dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), r"got Bernoulli with a discrete"),
        (dist.Categorical(torch.ones(3)), r"got Categorical with a discrete support"),
        (dist.LogNormal(torch.zeros(3), 1.0).to_event(1), r"got LogNormal$"),
        (dist.StudentT(3.0, torch.zeros(3), 1.0).to_event(1), r"got StudentT$"),
        ("Normal", r"got str$"),
        (None, r"got NoneType$"),
        (dist.Normal(torch.zeros(3), 1.0), r"batch shape \(3,\).*\.to_event\(1\)"),
        (dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), r"batch shape \(4,\)"),
        (dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3]), r"batch shape \(3,\)"),
        (
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3]).to_event(1),
            r"got event shape \(3, 2\)",
        ),
        (dist.Normal(0.0, 1.0), r"batch shape \(\) and event shape \(\)"),
    ],
)
@pytest.mark.parametrize("role", ["base_x", "base_z"])
def test_other_laws_are_refused_by_name(law: object, message: str, role: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{role} must be a Gaussian over real vectors.*{message}"
    ):
        GaussianBase.from_distribution(law, role)


def test_the_advice_for_a_scalar_helps() -> None:
    with pytest.raises(ValueError) as caught:
        GaussianBase.from_distribution(dist.Normal(0.0, 1.0), "base_z")
    assert "to_event(0)" not in str(caught.value)


# --- fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("event_shape", [(1,), (3,), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_without_shrinkage_is_the_maximum_likelihood_gaussian(
    event_shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases, "cross_validated_shrinkage", lambda x: 0.0)
    d = math.prod(event_shape)
    mix = torch.diag(torch.logspace(-2, 2, d, dtype=torch.float64)) @ (normal((d, d), 3) + 2.0)
    x = (50.0 + normal((60, d), 4) @ mix.T).reshape(60, *event_shape).to(dtype)
    base = GaussianBase.fit(x)
    flat = x.double().reshape(60, d).numpy()
    tight = 1e-9 if dtype is torch.float64 else 1e-5
    assert base.event_shape == event_shape and base.loc.dtype == base.scale.dtype == dtype
    np.testing.assert_allclose(base.loc.numpy(), flat.mean(0), rtol=tight)
    cov = np.cov(flat.T, bias=True).reshape(d, d)
    scale = base.scale.double().numpy()
    scale = np.diag(scale) if base.diagonal else scale
    outer = np.sqrt(np.outer(cov.diagonal(), cov.diagonal()))
    np.testing.assert_allclose(scale @ scale.T / outer, cov / outer, atol=tight)
    # The mean log density of the rows is the entropy term of a Gaussian at its own fit.
    expected = -0.5 * (d * math.log(2 * math.pi) + np.linalg.slogdet(cov)[1] + d)
    assert base.log_prob(x).double().mean().item() == pytest.approx(expected, abs=1e3 * tight)


def correlated(n: int, d: int, seed: int) -> Tensor:
    """Rows with correlations between 0.7 and 0.9."""
    return normal((n, d), seed) + 2.0 * normal((n, 1), seed + 1)


@pytest.mark.parametrize("dim", [6, 20])
def test_few_rows_are_shrunk_and_others_become_likelier(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the maximum-likelihood Gaussian, which is the sibling, on rows of the same source."""
    rows = [correlated(dim + 15, dim, seed) for seed in range(60)]
    others = correlated(2000, dim, 99)
    shrunk = [GaussianBase.fit(x).log_prob(others).mean().item() for x in rows]
    monkeypatch.setattr(bases, "cross_validated_shrinkage", lambda x: 0.0)
    plain = [GaussianBase.fit(x).log_prob(others).mean().item() for x in rows]
    gains = np.subtract(shrunk, plain)
    assert stats.ttest_1samp(gains, 0.0, alternative="greater").pvalue < CERTAIN
    assert gains.mean() > 0.1


def test_shrinkage_leaves_means_and_variances() -> None:
    x = correlated(20, 6, 3) * torch.logspace(-2, 2, 6) + 7.0
    base = GaussianBase.fit(x)
    cov = base.scale @ base.scale.T
    torch.testing.assert_close(base.loc, x.mean(0))
    torch.testing.assert_close(cov.diagonal(), x.var(0, correction=0))
    ratio = (cov / torch.cov(x.T, correction=0)).fill_diagonal_(0.5)
    assert ((ratio - ratio[0, 1]).fill_diagonal_(0.0).abs() < 1e-9).all() and ratio[0, 1] < 1.0


@pytest.mark.parametrize(("n", "event_shape"), [(1, (1,)), (2, (2,)), (3, (3,)), (4, (2, 2))])
def test_fit_needs_more_rows_than_dimensions(n: int, event_shape: tuple[int, ...]) -> None:
    d = math.prod(event_shape)
    with pytest.raises(ValueError, match=rf"{d} dimensions needs more than {d} rows; got {n}\."):
        GaussianBase.fit(normal((n, *event_shape), 0))
    assert GaussianBase.fit(normal((d + 1, *event_shape), 0)).dim == d


def test_fit_refuses_empty_data() -> None:
    with pytest.raises(ValueError, match="needs more than 2 rows; got 0"):
        GaussianBase.fit(torch.empty(0, 2))


@pytest.mark.parametrize("value", [0.0, 1000.3, -1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_names_constant_columns(value: float, dtype: torch.dtype) -> None:
    x = normal((40, 4), 1, dtype)
    x[:, [1, 3]] = value
    with pytest.raises(ValueError, match=r"columns \[1, 3\] of x are constant"):
        GaussianBase.fit(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_refuses_collinear_columns(dtype: torch.dtype) -> None:
    x = normal((40, 3), 2, dtype) * torch.tensor([1.0, 100.0, 1.0], dtype=dtype)
    x[:, 2] = 1e3 * x[:, 0] - x[:, 1]
    with pytest.raises(ValueError, match="singular: some columns are linear combinations"):
        GaussianBase.fit(x)
    x[:, 2] += 0.1 * normal((40,), 3, dtype) * x[:, 2].std()
    assert GaussianBase.fit(x).dim == 3


def test_fit_leaves_the_data_alone() -> None:
    x = normal((20, 2), 5).requires_grad_(True)
    copy = x.detach().clone()
    base = GaussianBase.fit(x)
    assert torch.equal(x.detach(), copy) and not base.loc.requires_grad
