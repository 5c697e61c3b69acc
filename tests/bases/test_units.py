# SPDX-License-Identifier: Apache-2.0
"""Densities follow the units of data: log p(c x) is log p(x) less log c, at any scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_lvebm import (
    LVEBM,
    MixtureBase,
    MLPEnergy,
    QuadraticEnergy,
    TemperedPool,
    disentanglement,
    log_evidence,
)
from pyro_lvebm.bases import GaussianBase, Support
from pyro_lvebm.bases.units import invert_tril, moments, power_of_two, unit_rows
from pyro_lvebm.cli.baselines import evaluate_baselines
from pyro_lvebm.evidence import LogPartition

SCALES = [1e-300, 1e-13, 1e300]

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
X[:, 1] += 0.5 * X[:, 0]
HOLES = X.clone()
HOLES[::7, 0] = torch.nan
HOLES[3::7, 1] = torch.nan
MIXED = torch.tensor([1e-200, 1e200], dtype=torch.float64)  # each column in a unit of its own

KNOWN = LogPartition(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2, 2, 1.0)


def log_units(unit: Any) -> float:
    return float(torch.as_tensor(unit, dtype=torch.float64).log().expand(2).sum())


def small(x: Tensor, **options: Any) -> LVEBM:
    energy = options.pop("energy", None)
    energy = MLPEnergy(2, 1, hidden=(4,)) if energy is None else energy
    pool = options.pop("pool", TemperedPool(2, 4))
    return LVEBM.from_data(energy, x, z_dim=1, pool=pool, **options)


@pytest.mark.parametrize("unit", [*SCALES, MIXED], ids=str)
@pytest.mark.parametrize("rows", [X, HOLES], ids=["complete", "incomplete"])
@pytest.mark.parametrize("base", ["gaussian", "mixture"])
def test_evidence_follows_the_unit(unit: Any, rows: Tensor, base: Any) -> None:
    """Untrained, f is 0, and log p(x) is that of the base, integrated over what is missing."""
    plain, scaled = small(rows, base=base), small(rows * unit, base=base)
    known: dict[str, Any] = {"log_z": KNOWN, "num_particles": 4, "num_runs": 2}
    expected = log_evidence(plain, rows[:8], **known).value
    found = log_evidence(scaled, rows[:8] * unit, **known).value
    observed = ~rows[:8].isnan()
    shift = torch.where(observed, torch.as_tensor(unit, dtype=torch.float64).log(), 0.0).sum(-1)
    torch.testing.assert_close(found + shift, expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("unit", [1e-36, 1e-20, 1e30])
def test_single_precision_as_far_as_it_goes(unit: float) -> None:
    rows = X.float()
    plain, scaled = small(rows), small(rows * unit)
    shift = log_units(unit)
    expected = plain.base_x.log_prob(rows)
    found = scaled.base_x.log_prob(rows * unit)
    torch.testing.assert_close(found + shift, expected, rtol=0.0, atol=1e-4)
    u = torch.linspace(-1, 1, 9).reshape(3, 3)
    torch.testing.assert_close(scaled.f.linear, plain.f.linear)  # type: ignore[arg-type]
    assert scaled.residual(u).isfinite().all()


def test_beyond_single_precision_is_said() -> None:
    with pytest.raises(ValueError, match=r"columns \[0, 1\] of x vary by less than torch.float32"):
        small(X.float() * 1e-41)
    with pytest.raises(ValueError, match=r"no inverse in torch\.float32"):
        GaussianBase(torch.zeros(1), torch.full((1,), 1e-40))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-200, -3e8])
def test_constant_columns_are_still_found(value: float) -> None:
    rows = torch.cat([X, torch.full((60, 1), value, dtype=torch.float64)], 1)
    with pytest.raises(ValueError, match=r"columns \[2\] of x are constant"):
        GaussianBase.fit(rows)
    rows[1, 2] *= 1.0 + 2e-16  # but for rounding
    assert moments(rows).constant.tolist() == [False, False, True]


def test_bounded_support() -> None:
    """log x only moves; and an interval of any width is the interval (0, 1) in another unit."""
    for unit in (1e-250, 1e250):
        base = GaussianBase.fit(X.exp(), Support(constraints.positive, torch.Size([2])))
        rows = X.exp() * unit
        scaled = GaussianBase.fit(rows, Support(constraints.positive, torch.Size([2])))
        shift = log_units(unit)
        expected = base.log_prob(X.exp())
        torch.testing.assert_close(scaled.log_prob(rows) + shift, expected, rtol=0, atol=1e-9)
        share = X.sigmoid()
        base = GaussianBase.fit(share, Support(constraints.unit_interval, torch.Size([2])))
        support = Support(constraints.interval(0.0, unit), torch.Size([2]))
        scaled = GaussianBase.fit(share * unit, support)
        expected = base.log_prob(share)
        torch.testing.assert_close(
            scaled.log_prob(share * unit) + shift, expected, rtol=0, atol=1e-9
        )


def test_wrong_transforms_are_refused_in_any_unit() -> None:
    """Values of 1e-13 are all near each other, if nearness is absolute."""
    normal = dist.Normal(torch.full((1,), -30.0).double(), 1.0)
    twice = dist.transforms.AffineTransform(0.0, 2.0)
    wrong = dist.TransformedDistribution(normal, [twice, dist.transforms.ExpTransform()])
    with pytest.raises(ValueError, match="its transform is not the one"):
        GaussianBase.from_bounded(wrong.to_event(1), "base_x")


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_bases_that_users_give(unit: float) -> None:
    loc = torch.zeros(2, dtype=torch.float64)
    base = GaussianBase.from_distribution(dist.Normal(loc, unit).to_event(1), "base_x")
    torch.testing.assert_close(base.log_prob(X * unit) + log_units(unit), -log_density(X))
    tril = torch.tensor([[1.0, 0.0], [0.5, 2.0]]).double()
    plain, scaled = (QuadraticEnergy(2, 2).double() for _ in range(2))
    for energy, size in ((plain, 1.0), (scaled, unit)):
        base_z = dist.MultivariateNormal(loc, scale_tril=size * tril)
        LVEBM(energy, dist.Normal(loc, size).to_event(1), base_z)
        energy.set_precision(torch.eye(4).double() + 0.3)
    expected, found = plain.posterior(X), scaled.posterior(X * unit)
    torch.testing.assert_close(found.mean / unit, expected.mean)
    torch.testing.assert_close(found.scale_tril / unit, expected.scale_tril)
    torch.testing.assert_close(scaled.mean_field_gap(), plain.mean_field_gap())


def log_density(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(-1) + math.log(2 * math.pi)


@pytest.mark.parametrize("unit", [1e-200, 1e-13, 1e200])
def test_contexts(unit: float) -> None:
    from pyro_lvebm import ContextPool

    def build(context: Tensor) -> LVEBM:
        energy = MLPEnergy(2, 1, hidden=(4,), context_dim=2)
        return small(X, energy=energy, context=context, pool=ContextPool(2, 8))

    plain, scaled = build(X), build(X * unit)
    for ebm in (plain, scaled):
        torch.nn.init.ones_(ebm.f.out.weight)  # type: ignore[union-attr,arg-type]
    u = torch.zeros(60, 3, dtype=torch.float64)
    torch.testing.assert_close(scaled.residual(u, X * unit), plain.residual(u, X))
    constant = torch.full((60, 2), 0.1, dtype=torch.float64) * unit
    with pytest.raises(ValueError, match=r"columns \[0, 1\] of the contexts are constant"):
        build(constant)


@pytest.mark.parametrize("unit", [1e-250, 1e-13, 1e250])
def test_baselines(unit: float) -> None:
    train, test = X[:50].numpy(), X[50:].numpy()
    plain = evaluate_baselines(train, test, seed=0).set_index("baseline")
    scaled = evaluate_baselines(train * unit, test * unit, seed=0).set_index("baseline")
    found = scaled["log_evidence"] + log_units(unit)
    np.testing.assert_allclose(found[plain.index], plain["log_evidence"], atol=1e-6)
    np.testing.assert_allclose(scaled["std_error"][plain.index], plain["std_error"], rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-200])
def test_disentanglement(unit: float) -> None:
    """Forests have absolute thresholds on what they split."""
    factors = X.numpy()
    latents = factors @ np.array([[1.0, 0.2], [0.1, 1.0]])
    plain = disentanglement(latents, factors, num_folds=3).scores
    scaled = disentanglement(latents * unit, factors / unit, num_folds=3).scores
    np.testing.assert_allclose(scaled["value"], plain["value"], atol=5e-3)
    assert plain["value"]["informativeness"] > 0.3


def test_mixture_has_its_modes_in_any_unit() -> None:
    rows = X.clone()
    rows[:20] += 12.0
    plain = MixtureBase.fit(rows)
    for unit in (1e-250,):
        base = MixtureBase.fit(rows * unit)
        assert base.num_components == plain.num_components > 1
        found = base.distribution().log_prob(rows * unit) + log_units(unit)
        torch.testing.assert_close(found, plain.log_prob(rows), rtol=0.0, atol=1e-8)


def test_powers_of_two_are_exact() -> None:
    x = torch.tensor([5e-324, 1e-310, 1e-30, -3.0, 1.7e308, 0.0, torch.inf], dtype=torch.float64)
    power = power_of_two(x)
    assert (torch.frexp(power)[0] == 0.5).all()
    assert power.isfinite().all() and (1.0 / power).isfinite().all()
    assert power.tolist()[3] == 2.0
    tril = torch.tensor([[1e-300, 0.0], [1e300, 1e300]], dtype=torch.float64)
    inverse = invert_tril(tril)
    torch.testing.assert_close(
        inverse * tril.diagonal()[None], torch.tensor([[1.0, 0], [-1, 1]]).double()
    )
    torch.testing.assert_close(unit_rows(tril).norm(dim=1), torch.ones(2).double())
