# SPDX-License-Identifier: Apache-2.0
"""Energies ½ |r|²: closed forms where r is linear, SciPy and quadrature where it is not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from referee import ALPHA, CERTAIN, grid_cdf, ks_p_value, normal, plane_grid, seeded
from torch import Tensor

from pyro_lvebm.sampling import (
    Linearised,
    find_mode,
    gauss_newton_root,
    init_state,
    jacobian,
    linearise,
    linearised_step,
    start_near,
    value_and_grad,
)
from pyro_lvebm.sampling.gauss_newton import DefensiveBase

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

SLOPES, TARGETS = normal((4, 5, 2), 1), normal((4, 5), 2)  # of four data


def straight(v: Tensor) -> Tensor:
    """Linear residuals of four data, and v (*, 4, 2) among them."""
    return torch.cat([torch.einsum("bmk,...bk->...bm", SLOPES, v) - TARGETS, v], -1)


def bent(v: Tensor) -> Tensor:
    """Residuals of a curve, which are not linear."""
    a, b = v.unbind(-1)
    return torch.stack([3.0 * (a + torch.sin(b)) - 1.0, 2.0 * (a * b - 0.5), a, b], -1)


def moments() -> tuple[Tensor, Tensor]:
    precision = SLOPES.mT @ SLOPES + torch.eye(2).double()
    covariance = torch.linalg.inv(precision)
    return (covariance @ (SLOPES.mT @ TARGETS[..., None]))[..., 0], covariance


@pytest.mark.parametrize("batch", [(3,), (2, 1, 3)])
def test_the_jacobian_is_that_of_autograd(batch: tuple[int, ...]) -> None:
    v = normal((*batch, 2), 3)
    value, j = jacobian(bent, v)
    torch.testing.assert_close(value, bent(v))
    expected = [torch.autograd.functional.jacobian(bent, row) for row in v.reshape(-1, 2)]
    torch.testing.assert_close(j, torch.stack(expected).reshape(*batch, 4, 2))


def test_linear_residuals_have_their_gaussian() -> None:
    """From wherever they are made linear."""
    mean, covariance = moments()
    for seed in (1, 2):
        law = linearise(straight, 3.0 * normal((4, 2), seed))
        torch.testing.assert_close(law.mean, mean)
        torch.testing.assert_close(law.root @ law.root.mT, covariance)
        torch.testing.assert_close(law.inverse @ law.root, torch.eye(2).double().expand(4, 2, 2))


def test_the_metric_is_a_mean_over_particles() -> None:
    v = normal((3, 4, 2), 1)
    root = gauss_newton_root(bent, v)
    j = torch.stack([jacobian(bent, part)[1] for part in v])
    expected = torch.linalg.inv((j.mT @ j).mean(0))
    torch.testing.assert_close(root @ root.mT, expected)


def test_modes_have_no_slope_and_lie_lower() -> None:
    starts = 2.0 * normal((6, 2), 4)
    found = find_mode(bent, starts, 60)
    energy = value_and_grad(lambda v: 0.5 * bent(v).square().sum(-1))
    assert (energy(found)[0] < energy(starts)[0]).all()
    assert float(energy(found)[1].abs().max()) < 1e-4 < float(energy(starts)[1].abs().min())


def test_no_step_goes_where_residuals_are_not_numbers() -> None:
    """A generator may overflow far out; each datum walks on its own."""

    def r(v: Tensor) -> Tensor:
        return torch.cat([torch.where(v > 1.0, torch.nan, 5.0 * (v - 0.9)), 0.1 * v], -1)

    found = find_mode(r, torch.tensor([[-3.0], [2.0]]).double(), 40)
    assert abs(float(found[0, 0]) - 0.9) < 1e-2 and float(found[1, 0]) == 2.0


# --- a base for annealing ---------------------------------------------------------------------


def law(count: int = 1) -> Linearised:
    root = torch.tensor([[0.3, 0.0], [-0.1, 0.2]]).double().expand(count, 2, 2)
    mean = torch.tensor([1.0, -0.5]).double().expand(count, 2)
    return Linearised(mean, root, torch.linalg.inv(root))


def test_the_defensive_base_is_normalised() -> None:
    """Its energy is that of a density but for the constant of N(0, I)."""
    points, cell = plane_grid(8.0, 801)
    energy = DefensiveBase(law()).energy(points[None, None])
    assert float((-energy).exp().sum()) * cell == pytest.approx(2.0 * math.pi, rel=1e-6)


def test_its_gradient_is_that_of_autograd() -> None:
    base, u = DefensiveBase(law(3)), normal((2, 3, 5, 2), 1)
    value, grad = base.energy_and_grad(u)
    for ours, theirs in zip((value, grad), value_and_grad(base.energy)(u), strict=True):
        torch.testing.assert_close(ours, theirs)


def draws_p_value(axis: int, other: float) -> float:
    base = DefensiveBase(law())
    u = base.draw((1, 1, 4000, 2), torch.zeros(1).double(), seeded(1))[0, 0, :, axis]
    cov = law().root[0] @ law().root[0].T
    mean, std = float(law().mean[0, axis]), float(cov[axis, axis].sqrt())

    def energy(v: Tensor) -> Tensor:
        near = torch.distributions.Normal(mean, std).log_prob(v) + math.log(other)
        far = torch.distributions.Normal(0.0, 1.0).log_prob(v) + math.log(1.0 - other)
        return -torch.logaddexp(near, far)

    return ks_p_value(u, grid_cdf(energy, 8.0))


@pytest.mark.parametrize("axis", [0, 1])
def test_its_draws_have_the_density(axis: int) -> None:
    """False alarms: 1e-3. Another share of the Gaussian fails."""
    assert draws_p_value(axis, 0.8) > ALPHA
    assert draws_p_value(axis, 0.7) < CERTAIN


def test_annealing_starts_at_the_lowest_mode_and_keeps_the_target() -> None:
    """Of two modes the deeper one is found from 0, which is nearer to the other."""

    def r(v: Tensor) -> Tensor:
        gap = 8.0 * ((v - 0.8) * (v + 1.5)) + 0.6 * (v + 1.5)
        return torch.cat([gap, 0.5 * (v + 1.5), torch.zeros_like(v)], -1)

    def f(v: Tensor) -> Tensor:
        return 0.5 * (r(v).square().sum(-1) - v.square().sum(-1))

    v = normal((1, 1, 6, 1), 1)
    relative, base = start_near(value_and_grad(f), r, (1, 6, 1), v, seeded(3))
    assert float(base.mean) == pytest.approx(-1.5, abs=1e-3)
    for ours, theirs in zip(
        relative(v), value_and_grad(lambda u: f(u) + 0.5 * u.square().sum(-1))(v), strict=True
    ):
        energy, slope = base.energy_and_grad(v)
        torch.testing.assert_close(ours + (energy if ours.dim() == 3 else slope), theirs)


# --- an independent proposal ------------------------------------------------------------------


def line(v: Tensor) -> Tensor:
    return torch.cat([2.0 * torch.sinh(v) - 1.0, v], -1)


def target(v: Tensor) -> Tensor:
    return 0.5 * line(v[..., None]).square().sum(-1)


def step_p_value(wrong: bool) -> float:
    """Kolmogorov's test of exact draws after five proposals."""
    grid = torch.linspace(-6.0, 6.0, 20001).double()
    cdf = torch.softmax(-target(grid), 0).cumsum(0)
    p = torch.rand(4000, generator=seeded(2)).double()
    u = torch.from_numpy(np.interp(p.numpy(), cdf.numpy(), grid.numpy()))
    f = value_and_grad(lambda v: target(v[..., 0]) - 0.5 * v.square().sum(-1))
    state = init_state(f, u[None, :, None])
    narrow = linearise(line, torch.zeros(1, 1).double())
    proposal = Linearised(narrow.mean, 0.6 * narrow.root, narrow.inverse / 0.6)
    if wrong:  # without the density of the way back
        proposal = proposal._replace(inverse=0.0 * proposal.inverse)
    generator = seeded(5)
    for _ in range(5):
        state, acceptance = linearised_step(f, state, proposal, generator)
        assert bool(((acceptance >= 0.0) & (acceptance <= 1.0)).all())
    return ks_p_value(state.u, grid_cdf(target, 6.0))


def test_proposals_leave_the_posterior_as_it_is() -> None:
    """False alarms: 1e-3. With another density of the proposal they do not."""
    assert step_p_value(wrong=False) > ALPHA
    assert step_p_value(wrong=True) < CERTAIN


def test_linear_residuals_accept_every_proposal() -> None:
    f = value_and_grad(lambda v: 0.5 * (straight(v).square().sum(-1) - v.square().sum(-1)))

    def last(u: Tensor) -> Any:
        value, grad = f(u.movedim(-2, 0))
        return value.movedim(0, -1), grad.movedim(0, -2)

    state = init_state(last, 5.0 * normal((4, 3, 2), 1))
    proposal = linearise(straight, torch.zeros(4, 2).double())
    new, acceptance = linearised_step(last, state, proposal, seeded(1))
    new, acceptance = linearised_step(last, new, proposal, seeded(2))
    torch.testing.assert_close(acceptance, torch.ones_like(acceptance))
    assert (new.u != state.u).all()
