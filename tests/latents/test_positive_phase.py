# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from latent_models import blocks_of, mean_model, parts
from referee import ALPHA, CERTAIN, normal, seeded, variance_p_value
from small_models import data_of, quadratic_ebm, warm
from torch import Tensor

from pyro_lvebm import MALA, ULA, AutoParticles, lvebm
from pyro_lvebm.latents import positive_phase as positive
from pyro_lvebm.latents.positive_phase import Moves, kernel_for, move_block, step_factors
from pyro_lvebm.sampling.langevin import init_state
from pyro_lvebm.sites.traces import frozen

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize("kernel", [MALA(), MALA(0.8), ULA(), ULA(0.9)])
@pytest.mark.parametrize("num_moves", [1, 5])
def test_moves_are_those_of_the_kernel(kernel: MALA | ULA, num_moves: int) -> None:
    """Written to the particles of the minibatch; one step size for all, adapted every move."""
    block, guide, ebm = parts()
    guide.step_size("scene_z").fill_(0.3)
    before = guide.particles("scene_z").clone()
    generator = seeded(1)
    with frozen([ebm]):
        state = init_state(block.f, block.v)
        rates, expected = [], torch.tensor(0.3).double()
        for _ in range(num_moves):
            state, accepted = kernel.step(block.f, state, float(expected), generator=generator)
            rates.append(accepted.mean())
            expected = kernel.adapt(expected, accepted.mean())
        rate = move_block(block, guide, Moves(kernel, num_moves, seeded(1)))
    torch.testing.assert_close(rate, torch.stack(rates).mean())
    rows = block.indices["data"]
    moved = guide.particles("scene_z")
    torch.testing.assert_close(moved[:, rows], ebm.base_z.unwhiten(state.u))
    others = [k for k in range(10) if k not in rows]
    assert torch.equal(moved[:, others], before[:, others])
    torch.testing.assert_close(guide.step_size("scene_z"), expected)
    fixed = block.at.nodes["scene_z"]["value"]  # what other blocks, and the loss, now see
    torch.testing.assert_close(fixed, ebm.base_z.unwhiten(state.u))


def test_a_block_that_has_moved_is_seen_by_the_next() -> None:
    """Their energies are conditional on each other, as in Gibbs sampling."""
    ebm = warm(quadratic_ebm(), 3)
    x, y = data_of(ebm, 6), normal((6,), 1)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", 6):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal((z * w).sum(-1), 0.5), obs=y)

    with torch.random.fork_rng():
        guide = AutoParticles(model, 3)
        guide(x, y)
        blocks, _ = blocks_of(model, x, y, guide=guide)
    first, second = blocks
    for block, other in ((first, second), (second, first)):
        name = block.columns[0].name
        guide.step_size(name).fill_(1e-3)
        with frozen([ebm]):
            before = other.f(other.v)[0]
            move_block(block, guide, Moves(MALA(), 5, seeded(1)))
            after = other.f(other.v)[0]
        assert (before != after).all()
        particles = guide.particles(name)
        assert torch.equal(block.at.nodes[name]["value"].reshape(particles.shape), particles)


def test_a_noisy_energy_has_a_kernel_of_its_own() -> None:
    kernel = MALA(0.5)
    block, _, _ = parts()
    assert kernel_for(block, kernel) is kernel
    with torch.random.fork_rng():
        (noisy,), _ = blocks_of(mean_model(4), normal((12,), 1))
        (exact,), _ = blocks_of(mean_model(12), normal((12,), 1))
    assert kernel_for(exact, kernel) is kernel
    assert kernel_for(noisy, kernel).target_acceptance > 0.9


def plain_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)).double(), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def plain_parts(count: int) -> tuple[Any, AutoParticles, Tensor]:
    y = normal((50,), 1)
    with torch.random.fork_rng():
        guide = AutoParticles(plain_model, count)
        guide(y)
        (block,), _ = blocks_of(plain_model, y, num_particles=count, guide=guide)
    return block, guide, y


def test_one_move_in_ten_is_shorter_where_a_test_may_refuse_all_long_ones() -> None:
    """Three standard errors of a binomial; LVEBMs alone and ULA have moves of one length."""
    block, _, _ = plain_parts(2)
    factors = torch.tensor(step_factors(block, MALA(), 5000, seeded(0)))
    short = factors[factors != 1.0]
    assert len(short) == pytest.approx(500, abs=3 * (5000 * 0.09) ** 0.5)
    assert 1e-3 <= float(short.min()) < 2e-3 and 0.9 < float(short.max()) < 1.0
    assert step_factors(block, ULA(), 50, seeded(0)) == [1.0] * 50
    assert step_factors(parts()[0], MALA(), 50, seeded(0)) == [1.0] * 50


def test_acceptance_is_that_of_the_moves_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a step that is far too long nothing is accepted, and at a thousandth of it nearly all."""

    def rate(factors: list[float]) -> float:
        block, guide, _ = plain_parts(20)
        guide.step_size("z").fill_(4.0)
        monkeypatch.setattr(positive, "step_factors", lambda *_: factors)
        return float(move_block(block, guide, Moves(MALA(), len(factors), seeded(3))))

    assert rate([1.0, 1.0]) < 0.3 and rate([1e-3, 1e-3]) > 0.95
    assert rate([1e-3, 1.0, 1e-3, 1.0]) < 0.3


def moved_p_value(factors: Callable[..., list[float]] | None) -> float:
    """Chi-square test of 200 particles of 50 data after 200 moves, against the exact posterior."""
    block, guide, y = plain_parts(200)
    with pytest.MonkeyPatch.context() as patch:
        if factors is not None:
            patch.setattr(positive, "step_factors", factors)
        move_block(block, guide, Moves(MALA(), 200, seeded(2)))
    centred = guide.particles("z") - 0.8 * y
    return variance_p_value(centred.reshape(-1, 1), 0.2)


def test_particles_with_moves_of_many_lengths_follow_the_posterior() -> None:
    """False-alarm rate ALPHA."""
    assert moved_p_value(None) > ALPHA


def test_the_check_fails_where_all_moves_are_short() -> None:
    assert moved_p_value(lambda block, kernel, n, generator: [1e-3] * n) < CERTAIN
