# SPDX-License-Identifier: Apache-2.0
"""Fitting a mixture of Gaussians whose size is chosen by cross-validation."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.bases.fitting import condition
from pyro_lvebm.rng import Stream, derive_seed, generator_for

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Numbers of components that are tried, in this order until two in a row are no better."""

ADDED_VARIANCES = (0.1, 1e-2, 1e-4)
"""Variances added to every component that are tried, in units of those of all rows."""

DEFENSIVE_WEIGHT = 0.01
"""Weight of the Gaussian of all rows, beside the components."""

_FOLDS = 3

_MAX_ROWS = 2000
"""Rows that the size is chosen on."""

_STARTS = 3


class Components(NamedTuple):
    """A mixture of K Gaussians in float64."""

    log_weights: Tensor  # (K,)
    means: Tensor  # (K, d)
    trils: Tensor  # (K, d, d)


def fit_mixture(w: Tensor, choice: tuple[int, float] | None = None) -> Components:
    """Fit a mixture to whitened rows, of as many components as cross-validation finds best.

    One component stands unless the held-out density of more is higher by two standard errors of
    the difference. The Gaussian of all rows, N(0, I), is one component with a weight of 0.01: no
    region that it reaches is left without mass, and the ratio to it is bounded. The same rows give
    the same mixture.

    Args:
        w: Rows (N, d), float64, with mean near 0 and variance near 1.
        choice: Number of components and added variance; by `choose_size` if None.

    Raises:
        ValueError: If the fit breaks down.

    Source:
        McLachlan and Peel (2000), Finite mixture models, chapter 6; Hesterberg (1995), Weighted
        average importance sampling and defensive mixture distributions.
    """
    rows = w.cpu().numpy()
    size, added = choose_size(w) if choice is None else choice
    if size == 1:
        one = torch.zeros(1).to(w)
        return Components(one, torch.zeros_like(w[:1]), torch.eye(w.shape[1])[None].to(w))
    found = _fit(rows, size, added, _STARTS)
    if found is None:
        raise ValueError(
            f"the fit of a mixture of {size} Gaussians to all rows broke down, though it did not "
            'on parts of them; give base="gaussian"'
        )
    trils = torch.from_numpy(np.linalg.cholesky(found.covariances_)).to(w)
    log_weights = torch.from_numpy(found.weights_).to(w).log() + math.log1p(-DEFENSIVE_WEIGHT)
    broad = torch.tensor([math.log(DEFENSIVE_WEIGHT)]).to(w)
    log_weights = torch.log_softmax(torch.cat([log_weights, broad]), 0)
    means = torch.cat([torch.from_numpy(found.means_).to(w), torch.zeros_like(w[:1])])
    return Components(log_weights, means, torch.cat([trils, torch.eye(w.shape[1])[None].to(w)]))


def fit_incomplete_mixture(y: Tensor, tril: Tensor) -> Components:
    """Fit a mixture to rows with missing entries, by stochastic expectation maximisation.

    Each of four rounds draws the missing entries given the others, first under the Gaussian of all
    rows and then under the mixture so far, and fits a mixture to the completed rows.

    Args:
        y: Centred rows (N, d), float64, NaN where missing.
        tril: L (d, d) of the Gaussian of all rows.

    Returns:
        The mixture of whitened rows L⁻¹ y.

    Source:
        Celeux and Diebolt (1985), The SEM algorithm.
    """
    generator = generator_for(0, Stream.MIXTURE_BASE, 0, device=y.device)
    d = y.shape[1]
    found = Components(y.new_zeros(1), y.new_zeros(1, d), torch.eye(d).to(y)[None])
    choice = None
    for last in (False, False, False, True):
        filled = _fill_in(y, found.means @ tril.T, tril @ found.trils, found.log_weights, generator)
        w = torch.linalg.solve_triangular(tril, filled.T, upper=False).T
        # The first rows are too much like the Gaussian to choose a size for good.
        choice = choose_size(w) if choice is None or last else choice
        found = fit_mixture(w, choice)
    return found


