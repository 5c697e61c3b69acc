# SPDX-License-Identifier: Apache-2.0
"""What every residual energy promises.

A new one gets these tests by a line in `PLAIN`, or in `CONDITIONAL` if it takes contexts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from referee import normal
from small_models import same, snapshot, tiny_pool
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    ConjugateEnergy,
    ContextPool,
    MLPEnergy,
    QuadraticEnergy,
    ZeroEnergy,
)
from pyro_lvebm.energies import WhitenedEnergy
from pyro_lvebm.model.density import Density
from pyro_lvebm.sampling import value_and_grad

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

X, Z, C = 2, 2, 3  # entries of x, z and a context


class Users(nn.Module):
    """A module that knows nothing of this package."""

    def __init__(self, context_dim: int = 0) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.weight = nn.Parameter(torch.full((X,), 0.7))

    def forward(self, x: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        if len(context) != bool(self.context_dim):
            raise TypeError("wrong number of arguments")
        shift = sum(c.sum(-1) for c in context)
        return (self.weight * torch.sin(x) * torch.tanh(z)).sum(-1) + shift * torch.sin(x[..., 0])


class UsersWhitened(WhitenedEnergy):
    """A user's function of whitened coordinates, whose gradient is that of autograd."""

    def __init__(self) -> None:
        super().__init__(X, Z)
        self.weight = nn.Parameter(torch.full((X + Z,), 0.3))

    def whitened(self, u: Tensor) -> Tensor:
        return (self.weight * torch.cos(u)).sum(-1) * torch.tanh(u[..., 0])


# Energies of (x, z), and of (x, z, context).
PLAIN: dict[str, Callable[[], Any]] = {
    "MLP": lambda: MLPEnergy(X, Z, (8, 6), seed=1),
    "MLP of one layer": lambda: MLPEnergy(X, Z, (5,), 3, seed=2),
    "MLP of three layers": lambda: MLPEnergy(X, Z, (8, 9, 7), 1, seed=3),
    "MLP without features": lambda: MLPEnergy(X, Z, (8, 6), 0, seed=1),
    "conjugate": lambda: ConjugateEnergy(X, Z, (8, 6), seed=1),
    "quadratic": lambda: QuadraticEnergy(X, Z),
    "zero": lambda: ZeroEnergy(X, Z),
    "a user's": Users,
    "a user's, whitened": UsersWhitened,
}
CONDITIONAL: dict[str, Callable[[], Any]] = {
    "MLP with contexts": lambda: MLPEnergy(X, Z, (8, 6), context_dim=C, seed=1),
    "MLP with contexts, without features": lambda: MLPEnergy(X, Z, (8,), 0, context_dim=C),
    "quadratic with contexts": lambda: QuadraticEnergy(X, Z, context_dim=C),
    "a user's with contexts": lambda: Users(C),
}
ENERGIES = PLAIN | CONDITIONAL
NOT_ZERO_AT_START = {"a user's", "a user's with contexts", "a user's, whitened"}
WITHOUT_THETA = {"zero"}  # 0 everywhere, with nothing to learn

every = pytest.mark.parametrize("name", ENERGIES)
that_learns = pytest.mark.parametrize("name", [n for n in ENERGIES if n not in WITHOUT_THETA])


def density_of(name: str) -> Density:
    """In float64, on a full base_x and a diagonal base_z, both away from the standard normal."""
    dtype = torch.float64
    tril = torch.tensor([[2.0, 0.0], [-0.7, 0.4]], dtype=dtype)
    base_x = dist.MultivariateNormal(torch.tensor([1.0, -3.0], dtype=dtype), scale_tril=tril)
    base_z = dist.Normal(torch.tensor([0.5, -0.1], dtype=dtype), 1.7).to_event(1)
    shape = (C,) if name in CONDITIONAL else None
    return Density(ENERGIES[name]().to(dtype), base_x, base_z, context_shape=shape)


