# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from referee import normal
from small_models import quadratic_ebm, same, snapshot, warm
from torch import Tensor, nn

from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool
from pyro_lvebm.training.trust_region import (
    TrustRegion,
    bounded_step,
    default_radius,
    lengthening,
    restore,
    scale_update,
    shrink_to_trust_region,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def pair(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters of several shapes, and their values before an update."""
    shapes = [(3, 2), (), (4,)]
    params = [normal(s, k, dtype).requires_grad_(True) for k, s in enumerate(shapes)]
    before = [normal(s, 10 + k, dtype) for k, s in enumerate(shapes)]
    return params, before


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_update_is_the_formula(factor: float, dtype: torch.dtype) -> None:
    params, before = pair(dtype)
    after, kept = [p.detach().clone() for p in params], [b.clone() for b in before]
    scale_update(params, before, factor)
    for p, a, b, k in zip(params, after, before, kept, strict=True):
        torch.testing.assert_close(p.detach(), b + factor * (a - b))
        assert torch.equal(b, k) and p.requires_grad and p.is_leaf


def test_a_factor_of_one_leaves_every_bit() -> None:
    params, before = pair(torch.float32)
    after = [p.detach().clone() for p in params]
    scale_update(params, before, 1.0)
    assert all(torch.equal(p, a) for p, a in zip(params, after, strict=True))


@given(st.floats(1e-9, 10.0), st.floats(0.0, 1.0))
def test_lengthening_of_a_quadratic_reaches_the_least(moved: float, least: float) -> None:
    factor = lengthening(moved, least)
    assert 1.0 <= factor <= 8.0
    if 1.0 < factor < 8.0:
        assert factor**2 * moved == pytest.approx(least)
    assert factor > 1.0 or moved >= least
    assert lengthening(math.nan, least) == lengthening(0.0, least) == 1.0


def test_restore_is_exact() -> None:
    params, before = pair(torch.float32)
    restore(params, before)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    with torch.no_grad():
        params[0].add_(1.0)
    assert not torch.equal(params[0], before[0])  # a copy, not an alias


@given(st.floats(0.01, 1e4), st.floats(1e-6, 1.0), st.integers(0, 12))
def test_halvings_are_the_fewest_that_suffice(
    size: float, radius: float, max_halvings: int
) -> None:
    p = torch.tensor([1.0 + size, 1.0], dtype=torch.float64)
    old = torch.tensor([1.0, 1.0], dtype=torch.float64)
    calls = []

    def divergence() -> Tensor:
        calls.append(p.clone())
        return (p - old).square().sum()

    halvings, moved = shrink_to_trust_region([p], [old], divergence, radius, max_halvings)
    needed = next(k for k in range(60) if (size / 2**k) ** 2 <= radius * (1 + 1e-9))
    borderline = abs((size / 2**needed) ** 2 / radius - 1) < 1e-6
    if needed <= max_halvings and not borderline:
        assert halvings == needed
        torch.testing.assert_close(p - old, torch.tensor([size / 2**needed, 0.0]).double())
        assert moved == divergence() <= radius
    elif not borderline:
        assert (halvings, moved) == (max_halvings + 1, 0.0)
        assert torch.equal(p, old)
    assert len(calls) <= max_halvings + 2


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_an_update_that_stays_too_large_is_undone(value: float) -> None:
    params, before = pair(torch.float32)
    calls = []

    def divergence() -> Tensor:
        calls.append(0)
        return torch.tensor(value)

    assert shrink_to_trust_region(params, before, divergence, 0.5, max_halvings=3) == (4, 0.0)
    assert len(calls) == 4
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_nan_parameters_are_undone() -> None:
    p, old = torch.tensor([math.nan, 2.0]), torch.tensor([1.0, 1.0])
    assert shrink_to_trust_region([p], [old], lambda: p.sum().abs(), 10.0) == (21, 0.0)
    assert torch.equal(p, old)


def test_a_small_update_is_kept_bit_for_bit() -> None:
    params, before = pair(torch.float32)
    after = [p.detach().clone() for p in params]
    moved = torch.tensor(0.1)
    assert shrink_to_trust_region(params, before, lambda: moved, 0.2) == (0, moved.item())
    assert all(torch.equal(p, a) for p, a in zip(params, after, strict=True))


@pytest.mark.parametrize("radius", [0.002, 0.05])
def test_a_model_moves_by_no_more_than_the_radius(radius: float) -> None:
    """KL between two Gaussian models, as the pool sees it, ends in (radius / 8, radius]."""
    energy = QuadraticEnergy(2, 1)
    ebm = LVEBM(
        energy,
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        pool=TemperedPool(4, 64, seed=3),
    )
    for _ in range(5):
        ebm.pool.refresh(ebm)
    params = list(energy.parameters())
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        energy.linear.copy_(torch.tensor([1.0, -2.0, 1.0]))
        energy.raw_tril.fill_(0.2)
    far = ebm.kl_of_update()
    halvings, moved = shrink_to_trust_region(params, before, ebm.kl_of_update, radius)
    assert 1 <= halvings <= 10 < far / radius
    assert radius / 8 < moved == ebm.kl_of_update() <= radius
    torch.testing.assert_close(
        energy.linear.detach(), torch.tensor([1.0, -2.0, 1.0]) / 2.0**halvings
    )


@pytest.mark.parametrize(("dim", "radius"), [(1, 0.02), (8, 0.02), (32, 0.04), (68, 0.0583)])
def test_the_default_radius_grows_with_the_dimension(dim: int, radius: float) -> None:
    assert default_radius(dim) == pytest.approx(radius, rel=1e-3)


class RootEnergy(nn.Module):
    """f = ½ |Lᵀ (x, z)|² with A = L Lᵀ; A may leave the matrices that have such a root."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        root = torch.linalg.cholesky(self.matrix)
        return 0.5 * (torch.cat([x, z], -1) @ root).square().sum(-1)


def root_ebm() -> LVEBM:
    standard = [dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (2, 1)]
    return warm(LVEBM(RootEnergy(), *standard, pool=TemperedPool(3, 32, num_moves=2)), 3)


def moved_by(
    ebms: list[LVEBM], update: dict[int, float], min_kl: float = 0.0
) -> tuple[int, float, float]:
    """A `bounded_step` that adds these numbers to the parameters of these LVEBMs."""
    changes = {
        p: update[k] for k, ebm in enumerate(ebms) for p in ebm.f.parameters() if k in update
    }

    def optim(params: list[Tensor]) -> None:
        with torch.no_grad():
            for p in params:
                p.add_(changes[p])

    region = TrustRegion(min_kl=min_kl)
    _, halvings, kl, longer = bounded_step(optim, list(changes), ebms, region, step=1)
    return halvings, kl, longer


def test_an_update_to_where_the_energy_cannot_be_evaluated_is_halved() -> None:
    """A = I − 10 (1 1ᵀ) has no root."""
    ebm = root_ebm()
    halvings, kl, _ = moved_by([ebm], {0: -10.0})
    assert 4 <= halvings <= 20 and 0.0 < kl <= 0.02
    assert torch.linalg.eigvalsh(ebm.f.matrix.detach()).min() > 0.0
    assert not torch.equal(ebm.f.matrix, torch.eye(3))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_update_that_is_broken_off_is_undone(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    ebm = root_ebm()
    before = snapshot(ebm)

    def fails(self: LVEBM) -> Tensor:
        raise error

    monkeypatch.setattr(LVEBM, "kl_of_update", fails)
    with pytest.raises(error):
        moved_by([ebm], {0: 0.5})
    assert same(before, snapshot(ebm))


def test_an_lvebm_that_rests_does_not_hold_up_another() -> None:
    """Its pool has not followed it, so its own divergence is far beyond the radius."""
    a, b = quadratic_ebm(seed=1), warm(quadratic_ebm(seed=2))
    assert float(a.kl_of_update()) > 0.1
    halvings, kl, _ = moved_by([a, b], {1: 1e-3})
    assert halvings == 0 and 0.0 < kl < 0.02
    with torch.no_grad():
        halvings, kl, _ = moved_by([a, b], {0: 0.0, 1: 1e-3})  # here it is trained
    assert halvings == 21 and kl == 0.0


def scaled_to(ebms: list[LVEBM], moving: int, divergence: float) -> float:
    """How much to add to the parameters of one LVEBM to move it so far, in nats."""
    params = list(ebms[moving].f.parameters())
    before = [p.detach().clone() for p in params]
    size = 1e-3
    for _ in range(8):
        with torch.no_grad():
            for p in params:
                p.add_(size)
        found = float(ebms[moving].kl_of_update())
        restore(params, before)
        size *= math.sqrt(divergence / found)
    return size


@pytest.mark.parametrize("moving", [0, 1])
def test_the_one_lvebm_that_moves_too_far_decides(moving: int) -> None:
    """One rests: with the mean over both in place of the largest, the other would go too far."""
    ebms = [warm(quadratic_ebm(seed=seed)) for seed in (1, 2)]
    radius = default_radius(ebms[moving].dim)
    update = {moving: scaled_to(ebms, moving, 1.5 * radius), 1 - moving: 0.0}
    halvings, kl, _ = moved_by(ebms, update)
    assert halvings == 1
    assert 0.0 < kl <= radius and kl == pytest.approx(float(ebms[moving].kl_of_update()))


def test_no_update_is_lengthened_where_one_lvebm_moves_by_min_kl() -> None:
    """The other LVEBM has a smaller radius, in units of which `min_kl` is a longer way."""
    ebms = [warm(quadratic_ebm(seed=1)), warm(quadratic_ebm(20, 12, seed=2))]
    small, large = (default_radius(ebm.dim) for ebm in ebms)
    assert large == pytest.approx(2.0 * small)
    min_kl = 0.2 * small
    for share, lengthened in ((1.5, False), (0.5, True)):
        update = {0: 0.0, 1: scaled_to(ebms, 1, share * min_kl)}
        before = snapshot(ebms[1])
        _, kl, longer = moved_by(ebms, update, min_kl)
        assert (longer > 1.0) == lengthened
        assert kl == pytest.approx(max(share, 1.0) * min_kl, rel=0.1)
        ebms[1].load_state_dict(before)
