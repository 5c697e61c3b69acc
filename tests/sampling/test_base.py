# SPDX-License-Identifier: Apache-2.0
"""Moves and annealing from a base that is no Gaussian, against quadrature on a line."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from referee import ALPHA, CERTAIN, grid_cdf, ks_p_value, mean_p_value, seeded
from torch import Tensor

from pyro_lvebm.bases import GaussianBase, MixtureBase
from pyro_lvebm.sampling import (
    MALA,
    STANDARD_NORMAL,
    Base,
    LangevinState,
    anneal,
    init_state,
    pilot,
    temper,
    value_and_grad,
)
from pyro_lvebm.sampling.annealing import independence_step

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

BASE = MixtureBase(
    GaussianBase(torch.zeros(1).double(), torch.ones(1).double()),
    torch.tensor([0.7, 0.3]).double().log(),
    torch.tensor([[-1.5], [2.0]]).double(),
    torch.tensor([[[0.8]], [[0.4]]]).double(),
)
BETA = 0.6


def bump(u: Tensor) -> Tensor:
    return torch.sin(2.0 * u).sum(-1) + 0.3 * u.square().sum(-1)


F = value_and_grad(bump)


def total(beta: float) -> Callable[[Tensor], Tensor]:
    return lambda u: BASE.energy(u[:, None]) + beta * bump(u[:, None])


def exact_draws(count: int, beta: float) -> Tensor:
    """By the inverse of the distribution function on a grid."""
    grid = torch.linspace(-8.0, 8.0, 40001).double()
    mass = torch.softmax(-total(beta)(grid), 0)
    level = torch.rand(count, generator=seeded(1), dtype=torch.float64)
    return grid[torch.searchsorted(mass.cumsum(0), level)][:, None]


def law_p_value(u: Tensor, beta: float) -> float:
    return ks_p_value(u, grid_cdf(total(beta), 8.0))


Move = Callable[[LangevinState, Base, torch.Generator], LangevinState]

MOVES: dict[str, Move] = {
    "MALA": lambda state, base, g: MALA().step(
        F, state, 0.3, inverse_temperature=BETA, base=base, generator=g
    )[0],
    "MALA with a scale": lambda state, base, g: MALA().step(
        F,
        state,
        0.3,
        inverse_temperature=BETA,
        base=base,
        scale=torch.tensor([[1.3]]).double(),
        generator=g,
    )[0],
    "independent": lambda state, base, g: independence_step(
        F, state, inverse_temperature=BETA, base=base, generator=g
    ),
}


def moved_p_value(name: str, base: Base) -> float:
    state, generator = init_state(F, exact_draws(8000, BETA)), seeded(2)
    for _ in range(25):
        state = MOVES[name](state, base, generator)
    return law_p_value(state.u, BETA)


@pytest.mark.parametrize("name", MOVES)
def test_moves_leave_the_law_of_base_and_energy(name: str) -> None:
    """Kolmogorov's test of 8,000 chains. False alarms: 1e-3 a move.

    Moves that take the base for a standard normal fail.
    """
    assert moved_p_value(name, BASE) > ALPHA
    assert moved_p_value(name, STANDARD_NORMAL) < CERTAIN


def ladder_p_value(base: Base) -> float:
    """Bonferroni's bound over three levels, each from exact draws."""
    betas = torch.tensor([0.0, 0.5, 1.0]).double()
    u = torch.stack([exact_draws(4000, float(beta)) for beta in betas])
    found = temper(
        F,
        init_state(F, u),
        betas,
        torch.full((2, 1), 0.3).double(),
        torch.eye(1).double().expand(2, 1, 1),
        kernel=MALA(),
        num_moves=12,
        generator=seeded(3),
        base=base,
    )
    return min(3 * law_p_value(found.state.u[k], float(betas[k])) for k in range(3))


def test_every_level_of_a_ladder_keeps_its_law() -> None:
    """False alarms: 1e-3. Fresh draws and moves from a standard normal fail."""
    assert ladder_p_value(BASE) > ALPHA
    assert ladder_p_value(STANDARD_NORMAL) < CERTAIN


def ratio_p_value(base: Base, resample: bool) -> float:
    """Student's test of E[Ẑ / Z] = 1 over 300 runs, Z by quadrature."""
    grid = torch.linspace(-8.0, 8.0, 40001).double()
    cell = math.log(16.0 / 40000)
    log_z = float(torch.logsumexp(-total(1.0)(grid), 0) + cell) - 0.5 * math.log(2 * math.pi)
    start = base.draw((1, 1, 500, 1), BASE.loc, seeded(4))
    schedule = pilot(F, start, base=base, relative_ess=0.7, generator=seeded(5))
    v = base.draw((300, 1, 60, 1), BASE.loc, seeded(6))
    found = anneal(
        F, v, schedule, base=base, resample=resample, independence=True, generator=seeded(7)
    )
    return mean_p_value((found.log_ratio.squeeze(1) - log_z).exp(), 1.0)


@pytest.mark.parametrize("resample", [True, False])
def test_annealing_from_the_base_is_unbiased(resample: bool) -> None:
    """False alarms: 1e-3 a case. From a standard normal it is another ratio."""
    assert ratio_p_value(BASE, resample) > ALPHA
    assert ratio_p_value(STANDARD_NORMAL, resample) < CERTAIN
