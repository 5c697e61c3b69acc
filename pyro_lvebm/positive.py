# SPDX-License-Identifier: Apache-2.0
"""The positive phase: Langevin moves of latent particles on p_θ(z | x)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import MALA, Kernel, init_state
from pyro_lvebm.local_energy import LatentBlock, latent_blocks
from pyro_lvebm.rollback import undo_particles
from pyro_lvebm.tracing import Model, Node, subsample_nodes, vectorise

# With a minibatch estimate of the energy, small steps are stochastic-gradient Langevin dynamics.
# The test on the same minibatch hardly ever refuses those; it stops a step that is still too large.
_NOISY_KERNEL = MALA(target_acceptance=0.95)


def move_minibatch(
    model: Model,
    guide: Model,
    particles: AutoParticles,
    kernel: Kernel,
    num_moves: int,
    generator: torch.Generator,
    undo: list[Callable[[], None]],
    nesting: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Node], dict[str, float]]:
    """Move the particles of one minibatch, block after block.

    Args:
        model: The Pyro model, with θ frozen.
        guide: The guide that holds the particles, and perhaps other latents.
        particles: The particles.
        kernel: `MALA()` or `ULA()`.
        num_moves: Langevin steps.
        generator: Source of randomness.
        undo: Gets an action for every block that puts its particles back.
        nesting: Number of batch dimensions of the model.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        The nodes that fix the minibatch, and the mean acceptance probability of every site.
    """
    acceptance: dict[str, float] = {}
    vectorised = vectorise(guide, particles.num_particles, nesting)
    with poutine.block(), torch.no_grad():
        guide_trace = poutine.trace(vectorised).get_trace(*args, **kwargs)
        blocks, trace = latent_blocks(model, particles, guide_trace, nesting, args, kwargs)
        for block in blocks:
            names = [column.name for column in block.columns]
            undo.append(undo_particles(particles, block.indices, names))
            rate = float(move_block(block, particles, kernel, num_moves, generator))
            acceptance |= dict.fromkeys(names, rate)
    return subsample_nodes(trace), acceptance


class Chain(NamedTuple):
    """Draws of one block and their statistics."""

    v: Tensor  # (num_samples, K, *B, D)
    energy: Tensor  # (num_samples, K, *B), −log p(x, z), nats
    acceptance: Tensor  # (num_samples, K, *B)


def kernel_for(block: LatentBlock, kernel: Kernel) -> Kernel:
    """Return the kernel for a block: the given one where its energy is exact."""
    return _NOISY_KERNEL if block.is_global else kernel


def move_block(
    block: LatentBlock,
    guide: AutoParticles,
    kernel: Kernel,
    num_moves: int,
    generator: torch.Generator,
) -> Tensor:
    """Move the particles of a block and store them, and the adapted step size, in the guide.

    The step size adapts after every move: on a sharp posterior the first one may be a hundred times
    too large. It follows the mean over all particles of a minibatch, of which one is a small part.

    Returns:
        Mean acceptance probability, a scalar.
    """
    kernel = kernel_for(block, kernel)
    step_size = guide.step_size(block.columns[0].name)
    state = init_state(block.f, block.v)
    eta = step_size.clone()
    acceptance = torch.zeros_like(step_size)
    for factor in step_factors(block, kernel, num_moves, generator):
        state, accepted = kernel.step(block.f, state, factor * float(eta), generator=generator)
        rate = accepted.mean()
        acceptance += rate / num_moves
        if factor == 1.0:
            eta = kernel.adapt(eta, rate)
    block.fix(state.u)
    for name, value in block.split(state.u).items():
        guide.write(name, block.indices, value)
    step_size.copy_(eta)
    return acceptance


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


def run_chains(
    block: LatentBlock,
    step_size: Tensor,
    kernel: Kernel,
    *,
    num_samples: int,
    num_warmup: int,
    thinning: int,
    generator: torch.Generator,
) -> Chain:
    """Run the particles of a block on as Markov chains, and keep every `thinning`-th position.

    The step size adapts in the warm-up, separately for each datum, and is fixed afterwards.

    Args:
        block: The block, with all else fixed.
        step_size: First step size, a scalar.
        kernel: `MALA()` or `ULA()`.
        num_samples: Draws to keep.
        num_warmup: Steps before the first of them.
        thinning: Steps from one draw to the next.
        generator: Source of randomness.
    """
    kernel = kernel_for(block, kernel)
    state = init_state(block.f, block.v)
    steps = step_size.expand(state.f.shape[1:])
    for _ in range(num_warmup):
        state, accepted = kernel.step(block.f, state, steps, generator=generator)
        steps = kernel.adapt(steps, accepted.expand(state.f.shape).mean(0))
    draws, energies, rates = [], [], []
    constant = 0.5 * block.v.shape[-1] * torch.log(torch.tensor(2 * torch.pi)).item()
    for _ in range(num_samples):
        for _ in range(thinning):
            state, accepted = kernel.step(block.f, state, steps, generator=generator)
        draws.append(state.u)
        base = 0.5 * (state.u**2).sum(-1) + constant
        energies.append(base + state.f - block.offset + block.log_abs_det(state.u))
        rates.append(accepted.expand(state.f.shape))
    return Chain(torch.stack(draws), torch.stack(energies), torch.stack(rates))
