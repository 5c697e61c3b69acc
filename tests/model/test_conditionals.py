# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from referee import normal
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MLPEnergy, QuadraticEnergy, ZeroEnergy
from pyro_lvebm.bases import Noise
from pyro_lvebm.bases.completion import Completion
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.model.conditionals import (
    draw_conditional,
    given_observed,
    given_x,
    given_z,
    residuals_given_x,
)
from pyro_lvebm.sampling.langevin import ValueAndGrad, value_and_grad


def make_ebm(full: bool = True) -> LVEBM:
    """x of shape (2, 2) and z of shape (2, 1), both bases away from the standard normal."""
    tril = 0.3 * normal((4, 4), 2).tril(-1) + torch.eye(4).double()
    base_x = GaussianBase(normal((2, 2), 1), tril if full else tril.diagonal().reshape(2, 2))
    base_z = GaussianBase(normal((2, 1), 3), torch.tensor([[0.8], [1.3]]).double())
    ebm = LVEBM(QuadraticEnergy(4, 2).double(), base_x, base_z)
    root = 0.5 * normal((6, 6), 4)
    ebm.f.set_precision(root @ root.T + 0.6 * torch.eye(6).double(), 0.5 * normal((6,), 5))
    return ebm


def assert_same(f: ValueAndGrad, g: ValueAndGrad, v: Tensor) -> None:
    for ours, theirs in zip(f(v), g(v), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert f(v)[1].shape == v.shape


@pytest.mark.parametrize("full", [False, True])
def test_given_x_is_the_residual_at_fixed_x(full: bool) -> None:
    ebm, w_x, v = make_ebm(full), normal((3, 4), 6), normal((5, 3, 2), 7)
    expected = value_and_grad(lambda v: ebm.residual(torch.cat([w_x.expand(5, 3, 4), v], -1)))
    assert_same(given_x(ebm, w_x), expected, v)


@pytest.mark.parametrize("noise", ["diagonal", "low-rank", "full"])
@pytest.mark.parametrize("energy", ["zero", "mlp", "own"])
def test_given_x_on_a_generator_is_what_the_joint_has(noise: Noise, energy: str) -> None:
    """The noise may vary with z, and the energy not depend on it."""

    class Own(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(x.flatten(-2)).sum(-1)

    class Wide(nn.Module):
        def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
            mean = torch.stack([z.sin().sum(-1), z.square().sum(-1)], -1)[:, None]
            return mean.expand(-1, 2, 2), 0.3 * mean.tanh().expand(-1, 2, 2)

    energies = {"zero": ZeroEnergy(4, 2), "mlp": MLPEnergy(4, 2, (8,), 3).double(), "own": Own()}
    rows = normal((30, 2, 2), 8)
    ebm = LVEBM.from_data(energies[energy], rows, z_dim=2, generator=Wide(), noise=noise)
    with torch.no_grad():
        for k, p in enumerate(ebm.parameters()):
            p.add_(0.2 * normal(tuple(p.shape), k))
    w_x, v = ebm.base_x.whiten(rows[:3]), normal((5, 3, 2), 7)
    value, grad = ebm.at_coordinates(torch.cat([w_x.expand(5, 3, 4), v], -1))
    ours = given_x(ebm, w_x)(v)
    torch.testing.assert_close(ours, (value, grad[..., 4:]))
    residuals = residuals_given_x(ebm, w_x)
    assert residuals is not None
    epsilon = ebm.base_x.noise_and_log_det(w_x.expand(5, 3, 4), ebm.base_z.unwhiten(v))[0]
    torch.testing.assert_close(residuals(v), torch.cat([epsilon, v], -1))


def test_given_z_is_the_residual_at_fixed_z() -> None:
    ebm, w_z, v = make_ebm(), normal((3, 2), 6), normal((5, 3, 4), 7)
    expected = value_and_grad(lambda v: ebm.residual(torch.cat([v, w_z.expand(5, 3, 2)], -1)))
    assert_same(given_z(ebm, w_z), expected, v)


def observed_entries() -> Tensor:
    """Rows that miss the last entry, the first and the last, and none."""
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[0, 3] = keep[1, 0] = keep[1, 3] = False
    return keep.reshape(3, 2, 2)


@pytest.mark.parametrize("full", [False, True])
def test_given_observed_keeps_observed_entries_and_moves_the_others(full: bool) -> None:
    """f at v is the residual at x with the missing entries that v stands for."""
    ebm, x, observed = make_ebm(full), normal((3, 2, 2), 6), observed_entries()
    columns = torch.tensor([0, 3])
    completion = Completion(ebm.base_x, x, observed)
    f = given_observed(ebm, completion, columns)

    def slowly(v: Tensor) -> Tensor:
        noise = torch.zeros(*v.shape[:-1], 4).double()
        noise[..., columns] = v[..., 2:]
        y = completion.mean + torch.linalg.solve_triangular(
            completion.root.mT, noise[..., None], upper=True
        ).squeeze(-1)
        filled = torch.where(observed.flatten(1), x.flatten(1), y).reshape(*v.shape[:-1], 2, 2)
        w_x = ebm.base_x.whiten(filled)
        return ebm.residual(torch.cat([w_x, v[..., :2]], -1))

    v = normal((5, 3, 4), 7)
    assert_same(f, value_and_grad(slowly), v)
    # Directions of v that no missing entry of a row stands for leave its energy as it is.
    grad = f(v)[1]
    assert (grad[:, 2, 2:] == 0).all() and (grad[:, 0, 2] == 0).all()
    assert (grad[:, 1, 2:] != 0).all()


def test_draws_are_one_of_every_problem() -> None:
    """Each at a well of its own, which takes it far from the start of its run."""
    wells = torch.tensor([[6.0, 0.0], [0.0, -6.0], [-6.0, 6.0]]).double()

    def f(v: Tensor) -> tuple[Tensor, Tensor]:
        away = v - wells[:, None]
        return 50.0 * away.square().sum(-1), 100.0 * away

    with torch.random.fork_rng():
        torch.manual_seed(0)
        v = draw_conditional(f, 3, 2, 16, wells)
    # The law is N(100/101 of the well, 1/101): 0.6 is six standard deviations.
    assert v.shape == (3, 2) and ((v - wells * 100 / 101).abs() < 0.6).all()
