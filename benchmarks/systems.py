# SPDX-License-Identifier: Apache-2.0
"""Physical systems with few factors, simulated and measured with noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.integrate import odeint


class Measured(NamedTuple):
    """Rows of measurements, and the factors that they came from."""

    x: np.ndarray  # (N, d)
    factors: np.ndarray  # (N, number of factors)


def pendulum(num_rows: int, seed: int, noise: float = 0.1) -> Measured:
    """Angles of a damped pendulum at 20 times; factors are amplitude and damping."""
    draw = np.random.default_rng(seed)
    factors = np.c_[draw.uniform(0.3, 2.8, num_rows), draw.uniform(0.05, 0.6, num_rows)]
    times = np.linspace(0.0, 6.0, 20)

    def slope(y: np.ndarray, _: float, damping: float) -> list[float]:
        return [y[1], -2.0 * np.sin(y[0]) - damping * y[1]]

    x = np.stack([odeint(slope, [a, 0.0], times, (c,))[:, 0] for a, c in factors])
    return Measured(x + noise * draw.normal(size=x.shape), factors)


def oscillator(num_rows: int, seed: int, noise: float = 0.4) -> Measured:
    """An oscillation of unknown phase and frequency at 10 times; these are the factors.

    So few noisy times leave several frequencies possible, and the phase goes with the frequency.
    """
    draw = np.random.default_rng(seed)
    factors = np.c_[draw.uniform(0.0, 2 * np.pi, num_rows), draw.uniform(0.5, 3.0, num_rows)]
    times = np.linspace(0.0, 5.0, 10)
    x = np.cos(factors[:, :1] + factors[:, 1:] * times)
    return Measured(x + noise * draw.normal(size=x.shape), factors)


def epidemic(num_rows: int, seed: int, noise: float = 0.03) -> Measured:
    """Infected shares of an SIR epidemic at 16 times; factors are contact and recovery rates."""
    draw = np.random.default_rng(seed)
    factors = np.c_[draw.uniform(0.3, 2.0, num_rows), draw.uniform(0.1, 0.6, num_rows)]
    times = np.linspace(0.0, 20.0, 16)

    def slope(y: np.ndarray, _: float, contact: float, recovery: float) -> list[float]:
        new = contact * y[0] * y[1]
        return [-new, new - recovery * y[1]]

    x = np.stack([odeint(slope, [0.99, 0.01], times, (b, g))[:, 1] for b, g in factors])
    return Measured(x + noise * draw.normal(size=x.shape), factors)


SYSTEMS: dict[str, Callable[[int, int], Measured]] = {
    "pendulum": pendulum,
    "oscillator": oscillator,
    "epidemic": epidemic,
}
