# SPDX-License-Identifier: Apache-2.0
"""Data sets of the training benchmark: toy densities, a chaotic flow, and small real tables.

Each is split at random, 80 % for training. Nothing is downloaded: the real tables come with
scikit-learn, and the other sets are generated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, SeedSequence
from scipy.integrate import solve_ivp
from sklearn.datasets import load_breast_cancer, load_wine, make_moons, make_swiss_roll

from pyro_lvebm.data import load_digits_data, split

NUM_ROWS = 5000
"""Rows of a generated set, before the split."""

HELD_OUT = 0.2

MOONS_NOISE = 0.1
PINWHEEL_ARMS, PINWHEEL_RATE = 5, 0.25
PINWHEEL_RADIAL_STD, PINWHEEL_TANGENTIAL_STD = 0.3, 0.1
GAUSSIANS, GAUSSIANS_RADIUS, GAUSSIANS_STD = 8, 2.0, 0.2
SWISS_NOISE = 0.5
LORENZ_SIGMA, LORENZ_RHO, LORENZ_BETA = 10.0, 28.0, 8.0 / 3.0
LORENZ_TRANSIENT, LORENZ_INTERVAL, LORENZ_NOISE = 20.0, 0.1, 0.5


@dataclass(frozen=True)
class DataSet:
    """Rows of one data set, split.

    Args:
        name: One of `NAMES`.
        train: Training rows (N, D), float64.
        test: Held-out rows (M, D), float64.
        z_dim: Entries of the latent variable of a model for these rows.
        generated: Whether the rows are generated, so that another seed draws other rows. A real
            table stays the same, and a seed fixes its split and, for the digits, their noise.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    z_dim: int
    generated: bool


def load(name: str, seed: int = 0) -> DataSet:
    """Return a data set; the same seed gives the same rows.

    Args:
        name: One of `NAMES`.
        seed: Fixes the generated rows and the split.

    Raises:
        ValueError: If there is no data set of that name.

    Example:
        >>> moons = load("two moons")
        >>> moons.train.shape, moons.test.shape
        ((4000, 2), (1000, 2))
    """
    if name not in NAMES:
        raise ValueError(f"no data set is called {name!r}; expected one of {', '.join(NAMES)}")
    if name == "digits":
        digits = load_digits_data(seed)
        return DataSet(name, digits.train, digits.test, z_dim=4, generated=False)
    if name in _TABLES:
        train, test = split(_TABLES[name](), HELD_OUT, seed)
        return DataSet(name, train, test, z_dim=2, generated=False)
    # Apart from [seed, 0] and [seed, 1], of which `data` makes the split and the digits' noise.
    rng = np.random.default_rng(SeedSequence([seed, 2, NAMES.index(name)]))
    train, test = split(_GENERATORS[name](rng), HELD_OUT, seed)
    return DataSet(name, train, test, z_dim=1, generated=True)


def two_moons(rng: Generator) -> np.ndarray:
    """Return two interleaved half circles of radius 1 with noise of standard deviation 0.1."""
    x, _ = make_moons(NUM_ROWS, noise=MOONS_NOISE, random_state=_legacy_seed(rng))
    return np.asarray(x, dtype=np.float64)


def pinwheel(rng: Generator) -> np.ndarray:
    """Return five arms, twisted more the farther out.

    Normal blobs at distance 1 from the origin, longer along the radius, are turned by an angle
    0.25 exp(r), r the radial coordinate, and scaled by 2.

    Source:
        Johnson et al. (2016), Composing graphical models with neural networks, section 6; scale as
        in Grathwohl et al. (2019), FFJORD.
    """
    blob = rng.normal(size=(NUM_ROWS, 2)) * [PINWHEEL_RADIAL_STD, PINWHEEL_TANGENTIAL_STD]
    radial, tangential = 1.0 + blob[:, 0], blob[:, 1]
    arm = rng.integers(PINWHEEL_ARMS, size=NUM_ROWS)
    angle = 2.0 * math.pi * arm / PINWHEEL_ARMS + PINWHEEL_RATE * np.exp(radial)
    cos, sin = np.cos(angle), np.sin(angle)
    return 2.0 * np.stack([radial * cos + tangential * sin, tangential * cos - radial * sin], -1)


