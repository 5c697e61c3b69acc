# SPDX-License-Identifier: Apache-2.0
"""The interacting particle Langevin algorithm as an optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, PyroOptim
from referee import ALPHA, CERTAIN, ks_p_value, normal
from scipy import stats
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle, ipla
from pyro_lvebm.training.ipla import NoisySGD

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

LR, NUM_PARTICLES = 0.03, 5


def shared_stream(lr: float, num_particles: int, seed: int = 0) -> PyroOptim:
    """Broken: one seed for all parameters."""
    return PyroOptim(NoisySGD, {"lr": lr, "num_particles": num_particles, "seed": seed})


def noise(make: Callable[..., PyroOptim], num_steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What is added to the gradient step for two parameters of one shape, (num_steps, 500) each."""
    pyro.clear_param_store()
    optim = make(LR, NUM_PARTICLES, seed=seed)
    params = []
    for name in ("a", "b"):
        pyro.param(name, torch.zeros(500, dtype=torch.float64))
        params.append(pyro.get_param_store()._params[name])
    added: list[list[Tensor]] = [[], []]
    for t in range(num_steps):
        for i, p in enumerate(params):
            p.grad = normal((500,), 10 * t + i)
            before = p.detach().clone()
            optim([p])
            added[i].append(p.detach() - before + LR * p.grad)
    return torch.stack(added[0]), torch.stack(added[1])


def law_p_value(std: float) -> float:
    a, b = noise(ipla, 4)
    return ks_p_value(torch.stack([a, b]), stats.norm(scale=std).cdf)


def test_a_step_is_gradient_descent_with_the_noise_of_the_algorithm() -> None:
    """Kolmogorov's test of √(2γ/N) ξ; false-alarm rate ALPHA."""
    assert law_p_value(math.sqrt(2.0 * LR / NUM_PARTICLES)) > ALPHA


@pytest.mark.parametrize("wrong", [2.0 * LR, LR / NUM_PARTICLES])
def test_the_check_fails_for_another_variance(wrong: float) -> None:
    assert law_p_value(math.sqrt(wrong)) < CERTAIN


def independence_p_value(make: Callable[..., PyroOptim]) -> float:
    """Correlations between parameters and between steps, with Bonferroni's correction."""
    a, b = noise(make, 4)
    rows = torch.cat([a, b]).numpy()
    p = [
        0.0 if (rows[i] == rows[j]).all() else float(stats.pearsonr(rows[i], rows[j]).pvalue)
        for i in range(8)
        for j in range(i)
    ]
    return min(1.0, len(p) * min(p))


def test_parameters_and_steps_have_noise_of_their_own() -> None:
    """False-alarm rate ALPHA."""
    assert independence_p_value(ipla) > ALPHA


def test_the_check_fails_for_one_stream_for_all_parameters() -> None:
    assert independence_p_value(shared_stream) < CERTAIN


def test_the_seed_fixes_the_noise() -> None:
    (a, b), (c, d), (other, _) = noise(ipla, 2), noise(ipla, 2), noise(ipla, 2, seed=1)
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, other)


def test_as_a_torch_optimiser() -> None:
    """Parameters of one optimiser have streams of their own; without a gradient none moves."""
    params = [torch.zeros(3, requires_grad=True) for _ in range(3)]
    optim = NoisySGD(params, lr=LR, num_particles=NUM_PARTICLES, seed=0)

    def loss() -> float:
        optim.zero_grad()
        value = (params[0] + params[1]).sum()
        value.backward()
        return float(value.detach())

    assert optim.step(loss) == 0.0
    assert not torch.equal(params[0], params[1])
    assert torch.equal(params[2], torch.zeros(3)) and optim.step() is None


@pytest.mark.parametrize(
    ("lr", "num_particles", "message"),
    [
        (0.0, 1, "lr must be positive and finite"),
        (math.nan, 1, "lr must be positive and finite"),
        (math.inf, 1, "lr must be positive and finite"),
        (0.1, 0, "num_particles must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(lr: float, num_particles: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ipla(lr, num_particles)


# --- checkpoints ----------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[], PyroOptim]] = {
    "noise": lambda: ipla(0.01, 3, seed=4),
    "momentum": lambda: SGD({"lr": 0.01, "momentum": 0.9}),
}


def model(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def steps(saddle: Saddle, y: Tensor) -> list[object]:
    losses = [saddle.step(y) for _ in range(3)]
    values = [pyro.param(name).tolist() for name in ("loc", "scale")]
    return [losses, values, saddle.particles.particles("z").tolist()]


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_a_loaded_run_goes_on_bit_for_bit(optim: str, tmp_path: Path) -> None:
    """For a model without an LVEBM; a new optimiser starts with another state and fails."""
    y = normal((6,), 0, torch.float32)
    saddle = Saddle(model, AutoParticles(model, 3), OPTIMISERS[optim](), num_moves=2)
    for _ in range(3):
        saddle.step(y)
    saddle.save(tmp_path / "run")
    expected = steps(saddle, y)
    for forget in (False, True):
        pyro.clear_param_store()
        guide = AutoParticles(model, 3)
        again = Saddle.load(tmp_path / "run", model, guide, OPTIMISERS[optim](), y)
        if forget:
            again.optim = OPTIMISERS[optim]()
        assert (steps(again, y) == expected) != forget


def test_the_noise_that_was_saved_goes_on_under_another_seed(tmp_path: Path) -> None:
    """As other settings of an optimiser do, the seed comes from the file."""
    y = normal((6,), 0, torch.float32)
    saddle = Saddle(model, AutoParticles(model, 3), ipla(0.01, 3, seed=4), num_moves=2)
    saddle.step(y)
    saddle.save(tmp_path / "run")
    expected = steps(saddle, y)
    pyro.clear_param_store()
    optim = ipla(0.5, 7, seed=5)
    again = Saddle.load(tmp_path / "run", model, AutoParticles(model, 3), optim, y)
    assert steps(again, y) == expected