def _fill_in(
    y: Tensor, means: Tensor, trils: Tensor, log_weights: Tensor, generator: torch.Generator
) -> Tensor:
    """Draw the missing entries of rows (N, d) given the others, under a mixture."""
    observed = ~y.isnan()
    draws, terms = [], []
    for mean, tril in zip(means, trils, strict=True):
        centred = torch.where(observed, y - mean, 0.0)
        shift, root = condition(torch.cholesky_inverse(tril), centred, observed)
        filled = torch.where(observed, centred, shift)
        r = torch.linalg.solve_triangular(tril, filled.T, upper=False)
        # log N of the observed entries: of the filled row, less that of what was filled in.
        scales = torch.where(observed, 1.0, root.diagonal(dim1=-2, dim2=-1))
        terms.append(-0.5 * r.square().sum(0) - tril.diagonal().log().sum() - scales.log().sum(-1))
        xi = torch.empty_like(y).normal_(generator=generator)
        noise = torch.linalg.solve_triangular(root.mT, xi[..., None], upper=True)[..., 0]
        draws.append(torch.where(observed, y, mean + shift + noise))
    shares = torch.softmax(log_weights + torch.stack(terms, -1), -1)
    k = torch.multinomial(shares, 1, generator=generator)
    return torch.stack(draws, 1).gather(1, k[..., None].expand(-1, -1, y.shape[1])).squeeze(1)


def choose_size(w: Tensor) -> tuple[int, float]:
    """Return number of components and added variance of the best mixture of rows (N, d)."""
    from sklearn.model_selection import KFold
    from threadpoolctl import threadpool_limits

    rows = w.cpu().numpy()
    seed = derive_seed(0, Stream.MIXTURE_BASE) % 2**32
    if len(rows) > _MAX_ROWS:
        rows = rows[np.random.default_rng(seed).permutation(len(rows))[:_MAX_ROWS]]
    if len(rows) < 4 * _FOLDS:
        return 1, 0.0
    folds = list(KFold(_FOLDS, shuffle=True, random_state=seed).split(rows))
    with threadpool_limits(1):
        one = _held_out(rows, folds, 1, 0.0)
        scores: dict[tuple[int, float], np.ndarray] = {}
        for added in ADDED_VARIANCES:
            best, worse = float(one.mean()), 0
            for size in COMPONENTS[1:]:
                score = scores[size, added] = _held_out(rows, folds, size, added)
                best, worse = (score.mean(), 0) if score.mean() > best else (best, worse + 1)
                if worse == 2:
                    break
    choice = max(scores, key=lambda key: float(scores[key].mean()))
    if not np.isfinite(scores[choice]).all():
        return 1, 0.0
    gain = scores[choice] - one
    better = gain.mean() > 2.0 * gain.std(ddof=1) / math.sqrt(len(gain))
    return choice if better else (1, 0.0)


def _held_out(
    rows: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], size: int, added: float
) -> np.ndarray:
    """Log density (N,) of every row under the fit to the other folds; −∞ where one broke down."""
    score = np.full(len(rows), -np.inf)
    for kept, left_out in folds:
        found = _fit(rows[kept], size, added, 1)
        if found is None:
            return np.full(len(rows), -np.inf)
        score[left_out] = found.score_samples(rows[left_out])
    return score


def _fit(rows: np.ndarray, size: int, added: float, starts: int) -> GaussianMixture | None:
    """Fit by expectation maximisation; None where there are too few rows or a fit breaks down."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if size * 2 > len(rows):
        return None
    model = GaussianMixture(
        size,
        reg_covar=added + 1e-6,
        n_init=starts,
        max_iter=200,
        random_state=derive_seed(0, Stream.MIXTURE_BASE, size) % 2**32,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return model.fit(rows)
    except ValueError:  # a component collapsed
        return None
