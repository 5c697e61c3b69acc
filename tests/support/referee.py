# SPDX-License-Identifier: Apache-2.0
"""Referees shared by the tests: p-values against closed forms, and quadrature.

A check is a function that returns a p-value. A correct implementation must reach more than ALPHA,
the false-alarm rate of one check; a deliberately broken one must stay below CERTAIN. Anything that
is not finite has p = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_lvebm import LogPartition

ALPHA = 1e-3
CERTAIN = 1e-6


@contextmanager
def assert_global_rng_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "torch's global generator was used"


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def _array(values: object) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _bonferroni(p: np.ndarray) -> float:
    return float(min(1.0, p.size * p.min()))


def variance_p_value(samples: object, variance: object, mean: object = 0.0) -> float:
    """Chi-square test of the variances of independent Gaussian rows with a known mean.

    n var_hat / var ~ chi2_n, two-sided, with Bonferroni's correction over coordinates. A wrong
    mean is found too: it inflates var_hat.
    """
    x = _array(samples)
    if not np.isfinite(x).all():
        return 0.0
    statistic = ((x - _array(mean)) ** 2).sum(0) / _array(variance)
    law = stats.chi2(len(x))
    return _bonferroni(2.0 * np.minimum(law.cdf(statistic), law.sf(statistic)))


def mean_p_value(replicates: object, expected: object) -> float:
    """Student's test that independent replicates (n, ...) have this mean, Bonferroni over `...`."""
    x = _array(replicates)
    x = x.reshape(len(x), -1)
    if not np.isfinite(x).all():
        return 0.0
    target = np.broadcast_to(_array(expected).reshape(-1), x.shape[1:])
    t = (x.mean(0) - target) / (x.std(0, ddof=1) / np.sqrt(len(x)))
    return _bonferroni(2.0 * stats.t(len(x) - 1).sf(np.abs(t)))


def ks_p_value(samples: object, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """Kolmogorov's test of independent draws against a distribution function."""
    x = _array(samples).reshape(-1)
    return float(stats.kstest(x, cdf).pvalue) if np.isfinite(x).all() else 0.0


def grid_cdf(
    energy: Callable[[Tensor], Tensor], half_width: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Distribution function of exp(-energy) on the line, by the trapezoidal rule."""
    grid = torch.linspace(-half_width, half_width, 20001, dtype=torch.float64)
    density = torch.exp(-energy(grid)).numpy()
    cdf = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    return lambda x: np.interp(x, grid.numpy(), cdf / cdf[-1])


def plane_grid(half_width: float, count: int) -> tuple[Tensor, float]:
    """Points (count², 2) of a square grid, and the area of a cell."""
    axis = torch.linspace(-half_width, half_width, count, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


def gaussian_log_partition(precision: Tensor, linear: Tensor) -> float:
    """log E_{N(0, I)}[exp(-f)] for f = ½ uᵀ(P - I)u + bᵀu, from P (d, d) and b (d,)."""
    p, b = _array(precision), _array(linear)
    return float(-0.5 * np.linalg.slogdet(p)[1] + 0.5 * b @ np.linalg.solve(p, b))


def gaussian_moments(precision: Tensor, linear: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d) of exp(-½ uᵀPu - bᵀu)."""
    covariance = np.linalg.inv(_array(precision))
    return -covariance @ _array(linear), covariance


def gaussian_draws(precision: Tensor, linear: Tensor, shape: tuple[int, ...], seed: int) -> Tensor:
    """Exact draws (*shape, d) of exp(-½ uᵀPu - bᵀu), in float64."""
    mean, covariance = map(torch.from_numpy, gaussian_moments(precision, linear))
    return mean + normal((*shape, len(mean)), seed) @ torch.linalg.cholesky(covariance).T


def fixed_point_mbar(
    f: Tensor, betas: Tensor, log_z: Tensor, num_iterations: int
) -> tuple[Tensor, Tensor]:
    """MBAR by its fixed-point iteration: log Z (L,), and log weights (L·n,) for the last level.

    log Z_l = log Σ_i exp(−β_l f_i) / Σ_m n exp(−β_m f_i − log Z_m), for f (L, n).
    """
    n = f.shape[1]
    a = -betas[:, None] * f.reshape(1, -1)  # (L, L·n)
    for _ in range(num_iterations):
        log_mixture = torch.logsumexp(a - log_z[:, None], 0) + math.log(n)
        log_z = torch.logsumexp(a - log_mixture, 1)
        log_z = log_z - log_z[0]
    log_mixture = torch.logsumexp(a - log_z[:, None], 0)
    return log_z, torch.log_softmax(a[-1] - log_mixture, 0)


def bracket(
    estimate: float, std_error: float = 0.0, lower: float | None = None, upper: float | None = None
) -> LogPartition:
    """A bracket of log Z with these numbers; by default it is exact."""
    low, high = (estimate if end is None else end for end in (lower, upper))
    return LogPartition(estimate, std_error, low, high, low, high, high, 1e3, 1, 2, 1e9)


class Isotropic:
    """A base with the energy ½ κ |u|², whose draws are those of N(0, I/κ)."""

    def __init__(self, kappa: float) -> None:
        self.kappa = kappa

    def energy(self, u: Tensor) -> Tensor:
        return 0.5 * self.kappa * u.square().sum(-1)

    def energy_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.energy(u), self.kappa * u

    def draw(self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
        return torch.empty(shape).to(like).normal_(generator=generator) / math.sqrt(self.kappa)


def isotropic(kappa: float) -> Isotropic | None:
    """The base with this precision, none where it is 0."""
    return Isotropic(kappa) if kappa else None
