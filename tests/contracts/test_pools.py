# SPDX-License-Identifier: Apache-2.0
"""What every pool of negatives promises. A new one gets these tests by a line in `POOLS`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from referee import ALPHA, CERTAIN, mean_p_value, normal, seeded, variance_p_value
from small_models import same, snapshot
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MALA, ULA, ContextPool, PersistentPool, QuadraticEnergy, TemperedPool
from pyro_lvebm.pools import Pool

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# From the number of chains for each temperature, and a seed.
POOLS: dict[str, Callable[[int, int], Pool]] = {
    "tempered": lambda n, seed: TemperedPool(3, n, num_moves=4, seed=seed),
    "tempered, two levels": lambda n, seed: TemperedPool(
        2, n, num_moves=4, kernel=MALA(0.8), step_size=0.5, seed=seed
    ),
    "persistent": lambda n, seed: PersistentPool(n, num_moves=4, step_size=0.01, seed=seed),
    "persistent, ULA that adapts": lambda n, seed: PersistentPool(
        n, num_moves=4, kernel=ULA(0.99), seed=seed
    ),
    "persistent, MALA": lambda n, seed: PersistentPool(
        n, num_moves=8, kernel=MALA(), step_size=0.5, seed=seed
    ),
    "contexts": lambda n, seed: ContextPool(5, n // 2, num_moves=4, seed=seed),
}
every = pytest.mark.parametrize("name", POOLS)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

CONTEXTS = normal((40, 2), 1)
PRECISION = torch.tensor([[1.5, 0.3, 0.0], [0.3, 0.8, -0.2], [0.0, -0.2, 1.2]]).double()
LINEAR = torch.tensor([0.4, -0.3, 0.2]).double()
BY_CONTEXT = torch.tensor([[0.3, 0.0, -0.2], [-0.1, 0.3, 0.0]]).double()


def ebm_of(pool: Pool, dtype: torch.dtype = torch.float64, energy: nn.Module | None = None) -> Any:
    """x 2-D on a full base and z 1-D; by default a quadratic energy away from zero."""
    given = energy is not None
    if energy is None:
        energy = QuadraticEnergy(2, 1, context_dim=2 if pool.takes_contexts else 0).to(dtype)
    tril = torch.tensor([[2.0, 0.0], [-0.7, 0.4]], dtype=dtype)
    ebm = LVEBM(
        energy,
        dist.MultivariateNormal(torch.tensor([1.0, -3.0], dtype=dtype), scale_tril=tril),
        dist.Normal(torch.tensor([0.5], dtype=dtype), 1.7).to_event(1),
        pool,
        context_shape=(2,) if pool.takes_contexts else None,
    )
    if not given:
        set_theta(ebm, 1.0)
    return ebm


def set_theta(ebm: Any, t: float) -> None:
    """A path from the base, t = 0, to the model, t = 1."""
    like, eye = ebm.base_x.loc, torch.eye(3).double()
    ebm.f.set_precision((eye + t * (PRECISION - eye)).to(like), (t * LINEAR).to(like))
    if ebm.context_shape is not None:
        with torch.no_grad():
            ebm.f.by_context.copy_(t * BY_CONTEXT)


def refresh(ebm: Any, count: int = 1) -> Any:
    context = None if ebm.context_shape is None else CONTEXTS.to(ebm.base_x.loc)
    for _ in range(count):
        ebm.pool.refresh(ebm, context)
    return ebm


def refreshed(name: str, count: int = 3, seed: int = 5, dtype: torch.dtype = torch.float64) -> Any:
    return refresh(ebm_of(POOLS[name](24, seed), dtype), count)


# --- where chains start, and what fixes their numbers ---------------------------------------


def start_p_value(name: str, spread: float) -> float:
    pool = ebm_of(POOLS[name](1000, 2)).pool
    return variance_p_value(spread * pool.u.flatten(0, 1), np.ones(3))


@every
def test_chains_start_from_the_base_where_log_z_is_zero(name: str) -> None:
    """Chi-square test of N(0, I). False alarms: 1e-3 a pool; chains 1.2 times as wide fail."""
    assert start_p_value(name, 1.0) > ALPHA
    assert start_p_value(name, 1.2) < CERTAIN
    assert ebm_of(POOLS[name](24, 2)).pool.log_partition.item() == 0.0


@every
def test_on_the_base_log_z_stays_zero_and_weights_are_equal(name: str) -> None:
    ebm = ebm_of(POOLS[name](24, 3))
    set_theta(ebm, 0.0)
    refresh(ebm, 4)
    log_w = ebm.pool.log_weights
    assert ebm.pool.log_partition.item() == pytest.approx(0.0, abs=1e-9)
    counted = log_w[log_w.isfinite()]  # young contexts have no weight
    torch.testing.assert_close(counted, torch.full_like(counted, -math.log(len(counted))))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refresh_is_fixed_by_seed_site_and_count(name: str, dtype: torch.dtype) -> None:
    def state(seed: int = 5, site: str = "", count: int = 3) -> dict[str, Tensor]:
        ebm = ebm_of(POOLS[name](24, seed), dtype)
        ebm.pool.belong_to(site)
        return snapshot(refresh(ebm, count).pool)

    first = state(site="a")
    assert same(first, state(site="a"))
    for other in (state(seed=6, site="a"), state(site="b"), state(), state(site="a", count=4)):
        assert not torch.equal(first["u"], other["u"])


@every
def test_a_pool_has_the_site_it_met_last(name: str) -> None:
    ebm = ebm_of(POOLS[name](24, 5))
    ebm.pool.belong_to("first")
    ebm.pool.belong_to("second")
    assert ebm.pool.site == "second"


@every
def test_a_copy_has_numbers_of_its_own_and_leaves_the_pool(name: str) -> None:
    ebm = refreshed(name)
    before = snapshot(ebm.pool)
    twin = ebm.pool.copy_for(77)
    assert same(before, snapshot(twin)) and twin.seed == 77
    twin.refresh(ebm, None if ebm.context_shape is None else CONTEXTS)
    assert same(before, snapshot(ebm.pool))
    refresh(ebm)
    assert not torch.equal(twin.u, ebm.pool.u)


# --- state ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_restored_pool_continues_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    original = refreshed(name, 3, dtype=dtype)
    state = snapshot(original)
    restored = ebm_of(POOLS[name](24, 5), dtype)
    set_theta(restored, 0.3)  # θ comes with the state as well
    restored.load_state_dict(state)
    assert same(snapshot(refresh(original, 3)), snapshot(refresh(restored, 3)))
    assert not same(snapshot(original), state)


@every
@pytest.mark.parametrize("device", DEVICES)
def test_buffers_follow_dtype_and_device(name: str, device: str) -> None:
    ebm = refreshed(name, 2, dtype=torch.float32).to(device=device, dtype=torch.float64)
    refresh(ebm, 2)
    floating = [t for t in snapshot(ebm).values() if t.is_floating_point()]
    assert len(floating) > 8 and {t.dtype for t in floating} == {torch.float64}
    assert {t.device.type for t in snapshot(ebm).values()} == {device}
    assert ebm.pool.refreshes.dtype is torch.long and int(ebm.pool.refreshes) >= 4


@every
def test_a_refresh_replaces_buffers_and_writes_into_none(name: str) -> None:
    """What `snapshot` relies on, also where θ changes abruptly."""
    ebm = refreshed(name, 1)
    buffers, before = dict(ebm.pool.named_buffers()), snapshot(ebm.pool)
    ebm.f.set_precision(3.0 * PRECISION)
    refresh(ebm, 2)
    assert same(before, buffers) and not same(before, snapshot(ebm.pool))


@every
def test_a_snapshot_puts_back_everything(name: str) -> None:
    ebm = refreshed(name, 2)
    ebm.mark_pool(fresh=True)
    before, put_back = snapshot(ebm.pool), ebm.pool.snapshot()
    refresh(ebm, 2)
    ebm.mark_pool(fresh=False)
    assert not same(before, snapshot(ebm.pool)) and not ebm.pool_is_fresh()
    put_back()
    assert same(before, snapshot(ebm.pool)) and ebm.pool_is_fresh()


@every
def test_a_pool_is_fresh_under_the_parameters_it_was_told_of(name: str) -> None:
    ebm = refreshed(name, 1)
    assert not ebm.pool_is_fresh()
    ebm.mark_pool(fresh=True)
    assert ebm.pool_is_fresh()
    with torch.no_grad():
        ebm.f.linear.add_(1e-9)
    assert not ebm.pool_is_fresh()


@every
def test_settling_takes_twenty_refreshes_and_more_where_log_z_is_not_known(name: str) -> None:
    """Up to 80, if the pool states an error at all. One without contexts rests."""
    for wanted in (None, 1e-9):
        ebm = ebm_of(POOLS[name](24, 5))
        if ebm.pool.takes_contexts:
            ebm.settle(wanted)
            assert int(ebm.pool.refreshes) == 0
        refresh(ebm)
        before = int(ebm.pool.refreshes)
        ebm.settle(wanted)
        states_error = ebm.pool.log_partition_std_error is not None
        count = 80 if wanted is not None and states_error else 20
        assert int(ebm.pool.refreshes) == before + count and ebm.pool_is_fresh()


# --- what it refuses ------------------------------------------------------------------------


class Hole(nn.Module):
    """A bad value where x_0 is high, which draws of the base enter and the first chains do not."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        return torch.where(x[..., 0] > 1.2, self.value, 0.1 * z[..., 0] ** 2)


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failing_energy_leaves_every_buffer(name: str, value: float) -> None:
    ebm = refreshed(name, 2)
    before, count = snapshot(ebm.pool), ebm.pool.f.numel()
    good = ebm.f.linear.detach().clone()
    with torch.no_grad():
        ebm.f.linear[0] = value
    message = rf"NaN or infinite at {count} of {count} negatives.*learning rate"
    with pytest.raises(ValueError, match=message):
        refresh(ebm)
    assert same(before, snapshot(ebm.pool))
    with torch.no_grad():
        ebm.f.linear.copy_(good)
    refresh(ebm)
    assert int(ebm.pool.refreshes) == int(before["refreshes"]) + 1


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_error_part_way_leaves_every_buffer(name: str, value: float) -> None:
    """Chains enter the hole in the refresh, or are kept out of it; it is never in the pool."""
    pool = POOLS[name](24, 4)
    ebm = ebm_of(pool, energy=Hole(value))
    pool.u = -pool.u.abs()
    before = snapshot(pool)
    try:
        refresh(ebm)
    except ValueError as error:
        assert "NaN or infinite" in str(error)
        assert same(before, snapshot(pool))
    assert pool.f.isfinite().all() and pool.log_partition.isfinite()


