# SPDX-License-Identifier: Apache-2.0
"""The positive phase: Langevin moves of latent particles on p_θ(z | x)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.guides import AutoParticles, undo_particles
from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.latents.program import Program
from pyro_lvebm.sampling import MALA, Kernel, init_state
from pyro_lvebm.sites import Model, Node, subsample_nodes

# With a minibatch estimate of the energy, small steps are stochastic-gradient Langevin dynamics.
# The test on the same minibatch hardly ever refuses those; it stops a step that is still too large.
_NOISY_KERNEL = MALA(target_acceptance=0.95)


class Moves(NamedTuple):
    """How particles move."""

    kernel: Kernel  # `MALA()` or `ULA()`
    num_moves: int  # Langevin steps
    generator: torch.Generator


def move_minibatch(
    program: Program,
    guide: Model,
    particles: AutoParticles,
    moves: Moves,
    undo: list[Callable[[], None]],
    guide_noise: Callable[[], AbstractContextManager[None]],
) -> tuple[dict[str, Node], dict[str, float]]:
    """Move the particles of one minibatch, block after block.

    Args:
        program: The model, with θ frozen, and the number of batch dimensions with its guide.
        guide: The guide that holds the particles, and perhaps other latents.
        particles: The particles.
        moves: How they move.
        undo: Gets an action for every block that puts its particles back.
        guide_noise: Seeds the draws of other latents from the guide. With the same seed the loss
            sees the particles beside the very draws given which they have moved.

    Returns:
        The nodes that fix the minibatch, and the mean acceptance probability of every site.
    """
    acceptance: dict[str, float] = {}
    choices: dict[str, Node] = {}
    with poutine.block(), torch.no_grad():
        if guide is not particles:  # the minibatch has noise of its own
            choices = subsample_nodes(program.trace(program.model))
        vectorised = program.vectorised(guide, particles.num_particles, choices)
        with guide_noise():
            guide_trace = program.trace(vectorised)
        blocks, trace = latent_blocks(program, particles, guide_trace)
        for block in blocks:
            names = [column.name for column in block.columns]
            undo.append(undo_particles(particles, block.indices, names))
            rate = float(move_block(block, particles, moves))
            acceptance |= dict.fromkeys(names, rate)
    return subsample_nodes(trace), acceptance


def kernel_for(block: LatentBlock, kernel: Kernel) -> Kernel:
    """Return the kernel for a block: the given one where its energy is exact."""
    return _NOISY_KERNEL if block.is_global else kernel


def move_block(block: LatentBlock, guide: AutoParticles, moves: Moves) -> Tensor:
    """Move the particles of a block and store them, and the adapted step size, in the guide.

    The step size adapts after every move: on a sharp posterior the first one may be a hundred times
    too large. It follows the mean over all particles of a minibatch, of which one is a small part.

    Returns:
        Mean acceptance probability, a scalar, of the moves of full size if there are any.
    """
    kernel, num_moves, generator = moves
    kernel = kernel_for(block, kernel)
    step_size = guide.step_size(block.columns[0].name)
    state = init_state(block.f, block.v)
    eta = step_size.clone()
    rates: list[Tensor] = []
    shortened: list[Tensor] = []
    for factor in step_factors(block, kernel, num_moves, generator):
        state, accepted = kernel.step(block.f, state, factor * float(eta), generator=generator)
        rate = accepted.mean()
        if factor == 1.0:
            eta = kernel.adapt(eta, rate)
        (rates if factor == 1.0 else shortened).append(rate)
    block.fix(state.u)
    for name, value in block.split(state.u).items():
        guide.write(name, block.indices, value)
    step_size.copy_(eta)
    return torch.stack(rates or shortened).mean()


def step_factors(
    block: LatentBlock, kernel: Kernel, num_moves: int, generator: torch.Generator
) -> list[float]:
    """Draw a factor on the step size of each move: 1, or for one in ten 10^(−3u), u ~ U(0, 1).

    Far from the mode an energy may be so steep that Metropolis' test refuses every move of the size
    that suits the other particles; shorter ones bring such a particle back. A factor that does not
    depend on the particles leaves their law invariant. The energy of an LVEBM alone, whitened and
    Lipschitz on a Gaussian base, needs none, and without a test nothing is refused.
    """
    if not isinstance(kernel, MALA) or block.is_direct:
        return [1.0] * num_moves
    draws = torch.rand((num_moves, 2), generator=generator, device=block.v.device).tolist()
    return [10.0 ** (-3.0 * u) if short < 0.1 else 1.0 for short, u in draws]
