# SPDX-License-Identifier: Apache-2.0
"""Held-out log densities of textbook models, in the units of an LVEBM's log evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pyro_lvebm.rng import Stream, derive_seed

if TYPE_CHECKING:
    import pandas as pd

MAX_ITER = 2000
"""Limit on the steps of expectation maximisation in one fit."""

FACTORS = (2, 4, 8)

DIAGONAL_COMPONENTS = (5, 10, 30)

FULL_COMPONENTS = (10, 20, 30)

MAX_FULL_DIM = 8


class HeldOut(NamedTuple):
    """What a baseline says of held-out rows.

    Attributes:
        log_evidence: log p(x) of each held-out row (N,), in nats: the density of x as given.
        converged: Whether the fit met its tolerance within `MAX_ITER` steps.
    """

    log_evidence: np.ndarray
    converged: bool


def gaussian(train: np.ndarray, test: np.ndarray) -> HeldOut:
    """Fit one Gaussian with a full covariance by maximum likelihood.

    Args:
        train: Training rows (N, D), N > D.
        test: Held-out rows (M, D).

    Raises:
        ValueError: If the data are not two finite tables of equal width, a training column is
            constant, there are too few rows, or columns are linearly dependent.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(4000, 2))
        >>> result = gaussian(x, np.zeros((1, 2)))  # −log 2π = −1.838
        >>> bool(abs(result.log_evidence[0] + 1.838) < 0.05)
        True
    """
    train, test, log_scale = _standardise(train, test)
    n, dim = train.shape
    if n <= dim:
        raise ValueError(
            f"train has {n} rows for {dim} columns; a full covariance needs more rows than columns"
        )
    rank = int(np.linalg.matrix_rank(train))
    if rank < dim:
        raise ValueError(
            f"the {dim} columns of train are linearly dependent: rank {rank}; a density needs full "
            "rank. Remove the columns that the others determine"
        )
    # Standardised rows have mean 0, so their covariance is this product, LLᵀ.
    tril = np.linalg.cholesky(train.T @ train / n)
    r = np.linalg.solve(tril, test.T)
    log_det = np.log(np.diag(tril)).sum()
    log_evidence = -0.5 * (r * r).sum(0) - 0.5 * dim * math.log(2 * math.pi) - log_det - log_scale
    return HeldOut(np.asarray(log_evidence), True)


def factor_analysis(train: np.ndarray, test: np.ndarray, n_factors: int) -> HeldOut:
    """Fit x = μ + Λz + ε, with z ~ N(0, I) and independent noise, by maximum likelihood.

    Args:
        train: Training rows (N, D).
        test: Held-out rows (M, D).
        n_factors: Number of entries of z, from 1 to D − 1.

    Raises:
        ValueError: If the data are not two finite tables of equal width, a training column is
            constant, or `n_factors` is out of range.

    Source:
        Rubin and Thayer (1982), EM algorithms for ML factor analysis.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.normal(size=(500, 1)) @ np.ones((1, 3)) + 0.1 * rng.normal(size=(500, 3))
        >>> factor_analysis(x[:400], x[400:], n_factors=1).log_evidence.shape
        (100,)
    """
    from sklearn.decomposition import FactorAnalysis

    train, test, log_scale = _standardise(train, test)
    dim = train.shape[1]
    if not 1 <= n_factors < dim:
        raise ValueError(f"n_factors is {n_factors}; expected 1 to {dim - 1} for {dim} columns")
    # The exact decomposition: with it a fit draws no random numbers.
    model = FactorAnalysis(n_factors, svd_method="lapack", max_iter=MAX_ITER)
    with _quiet_fit():
        model.fit(train)
    return HeldOut(np.asarray(model.score_samples(test)) - log_scale, model.n_iter_ < MAX_ITER)


def gaussian_mixture(
    train: np.ndarray, test: np.ndarray, components: int, covariance_type: str, seed: int
) -> HeldOut:
    """Fit a mixture of Gaussians by expectation maximisation: the best of three starts.

    Args:
        train: Training rows (N, D).
        test: Held-out rows (M, D).
        components: Number of Gaussians, at least 1.
        covariance_type: "diag" or "full".
        seed: Fixes the starts.

    Raises:
        ValueError: If the data are not two finite tables of equal width, a training column is
            constant, `covariance_type` is another, or there are fewer distinct training rows than
            components need.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = rng.choice([-3.0, 3.0], size=(500, 1)) + rng.normal(size=(500, 1))
        >>> two = gaussian_mixture(x[:400], x[400:], 2, "diag", seed=0).log_evidence.mean()
        >>> bool(two > gaussian(x[:400], x[400:]).log_evidence.mean())
        True
    """
    from sklearn.mixture import GaussianMixture

    train, test, log_scale = _standardise(train, test)
    if covariance_type not in ("diag", "full"):
        raise ValueError(f'covariance_type is {covariance_type!r}; expected "diag" or "full"')
    if components < 1:
        raise ValueError(f"components is {components}; expected at least 1")
    needed = _rows_needed(components, covariance_type, train.shape[1])
    rows = _distinct_rows(train)
    if rows < needed:
        raise ValueError(
            f"train has {rows} distinct rows; {components} components ({covariance_type}) need "
            f"{needed}. Use fewer components"
        )
    model = GaussianMixture(
        components,
        covariance_type=covariance_type,
        max_iter=MAX_ITER,
        n_init=3,
        random_state=derive_seed(seed, Stream.MIXTURE_STARTS, components) % 2**32,
    )
    with _quiet_fit():
        model.fit(train)
    return HeldOut(np.asarray(model.score_samples(test)) - log_scale, bool(model.converged_))


def evaluate_baselines(train: np.ndarray, test: np.ndarray, seed: int) -> pd.DataFrame:
    """Fit every baseline that the data have rows and columns for, and compare held-out evidence.

    They are a full Gaussian (N > D), factor analysis with 2, 4 and 8 factors (fewer than D),
    mixtures of 5, 10 and 30 diagonal Gaussians and, up to 8 dimensions, of 10, 20 and 30 full ones.
    A mixture needs, for each component, ten distinct training rows, and for full covariances at
    least 2 (D + 1). A fit that met its limit of steps has "(not converged)" in its name.

    Args:
        train: Training rows (N, D).
        test: Held-out rows (M, D), M at least 2.
        seed: Fixes the starts of the mixtures.

    Returns:
        A table with columns `baseline`, `log_evidence` (mean log p(x) of the held-out rows, nats)
        and `std_error` (of that mean, over held-out rows), best first.

    Raises:
        ValueError: If the data are not two finite tables of equal width, a training column is
            constant, columns are linearly dependent, there are fewer than 2 held-out rows, or too
            few training rows for any baseline.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> table = evaluate_baselines(x[:80], x[80:], seed=0)
        >>> sorted(table["baseline"])
        ['diagonal mixture, 5 components', 'factor analysis, 2 factors', 'full Gaussian']
    """
    import pandas as pd

    dim = _standardise(train, test)[0].shape[1]
    if len(test) < 2:
        raise ValueError(f"test has {len(test)} row; a standard error needs at least 2")
    results: dict[str, HeldOut] = {}
    if len(train) > dim:
        results["full Gaussian"] = gaussian(train, test)
    for k in FACTORS:
        if k < dim:
            results[f"factor analysis, {k} factors"] = factor_analysis(train, test, k)
    mixtures = [("diagonal", k) for k in DIAGONAL_COMPONENTS]
    if dim <= MAX_FULL_DIM:
        mixtures += [("full", k) for k in FULL_COMPONENTS]
    rows = _distinct_rows(train)
    for kind, k in mixtures:
        covariance_type = "diag" if kind == "diagonal" else "full"
        if rows >= _rows_needed(k, covariance_type, dim):
            name = f"{kind} mixture, {k} components"
            results[name] = gaussian_mixture(train, test, k, covariance_type, seed)
    if not results:
        raise ValueError(
            f"train has {len(train)} rows for {dim} columns, too few for any baseline; expected at "
            f"least {dim + 1}"
        )
    table = pd.DataFrame(
        {
            "baseline": [
                name if result.converged else f"{name} (not converged)"
                for name, result in results.items()
            ],
            "log_evidence": [float(result.log_evidence.mean()) for result in results.values()],
            "std_error": [
                float(result.log_evidence.std(ddof=1)) / math.sqrt(len(test))
                for result in results.values()
            ],
        }
    )
    return table.sort_values("log_evidence", ascending=False, kind="stable", ignore_index=True)


def evaluate_incomplete(train: np.ndarray, test: np.ndarray) -> pd.DataFrame:
    """Evaluate the one baseline that takes missing entries, a Gaussian fitted by EM.

    Args:
        train: Training rows (N, D), NaN where missing.
        test: Held-out rows (M, D), M at least 2; log p is that of their observed entries.

    Returns:
        As `evaluate_baselines`.

    Raises:
        ValueError: If the Gaussian cannot be fitted.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> x[::5, 0] = np.nan
        >>> evaluate_incomplete(x[:80], x[80:])["baseline"].tolist()
        ['full Gaussian, by EM']
    """
    import pandas as pd
    import torch

    from pyro_lvebm.bases import Completion, GaussianBase

    rows = torch.as_tensor(test, dtype=torch.float64)
    base = GaussianBase.fit(torch.as_tensor(train, dtype=torch.float64))
    log_p = Completion(base, rows, ~rows.isnan()).log_base().numpy()
    return pd.DataFrame(
        {
            "baseline": ["full Gaussian, by EM"],
            "log_evidence": [float(log_p.mean())],
            "std_error": [float(log_p.std(ddof=1)) / math.sqrt(len(log_p))],
        }
    )


@contextmanager
def _quiet_fit() -> Iterator[None]:
    """Fit with one thread, and without the warning that `HeldOut.converged` stands for.

    The fits are many small steps. On busy cores, threads that wait for one another made those of
    the digits 100 times slower.
    """
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _rows_needed(components: int, covariance_type: str, dim: int) -> int:
    """Return the fewest rows for a mixture whose components do not each memorise their rows."""
    each = 10 if covariance_type == "diag" else max(10, 2 * (dim + 1))
    return components * each


def _distinct_rows(x: np.ndarray) -> int:
    """Count distinct rows. A copy of a row adds nothing that a component could be fitted to."""
    return len(np.unique(x, axis=0))


def _standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Scale columns to training mean 0 and variance 1, so that no fit depends on their units.

    A density in the scaled columns, divided by the product of the scales, is one of x.

    Returns:
        The two tables, scaled, and the log of that product.
    """
    for name, x in (("train", train), ("test", test)):
        if x.ndim != 2 or x.size == 0:
            raise ValueError(f"{name} has shape {x.shape}; expected (N, D) with N, D at least 1")
        if x.dtype.kind not in "fiu":
            raise ValueError(f"{name} has type {x.dtype}; expected real numbers")
        bad = int((~np.isfinite(x)).sum())
        if bad:
            raise ValueError(
                f"{name} has {bad} NaN or infinite entries of {x.size}; all must be finite"
            )
    if train.shape[1] != test.shape[1]:
        raise ValueError(
            f"train has {train.shape[1]} columns and test {test.shape[1]}; expected equal numbers"
        )
    constant = np.flatnonzero(np.ptp(train, axis=0) == 0)
    if len(constant):
        raise ValueError(
            f"{len(constant)} of {train.shape[1]} columns of train are constant, the first at "
            f"index {constant[0]}; a density needs variation. Remove them"
        )
    # By powers of two, so that no square leaves the range of floating point numbers.
    train, test = train.astype(np.float64), test.astype(np.float64)
    _, power = np.frexp(np.abs(train).max(0))
    train, test = np.ldexp(train, -power), np.ldexp(test, -power)
    mean, scale = train.mean(0), train.std(0)
    log_scale = float((np.log(scale) + math.log(2.0) * power).sum())
    return (train - mean) / scale, (test - mean) / scale, log_scale