def eight_gaussians(rng: Generator) -> np.ndarray:
    """Return rows of eight equal normal blobs of standard deviation 0.2 on a circle of radius 2.

    Neighbours are 7.7 standard deviations apart, so that the expected log p(x) of the true density
    is −log 8 − log(2πe · 0.2²) = −1.698 nats.
    """
    angle = 2.0 * math.pi * rng.integers(GAUSSIANS, size=NUM_ROWS) / GAUSSIANS
    centre = GAUSSIANS_RADIUS * np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.asarray(centre + GAUSSIANS_STD * rng.normal(size=(NUM_ROWS, 2)))


def swiss_roll(rng: Generator) -> np.ndarray:
    """Return a rolled-up sheet in three dimensions with noise of standard deviation 0.5.

    Turns of the roll are 2π apart.
    """
    x, _ = make_swiss_roll(NUM_ROWS, noise=SWISS_NOISE, random_state=_legacy_seed(rng))
    return np.asarray(x, dtype=np.float64)


def lorenz_63(rng: Generator) -> np.ndarray:
    """Return states of the Lorenz equations, 0.1 time units apart, with noise.

        dx/dt = σ (y − x),    dy/dt = x (ρ − z) − y,    dz/dt = x y − β z,

    with σ = 10, ρ = 28, β = 8/3. The start is random, 20 time units are left out for the transient,
    and each coordinate has independent normal noise of standard deviation 0.5, without which the
    rows would lie on a set of volume zero and have no density.

    Source:
        Lorenz (1963), Deterministic nonperiodic flow.
    """

    def velocity(_: float, u: np.ndarray) -> tuple[float, float, float]:
        # Floats, because arithmetic on single entries of an array takes several times as long.
        x, y, z = u.tolist()
        return LORENZ_SIGMA * (y - x), x * (LORENZ_RHO - z) - y, x * y - LORENZ_BETA * z

    times = LORENZ_TRANSIENT + LORENZ_INTERVAL * np.arange(NUM_ROWS)
    start = np.array([0.0, 0.0, LORENZ_RHO - 1.0]) + rng.normal(size=3)
    solution = solve_ivp(
        velocity, (0.0, times[-1]), start, method="DOP853", t_eval=times, rtol=1e-9, atol=1e-9
    )
    if not solution.success:
        raise RuntimeError(f"the Lorenz equations were not integrated: {solution.message}")
    return np.asarray(solution.y.T + LORENZ_NOISE * rng.normal(size=(NUM_ROWS, 3)))


def breast_cancer() -> np.ndarray:
    """Return logarithms of the 30 measurements of cell nuclei, for 556 of the 569 patients.

    All are positive sizes and shapes with long right tails, but for 13 patients whose concavities
    and concave points are recorded as zero. They are left out: whatever a zero is replaced by, the
    13 rows agree in six columns, where a model earns any number of nats by a spike on them.

    Source:
        Street, Wolberg and Mangasarian (1993), Nuclear feature extraction for breast tumor
        diagnosis.
    """
    x = np.asarray(load_breast_cancer().data, dtype=np.float64)
    return np.asarray(np.log(x[(x > 0).all(1)]))


def wine() -> np.ndarray:
    """Return the 13 chemical measurements of 178 wines, as they are.

    Source:
        Aeberhard and Forina (1991), Wine, UCI repository.
    """
    return np.asarray(load_wine().data, dtype=np.float64)


def _legacy_seed(rng: Generator) -> int:
    """Return a seed for scikit-learn, which takes no `Generator`."""
    return int(rng.integers(2**32))


_GENERATORS: dict[str, Callable[[Generator], np.ndarray]] = {
    "two moons": two_moons,
    "pinwheel": pinwheel,
    "8 Gaussians": eight_gaussians,
    "Swiss roll": swiss_roll,
    "Lorenz-63": lorenz_63,
}
_TABLES: dict[str, Callable[[], np.ndarray]] = {"breast cancer": breast_cancer, "wine": wine}

NAMES = (*_GENERATORS, "digits", *_TABLES)