def trained(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> Density:
    """The density of the energy with θ away from its start."""
    density = density_of(name)
    with torch.no_grad():
        for k, p in enumerate(density.f.parameters()):
            p.add_(0.4 * normal(tuple(p.shape), 10 * seed + k))
    return density.to(dtype)


def inputs(
    density: Density, batch: tuple[int, ...] = (5,), seed: int = 1, size: float = 1.5
) -> tuple[Tensor, Tensor | None]:
    """Whitened coordinates, and contexts where there are any."""
    dtype = density.base_x.loc.dtype
    u = size * normal((*batch, X + Z), seed, dtype)
    return u, normal((*batch, C), seed + 1, dtype) if density.context_shape else None


def of_pairs(density: Density, u: Tensor, context: Tensor | None) -> Tensor:
    """f as a user calls it, on data coordinates."""
    return density.f(*density.unwhiten(u), *(() if context is None else (context,)))


@pytest.mark.parametrize("name", [name for name in ENERGIES if name not in NOT_ZERO_AT_START])
def test_an_untrained_energy_is_zero_and_can_learn(name: str) -> None:
    """So that an untrained LVEBM is its base, with log Z = 0."""
    density = density_of(name)
    u, context = inputs(density, (3, 4), size=4.0)
    value, grad = density.residual_and_grad(u, context)
    assert not value.any() and not grad.any() and not density.residual(u, context).any()
    if name in WITHOUT_THETA:
        assert density.is_base and not density.theta()
        return
    density.residual(u, context).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in density.f.parameters())


@every
def test_an_lvebm_takes_it_and_follows_it(name: str) -> None:
    """Contexts are a part of it: without them, or with them where it has none, it is refused."""
    energy, one = ENERGIES[name](), dist.Normal(torch.zeros(2), 1.0).to_event(1)
    fits, wrong = (tiny_pool(), None), (ContextPool(3, 8), (C,))
    if name in CONDITIONAL:
        fits, wrong = wrong, fits
    if name not in WITHOUT_THETA:  # which takes contexts or leaves them
        with pytest.raises(ValueError, match=r"energy\(x, z|takes (a|no) context"):
            LVEBM(ENERGIES[name](), one, one, wrong[0], context_shape=wrong[1])
    ebm = LVEBM(energy, one, one, fits[0], context_shape=fits[1])
    context = normal((8, C), 1, torch.float32) if name in CONDITIONAL else None
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.1)
    if name in WITHOUT_THETA:  # then the pool has nothing to follow
        assert float(ebm.log_norm()) == 0.0 and not ebm.is_trained
        return
    ebm.log_norm(context).backward()
    assert int(ebm.pool.refreshes) > 0
    assert all(p.grad.isfinite().all() for p in energy.parameters() if p.grad is not None)


