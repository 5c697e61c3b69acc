# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from referee import ALPHA, CERTAIN, mean_p_value

from pyro_lvebm.diagnostics import divergences
from pyro_lvebm.diagnostics.divergences import (
    debiased_squared_w2,
    free_energy,
    gaussian_kl,
    squared_w2,
)

TRIL = np.array([[0.7, 0.0, 0.0], [0.4, 1.2, 0.0], [-0.3, 0.2, 0.9]])
SHIFT = np.array([0.8, -0.3, 0.2])
COVARIANCE = TRIL @ TRIL.T
KL_TO_STANDARD = 0.5 * (
    np.trace(COVARIANCE) + SHIFT @ SHIFT - 3.0 - np.linalg.slogdet(COVARIANCE)[1]
)


def draws(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return SHIFT + rng.normal(size=(*shape, 3)) @ TRIL.T


# --- moments ---------------------------------------------------------------------------------


def gaussian_p_value(n: int, m: int) -> float:
    """Student's test over 3,000 pairs of small samples that the mean estimate is the exact KL."""
    rng = np.random.default_rng(0)
    values = [gaussian_kl(draws(rng, n), rng.normal(size=(m, 3))) for _ in range(3000)]
    return mean_p_value(np.array(values)[:, None], KL_TO_STANDARD)


@pytest.mark.parametrize(("n", "m"), [(9, 40), (40, 12)])
def test_moments_of_small_samples_are_unbiased(n: int, m: int) -> None:
    """False alarms: ALPHA a case."""
    assert gaussian_p_value(n, m) > ALPHA


def test_check_of_moments_fails_without_a_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergences, "_log_det_bias", lambda n, d: 0.0)
    assert gaussian_p_value(9, 40) < CERTAIN


def test_too_few_draws_for_moments_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="5 draws in 3 dimensions; expected more than 5"):
        gaussian_kl(draws(rng, 50), draws(rng, 5))


# --- neighbours ------------------------------------------------------------------------------


def energy(u: np.ndarray) -> np.ndarray:
    return 0.5 * (u * u).sum(-1)


def distance_from_kl(estimate: Callable[[np.ndarray, np.ndarray], float], n: int) -> float:
    """Largest |error| in nats that 100 replicates leave possible, at 3.3 standard errors."""
    rng = np.random.default_rng(1)
    values = np.array([estimate(draws(rng, n), rng.normal(size=(n, 3))) for _ in range(100)])
    return abs(values.mean() - KL_TO_STANDARD) + 3.3 * values.std(ddof=1) / 10.0


def by_neighbours(r: np.ndarray, p: np.ndarray) -> float:
    return free_energy(r, energy(r)) - free_energy(p, energy(p))


def test_free_energies_differ_by_the_divergence() -> None:
    """Within 0.03 nats in three dimensions with 1,000 draws; without the entropies it is not."""
    assert distance_from_kl(by_neighbours, 1000) < 0.03
    assert distance_from_kl(lambda r, p: energy(r).mean() - energy(p).mean(), 1000) > 0.3


def equal_laws_p_value(scale: float) -> float:
    rng = np.random.default_rng(2)
    pairs = [(rng.normal(size=(60, 2)), scale * rng.normal(size=(60, 2))) for _ in range(400)]
    return mean_p_value(np.array([[by_neighbours(*pair)] for pair in pairs]), 0.0)


def test_equal_laws_have_equal_free_energies() -> None:
    """Also with few draws. False alarms: ALPHA."""
    assert equal_laws_p_value(1.0) > ALPHA
    assert equal_laws_p_value(1.4) < CERTAIN


def test_draws_that_coincide_are_refused() -> None:
    u = np.zeros((10, 2))
    with pytest.raises(ValueError, match="draws coincide"):
        free_energy(u, energy(u))
    with pytest.raises(ValueError, match="4 draws; expected more than 4"):
        free_energy(u[:4], energy(u[:4]))


# --- assignments -----------------------------------------------------------------------------


def test_assignment_is_the_best_permutation() -> None:
    rng = np.random.default_rng(3)
    r, p = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    costs = [((r - p[list(s)]) ** 2).sum(1).mean() for s in itertools.permutations(range(6))]
    assert squared_w2(r, p) == pytest.approx(min(costs))
    line = squared_w2(r[:, :1], p[:, :1])
    assert line == pytest.approx(((np.sort(r[:, 0]) - np.sort(p[:, 0])) ** 2).mean())


def translate_p_value(distance: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Student's test over 200 replicates that W2² between translates is the squared shift."""
    rng = np.random.default_rng(4)
    values = [
        distance(SHIFT + rng.normal(size=(2, 40, 3)), rng.normal(size=(2, 40, 3)))
        for _ in range(200)
    ]
    return mean_p_value(np.array(values)[:, None], SHIFT @ SHIFT)


def test_distance_of_translates_is_unbiased() -> None:
    """False alarms: ALPHA. The plain distance of samples is too large."""
    assert translate_p_value(debiased_squared_w2) > ALPHA
    assert translate_p_value(lambda r, p: squared_w2(r[0], p[0])) < CERTAIN
