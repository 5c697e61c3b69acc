# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import MODULES, Recipe, available, held_out_nll, log_partition, run_peer

SMALL = Recipe(chains=32, num_moves=4, step_size=0.01, energy_penalty=0.001, buffer=64)
LOG_2PI = math.log(2 * math.pi)


def gaussian_energy(dim: int) -> tuple[Any, np.ndarray, np.ndarray]:
    """½ (u − m)ᵀ S⁻¹ (u − m), with m and S."""
    rng = np.random.default_rng(dim)
    mean, root = 0.3 * rng.normal(size=dim), 0.2 * rng.normal(size=(dim, dim)) + 0.5 * np.eye(dim)
    cov = root @ root.T
    m, precision = torch.tensor(mean), torch.tensor(np.linalg.inv(cov))

    def energy(u: Tensor) -> Tensor:
        return 0.5 * ((u - m) @ precision * (u - m)).sum(-1)

    return energy, mean, cov


def exact_log_z(cov: np.ndarray) -> float:
    return float(0.5 * (len(cov) * LOG_2PI + np.linalg.slogdet(cov)[1]))


def table(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 3.0 + rng.normal(size=(rows, dim)) * np.arange(1, dim + 1) * 0.2


class StandardNormal(nn.Module):
    """A 'trained' network whose density is known: E = shift + ½ |u|²."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, u: Tensor) -> Tensor:
        return self.shift + 0.5 * (u * u).sum(-1)


@pytest.fixture
def fake_peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let an installed package that is no peer stand for one, with weights of the test's choice."""

    def install(shift: float) -> str:
        def trainer(u: Tensor, recipe: Recipe, updates: int) -> tuple[nn.Module, float]:
            torch.randn(3)
            return StandardNormal(shift), 0.5

        monkeypatch.setattr(peers, "MODULES", {"numpy": "numpy"})
        monkeypatch.setattr(peers, "_TRAINERS", {"numpy": trainer})
        return "numpy"

    return install


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_quadrature_of_a_gaussian(dim: int) -> None:
    energy, _, cov = gaussian_energy(dim)
    result = log_partition(energy, dim)
    assert result.value == pytest.approx(exact_log_z(cov), abs=1e-6)
    assert result.note == ""
    assert "midpoint" in result.method


def test_shells_add_what_lies_outside_the_box() -> None:
    # ∫ exp(−0.2 |u|) du = 10 on each axis; the box of ±6 holds half of the mass.
    result = log_partition(lambda u: 0.2 * u.abs().sum(-1), 2)
    assert result.value == pytest.approx(math.log(100), abs=2e-3)
    assert result.note == ""


def test_energy_that_falls_is_normalised_on_the_box() -> None:
    result = log_partition(lambda u: u[:, 0], 2)
    assert result.value == pytest.approx(math.log(2 * math.sinh(6) * 12), abs=1e-4)
    assert "not normalisable on R^2" in result.note
    assert "±6" in result.note


def test_energy_that_rises_slowly_is_normalised_on_the_box() -> None:
    result = log_partition(lambda u: 0.01 * u.abs().sum(-1), 1)
    assert result.value == pytest.approx(math.log(200 * (1 - math.exp(-0.06))), abs=1e-4)
    assert "mass beyond" in result.note


def test_grid_that_is_too_coarse_is_reported() -> None:
    # A well much narrower than a cell, on a node of one grid and not of the other.
    node = 6 / 4096
    result = log_partition(lambda u: 5e9 * ((u - node) ** 2).sum(-1), 1)
    assert "half as many nodes" in result.note


def test_annealing_beyond_three_dimensions(global_rng_untouched: None) -> None:
    energy, _, cov = gaussian_energy(5)
    result = log_partition(energy, 5, seed=1)
    assert result.value == pytest.approx(exact_log_z(cov), abs=0.1)
    assert "annealing" in result.method
    assert "low in expectation" in result.note
    assert "not normalisable" not in result.note


def test_density_is_of_the_rows_as_given() -> None:
    energy, mean, cov = gaussian_energy(2)
    scale, shift = np.array([3.0, 0.1]), np.array([-5.0, 2.0])
    x = np.random.default_rng(0).normal(size=(50, 2)) * scale + shift
    u = torch.tensor((x - shift) / scale)
    nll, std_error = held_out_nll(energy, u, exact_log_z(cov), scale)
    law = stats.multivariate_normal(shift + scale * mean, cov * np.outer(scale, scale))
    log_p = law.logpdf(x)
    assert nll == pytest.approx(-log_p.mean())
    assert std_error == pytest.approx(log_p.std(ddof=1) / math.sqrt(50))


def test_run_counts_the_jacobian_and_leaves_the_generator(
    fake_peer: Any, global_rng_untouched: None
) -> None:
    train, test = table(400, 2), table(100, 2, seed=1)
    result = run_peer(fake_peer(7.0), train, test, gradient_evaluations=1000, seed=0, recipe=SMALL)
    expected = stats.norm(train.mean(0), train.std(0)).logpdf(test).sum(1)
    assert result.nll == pytest.approx(-expected.mean(), abs=1e-6)
    assert result.log_partition == pytest.approx(LOG_2PI - 7.0, abs=1e-6)
    assert not result.diverged
    assert result.gradient_evaluations == 7 * 32 * 4
    assert (result.peer, result.version) == ("numpy", np.__version__)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_divergence_is_reported(fake_peer: Any, weight: float) -> None:
    train, test = table(400, 2), table(100, 2, seed=1)
    result = run_peer(
        fake_peer(weight), train, test, gradient_evaluations=1000, seed=0, recipe=SMALL
    )
    assert result.diverged
    assert "diverged" in result.note


def test_budget() -> None:
    recipe = Recipe(10, 5, 0.1, 0.0, buffer=20, warm_up=3)
    assert recipe.updates(60 + 50 * 4 + 49) == 4
    assert recipe.cost(4) == 260
    with pytest.raises(ValueError, match="needs 110"):
        recipe.updates(109)


def test_available_names_are_known() -> None:
    assert set(available()) <= set(MODULES)


def test_unknown_peer() -> None:
    with pytest.raises(ValueError, match="'nothing' is not installed"):
        run_peer("nothing", table(9, 1), table(9, 1), gradient_evaluations=1, seed=0)


@pytest.mark.parametrize("name", MODULES)
def test_peer_trains_within_its_budget(
    name: str, monkeypatch: pytest.MonkeyPatch, global_rng_untouched: None
) -> None:
    if name not in available():
        pytest.skip(f"{name} is not installed")
    pytest.importorskip(MODULES[name])
    points = 0
    autograd_grad = torch.autograd.grad

    def counting(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal points
        points += len(inputs)
        return autograd_grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    warm_up = 2 if name == "torchebm" else 0
    recipe = Recipe(32, 4, 0.01, 0.001, buffer=64, warm_up=warm_up)
    train, test = table(200, 1), table(100, 1, seed=1)
    precision = torch.get_float32_matmul_precision()

    results = [
        run_peer(name, train, test, gradient_evaluations=6000, seed=seed, recipe=recipe)
        for seed in (0, 0, 1)
    ]

    assert points == sum(r.gradient_evaluations for r in results)
    assert 6000 - 32 * 4 < results[0].gradient_evaluations <= 6000
    assert math.isfinite(results[0].nll) and math.isfinite(results[0].std_error)
    assert results[0].seconds > 0
    assert results[0].nll == results[1].nll != results[2].nll
    assert torch.get_float32_matmul_precision() == precision
