# SPDX-License-Identifier: Apache-2.0
"""Latents of an LVEBM alone move without a trace of the model, and land where a trace puts them.

There are three ways to the energy of a block: straight from the LVEBM; that, and a trace at every
Langevin step for the other sites that depend on the latents; and a trace for all. The first two are
equal bit for bit. The third is the same function with its terms added in another order: it goes to
data coordinates and back, adds log base_z and log |dz/dv| where the others leave out what cancels,
and takes gradients by autograd where energies may have written theirs out. It agrees to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from latent_models import bent_ebm, blocks_of
from pyro.optim import Adam
from referee import normal, seeded
from small_models import data_of, quadratic_ebm, same, snapshot, tiny_pool, warm
from torch import Tensor

from pyro_lvebm import LVEBM, MALA, AutoParticles, MLPEnergy, Saddle, lvebm
from pyro_lvebm.latents import energy as local_energy
from pyro_lvebm.latents import positive_phase as positive
from pyro_lvebm.latents.model_at import ModelAt
from pyro_lvebm.sampling.langevin import init_state
from pyro_lvebm.sites.traces import frozen

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def network_ebm() -> LVEBM:
    energy = MLPEnergy(3, 2, hidden=(8, 8), seed=1).double()
    torch.nn.init.normal_(energy.out.weight, generator=seeded(2))
    return LVEBM.from_data(energy, normal((40, 3), 1), z_dim=2, base="gaussian", pool=tiny_pool())


EBMS = {"quadratic": quadratic_ebm, "network": network_ebm, "bent": lambda: bent_ebm(True)}


CASES = [(kind, size, holes) for kind in EBMS for size, holes in ((None, True), (5, False))]


def rows(ebm: LVEBM, holes: bool) -> Tensor:
    """Twelve rows; with holes in some, one of which has nothing else."""
    x = data_of(ebm, 12)
    flat = x.reshape(12, -1)
    if holes:
        flat[::3, 0] = flat[4, 1:] = flat[7] = torch.nan
    return x


def model_of(ebm: LVEBM, size: int | None, weight: float | None) -> Callable[[Tensor], None]:
    """An LVEBM alone; with a weight, beside a site that adds the weight times the sum of z."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            observed = ~x[i].isnan()
            _, z = lvebm("scene", ebm, obs=x[i], observed=None if observed.all() else observed)
            if weight is not None:
                pyro.factor("further", weight * z.sum(tuple(range(-len(ebm.z_shape), 0))))

    return model


# --- without a trace, and with one at every step ----------------------------------------------


def trained(kind: str, size: int | None, holes: bool, weight: float | None) -> tuple[Any, ...]:
    """Losses, θ and pool, particles and step sizes after 6 steps, and traces of the model."""
    pyro.clear_param_store()
    ebm = EBMS[kind]()
    model = model_of(ebm, size, weight)
    guide = AutoParticles(model, 3)
    count = [0]

    def counted(self: ModelAt, *args: Any, **values: Tensor) -> Any:
        count[0] += 1
        return trace(self, *args, **values)

    trace = ModelAt.trace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelAt, "trace", counted)
        # Where other sites steer the latents, one move in ten is short, on either path.
        patch.setattr(positive, "step_factors", lambda block, kernel, n, generator: [1.0] * n)
        saddle = Saddle(model, guide, Adam({"lr": 1e-2}), num_moves=4, seed=3)
        losses = [saddle.step(rows(ebm, holes)) for _ in range(6)]
    return losses, snapshot(ebm), snapshot(guide), count[0]


@pytest.mark.parametrize(("kind", "size", "holes"), CASES)
def test_training_without_traces_is_training_with_them_bit_for_bit(
    kind: str, size: int | None, holes: bool
) -> None:
    losses, ebm, particles, traces = trained(kind, size, holes, None)
    other_losses, other_ebm, other_particles, other_traces = trained(kind, size, holes, 0.0)
    assert losses == other_losses and losses[0] != losses[-1]
    assert same(ebm, other_ebm) and same(particles, other_particles)
    assert "particles_scene_missing" in particles or not holes
    # One at the first look; one for the plates of each step; and one for what depends on z, and one
    # for each gradient.
    assert traces == 1 + 6 and other_traces == 1 + 6 * (1 + 1 + 5)


