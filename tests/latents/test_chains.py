# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from latent_models import blocks_of, parts
from referee import ALPHA, CERTAIN, normal, seeded, variance_p_value
from small_models import rotations
from torch import Tensor

from pyro_lvebm import MALA, ULA
from pyro_lvebm.latents import chains
from pyro_lvebm.latents.chains import ChainSettings, run_chains, window_ends
from pyro_lvebm.sampling.langevin import Kernel, init_state
from pyro_lvebm.sites.traces import frozen

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def test_chains_adapt_to_each_datum_in_the_warm_up_only() -> None:
    """One draw more is the same chain, one step longer."""
    block, guide, ebm = parts(2, None)
    step_size = guide.step_size("scene_z")

    def run(num_samples: int, num_warmup: int) -> Any:
        (chain,) = run_chains(
            [block],
            [step_size],
            MALA(),
            ChainSettings(num_samples, num_warmup, 1),
            seeded(3),
        )
        return chain

    with frozen([ebm]):
        short, long, none = run(2, 6), run(5, 6), run(1, 0)
        u = block.v.movedim(0, -2).contiguous()
        f = chains.particles_last(block.f)
        state, _ = MALA().step(f, init_state(f, u), 0.1, generator=seeded(3))
    assert short.v.shape == (2, 2, 10, 2) and long.energy.shape == (5, 2, 10)
    assert torch.equal(short.v, long.v[:2]) and torch.equal(short.energy, long.energy[:2])
    assert step_size == 0.1 and torch.equal(step_size, guide.step_size("scene_z"))
    torch.testing.assert_close(none.v[0], state.u.movedim(-2, 0))


@pytest.mark.parametrize("num_warmup", [0, 26, 27, 100, 200, 333, 1000])
def test_windows_grow_and_leave_a_quarter(num_warmup: int) -> None:
    ends = window_ends(num_warmup)
    assert (not ends) == (num_warmup < 27)
    widths = [b - a for a, b in pairwise([0, *ends])]
    assert not ends or (ends[-1] == 3 * num_warmup // 4 and widths[0] >= 20)
    assert all(b >= 1.4 * a for a, b in pairwise(widths))


# --- the metric -------------------------------------------------------------------------------

D = 6


def ridge() -> Tensor:
    """A covariance (6, 6) with standard deviations from 0.03 to 3 along slanted axes."""
    axes, _ = torch.linalg.qr(normal((D, D), 1))
    return (axes * torch.logspace(-3.0, 1.0, D).double()) @ axes.T


def gaussian(count: int) -> Any:
    """The block of a latent of all data, whose posterior is N(1, ridge)."""
    law = dist.MultivariateNormal(torch.ones(D).double(), ridge())

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(D).double(), 1.0).to_event(1))
        # The prior cancels.
        pyro.factor("target", law.log_prob(z) + 0.5 * (z * z).sum(-1))

    with torch.random.fork_rng():
        (block,), _ = blocks_of(model, num_particles=count)
    return block


def draws_of(block: Any, kernel: Kernel, num_warmup: int, num_samples: int = 1) -> Tensor:
    step = torch.tensor(0.1).double()
    (chain,) = run_chains(
        [block],
        [step],
        kernel,
        ChainSettings(num_samples, num_warmup, 20),
        seeded(2),
    )
    return chain.v


def ridge_p_value(kernel: Kernel, num_warmup: int) -> float:
    """Chi-square tests of one draw of 400 chains, in all directions."""
    v = draws_of(gaussian(400), kernel, num_warmup)[0]
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(ridge()), (v - 1.0).T, upper=False)
    return variance_p_value(rotations(white.T), 1.0)


@pytest.mark.parametrize("kernel", [MALA(), MALA(0.8)])
def test_chains_with_a_metric_reach_the_end_of_a_long_ridge(kernel: MALA) -> None:
    """False-alarm rate ALPHA; within 200 steps, where the ridge is a hundred times its width."""
    assert ridge_p_value(kernel, 200) > ALPHA


@pytest.mark.parametrize("kernel", [MALA(), ULA(0.574)])
def test_without_one_they_do_not(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """ULA has no metric, whatever the windows."""
    if isinstance(kernel, MALA):
        monkeypatch.setattr(chains, "window_ends", lambda num_warmup: [])
    assert ridge_p_value(kernel, 200) < CERTAIN
