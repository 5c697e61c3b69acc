# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import assert_unchanged, make_neural, make_quadratic
from torch import Tensor, nn

from pyro_lvebm import LVEBM, Dissipativity, TemperedPool, TrainingWarning, check_dissipativity

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Radial(nn.Module):
    """A function of the distance from the mean of the bases of `user_ebm`, in data coordinates."""

    def __init__(self, of_square: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.of_square = of_square

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.of_square(((x - 5.0) / 2.0).square().sum((-2, -1)) + z.square().sum(-1))


def user_ebm(energy: nn.Module, dtype: torch.dtype = torch.float64) -> LVEBM:
    """x (1, 2) about 5 with standard deviation 2, z (1,) standard; what warns when built may."""
    base_x = dist.Normal(torch.full((1, 2), 5.0, dtype=dtype), 2.0).to_event(2)
    base_z = dist.Normal(torch.zeros(1, dtype=dtype), 1.0).to_event(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        return LVEBM(energy, base_x, base_z, TemperedPool(2, 4))


def quietly(ebm: LVEBM, **options: Any) -> Dissipativity:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        return check_dissipativity(ebm, **options)


# --- energies that are dissipative ------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_quadratic_energy_has_its_extreme_eigenvalues(seed: int) -> None:
    """a is the smallest of P, and the Lipschitz constant of ∇f the largest |P − 1|."""
    ebm = make_quadratic()
    with torch.no_grad():
        ebm.f.linear.zero_()
    eigenvalues = torch.linalg.eigvalsh(ebm.f.precision.detach())
    result = check_dissipativity(ebm, num_rays=32, num_radii=5, seed=seed)
    assert result.a == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert result.b == pytest.approx(0.0, abs=1e-6)
    lipschitz = float((eigenvalues - 1.0).abs().max())
    assert lipschitz * 0.95 < result.lipschitz < lipschitz * (1.0 + 1e-6)
    assert result.frame["a"].to_numpy() == pytest.approx(result.a, rel=1e-6)
    assert result.is_dissipative and result.is_smooth and len(result.offending_x) == 0


class Stays:
    """What `minimize` would return if it went nowhere."""

    def __init__(self, x: Any) -> None:
        self.x = x


def test_random_rays_alone_would_miss_the_smallest_eigenvalue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scipy.optimize.minimize", lambda _, x, **__: Stays(x))
    ebm = make_quadratic()
    smallest = float(torch.linalg.eigvalsh(ebm.f.precision.detach())[0])
    assert check_dissipativity(ebm, num_rays=32).a > 1.02 * smallest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inequality_holds_at_fresh_points(dtype: torch.dtype) -> None:
    """With a linear term too, ½ a |u|² − b is below ⟨∇E(u), u⟩ nearly everywhere.

    b comes from probes, so a few fresh points may lie lower, by a little.
    """
    ebm = make_quadratic(dtype=dtype)
    result = check_dissipativity(ebm, max_radius=1e3, num_radii=13)
    u = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    u = u * torch.logspace(-1, 2, 2000).to(dtype)[:, None]
    outward = ((u + ebm.residual_and_grad(u)[1]) * u).sum(-1)
    bound = 0.5 * result.a * u.square().sum(-1)
    assert result.b > 0.0
    assert (outward < bound - 1.1 * result.b).double().mean() < 0.005
    assert (outward < bound).any()  # without b it fails


@pytest.mark.parametrize("x_dim", [1, 2])
def test_networks_pass(x_dim: int) -> None:
    """f is Lipschitz, so that a tends to 1."""
    result = check_dissipativity(make_neural(x_dim, 1, full=x_dim > 1))
    assert result.is_dissipative and result.is_smooth
    assert 0.95 < result.a <= 1.0 + 1e-3
    assert "no probe up to radius 10000 contradicts" in str(result)


def test_an_untrained_model_is_its_base() -> None:
    result = check_dissipativity(user_ebm(Radial(lambda s: 0.0 * s)), num_radii=3)
    assert (result.a, result.b, result.lipschitz) == (pytest.approx(1.0), 0.0, 0.0)


def test_a_quartic_is_dissipative_but_not_smooth() -> None:
    result = check_dissipativity(user_ebm(Radial(lambda s: 0.1 * s.square())))
    assert result.is_dissipative and not result.is_smooth
    assert "grows with the radius: keep to MALA" in result.verdict


# --- energies that are not --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("of_square", "radius"),
    [
        (lambda s: -1e-6 * s.square(), 500.0),  # ⟨∇E, u⟩ = |u|² − 4e-6 |u|⁴
        (lambda s: -0.6 * s, 1.0),
        (lambda s: -1e-3 * s**1.5, 333.4),
    ],
)
def test_energies_that_fall_outwards_are_caught(
    of_square: Callable[[Tensor], Tensor], radius: float, dtype: torch.dtype
) -> None:
    """The points named are just beyond the radius from where on the energy falls."""
    ebm = user_ebm(Radial(of_square), dtype)
    with pytest.warns(TrainingWarning, match="not dissipative.*Make f bounded or Lipschitz"):
        result = check_dissipativity(ebm)
    assert not result.is_dissipative and result.a < 0.0 and result.b != result.b
    assert 1 <= len(result.offending_x) <= 5
    u = ebm.whiten(result.offending_x, result.offending_z)
    ratio = 10.0 ** (4.0 / 12.0)
    distance = u.norm(dim=-1)
    assert (distance >= 0.999 * radius).all() and (distance <= 1.001 * radius * ratio).all()
    assert result.offending_x.shape[1:] == (1, 2) and result.offending_z.shape[1:] == (1,)
    assert f"{float(result.offending_x[0, 0, 0]):.3g}" in result.verdict


class Cone(nn.Module):
    """Falls within 27 degrees of the first axis of x: ⟨∇E, u⟩ = (1 − 6 cos¹⁶) |u|² far out."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        u = torch.cat([(x[..., 0, :] - 5.0) / 2.0, z], -1)
        cosine = u[..., 0].clamp(min=0.0) / (1.0 + u.square().sum(-1)).sqrt()
        return -3.0 * u.square().sum(-1) * cosine**16


def test_a_narrow_cone_is_found_by_turning_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of 8 rays meets it, and without L-BFGS it is missed."""
    result = quietly(user_ebm(Cone()), num_rays=8)
    assert not result.is_dissipative and result.a == pytest.approx(-5.0, abs=1e-3)
    assert (result.offending_x[:, 0, 0] > 5.0).all()
    monkeypatch.setattr("scipy.optimize.minimize", lambda _, x, **__: Stays(x))
    assert quietly(user_ebm(Cone()), num_rays=8).is_dissipative


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    result = quietly(user_ebm(Radial(lambda s: torch.where(s > 100.0, value, 0.1 * s))))
    u = user_ebm(Radial(lambda s: 0.0 * s)).whiten(result.offending_x, result.offending_z)
    assert not result.is_dissipative
    assert (u.norm(dim=-1) >= 10.0 - 1e-6).all() and u.norm(dim=-1).min() < 25.0


# --- the rest ---------------------------------------------------------------------------------


def test_nothing_moves_and_the_seed_decides() -> None:
    ebm = make_neural(1, 1)
    with assert_unchanged(ebm):
        a, b, c = (check_dissipativity(ebm, num_radii=4, seed=seed) for seed in (1, 1, 2))
    assert a.frame.equals(b.frame) and not a.frame.equals(c.frame)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_radius": 1.0}, "max_radius must exceed 1; got 1.0"),
        ({"num_radii": 1}, "num_radii must be at least 2; got 1"),
        ({"num_rays": 0}, "num_rays must be at least 1; got 0"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dissipativity(user_ebm(Radial(lambda s: 0.0 * s)), **options)
