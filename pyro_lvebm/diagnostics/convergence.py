# SPDX-License-Identifier: Apache-2.0
"""How fast Langevin dynamics carry the base to the model, against the theory's rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.diagnostics.divergences import (
    debiased_squared_w2,
    free_energy,
    gaussian_kl,
    squared_w2,
)
from pyro_lvebm.diagnostics.flow import langevin_flow, model_draws, to_numpy, whitened_draws
from pyro_lvebm.model import LVEBM, check_unconditional
from pyro_lvebm.validation import check_at_least

if TYPE_CHECKING:
    import pandas as pd

Estimator = Literal["neighbours", "gaussian"]

_ASSIGNED = 256
"""Draws of each sample that are assigned to each other; the cost is their number cubed."""

_CLEAR = 3.0
"""Standard errors by which KL has to exceed the noise floor."""


@dataclass(frozen=True)
class ConvergenceRate:
    """KL and W2 to the model along the Langevin flow from the base, and the decay rate of KL."""

    frame: pd.DataFrame  # columns t, kl, kl_se, w2, w2_se, fitted; a row for each time
    rate: float  # −d log KL / dt over the fitted times; NaN if fewer than three are fitted
    std_error: float  # of the rate, by the jackknife over replicates
    plateau: float  # KL in nats at which the decay has stopped; NaN if it has not
    kl_floor: float  # KL in nats that two samples of the model may show
    w2_floor: float  # W2 between two samples of the model, which has been taken off w2²
    estimator: str
    step_size: float

    @property
    def verdict(self) -> str:
        """What the fit says of the log-Sobolev constant, in one sentence."""
        count = int(self.frame["fitted"].sum())
        if math.isnan(self.rate):
            return (
                f"KL is above its noise at {count} times, and a rate needs three: the base is "
                "close to the model, or the flow soon arrives; take more chains, or a shorter "
                "duration"
            )
        if not math.isnan(self.plateau):
            return (
                f"KL falls as exp(−{self.rate:.2f} t) over {count} times and then stays at "
                f"{self.plateau:.2g} nats: chains are held in modes, or step_size is too large; "
                "the rate is that of the first phase only"
            )
        return (
            f"KL falls as exp(−{self.rate:.2f} t) over {count} times; half of that, "
            f"{0.5 * self.rate:.2f} ± {0.5 * self.std_error:.2f}, estimates the log-Sobolev "
            "constant from above"
        )

    def __str__(self) -> str:
        return self.verdict


def convergence_rate(
    ebm: LVEBM,
    *,
    duration: float = 2.0,
    num_times: int = 11,
    fit_from: float = 0.0,
    step_size: float = 0.01,
    num_chains: int = 512,
    num_replicates: int = 8,
    estimator: Estimator = "neighbours",
    draws: Tensor | None = None,
    num_refreshes: int = 50,
    seed: int = 0,
) -> ConvergenceRate:
    """Measure how fast the law r_t of Langevin dynamics from the base comes to the model.

        du = −∇E(u) dt + √2 dB,    KL(r_t ‖ p) ≤ e^{−2λt} KL(r_0 ‖ p),    W2² ≤ (2 / λ) KL

    in coordinates u whitened by the base, with λ the log-Sobolev constant of the model. Chains
    start in the base N(0, I) and take unadjusted Langevin steps of size η, so k steps are the time
    t = kη. The rate is the slope of log KL on t, weighted by its precision, until KL is not clearly
    above its noise floor, or above a KL at which it stays; half of it bounds λ from above, up to
    errors. "neighbours" estimates KL by distances between neighbours (`free_energy`), "gaussian" by
    moments (`gaussian_kl`); docs/diagnostics.md says where each is right.

    Args:
        ebm: The LVEBM; unchanged.
        duration: Last time, in units of the whitened dynamics.
        num_times: Times at which both are estimated, from 0 to `duration`.
        fit_from: First time of the fit; early times show the fast directions of the energy.
        step_size: η; `duration` / (`num_times` − 1) is rounded to a multiple of it.
        num_chains: Chains in each sample.
        num_replicates: Independent repetitions, at least 3, each with two samples of r_t and of
            p, behind all standard errors.
        estimator: "neighbours" or "gaussian".
        draws: Independent draws of the model (m, entries of x and z) as `ebm.joint().sample`
            returns them, at least 2 × `num_replicates` × `num_chains`. If None they come from a
            copy of the pool, and are as good as the pool has converged.
        num_refreshes: Refreshes of that copy before draws are taken.
        seed: Fixes every random number.

    Returns:
        The estimates by time, and the rate. `w2` is 0 where the estimate of W2² is negative.

    Raises:
        ValueError: If the LVEBM is conditional, a number is out of range, `draws` are too few, or
            the chains diverge.

    Source:
        Bakry, Gentil and Ledoux (2014), Analysis and geometry of Markov diffusion operators,
        theorem 5.2.1 (KL); Otto and Villani (2000), theorem 1 (W2); docs/maths.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, convergence_rate
        >>> energy = QuadraticEnergy(1, 1)
        >>> x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.set_precision(torch.eye(2), torch.tensor([2.0, 0.0]))  # λ = 1
        >>> result = convergence_rate(ebm, estimator="gaussian", num_chains=64, num_times=6)
        >>> abs(result.rate - 2.0) < 4.0 * result.std_error
        True
    """
    import pandas as pd

    check_unconditional(ebm, "convergence_rate")
    stride = _check(duration, num_times, fit_from, step_size, num_chains, num_replicates)
    if estimator not in ("neighbours", "gaussian"):
        raise ValueError(f"estimator must be 'neighbours' or 'gaussian'; got {estimator!r}")
    size = (num_replicates, 2, num_chains)
    with ebm.frozen():
        p = (
            model_draws(ebm, size, num_refreshes, seed)
            if draws is None
            else whitened_draws(ebm, draws, size)
        )
        flow = langevin_flow(ebm, size, num_times, stride, step_size, seed)
        divergences = _gaussian_kls if estimator == "gaussian" else _neighbour_kls
        kl, null = divergences(ebm, flow, p)
    few = slice(min(num_chains, _ASSIGNED))
    pairs = [[(r[:, few], q[:, few]) for r, q in zip(at, p, strict=True)] for at in flow]
    w2 = np.array([[debiased_squared_w2(*pair) for pair in row] for row in pairs])
    kl_floor = float(abs(null.mean()) + 2.0 * _std_error(null))
    t = step_size * stride * np.arange(num_times)
    squared, squared_se = w2.mean(1), _std_error(w2)
    distance = np.sqrt(np.maximum(squared, 0.0))
    frame = pd.DataFrame(
        {
            "t": t,
            "kl": kl.mean(1),
            "kl_se": _std_error(kl),
            "w2": distance,
            # The slope of the root ends where the root is within its own error.
            "w2_se": 0.5 * squared_se / np.maximum(distance, np.sqrt(squared_se)),
        }
    )
    held = _held(kl, kl_floor)
    clear = frame["kl"] - held > max(kl_floor, held) + _CLEAR * frame["kl_se"]
    late = t >= fit_from - 0.5 * step_size
    frame["fitted"] = late & (clear | ~late).cummin()
    rate, std_error, fitted = _fit(t, kl - held, frame)
    late_kl, expected = kl[-num_times // 3 :].mean(0), fitted[-num_times // 3 :].mean()
    clearly = float(late_kl.mean() - _CLEAR * _std_error(late_kl))
    stopped = held > 0.0 or clearly > max(kl_floor, 2.0 * expected)
    plateau = float(late_kl.mean()) if stopped else math.nan
    floor = math.sqrt(np.mean([squared_w2(*pair[:, few]) for pair in p]))
    return ConvergenceRate(frame, rate, std_error, plateau, kl_floor, floor, estimator, step_size)


def _check(
    duration: float,
    num_times: int,
    fit_from: float,
    step_size: float,
    num_chains: int,
    num_replicates: int,
) -> int:
    """Return the steps between two times, or raise a ValueError."""
    check_at_least(3, num_times=num_times, num_replicates=num_replicates)
    check_at_least(8, num_chains=num_chains)
    if not step_size > 0.0:
        raise ValueError(f"step_size must be positive; got {step_size}")
    stride = round(duration / (num_times - 1) / step_size)
    if stride < 1:
        raise ValueError(
            f"duration must be at least (num_times − 1) step_size, which is "
            f"{(num_times - 1) * step_size:g}; got {duration}"
        )
    if not 0.0 <= fit_from < duration:
        raise ValueError(f"fit_from must lie between 0 and duration {duration:g}; got {fit_from}")
    return stride


def _gaussian_kls(
    ebm: LVEBM, flow: list[np.ndarray], p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL by time and replicate (T, R), and between the two samples of the model (R,)."""
    kl = [
        [gaussian_kl(r, q) for r, q in zip(_samples(at), _samples(p), strict=True)] for at in flow
    ]
    return np.reshape(kl, (len(flow), -1, 2)).mean(-1), np.array([gaussian_kl(*pair) for pair in p])