@every
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_both_ways_to_call_it_agree(name: str, batch: tuple[int, ...]) -> None:
    density = trained(name)
    u, context = inputs(density, batch)
    value = density.residual(u, context)
    assert value.shape == batch and value.dtype is torch.float64
    torch.testing.assert_close(of_pairs(density, u, context), value, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_value_and_grad_is_that_of_autograd(name: str, batch: tuple[int, ...]) -> None:
    density = trained(name)
    u, context = inputs(density, batch)
    value, grad = density.residual_and_grad(u, context)
    expected = value_and_grad(lambda v: of_pairs(density, v, context))(u)
    assert value.shape == batch and grad.shape == u.shape
    assert grad.abs().max() > 0.01 or name in WITHOUT_THETA
    assert not value.requires_grad and not grad.requires_grad
    for ours, theirs in zip((value, grad), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@every
def test_given_x_it_is_the_same_energy(name: str) -> None:
    """Contexts have more rows than x where they wish."""
    density = trained(name)
    u, context = inputs(density, (4, 5))
    at = density.given(context)
    u[..., :X] = u[:1, :, :X]
    value, grad = density.residual_and_grad(u, context)
    for w_x in (u[0, :, :X], u[..., :X]):
        ours = at.residual_given_x(w_x)(u[..., X:])
        torch.testing.assert_close(ours, (value, grad[..., X:]), rtol=1e-9, atol=1e-9)
        assert not any(part.requires_grad for part in ours)


@every
def test_it_is_smooth(name: str) -> None:
    """The gradient is that of central differences, and does not jump within a small step."""
    density = trained(name)
    u, context = inputs(density, (6,))
    step = 1e-5
    shifts = step * torch.eye(X + Z, dtype=torch.float64)
    wide = None if context is None else context[:, None].expand(-1, X + Z, -1)
    ahead, behind = (density.residual_and_grad(u[:, None] + s * shifts, wide) for s in (1, -1))
    grad = density.residual_and_grad(u, context)[1]
    torch.testing.assert_close((ahead[0] - behind[0]) / (2 * step), grad, rtol=1e-6, atol=1e-7)
    assert (ahead[1] - behind[1]).abs().max() < 1e4 * step


@every
def test_it_is_finite_far_from_the_base(name: str) -> None:
    """Chains may go there, and a gradient from there must bring them back."""
    density = trained(name, dtype=torch.float32)
    u, context = inputs(density, (200,), size=100.0)
    assert all(part.isfinite().all() for part in density.residual_and_grad(u, context))


@every
def test_an_element_of_a_batch_has_a_value_of_its_own(name: str) -> None:
    """Langevin moves take the gradient of a sum for the gradients of its terms."""
    density = trained(name)
    u, context = inputs(density, (4,))
    whole = density.residual_and_grad(u, context)
    for i in range(4):
        alone = density.residual_and_grad(u[i], None if context is None else context[i])
        for ours, theirs in zip(alone, whole, strict=True):
            torch.testing.assert_close(ours, theirs[i], rtol=1e-10, atol=1e-10)


@every
def test_single_precision_is_close_to_double(name: str) -> None:
    density, single = trained(name), trained(name, dtype=torch.float32)
    u, context = inputs(density)
    narrow = None if context is None else context.float()
    for ours, exact in zip(
        single.residual_and_grad(u.float(), narrow),
        density.residual_and_grad(u, context),
        strict=True,
    ):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-3)


@that_learns
def test_the_gradient_in_theta_is_that_of_central_differences(name: str) -> None:
    """Along a random direction; every parameter has one."""
    density = trained(name)
    u, context = inputs(density, (20,))
    params = list(density.f.parameters())
    assert params and len(params) == len(list(density.parameters()))  # bases and f have no others
    grads = torch.autograd.grad(density.residual(u, context).sum(), params)
    assert all(g.isfinite().all() and g.any() for g in grads)
    directions = [normal(tuple(p.shape), 50 + k) for k, p in enumerate(params)]
    sums, step = [], 1e-6
    with torch.no_grad():
        for sign in (1.0, -2.0):
            for p, d in zip(params, directions, strict=True):
                p.add_(sign * step * d)
            sums.append(float(density.residual(u, context).sum()))
    slope = (sums[0] - sums[1]) / (2 * step)
    expected = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert slope == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


@that_learns
def test_a_state_dict_restores_it(name: str) -> None:
    density, other = trained(name, 1), trained(name, 2)
    u, context = inputs(density)
    before = density.residual(u, context)
    assert not torch.equal(other.residual(u, context), before)
    other.load_state_dict(density.state_dict())
    assert torch.equal(other.residual(u, context), before)
    assert torch.equal(of_pairs(other, u, context), of_pairs(density, u, context))


@every
def test_a_deep_copy_is_independent(name: str) -> None:
    density = trained(name)
    u, context = inputs(density)
    before, twin = snapshot(density), copy.deepcopy(density)
    assert torch.equal(twin.residual(u, context), density.residual(u, context))
    with torch.no_grad():
        for p in twin.f.parameters():
            p.add_(1.0)
    assert same(before, snapshot(density))


@every
def test_it_starts_alike_every_time(name: str) -> None:
    assert same(snapshot(ENERGIES[name]()), snapshot(ENERGIES[name]()))
