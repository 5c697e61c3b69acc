# SPDX-License-Identifier: Apache-2.0
"""What every kernel promises on exp(−½ |u|² − β f(u)). A new one gets these by a line in `KERNELS`.

Targets without a base, and each kernel's own formulas, are in tests/sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from referee import ALPHA, CERTAIN, normal, seeded, variance_p_value
from torch import Tensor

from pyro_lvebm import MALA, ULA
from pyro_lvebm.sampling import Kernel, LangevinState, ValueAndGrad, init_state, value_and_grad
from pyro_lvebm.sampling.annealing import independence_step

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

Move = tuple[LangevinState, Tensor | None]
Step = Callable[[ValueAndGrad, LangevinState, float, torch.Generator], Move]

ETA = 0.3
LOOSE = torch.tensor([[1.2, -0.9, 0.3], [0.5, 0.6, -0.2], [0.1, 0.8, 0.7]])


class Entry(NamedTuple):
    """A kernel, and what it says of itself."""

    step: Step  # f, state, β and a generator; acceptance is None where a kernel tells none
    variance: Callable[[Tensor], Tensor] = torch.reciprocal  # stationary, for curvatures λ of E
    has_test: bool = True  # of Metropolis, which refuses proposals without an energy


def step_of(kernel: Kernel, scale: Tensor | None = None, each: bool = False) -> Step:
    """Steps of one size, or of a tensor of sizes; in coordinates of a scale, if there is one."""

    def step(
        f: ValueAndGrad, state: LangevinState, beta: float, generator: torch.Generator
    ) -> Move:
        eta = torch.full_like(state.f, ETA) if each else ETA
        options = {} if scale is None else {"scale": scale.to(state.u)}
        return kernel.step(f, state, eta, inverse_temperature=beta, generator=generator, **options)

    return step


def independent(
    f: ValueAndGrad, state: LangevinState, beta: float, generator: torch.Generator
) -> Move:
    return independence_step(f, state, inverse_temperature=beta, generator=generator), None


def of_ula(curvature: Tensor) -> Tensor:
    return 1.0 / (curvature * (1.0 - 0.5 * ETA * curvature))


KERNELS = {
    "ULA": Entry(step_of(ULA()), of_ula, has_test=False),
    "ULA that adapts": Entry(step_of(ULA(0.9)), of_ula, has_test=False),
    "MALA": Entry(step_of(MALA())),
    "MALA at another target": Entry(step_of(MALA(0.8))),
    "MALA with a tensor of sizes": Entry(step_of(MALA(), each=True)),
    "MALA with a scale": Entry(step_of(MALA(), LOOSE)),
    "independent proposals": Entry(independent),
}

every = pytest.mark.parametrize("name", KERNELS)
BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


# f = ½ uᵀAu + bᵀu, with the eigenvectors and the mean of the target.
AXES = torch.linalg.qr(normal((3, 3), 1)).Q
EIGENVALUES = torch.tensor([-0.4, 0.5, 1.5], dtype=torch.float64)
B = 0.6 * normal((3,), 2)


def quadratic(u: Tensor) -> tuple[Tensor, Tensor]:
    matrix, b = ((AXES * EIGENVALUES) @ AXES.T).to(u), B.to(u)
    grad = u @ matrix
    return 0.5 * (u * grad).sum(-1) + u @ b, grad + b


def invariance_p_value(entry: Entry, beta: float, moved_at: float, dtype: torch.dtype) -> float:
    """Exact draws of the kernel's law at β, moved at some temperature: still of that law?"""
    curvature = 1.0 + beta * EIGENVALUES
    mean = -beta * (B @ AXES) / curvature  # along the eigenvectors
    variance = entry.variance(curvature)
    exact = (mean + normal((8000, 3), 3) * variance.sqrt()) @ AXES.T
    state, generator = init_state(quadratic, exact.to(dtype)), seeded(4)
    for _ in range(15):
        state, _ = entry.step(quadratic, state, moved_at, generator)
    assert (state.u != exact).any(-1).double().mean() > 0.9
    return variance_p_value(state.u.double() @ AXES, variance, mean)


@every
@pytest.mark.parametrize(
    ("beta", "dtype"), [(0.0, torch.float64), (0.4, torch.float32), (1.0, torch.float64)]
)
def test_its_law_is_left_invariant(name: str, beta: float, dtype: torch.dtype) -> None:
    """Chi-square tests of the variances along three axes. False alarms: 1e-3 a case."""
    assert invariance_p_value(KERNELS[name], beta, beta, dtype) > ALPHA