@every
def test_a_second_lvebm_is_refused(name: str) -> None:
    """It would reset the chains, and both would share one log Z."""
    ebm = refreshed(name)
    before = snapshot(ebm)
    with pytest.raises(ValueError, match="belongs to another LVEBM"):
        LVEBM(ebm.f, ebm.base_x, ebm.base_z, ebm.pool, context_shape=ebm.context_shape)
    assert same(before, snapshot(ebm))


@every
def test_it_is_for_lvebms_with_contexts_or_for_those_without(name: str) -> None:
    pool = POOLS[name](24, 4)
    shape = None if pool.takes_contexts else (2,)
    one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    with pytest.raises(ValueError, match="a conditional LVEBM needs a ContextPool"):
        LVEBM(Hole(0.0), one, one, pool, context_shape=shape)
    assert pool.u.shape[-1] == 0  # still free
    ebm_of(pool)


# --- what it tells --------------------------------------------------------------------------


@every
def test_negatives_residuals_and_contexts_fit_together(name: str) -> None:
    ebm = refreshed(name)
    u, log_w = ebm.pool.negatives()
    f, again = ebm.negative_residuals()
    assert u.shape == (len(log_w), 3) and f.shape == log_w.shape and torch.equal(log_w, again)
    torch.testing.assert_close(ebm.pool.negative_residuals(), f.detach())
    assert torch.logsumexp(log_w, 0).item() == pytest.approx(0.0, abs=1e-9)
    assert 1.0 <= float(ebm.pool.ess) <= len(log_w) + 1e-9
    context = ebm.pool.negative_contexts()
    assert (context is None) == (not ebm.pool.takes_contexts)
    if context is not None:
        assert context.shape == (len(log_w), 2)
        assert (context[:, None] == CONTEXTS).all(-1).any(-1).all()


