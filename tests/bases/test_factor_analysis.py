# SPDX-License-Identifier: Apache-2.0
"""Where a generator starts: factor analysis of maximum likelihood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from referee import normal
from sklearn.decomposition import FactorAnalysis
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from pyro_lvebm import GeneratorBase, MLPGenerator
from pyro_lvebm.bases import GaussianBase, Support
from pyro_lvebm.bases.factor_analysis import factor_analysis, rows_with_covariance

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

DIM = 5


def rows(count: int = 400, seed: int = 0) -> Tensor:
    z = normal((count, 2), seed)
    noise = normal((count, DIM), seed + 1)
    return z @ normal((2, DIM), 7) + noise * torch.linspace(0.3, 1.0, DIM).double() + 4.0


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def log_likelihood(x: Tensor, a: Tensor, psi: Tensor) -> Tensor:
    law = MultivariateNormal(torch.zeros(DIM).double(), a @ a.T + psi.diag())
    return law.log_prob(x).mean()


def test_it_is_a_maximum_of_the_likelihood() -> None:
    """No gradient is left; at half of the loadings there is one."""
    x = standardised(rows())
    a, psi = (p.requires_grad_(True) for p in factor_analysis(x, 2))
    assert a.shape == (DIM, 2) and psi.shape == (DIM,)

    def size(a: Tensor) -> float:
        grads = torch.autograd.grad(log_likelihood(x, a, psi), (a, psi))
        return max(float(g.abs().max()) for g in grads)

    assert 20.0 * size(a) < size(0.5 * a)


def test_axes_are_in_their_canonical_form() -> None:
    a, psi = factor_analysis(standardised(rows()), 2)
    product = a.T @ (a / psi[:, None])
    assert abs(float(product[0, 1])) < 1e-6 * float(product[0, 0])
    assert product[0, 0] > product[1, 1]


def test_factors_beyond_the_entries_are_zero() -> None:
    a, _ = factor_analysis(standardised(rows()), DIM + 2)
    assert a.shape == (DIM, DIM + 2) and not a[:, DIM:].any()


def test_rows_that_stand_for_a_covariance() -> None:
    tril = normal((4, 4), 1).tril()
    x = rows_with_covariance(tril)
    torch.testing.assert_close(x.T @ x / len(x), tril @ tril.T)
    torch.testing.assert_close(x.sum(0), torch.zeros(4).double())


def marginal(base: GeneratorBase) -> MultivariateNormal:
    """The law of flat y where g = 0 and z ~ N(0, I)."""
    a = base.unit[:, None] * base.linear.detach()
    sigma = base.unit * (1e-3 + base.log_noise.detach().exp())
    return MultivariateNormal(base.loc, a @ a.T + sigma.square().diag())


@pytest.mark.parametrize("noise", ["diagonal", "full"])
def test_a_base_starts_at_factor_analysis(noise: Any) -> None:
    """Its mean log likelihood is that of scikit-learn on the same rows."""
    x = rows()
    base = GeneratorBase.from_factor_analysis(
        x, torch.Size([2]), MLPGenerator(2, (DIM,)), noise=noise
    )
    with torch.no_grad():
        found = float(marginal(base).log_prob(x).mean())
    y = standardised(x).numpy()
    theirs = FactorAnalysis(2, tol=1e-8, max_iter=5000, svd_method="lapack").fit(y).score(y)
    assert found == pytest.approx(theirs - float(x.std(0, correction=0).log().sum()), abs=2e-4)


def test_missing_entries_and_supports() -> None:
    """The covariance of maximum likelihood stands in for rows with holes; the unconstrained
    coordinates for bounded ones."""
    x = rows(800)
    plain = marginal(GeneratorBase.from_factor_analysis(x, torch.Size([2])))
    holed = x.masked_fill(normal(tuple(x.shape), 5) > 1.5, torch.nan)
    law = marginal(GeneratorBase.from_factor_analysis(holed, torch.Size([2])))
    assert abs(float((law.log_prob(x) - plain.log_prob(x)).mean())) < 0.01
    support = Support(constraints.positive, torch.Size([DIM]))
    bounded = GeneratorBase.from_factor_analysis(x.exp(), torch.Size([2]), support=support)
    torch.testing.assert_close(marginal(bounded).log_prob(x), plain.log_prob(x))


def test_fewer_rows_than_entries() -> None:
    """The Gaussian over x has no correlations then; the start is still factor analysis."""
    x = rows()[:DIM]
    base = GeneratorBase.from_factor_analysis(x, torch.Size([1]))
    assert base.diagonal and type(base.coordinates()) is GaussianBase
    assert bool(marginal(base).log_prob(x).isfinite().all())
    with pytest.raises(ValueError, match=r"columns \[0, 1, 2, 3, 4\] of x are constant"):
        GeneratorBase.from_factor_analysis(torch.ones(3, DIM), torch.Size([1]))