@every
def test_the_check_fails_at_another_temperature(name: str) -> None:
    assert invariance_p_value(KERNELS[name], 1.0, 0.4, torch.float64) < CERTAIN
    assert invariance_p_value(KERNELS[name], 0.4, 1.0, torch.float64) < CERTAIN


@every
def test_the_check_tells_the_target_from_the_law_of_ula(name: str) -> None:
    entry = KERNELS[name]
    other = torch.reciprocal if entry.variance is of_ula else of_ula
    assert invariance_p_value(entry._replace(variance=other), 1.0, 1.0, torch.float64) < CERTAIN


def rough(u: Tensor) -> Tensor:
    return (u**4).sum(-1) / 4.0 + torch.sin(3.0 * u).sum(-1) + u[..., 0] * u[..., -1]


ROUGH = value_and_grad(rough)


@every
@pytest.mark.parametrize("shape", [(7, 3), (2, 3, 4, 3)])
@BOTH_DTYPES
def test_a_step_is_pure_and_evaluates_once(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    step, calls = KERNELS[name].step, []

    def counted(u: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(u)
        return ROUGH(u)

    state = init_state(counted, normal(shape, 5, dtype))
    kept = [part.clone() for part in state]
    calls.clear()
    new, _ = step(counted, state, 0.7, seeded(6))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
    assert (new.u.shape, new.f.shape, new.grad.shape) == (shape, shape[:-1], shape)
    assert new.u.dtype == new.f.dtype == new.grad.dtype == dtype
    assert (new.u != state.u).any()


@every
def test_the_state_carries_the_energy_of_its_positions(name: str) -> None:
    state, generator = init_state(ROUGH, normal((40, 3), 7)), seeded(8)
    for _ in range(3):
        state, _ = KERNELS[name].step(ROUGH, state, 0.7, generator)
    for kept, expected in zip(state, init_state(ROUGH, state.u), strict=True):
        torch.testing.assert_close(kept, expected)


@every
def test_the_generator_fixes_a_step(name: str) -> None:
    state = init_state(ROUGH, normal((40, 3), 7))
    first, again, other = (KERNELS[name].step(ROUGH, state, 0.7, seeded(s))[0] for s in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.u, other.u)


@pytest.mark.parametrize("name", [n for n in KERNELS if n != "independent proposals"])
@BOTH_DTYPES
def test_acceptance_is_a_probability(name: str, dtype: torch.dtype) -> None:
    """Of every chain, or one for all; independent proposals do not report theirs."""
    state, generator = init_state(ROUGH, 2.0 * normal((6, 50, 3), 9, dtype)), seeded(10)
    for _ in range(3):
        state, acceptance = KERNELS[name].step(ROUGH, state, 1.0, generator)
        assert acceptance is not None
        assert acceptance.dtype == dtype and acceptance.shape in ((), state.f.shape)
        assert ((acceptance >= 0.0) & (acceptance <= 1.0)).all()


def walled(value: float) -> ValueAndGrad:
    """½ |u|² for u_0 ≤ 0 and `value`, with a NaN gradient, beyond."""

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        outside = u[..., 0] > 0.0
        f = torch.where(outside, value, 0.5 * u.square().sum(-1))
        return f, torch.where(outside[..., None], math.nan, u)

    return evaluate


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_proposals_without_an_energy_are_refused(name: str, value: float) -> None:
    """By kernels with a test. Others go there, so their users check f (`check_finite`)."""
    entry, f = KERNELS[name], walled(value)
    start = init_state(f, -normal((2000, 3), 11).abs())
    state, acceptance = entry.step(f, start, 0.5, seeded(12))
    outside = ~state.f.isfinite()
    assert acceptance is None or acceptance.isfinite().all()
    assert entry.has_test != bool(outside.any())
    generator = seeded(13)
    for _ in range(5 if entry.has_test else 0):
        state, _ = entry.step(f, state, 0.5, generator)
        assert (state.u[:, 0] <= 0.0).all()
        assert all(part.isfinite().all() for part in state)
    if acceptance is not None and acceptance.dim() and not entry.has_test:
        assert not acceptance[outside].any()