@every
def test_chains_move(name: str) -> None:
    ebm = refreshed(name, 1)
    before = ebm.pool.u.clone()
    refresh(ebm, 2)
    assert (ebm.pool.u != before).any(-1).double().mean() > 0.5
    acceptance = ebm.pool.acceptance
    assert acceptance.shape == (ebm.pool.num_levels,)
    assert ((acceptance > 0.0) & (acceptance <= 1.0 + 1e-9)).all()
    assert (ebm.pool.step_size > 0.0).all()


@every
def test_kl_is_zero_for_the_same_law_and_positive_for_another(name: str) -> None:
    """A constant in f changes no law."""
    ebm = refreshed(name)
    f = ebm.pool.negative_residuals()
    for constant in (0.0, 40.0, -40.0):
        assert float(ebm.pool.kl_to(f + constant)) == pytest.approx(0.0, abs=1e-9)
    assert float(ebm.pool.kl_to(1.5 * f)) > 0.005
    assert float(ebm.kl_of_update()) == pytest.approx(0.0, abs=1e-9)
    assert float(ebm.pool.kl_from_base()) >= 0.0


@every
def test_the_variance_of_f_has_a_graph(name: str) -> None:
    ebm = refreshed(name)
    f, _ = ebm.negative_residuals()
    variance = ebm.pool.variance(f)
    variance.backward()
    assert variance.shape == () and variance.detach() > 0.0
    assert ebm.f.raw_tril.grad.isfinite().all() and ebm.f.raw_tril.grad.abs().sum() > 0.0
    constant = torch.full_like(f.detach(), 7.0)
    assert float(ebm.pool.variance(constant)) == pytest.approx(0.0, abs=1e-9)


