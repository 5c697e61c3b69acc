# SPDX-License-Identifier: Apache-2.0
"""KL divergence and Wasserstein distance estimated from samples of two laws."""

from __future__ import annotations

import numpy as np

_NEIGHBOURS = 4
"""More neighbours mean less variance and more bias."""


def gaussian_kl(r: np.ndarray, p: np.ndarray) -> float:
    """Estimate KL(r ‖ p) between Gaussians from their sample moments, without bias.

        KL = ½ (tr(P S) + (m − μ)ᵀ P (m − μ) − d − log det(P S))

    with m, S the mean and covariance of r and μ, P the mean and precision of p. The biases that
    sample moments of Gaussians give to each term are known and taken off, so the estimate is
    unbiased if both laws are Gaussian, and may be negative. For other laws it is the divergence of
    the Gaussians with their moments, which may be larger or smaller than theirs.

    Args:
        r: Independent draws (n, d), n > d + 2.
        p: Independent draws (m, d), m > d + 2, independent of r.

    Returns:
        The estimate, in nats.

    Raises:
        ValueError: If there are too few draws.

    Source:
        Mardia, Kent and Bibby (1979), Multivariate analysis, section 3.4 (moments of the Wishart
        law, its inverse, and its log determinant).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> r, p = rng.normal(1.0, size=(2000, 1)), rng.normal(size=(2000, 1))
        >>> bool(abs(gaussian_kl(r, p) - 0.5) < 0.1)
        True
    """
    (n, d), m = r.shape, len(p)
    if min(n, m) <= d + 2:
        raise ValueError(f"{min(n, m)} draws in {d} dimensions; expected more than {d + 2}")
    s_r = np.atleast_2d(np.cov(r.T))
    s_p = np.atleast_2d(np.cov(p.T))
    precision = (m - d - 2) / (m - 1) * np.linalg.inv(s_p)
    shift = r.mean(0) - p.mean(0)
    trace = np.sum(precision * s_r)
    square = shift @ precision @ shift - trace / n - d / m
    log_det_r = np.linalg.slogdet(s_r)[1] - _log_det_bias(n, d)
    log_det_p = np.linalg.slogdet(s_p)[1] - _log_det_bias(m, d)
    return float(0.5 * (trace + square - d - log_det_r + log_det_p))


def _log_det_bias(n: int, d: int) -> float:
    """Mean of log det Ŝ − log det S for the sample covariance Ŝ of n Gaussian draws."""
    from scipy.special import digamma

    return float(digamma(0.5 * (n - np.arange(1, d + 1))).sum() + d * np.log(2.0 / (n - 1)))


def free_energy(u: np.ndarray, energy: np.ndarray) -> float:
    """Free energy E_r[E] − H(r) of a sample, whose differences are differences of KL(r ‖ p).

        KL(r ‖ p) = F(r) − F(p),    F(r) ≈ mean_i E(u_i) − H
        H = ψ(n) − ψ(k) + log c_d + (d / n) Σ_i log ρ_i

    for p ∝ e^{−E}, with ρ_i the distance from draw i to its k-th neighbour in the sample, k = 4,
    and c_d the volume of the unit ball. Log Z cancels, and so does the bias of the entropy as far
    as both laws have it: the difference has mean zero where they agree. It is consistent for all
    densities; with finite samples the entropy of a law with thin structures is too large, the more
    so the higher the dimension, and its KL then too small.

    Args:
        u: Independent draws of r (n, d), n > 4.
        energy: E at the draws (n,), nats, up to a constant.

    Returns:
        F(r), in nats, up to the same constant.

    Raises:
        ValueError: If there are too few draws, or draws coincide.

    Source:
        Kozachenko and Leonenko (1987), in the form of Kraskov, Stögbauer and Grassberger (2004),
        Estimating mutual information, equation 20.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> r, p = rng.normal(1.0, size=(2000, 1)), rng.normal(size=(2000, 1))
        >>> kl = free_energy(r, 0.5 * r[:, 0] ** 2) - free_energy(p, 0.5 * p[:, 0] ** 2)
        >>> bool(abs(kl - 0.5) < 0.1)
        True
    """
    from scipy.spatial import KDTree
    from scipy.special import digamma, gammaln

    n, d = u.shape
    if n <= _NEIGHBOURS:
        raise ValueError(f"{n} draws; expected more than {_NEIGHBOURS}")
    distance = KDTree(u).query(u, [_NEIGHBOURS + 1])[0][:, 0]  # a draw is its own first neighbour
    if not distance.min() > 0.0:
        raise ValueError("draws coincide; distances between neighbours need distinct draws")
    log_ball = 0.5 * d * np.log(np.pi) - gammaln(0.5 * d + 1.0)
    entropy = digamma(n) - digamma(_NEIGHBOURS) + log_ball + d * np.mean(np.log(distance))
    return float(energy.mean() - entropy)


def squared_w2(r: np.ndarray, p: np.ndarray) -> float:
    """Squared Wasserstein distance W2² between two samples of equal size, by exact assignment.

        W2² = min over permutations σ of (1 / n) Σ_i |r_i − p_σ(i)|²

    In expectation it is at least that of the laws behind the samples.

    Args:
        r: Draws (n, d).
        p: Draws (n, d).

    Source:
        Peyré and Cuturi (2019), Computational optimal transport, section 2.2; cubic in n.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    cost = cdist(r, p, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    return float(cost[rows, columns].mean())


def debiased_squared_w2(r: np.ndarray, p: np.ndarray) -> float:
    """Squared W2 between two laws, less the distance that samples of one law have.

        ½ (W2²(r₀, p₀) + W2²(r₁, p₁) − W2²(r₀, r₁) − W2²(p₀, p₁))

    with r₀, r₁ and p₀, p₁ two independent samples of each law. It is unbiased where one law is a
    translate of the other, and its mean is zero where they agree; it may be negative.

    Args:
        r: Two independent samples (2, n, d).
        p: Two independent samples (2, n, d).

    Source:
        The form is that of the Sinkhorn divergence, Genevay, Peyré and Cuturi (2018), equation 5,
        without regularisation.
    """
    across = squared_w2(r[0], p[0]) + squared_w2(r[1], p[1])
    return 0.5 * (across - squared_w2(r[0], r[1]) - squared_w2(p[0], p[1]))
