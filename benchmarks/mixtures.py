# SPDX-License-Identifier: Apache-2.0
"""The mixture of Gaussians to beat: chosen by cross-validation on the training rows alone.

Besides the number of components and the form of the covariances, the search covers two things that
are usually left alone and are worth one to four nats on tables with many columns: the variance that
each component is given on top of its own (`reg_covar` of scikit-learn), and the coordinates in
which it is added. In columns scaled to variance 1 it pulls components towards spheres, in whitened
ones towards the shape of the covariance of all rows. A diagonal covariance in whitened coordinates
has the principal axes of all rows.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import KFold
from threadpoolctl import threadpool_limits

from pyro_lvebm.cli.baselines import MAX_ITER, HeldOut, gaussian

COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 65, 80, 100)
REG_COVAR = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6)

SCREEN_COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 100)
SCREEN_REG_COVAR = (1e-6, 1e-3, 0.01, 0.1, 0.3)
QUICK_COMPONENTS = (1, 2, 4, 8, 12, 20, 40)
QUICK_REG_COVAR = (1e-3, 0.1)

STARTS = 3
"""Starts of a fit, of which the likeliest is kept."""

FEW_COMPONENTS = 20
"""Up to this number, fits of the search have `STARTS` starts too, as one may miss a cluster.

