# SPDX-License-Identifier: Apache-2.0
"""Factor analysis of maximum likelihood, where a generator starts."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

MAX_ITERATIONS, TOLERANCE = 5_000, 1e-6
"""Of expectation maximisation: nats per row by which an iteration must raise the likelihood."""


def factor_analysis(x: Tensor, num_factors: int) -> tuple[Tensor, Tensor]:
    """Fit x ~ N(0, A Aᵀ + diag(ψ)) to rows by maximum likelihood.

    Axes of A are those of its canonical form, Aᵀ ψ⁻¹ A diagonal, the largest first.

    Args:
        x: Rows (N, d) with mean 0 and variance near 1 in every column, float64.
        num_factors: Number of columns of A; those beyond d are 0.

    Returns:
        A (d, num_factors) and ψ (d,).

    Source:
        Barber (2012), Bayesian Reasoning and Machine Learning, algorithm 21.1, by scikit-learn.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> z = torch.randn(2000, 1, generator=draw).double()
        >>> noise = torch.randn(2000, 3, generator=draw).double()
        >>> a, psi = factor_analysis(0.8 * z + 0.6 * noise, 1)
        >>> bool(((a.abs() - 0.8).abs() < 0.05).all()), bool(((psi - 0.36).abs() < 0.05).all())
        (True, True)
    """
    from sklearn.decomposition import FactorAnalysis
    from sklearn.exceptions import ConvergenceWarning

    n, d = x.shape
    k = min(num_factors, d)
    fit = FactorAnalysis(k, tol=TOLERANCE * n, max_iter=MAX_ITERATIONS, svd_method="lapack")
    with warnings.catch_warnings():
        # A noise variance that goes to 0 makes progress slow; training goes on from there.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit.fit(x.cpu().numpy())
    a = torch.zeros(d, num_factors).to(x)
    a[:, :k] = torch.from_numpy(fit.components_.T.copy()).to(x)
    return a, torch.from_numpy(fit.noise_variance_.copy()).to(x)


def rows_with_covariance(tril: Tensor) -> Tensor:
    """Return rows (2 d, d) whose mean is 0 and whose covariance is L Lᵀ, for L (d, d)."""
    columns = math.sqrt(len(tril)) * tril.T
    return torch.cat([columns, -columns])