def test_the_check_fails_for_energies_that_differ_in_the_last_digits() -> None:
    """A slope of 1e-13 in z is enough."""
    losses, _, particles, _ = trained("bent", 5, False, None)
    other_losses, _, other_particles, _ = trained("bent", 5, False, 1e-13)
    assert losses != other_losses and not same(particles, other_particles)


# --- and with a trace for all -----------------------------------------------------------------


def both_paths(kind: str, holes: bool) -> tuple[LVEBM, Any, Any]:
    ebm = warm(EBMS[kind](), 3)
    model, x = model_of(ebm, None, None), rows(ebm, holes)
    with torch.random.fork_rng():
        (fast,), _ = blocks_of(model, x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_energy, "_own_part", lambda *_: None)
            (traced,), _ = blocks_of(model, x)
    assert fast.is_direct and not traced.is_direct
    return ebm, fast, traced


@pytest.mark.parametrize("kind", EBMS)
@pytest.mark.parametrize("holes", [False, True])
def test_a_trace_for_all_agrees_to_rounding(kind: str, holes: bool) -> None:
    """To 8 units in the last place of the largest term of the sum."""
    ebm, fast, traced = both_paths(kind, holes)
    v = 1.5 * normal((50, *fast.v.shape[1:]), 9)
    with frozen([ebm]):
        (f, grad), (g, slow) = fast.f(v), traced.f(v)
    largest = fast.offset.abs() + f.abs() + (v * v).sum(-1) + v.shape[-1]
    ulp = torch.finfo(v.dtype).eps
    error = ((f - fast.offset) - (g - traced.offset)).abs() / largest
    slope = (grad - slow).abs() / (grad.abs().amax() + v.abs())
    assert float(error.max()) < 8 * ulp and float(slope.max()) < 8 * ulp
    assert float(error.max()) > 0  # it is not the same order of operations


def accepted(block: Any, ebm: LVEBM, num_steps: int) -> tuple[Tensor, Tensor]:
    """Decisions (num_steps, K, N) of MALA under one seed, and where the chains end."""
    generator, moved = seeded(4), []
    with frozen([ebm]):
        state = init_state(block.f, block.v)
        for _ in range(num_steps):
            before = state.u
            state, _ = MALA().step(block.f, state, 0.4, generator=generator)
            moved.append((state.u != before).any(-1))
    return torch.stack(moved), state.u


@pytest.mark.parametrize("kind", EBMS)
@pytest.mark.parametrize("holes", [False, True])
def test_a_trace_for_all_accepts_the_same_moves(kind: str, holes: bool) -> None:
    """All of 60 × 3 × 12 decisions, of which some are refusals; positions agree to rounding."""
    ebm, fast, traced = both_paths(kind, holes)
    (ours, u), (theirs, v) = accepted(fast, ebm, 60), accepted(traced, ebm, 60)
    assert torch.equal(ours, theirs) and 0.3 < float(ours.double().mean()) < 0.999
    torch.testing.assert_close(u, v, rtol=0.0, atol=1e-13)


class Warmer:
    """A block at another temperature."""

    def __init__(self, block: Any, factor: float) -> None:
        self.block, self.v, self.factor = block, block.v, factor

    def f(self, v: Tensor) -> tuple[Tensor, Tensor]:
        f, grad = self.block.f(v)
        return self.factor * f, self.factor * grad


def test_decisions_differ_for_energies_that_differ_by_a_thousandth() -> None:
    ebm, fast, _ = both_paths("quadratic", False)
    other: Any = Warmer(fast, 0.999)
    assert not torch.equal(accepted(fast, ebm, 300)[0], accepted(other, ebm, 300)[0])