def _neighbour_kls(
    ebm: LVEBM, flow: list[np.ndarray], p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL by time and replicate (T, R), and between the two samples of the model (R,)."""

    def free_energies(u: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            at = torch.from_numpy(u).to(ebm.base_x.loc)
            energy = to_numpy(ebm.residual(at) + ebm.base.energy(at)).reshape(-1, u.shape[-2])
        values = [free_energy(*sample) for sample in zip(_samples(u), energy, strict=True)]
        return np.reshape(values, u.shape[:2])

    at_model = free_energies(p)
    kl = np.array([(free_energies(at) - at_model).mean(1) for at in flow])
    return kl, at_model[:, 0] - at_model[:, 1]


def _samples(u: np.ndarray) -> np.ndarray:
    """Samples (R, 2, n, d) as (2 R, n, d)."""
    return u.reshape(-1, *u.shape[2:])


def _std_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over the last axis."""
    error: np.ndarray = values.std(-1, ddof=1) / math.sqrt(values.shape[-1])
    return error


def _held(kl: np.ndarray, floor: float) -> float:
    """KL at which the decay stops early on, in nats; 0 where it does not.

    Of an exponential decay that loses two thirds of KL (T, R) from first to last, the middle third
    of the times has 1.44 times the mean of the last at least; here it has 1.2 times at most.
    """
    third = len(kl) // 3
    late, middle, start = kl[-third:].mean(0), kl[-2 * third : -third].mean(), kl[0].mean()
    clearly = float(late.mean() - _CLEAR * _std_error(late))
    flat = clearly > floor and middle < 1.2 * late.mean() and start > 3.0 * late.mean()
    return float(late.mean()) if flat else 0.0


def _fit(t: np.ndarray, kl: np.ndarray, frame: pd.DataFrame) -> tuple[float, float, np.ndarray]:
    """Slope of −log KL over the fitted times, its jackknife standard error, and the fitted KL (T,).

    Args:
        t: Times (T,).
        kl: Estimates by replicate (T, R), less the KL that is held.
        frame: Columns `kl_se` and `fitted`.
    """
    used = frame["fitted"].to_numpy()
    if used.sum() < 3:
        return math.nan, math.nan, np.full(len(t), np.nan)
    root_weight = kl.mean(1)[used] / frame["kl_se"].to_numpy()[used]

    def line(mean: np.ndarray) -> np.ndarray:
        coefficients: np.ndarray = np.polyfit(t[used], np.log(mean[used]), 1, w=root_weight)
        return coefficients

    n, total, whole = kl.shape[1], kl.sum(1), line(kl.mean(1))
    left_out = np.array([line((total - one) / (n - 1))[0] for one in kl.T])
    return -float(whole[0]), math.sqrt((n - 1) * left_out.var()), np.exp(np.polyval(whole, t))
