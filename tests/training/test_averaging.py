# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from referee import ALPHA, CERTAIN, normal, variance_p_value
from torch import Tensor, nn

from pyro_lvebm.training.averaging import ParameterAverage, assign

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def run(average: ParameterAverage, values: Tensor) -> Tensor:
    """The average after a parameter has taken these values (t, *shape) in turn."""
    theta = nn.Parameter(torch.zeros_like(values[0]))
    for value in values:
        with torch.no_grad():
            theta.copy_(value)
        average.update([theta])
    return average.values[theta]


# --- the formula ----------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_the_average_is_the_recursion(decay: float, shape: tuple[int, ...]) -> None:
    """In numpy, from the first value on, over enough steps for `decay` to take over."""
    values = normal((60, *shape), 1)
    expected = values[0].numpy()
    for t in range(1, 60):
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * values[t].numpy()
    np.testing.assert_allclose(run(ParameterAverage(decay), values).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("t", [1, 5, 40])
def test_first_values_are_soon_forgotten(t: int) -> None:
    """Below `decay`, the weight of the first of t + 1 values is (t + 1)! 10! / (t + 10)!."""
    values = torch.zeros(t + 1, dtype=torch.float64)
    values[0] = 1.0
    weight = math.factorial(t + 1) * math.factorial(10) / math.factorial(t + 10)
    average = run(ParameterAverage(1.0 - 1e-12), values)
    assert float(average) == pytest.approx(weight, rel=1e-9)


def test_after_many_steps_the_decay_is_that_asked_for() -> None:
    """A jump at the end, long after the start, keeps the weights d^k exactly."""
    values = torch.zeros(120, dtype=torch.float64)
    values[-8:] = 1.0
    assert float(run(ParameterAverage(0.8), values)) == pytest.approx(1.0 - 0.8**8, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_is_its_own_average(dtype: torch.dtype) -> None:
    value = normal((5,), 2, dtype)
    average = run(ParameterAverage(0.97), value.expand(300, 5))
    assert average.dtype == dtype and torch.equal(average, value)


def variance_check(decay_in_truth: float) -> float:
    """p-value of var θ̄ = (1 − d) / (1 + d) for θ of unit variance, with d = 0.9."""
    average = run(ParameterAverage(decay_in_truth), normal((250, 4000), 3))
    return variance_p_value(average, (1 - 0.9) / (1 + 0.9))


def test_noise_shrinks_by_the_factor_of_an_exponential_average() -> None:
    """4,000 parameters that jump about zero; false alarm 1e-3."""
    assert variance_check(0.9) > ALPHA


def test_the_check_fails_for_another_decay() -> None:
    assert variance_check(0.85) < CERTAIN


def test_the_average_is_closer_to_an_optimum_than_the_parameter() -> None:
    """Noisy gradient steps on ½ θ²: averages lie eight times closer in mean square, at least."""
    theta, average = nn.Parameter(torch.zeros(500).double()), ParameterAverage(0.98)
    for t in range(400):
        with torch.no_grad():
            theta -= 0.5 * (theta + normal((500,), 1000 + t))
        average.update([theta])
    raw, averaged = theta.detach().square().mean(), average.values[theta].square().mean()
    assert averaged < raw / 8


# --- parameters -----------------------------------------------------------------------------


def test_a_parameter_that_comes_late_starts_at_its_own_value() -> None:
    a, b = torch.zeros(2), torch.tensor([5.0, -5.0])
    average = ParameterAverage(0.9)
    for _ in range(30):
        average.update([a])
    average.update([a, b])
    assert torch.equal(average.values[b], b) and average.count == 31


def test_parameters_are_told_apart_by_identity() -> None:
    a, b = torch.zeros(3), torch.zeros(3)
    average = ParameterAverage(0.0)
    average.update([a, b])
    b.fill_(2.0)
    average.update([a, b])
    assert len(average.values) == 2
    assert torch.equal(average.values[a], torch.zeros(3)) and torch.equal(average.values[b], b)


def test_averages_are_values_of_their_own() -> None:
    theta, average = nn.Parameter(torch.ones(3)), ParameterAverage(0.5)
    average.update([theta])
    with torch.no_grad():
        theta.fill_(9.0)
    assert torch.equal(average.values[theta], torch.ones(3))
    assert not average.values[theta].requires_grad
    copy = average.copy()
    average.update([theta])
    assert torch.equal(copy[theta], torch.ones(3)) and average.values[theta][0] > 1.0
    copy[theta].fill_(-1.0)
    assert average.values[theta][0] > 1.0


# --- swapping -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_parameters_come_back_bit_for_bit(error: type[BaseException] | None) -> None:
    params = [nn.Parameter(normal(shape, k, torch.float32)) for k, shape in enumerate([(3, 2), ()])]
    average = ParameterAverage(0.4)
    average.update(params)
    with torch.no_grad():
        for p in params:
            p.mul_(1.7)
    average.update(params)
    own = [p.detach().clone() for p in params]
    sum(p.square().sum() for p in params).backward()
    grads = [p.grad for p in params]
    try:
        with average.swapped_in():
            for p, value in zip(params, own, strict=True):
                assert torch.equal(p, average.values[p]) and not torch.equal(p, value)
                assert p.requires_grad and p.is_leaf
            with torch.no_grad():
                params[0].add_(7.0)  # is lost with the block
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    for p, value, grad in zip(params, own, grads, strict=True):
        assert torch.equal(p, value) and p.grad is grad
    assert not any(torch.equal(average.values[p], p) for p in params)


def test_blocks_may_be_nested() -> None:
    theta, average = torch.tensor(1.0), ParameterAverage(0.5)
    average.update([theta])
    theta.fill_(3.0)
    with average.swapped_in(), average.swapped_in():
        assert theta == 1.0
    assert theta == 3.0


def test_without_an_update_nothing_is_swapped() -> None:
    with ParameterAverage(0.3).swapped_in():
        pass


def test_assign_writes_in_place() -> None:
    theta = nn.Parameter(torch.zeros(2))
    value = torch.tensor([1.0, 2.0])
    assign({theta: value})
    assert theta.tolist() == [1.0, 2.0] and theta.is_leaf
    value.zero_()
    assert theta.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("decay", [1.0, -0.01, 2.0, math.nan, math.inf])
def test_impossible_decays_are_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay must be in \[0, 1\); got {decay}"):
        ParameterAverage(decay)
