# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from bounded_models import twins
from linear_gaussian import assert_unchanged, make_neural
from referee import ALPHA, CERTAIN, variance_p_value
from scipy import stats
from small_models import condition, data_of, exact_joint, exact_posterior, quadratic_ebm, rotations
from small_models import whitened as whitened_by
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from pyro_lvebm import LVEBM, Traversal, traverse
from pyro_lvebm.sampling.langevin import ValueAndGrad

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

MODULE = sys.modules["pyro_lvebm.diagnostics.traversal"]
VALUES = torch.tensor([-2.0, 0.5, 3.0])


def run(num_runs: int = 12, seed: int = 0) -> tuple[LVEBM, Tensor, Traversal]:
    ebm = quadratic_ebm(3, 2)
    x = data_of(ebm, 4)
    return ebm, x, traverse(ebm, x, 1, VALUES, num_runs=num_runs, seed=seed)


def exact(ebm: LVEBM, z: Tensor) -> MultivariateNormal:
    """p(x | z) of a quadratic energy."""
    return condition(exact_joint(ebm), [3, 4], z)


def mean_p(ebm: LVEBM, result: Traversal) -> float:
    """Student's test of the mean of each entry, row and value, with Bonferroni's correction."""
    t = ((result.mean - exact(ebm, result.z).mean) / result.std_error).abs()
    p = 2.0 * stats.t(len(result.draws) - 1).sf(float(t.max()))
    return min(1.0, t.numel() * p)


def test_means_are_those_of_x_given_z() -> None:
    """Against the closed form, and errors within a factor. False alarms: ALPHA."""
    ebm, _, result = run()
    assert mean_p(ebm, result) > ALPHA
    z_scores = (result.mean - exact(ebm, result.z).mean) / result.std_error
    assert 0.5 < float(z_scores.std()) < 2.0
    assert result.mean.shape == result.std_error.shape == (4, 3, 3)


def test_check_of_means_fails_for_the_law_at_another_latent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = MODULE.given_z

    def confused(ebm: LVEBM, w_z: Tensor) -> ValueAndGrad:
        return real(ebm, -w_z)

    monkeypatch.setattr(MODULE, "given_z", confused)
    ebm, _, result = run()
    assert mean_p(ebm, result) < CERTAIN


def test_draws_are_those_of_x_given_z() -> None:
    """Variances in nine directions, 12 × 24 draws. False alarms: ALPHA."""
    ebm, _, result = run(num_runs=24)
    law = exact(ebm, result.z)
    white = rotations(whitened_by(result.draws, law))
    assert variance_p_value(white, np.ones(9)) > ALPHA
    means = rotations(whitened_by(result.mean.expand_as(result.draws), law))
    assert variance_p_value(means, np.ones(9)) < CERTAIN  # means are no draws


def test_only_one_entry_of_z_moves() -> None:
    """The others are posterior means, within 5 standard errors of 64 draws."""
    ebm, x, result = run(num_runs=2)
    assert torch.equal(result.z[..., 1], VALUES.double().expand(4, 3))
    assert torch.equal(result.z[:, :1, 0].expand(4, 3), result.z[..., 0])
    posterior = exact_posterior(ebm, x)
    error = posterior.covariance_matrix[..., 0, 0].sqrt() / 8.0
    assert ((result.z[:, 0, 0] - posterior.mean[:, 0]).abs() < 5.0 * error).all()


def test_nothing_moves_and_the_seed_decides() -> None:
    ebm = make_neural(2, 1)
    x = data_of(ebm, 3)
    with assert_unchanged(ebm):
        a, b, c = (traverse(ebm, x, 0, VALUES, num_runs=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.draws, b.draws) and not torch.equal(a.draws, c.draws)
    assert a.draws.shape == (2, 3, 3, 2) and a.draws.dtype == x.dtype


def test_rows_beyond_one_batch_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "_MAX_PROBLEMS", 5)
    ebm, _, result = run()
    assert mean_p(ebm, result) > ALPHA and result.draws.shape == (12, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, VALUES), "dim must be an entry of z, 0 … 1; got 2"),
        ((-1, VALUES), "dim must be an entry of z"),
        ((0, VALUES[:, None]), r"values must be a vector of finite numbers; got shape \(3, 1\)"),
        ((0, VALUES[:0]), "values must be a vector"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    ebm = quadratic_ebm(3, 2)
    with pytest.raises(ValueError, match=message):
        traverse(ebm, data_of(ebm, 2), *arguments)


def test_wrong_rows_and_counts_are_refused() -> None:
    ebm = quadratic_ebm(3, 2)
    with pytest.raises(ValueError, match="expected trailing shape"):
        traverse(ebm, torch.zeros(4, 2).double(), 0, VALUES)
    with pytest.raises(ValueError, match="num_runs must be at least 2; got 1"):
        traverse(ebm, data_of(ebm, 2), 0, VALUES, num_runs=1)


def test_means_on_a_bounded_support_are_those_of_x() -> None:
    """Against E[x | z] = exp(m + s² / 2) of log-normal x. False alarms: ALPHA.

    The map of the mean of log x, which is the median, fails.
    """
    plain, ebm = twins(constraints.positive)
    x = data_of(plain, 3).exp()
    result = traverse(ebm, x, 1, VALUES, num_runs=24)
    law = exact(plain, result.z)
    median = law.mean.exp()

    def p_value(expected: Tensor) -> float:
        t = ((result.mean - expected) / result.std_error).abs()
        return min(1.0, t.numel() * 2.0 * float(stats.t(23).sf(float(t.max()))))

    assert p_value(median * (0.5 * law.variance).exp()) > ALPHA
    assert p_value(median) < CERTAIN