Larger mixtures, whose fits are slow, then differ little between starts, and folds average that.
"""

FINALISTS = 5
"""Screened candidates that enter the finer search."""

WHITENED_FROM_DIM = 4
"""Fewest columns for which whitened coordinates are tried; with fewer they change little."""


@dataclass(frozen=True)
class Candidate:
    """A mixture before its fit.

    Args:
        coordinates: "scaled" to variance 1 or "whitened".
        covariance_type: "full" or "diag".
        components: Number of Gaussians.
        reg_covar: Variance added to each component along each coordinate.
    """

    coordinates: str
    covariance_type: str
    components: int
    reg_covar: float

    @property
    def name(self) -> str:
        """A name such as "full, 40 components, +0.003", or the same with ", whitened"."""
        plural = "" if self.components == 1 else "s"
        coordinates = ", whitened" if self.coordinates == "whitened" else ""
        return (
            f"{self.covariance_type}, {self.components} component{plural}, "
            f"+{self.reg_covar:g}{coordinates}"
        )


@dataclass(frozen=True)
class BestMixture:
    """The chosen mixture, fitted to all training rows.

    Args:
        choice: What was chosen.
        held_out: log p(x) of each held-out row, in nats, and whether the fit converged.
        seconds: Time of the choice and the fit.
        table: The search, best first: a row for each candidate with its settings and its mean log
            p(x) in cross-validation, `screening` in few folds and `cross_validation` in more. A
            number that was not computed is NaN, and −∞ marks a fit that broke down.
    """

    choice: Candidate
    held_out: HeldOut
    seconds: float
    table: pd.DataFrame

    @property
    def name(self) -> str:
        """The name of the choice."""
        return self.choice.name

    @property
    def log_evidence(self) -> float:
        """Mean log p(x) of the held-out rows, in nats."""
        return float(self.held_out.log_evidence.mean())

    @property
    def std_error(self) -> float:
        """Standard error of `log_evidence`, over held-out rows."""
        rows = self.held_out.log_evidence
        return float(rows.std(ddof=1)) / math.sqrt(len(rows))


def best_mixture(
    train: np.ndarray, test: np.ndarray, seed: int, *, quick: bool = False
) -> BestMixture:
    """Choose a mixture of Gaussians on the training rows, and evaluate it on held-out ones.

    A coarse grid is screened by cross-validation in 3 folds. Then its five best candidates are
    compared in 10 folds, and so are neighbours of the best on a finer grid, until none is better.
    The winner is fitted to all training rows, by the best of three starts of expectation
    maximisation. A candidate that has more components than a fold has rows, or whose fit breaks
    down, is not chosen. On one core this takes about a minute for 4,000 rows of 3 columns.

    Args:
        train: Training rows (N, D).
        test: Held-out rows (M, D), M at least 2.
        seed: Fixes the folds and the starts.
        quick: For a rough answer within seconds: only a coarser grid, in 2 folds, with one start
            for each fit.

    Raises:
        ValueError: As `gaussian`, or if there are fewer than 2 held-out rows.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.choice([-3.0, 3.0], size=(500, 1)) + rng.normal(size=(500, 1))
        >>> best_mixture(x[:400], x[400:], seed=0, quick=True).choice.components
        2
    """
    gaussian(train, test)  # It checks the rows.
    if len(test) < 2:
        raise ValueError(f"test has {len(test)} row; a standard error needs at least 2")
    start = time.perf_counter()
    choice, table = choose(train, seed, quick=quick)
    held_out = fit(train, test, choice, 1 if quick else STARTS, seed)
    return BestMixture(choice, held_out, time.perf_counter() - start, table)


def choose(train: np.ndarray, seed: int, *, quick: bool = False) -> tuple[Candidate, pd.DataFrame]:
    """Return the choice of `best_mixture`, and the table of its search."""
    screening: dict[Candidate, float] = {}
    components, reg_covar, folds = (
        (QUICK_COMPONENTS, QUICK_REG_COVAR, 2)
        if quick
        else (SCREEN_COMPONENTS, SCREEN_REG_COVAR, 3)
    )
    for path in _paths(components, reg_covar, train.shape[1]):
        best, worse = -math.inf, 0
        for candidate in path:
            starts = 1 if quick else _starts(candidate)
            score = screening[candidate] = cross_validate(train, candidate, folds, starts, seed)
            best, worse = (score, 0) if score > best else (best, worse + 1)
            # More components than this only overfit, and their fits are the slowest.
            if worse == 3:
                break
    finalists = sorted(screening, key=screening.__getitem__, reverse=True)[:FINALISTS]
    final = screening if quick else _climb(train, finalists, seed)
    table = pd.DataFrame(
        {
            "coordinates": candidate.coordinates,
            "covariance_type": candidate.covariance_type,
            "components": candidate.components,
            "reg_covar": candidate.reg_covar,
            "screening": screening.get(candidate, math.nan),
            "cross_validation": math.nan if quick else final.get(candidate, math.nan),
        }
        for candidate in {**final, **screening}
    )
    table = table.sort_values(
        ["cross_validation", "screening"], ascending=False, kind="stable", ignore_index=True
    )
    return max(final, key=final.__getitem__), table


def cross_validate(
    train: np.ndarray, candidate: Candidate, folds: int, starts: int, seed: int
) -> float:
    """Return the mean log p(x) of training rows under fits to the other folds.

    It is −∞ where a fold has too few rows, or a fit breaks down.
    """
    splitter = KFold(folds, shuffle=True, random_state=seed)
    total = 0.0
    for fitted, left_out in splitter.split(train):
        if candidate.components > len(fitted):
            return -math.inf
        try:
            rows = fit(train[fitted], train[left_out], candidate, starts, seed).log_evidence
        # A component that collapsed, or a fold in which the columns are linearly dependent.
        except (ValueError, np.linalg.LinAlgError):
            return -math.inf
        total += float(rows.sum())
    return total / len(train)


def fit(
    train: np.ndarray, test: np.ndarray, candidate: Candidate, starts: int, seed: int
) -> HeldOut:
    """Fit a candidate by expectation maximisation, and evaluate it on other rows.

    With `scaled` coordinates, `reg_covar` 1e-6 and three starts this is `gaussian_mixture`.

    Args:
        train: Rows to fit to (N, D).
        test: Rows to evaluate (M, D).
        candidate: What to fit.
        starts: The best of so many starts is kept, by the likelihood of the fitted rows.
        seed: Fixes the starts.

    Raises:
        ValueError: If the fit breaks down.
    """
    mean = train.mean(0)
    to_unit = _to_unit(train - mean, candidate.coordinates)
    model = GaussianMixture(
        candidate.components,
        covariance_type=candidate.covariance_type,
        reg_covar=candidate.reg_covar,
        max_iter=MAX_ITER,
        n_init=starts,
        random_state=int(np.random.SeedSequence([seed, candidate.components]).generate_state(1)[0]),
    )
    # On busy cores, threads that wait for one another make such small steps many times slower.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit((train - mean) @ to_unit)
    rows = model.score_samples((test - mean) @ to_unit) + np.linalg.slogdet(to_unit).logabsdet
    return HeldOut(np.asarray(rows), bool(model.converged_))


def _paths(
    components: tuple[int, ...], reg_covar: tuple[float, ...], dim: int
) -> Iterator[Iterator[Candidate]]:
    """Yield the candidates of a grid, one path of growing numbers of components after another."""
    coordinates = ("scaled", "whitened") if dim >= WHITENED_FROM_DIM else ("scaled",)
    for settings in itertools.product(coordinates, ("full", "diag"), reg_covar):
        yield (Candidate(*settings[:2], k, settings[2]) for k in components)


def _climb(train: np.ndarray, candidates: list[Candidate], seed: int) -> dict[Candidate, float]:
    """Score candidates, then neighbours of the best one until none of them is better."""
    scores: dict[Candidate, float] = {}
    while candidates:
        for candidate in candidates:
            scores[candidate] = cross_validate(train, candidate, 10, _starts(candidate), seed)
        best = max(scores, key=scores.__getitem__)
        candidates = [candidate for candidate in _neighbours(best) if candidate not in scores]
    return scores


def _starts(candidate: Candidate) -> int:
    """Return the starts of each fit in cross-validation."""
    return STARTS if candidate.components <= FEW_COMPONENTS else 1


def _neighbours(candidate: Candidate) -> Iterator[Candidate]:
    """Yield candidates one step away on the fine grid, in components or in added variance."""
    i, j = COMPONENTS.index(candidate.components), REG_COVAR.index(candidate.reg_covar)
    for k in COMPONENTS[max(i - 1, 0) : i + 2]:
        yield replace(candidate, components=k)
    for reg_covar in REG_COVAR[max(j - 1, 0) : j + 2]:
        yield replace(candidate, reg_covar=reg_covar)


def _to_unit(centred: np.ndarray, coordinates: str) -> np.ndarray:
    """Return the matrix that takes centred rows to coordinates of variance 1."""
    scale = centred.std(0)
    if not scale.all():
        raise ValueError("a column is constant")
    if coordinates == "scaled":
        return np.diag(1.0 / scale)
    scaled = centred / scale
    variances, axes = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    if variances[0] < 1e-12:
        raise ValueError("columns are linearly dependent")
    return np.asarray(axes / np.sqrt(variances) / scale[:, None])
