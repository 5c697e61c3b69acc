# SPDX-License-Identifier: Apache-2.0
"""Fitting a Gaussian to few or incomplete rows, and conditioning it on observed entries."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

SHARES = (0.0, *(10 ** (k / 4) for k in range(-20, 0)))
"""Shares of shrinkage that are tried, in quarters of a decade."""

MAX_ITERATIONS, TOLERANCE = 500, 1e-7
"""Of expectation maximisation: nats per row by which an iteration must raise the likelihood."""


def cross_validated_shrinkage(x: Tensor, num_folds: int = 10) -> float:
    """Return the share a of `SHARES` whose Gaussian gives left-out rows the highest density.

        a = argmax Σ_folds log N(x_left_out; m, (1 − a) C + a I),    m, C from the other rows

    Args:
        x: Rows (N, d) with mean 0 and variance 1 in every column, float64.
        num_folds: Number of parts, of which each is left out once; at most N are used. Rows are
            dealt to them at random, always in the same way.

    Returns:
        The share; 0 if N < 3, where nothing can be left out.

    Source:
        Friedman (1989), Regularized discriminant analysis, JASA 84, equation 16, for one class,
        with unit variances in place of a sphere.

    Example:
        >>> x = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)).double()
        >>> cross_validated_shrinkage((x - x.mean(0)) / x.std(0, correction=0)) > 0.1
        True
    """
    n, d = x.shape
    if n < 3:
        return 0.0
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(x.device)
    shares = torch.tensor(SHARES).to(x)[:, None]
    score = torch.zeros(len(SHARES)).to(x)
    for left_out in order.tensor_split(min(num_folds, n)):
        kept = torch.ones(n, dtype=torch.bool, device=x.device)
        kept[left_out] = False
        mean = x[kept].mean(0)
        centred = x[kept] - mean
        # All shares have the same eigenvectors, so one decomposition serves them all.
        eigenvalues, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
        variances = torch.lerp(eigenvalues.clamp(min=1e-12), torch.ones(d).to(x), shares)
        squares = ((x[left_out] - mean) @ axes).square().sum(0)
        score -= 0.5 * (squares / variances + len(left_out) * variances.log()).sum(-1)
    return SHARES[int(score.argmax())]


def condition(precision: Tensor, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Condition N(0, P⁻¹) on the observed entries of every row.

        x_m | x_o ~ N(−P_mm⁻¹ P_mo x_o, P_mm⁻¹)

    Rows may have different entries missing: observed ones stay, as a block of their own.

    Args:
        precision: P (d, d).
        x: Rows (*b, d); what stands at missing entries does not matter.
        observed: Which entries are observed (*b, d).

    Returns:
        The conditional means (*b, d), 0 at observed entries; and the lower Cholesky factor R
        (*b, d, d) of the conditional precisions, with rows and columns of the identity times the
        root of P_ii at observed entries.
    """
    missing = ~observed
    block = missing[..., :, None] & missing[..., None, :]
    own = torch.diag_embed(precision.diagonal().expand(observed.shape))
    root = torch.linalg.cholesky(torch.where(block, precision, own))
    cross = torch.where(observed, x, 0.0) @ precision
    shift = torch.cholesky_solve(torch.where(missing, -cross, 0.0)[..., None], root)
    return shift[..., 0], root


def fit_incomplete(x: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a Gaussian to rows with missing entries by expectation maximisation.

    It converges to a maximum of the likelihood of the observed entries, which is what should be
    fitted where entries are missing at random.

    Args:
        x: Rows (N, d), float64, NaN where missing; every column with two different values.

    Returns:
        Mean (d,) and covariance (d, d).

    Raises:
        ValueError: If two columns are never observed together, or the covariance becomes singular,
            as where there are too few entries.

    Source:
        Little and Rubin (2019), Statistical analysis with missing data, 3rd edition, section 11.2.
    """
    observed = ~x.isnan()
    together = observed.to(x).T @ observed.to(x)
    if (together == 0.0).any():
        i, j = torch.nonzero(together == 0.0)[0].tolist()
        raise ValueError(
            f"columns {i} and {j} of x are never observed together, so nothing tells how they are "
            "correlated. Drop one, or give a base with standard deviations only"
        )
    loc, std = x.nanmean(0), (x - x.nanmean(0)).square().nanmean(0).sqrt()
    y = torch.where(observed, (x - loc) / std, 0.0)
    mean, cov = torch.zeros_like(loc), torch.eye(len(loc)).to(x)
    last = -math.inf
    for _ in range(MAX_ITERATIONS):
        factor, info = torch.linalg.cholesky_ex(cov)
        if info or factor.diagonal().min() < 1e-5:
            raise ValueError(
                "the covariance of the observed entries of x is singular: too few entries are "
                "observed together. Give more rows, drop columns that are hardly ever observed, "
                "or give a base with standard deviations only"
            )
        precision = torch.cholesky_inverse(factor)
        shift, root = condition(precision, y - mean, observed)
        filled = torch.where(observed, y - mean, shift)
        hidden = torch.diag_embed((~observed).to(x)) @ torch.cholesky_inverse(root)
        # log N of the observed entries: of the filled rows, less that of what was filled in.
        scales = torch.where(observed, 1.0, root.diagonal(dim1=-2, dim2=-1))
        score = float(
            -0.5 * ((filled @ precision) * filled).sum(-1).mean()
            - factor.diagonal().log().sum()
            - scales.log().sum(-1).mean()
        )
        mean = mean + filled.mean(0)
        centred = filled - filled.mean(0)
        cov = (centred.T @ centred + hidden.sum(0)) / len(x)
        if score - last < TOLERANCE:
            break
        last = score
    else:
        warnings.warn(
            f"expectation maximisation has not converged in {MAX_ITERATIONS} iterations: much of x "
            "is missing. The base is near, not at, maximum likelihood; training goes on from there",
            UserWarning,
            stacklevel=2,
        )
    return loc + std * mean, cov * std[:, None] * std