@every
def test_statistics_are_numbers_for_the_history(name: str) -> None:
    pool = refreshed(name).pool
    found, error = pool.statistics(), pool.log_partition_std_error
    levels = {f"acceptance_{level}" for level in range(pool.num_levels)}
    assert {"log_partition", "ess"} | levels <= found.keys()
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found["log_partition"] == float(pool.log_partition)
    assert ("log_partition_se" in found) == (error is not None)
    if error is not None:
        assert error.shape == () and error > 0.0 and found["log_partition_se"] == float(error)


@pytest.mark.parametrize("name", [n for n in POOLS if not POOLS[n](24, 0).takes_contexts])
def test_draws_leave_the_pool_and_repeat_by_generator(name: str) -> None:
    """A pool with contexts has no one law to draw from."""
    ebm = refreshed(name)
    before = snapshot(ebm.pool)
    first, again, other = (ebm.pool.draw(ebm, 7, generator=seeded(seed)) for seed in (1, 1, 2))
    assert first.shape == (7, 3) and torch.equal(first, again) and not torch.equal(first, other)
    assert same(before, snapshot(ebm.pool))


# --- the law of the negatives ---------------------------------------------------------------


class Tilted:
    """An LVEBM whose energy a pool sees twice too high."""

    is_base = False

    def __init__(self, density: Any) -> None:
        self.density, self.base = density, density.base

    def residual_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = self.density.residual_and_grad(u)
        return 2.0 * value, 2.0 * grad

    def given(self, context: Tensor) -> Tilted:
        return Tilted(self.density.given(context))


def errors(name: str, seen: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
    """Errors of log Z (10,), and of weighted moments (10, 6), of pools that followed a slow path.

    Contexts differ between pools, so the truth is that of the contexts of each pool.
    """
    log_z, moments = [], []
    for seed in range(10):
        ebm = ebm_of(POOLS[name](160, seed))
        for t in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0, 1.0):
            set_theta(ebm, t)
            ebm.pool.refresh(seen(ebm), CONTEXTS if ebm.pool.takes_contexts else None)
        found = []
        for _ in range(4):
            ebm.pool.refresh(seen(ebm))
            u, log_w = ebm.pool.negatives()
            context = ebm.pool.negative_contexts()
            given, w = () if context is None else (context,), log_w.exp()
            with torch.no_grad():
                covariance = torch.linalg.inv(ebm.f.precision)
                centred = u + ebm.f.linear_at(*given) @ covariance
                exact = (w * ebm.f.log_partition(*given)).sum()
            squares = w @ centred**2 - covariance.diagonal()
            found.append(torch.cat([(ebm.pool.log_partition - exact)[None], w @ centred, squares]))
        log_z.append(torch.stack(found)[:, 0].mean())
        moments.append(torch.stack(found)[:, 1:].mean(0))
    return torch.stack(log_z), torch.stack(moments)


LAG = 0.02
"""What log Z may be off in the mean so soon after a path, in nats.

Over 60 pools the means of tempered ones are 0.01 low after it, whatever their number of chains,
and 0.001 after 60 refreshes at rest.
"""


def law_p_values(name: str, seen: Callable[[Any], Any]) -> tuple[float, float]:
    log_z, moments = errors(name, seen)
    lag = log_z.mean().clamp(-LAG, LAG).item()
    return mean_p_value(log_z, lag), mean_p_value(moments, 0.0)


# The other persistent ones have the law of ULA, which tests/pools/test_persistent.py knows.
@pytest.mark.parametrize("name", ["tempered", "persistent, MALA", "contexts"])
def test_log_z_and_moments_are_those_of_the_closed_form(name: str) -> None:
    """Student's tests over 10 pools. False alarms: 2e-3 a pool.

    Pools that see the energy twice too high fail.
    """
    assert min(law_p_values(name, lambda ebm: ebm)) > ALPHA
    assert max(law_p_values(name, Tilted)) < CERTAIN
