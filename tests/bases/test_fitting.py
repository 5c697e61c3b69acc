# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from referee import normal
from scipy import optimize, stats
from torch import Tensor

from pyro_lvebm.bases import fitting as module
from pyro_lvebm.bases.fitting import SHARES, condition, cross_validated_shrinkage, fit_incomplete

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def correlated(n: int, d: int, seed: int) -> Tensor:
    """Rows with correlations between 0.7 and 0.9."""
    return normal((n, d), seed) + 2.0 * normal((n, 1), seed + 1)


@pytest.mark.parametrize(("n", "folds"), [(3, 10), (9, 10), (25, 4)])
def test_shrinkage_is_that_of_cross_validation_written_out(n: int, folds: int) -> None:
    x = standardised(correlated(n, 3, 10))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).numpy()
    scores = []
    for a in SHARES[1:]:  # without shrinkage the covariance of few rows is singular
        score = 0.0
        for left_out in np.array_split(order, min(folds, n)):
            kept = np.delete(x.numpy(), left_out, 0)
            cov = (1.0 - a) * np.cov(kept.T, bias=True) + a * np.eye(3)
            normal_of = stats.multivariate_normal(kept.mean(0), cov)
            score += normal_of.logpdf(x.numpy()[left_out]).sum()
        scores.append(score)
    assert cross_validated_shrinkage(x, folds) == SHARES[1 + int(np.argmax(scores))]


def test_two_rows_are_not_shrunk() -> None:
    assert cross_validated_shrinkage(torch.tensor([[-1.0], [1.0]], dtype=torch.float64)) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_many_correlated_rows_are_hardly_shrunk(seed: int) -> None:
    assert cross_validated_shrinkage(standardised(correlated(5000, 6, seed))) <= 0.01


# --- conditioning ---------------------------------------------------------------------------


def holes(x: Tensor, share: float, seed: int) -> Tensor:
    """The rows with a share of their entries missing, but never all entries of a row."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(x.shape, generator=generator, dtype=torch.float64) < share
    hidden[hidden.all(1), 0] = False
    return x.masked_fill(hidden, math.nan)


def test_conditional_laws_are_those_of_each_row() -> None:
    root = normal((4, 4), 0)
    precision = root @ root.T + 0.3 * torch.eye(4)
    x = holes(normal((50, 4), 1), 0.5, 2)
    seen = ~x.isnan()
    shift, factor = condition(precision, x, seen)
    cov = torch.linalg.inv(precision)
    for row, mask, mean, r in zip(x, seen, shift, factor, strict=True):
        m, o = torch.nonzero(~mask)[:, 0], torch.nonzero(mask)[:, 0]
        slope = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        torch.testing.assert_close(mean[m], slope @ row[o])
        assert (mean[o] == 0.0).all()
        left = cov[m][:, m] - slope @ cov[o][:, m]
        inverse = torch.linalg.inv(r @ r.T)
        torch.testing.assert_close(inverse[m][:, m], left)
        assert (inverse[m][:, o] == 0.0).all()
        torch.testing.assert_close(inverse[o][:, o], (1.0 / precision.diagonal()[o]).diag())


# --- missing entries ------------------------------------------------------------------------


def observed_log_likelihood(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """Mean log density of the observed entries of every row, by its marginal."""
    total, seen = 0.0, ~np.isnan(x)
    for o in np.unique(seen, axis=0):
        rows = x[(seen == o).all(1)][:, o]
        total += stats.multivariate_normal(mean[o], cov[np.ix_(o, o)]).logpdf(rows).sum()
    return total / len(x)


def test_expectation_maximisation_finds_what_an_optimiser_finds() -> None:
    """Against BFGS on mean and Cholesky factor, from the same rows."""
    mix = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.3, 0.5]], dtype=torch.float64)
    x = holes(normal((80, 3), 3) @ mix.T * torch.tensor([1.0, 10.0, 0.1]) + 5.0, 0.3, 4)
    mean, cov = (part.numpy() for part in fit_incomplete(x))
    found = observed_log_likelihood(x.numpy(), mean, cov)
    scale = np.sqrt(cov.diagonal())
    lower = np.tril_indices(3)

    def loss(theta: np.ndarray) -> float:
        tril = np.zeros((3, 3))
        tril[lower] = theta[3:]
        own = scale[:, None] * tril
        return -observed_log_likelihood(x.numpy(), mean + scale * theta[:3], own @ own.T)

    start = np.concatenate([np.zeros(3), np.linalg.cholesky(cov / np.outer(scale, scale))[lower]])
    best = optimize.minimize(loss, start + 0.05, method="BFGS")
    assert found == pytest.approx(-best.fun, abs=1e-5)
    # The sibling: the Gaussian of rows filled with column means is far from it.
    rows = x.numpy()
    filled = np.where(np.isnan(rows), np.nanmean(rows, 0), rows)
    wrong = observed_log_likelihood(rows, filled.mean(0), np.cov(filled.T, bias=True))
    assert wrong < found - 0.05


def test_without_missing_entries_it_is_maximum_likelihood() -> None:
    x = normal((30, 3), 5) @ normal((3, 3), 6) + 2.0
    mean, cov = fit_incomplete(x)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(cov, torch.cov(x.T, correction=0), rtol=1e-5, atol=1e-6)


def test_columns_that_are_never_seen_together_are_refused() -> None:
    x = normal((60, 3), 7)
    x[:30, 0], x[30:, 2] = math.nan, math.nan
    with pytest.raises(ValueError, match="columns 0 and 2 of x are never observed together"):
        fit_incomplete(x)


def test_slow_convergence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ITERATIONS", 2)
    with pytest.warns(UserWarning, match="not converged in 2 iterations"):
        fit_incomplete(holes(correlated(50, 3, 8), 0.5, 9))


def test_too_few_entries_are_refused() -> None:
    x = normal((5, 4), 8)
    x[1:, 1:3] = math.nan
    x[2, 1:3] = 1.0
    with pytest.raises(ValueError, match="singular: too few entries are observed together"):
        fit_incomplete(x)
