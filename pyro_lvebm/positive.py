# SPDX-License-Identifier: Apache-2.0
"""The positive phase: Langevin moves of latent particles on p_θ(z | x)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import MALA, Kernel, LangevinState, init_state
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


class Kept(NamedTuple):
    """One draw of one block, and what its chains did on the way."""

    v: Tensor  # (K, *B, D)
    energy: Tensor  # (K, *B), −log p of the sites in the plates of the block, nats
    acceptance: Tensor  # (K, *B), of the last step
    step_size: Tensor  # (*B), fixed since the warm-up


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
    kept = chain_draws(
        [block],
        [step_size],
        kernel,
        num_samples=num_samples,
        num_warmup=num_warmup,
        thinning=thinning,
        generator=generator,
    )
    draws, energies, rates, _ = zip(*(draw for (draw,) in kept), strict=True)
    return Chain(torch.stack(draws), torch.stack(energies), torch.stack(rates))


def chain_draws(
    blocks: list[LatentBlock],
    step_sizes: list[Tensor],
    kernel: Kernel,
    *,
    num_samples: int,
    num_warmup: int,
    thinning: int,
    generator: torch.Generator,
) -> Iterator[list[Kept]]:
    """Run blocks on as Markov chains, and yield every `thinning`-th position, one at a time.

    Several blocks take turns, each moving on its law given the others: Metropolis within Gibbs,
    which leaves the joint law invariant.

    Args:
        blocks: All blocks of a minibatch; several need energies that follow each other's values.
        step_sizes: First step size of each block, a scalar.
        kernel: `MALA()` or `ULA()`.
        num_samples: Draws to keep.
        num_warmup: Steps before the first of them, in which step sizes adapt.
        thinning: Steps from one draw to the next.
        generator: Source of randomness.

    Source:
        Tierney (1994), Markov chains for exploring posterior distributions, section 2.4.
    """
    kernels = [kernel_for(block, kernel) for block in blocks]
    states = [init_state(block.f, block.v) for block in blocks]
    steps = [s.expand(t.f.shape[1:]) for s, t in zip(step_sizes, states, strict=True)]
    rates = [torch.zeros_like(state.f) for state in states]

    def sweep() -> None:
        for j, block in enumerate(blocks):
            if len(blocks) > 1:  # the others have moved since
                states[j] = init_state(block.f, states[j].u)
            states[j], accepted = kernels[j].step(block.f, states[j], steps[j], generator=generator)
            rates[j] = accepted.expand(states[j].f.shape)
            if len(blocks) > 1:
                block.fix(states[j].u)

    for _ in range(num_warmup):
        sweep()
        steps = [k.adapt(s, r.mean(0)) for k, s, r in zip(kernels, steps, rates, strict=True)]
    for _ in range(num_samples):
        for _ in range(thinning):
            sweep()
        yield [
            Kept(state.u, _energy(block, state, len(blocks) > 1), rate, step)
            for block, state, rate, step in zip(blocks, states, rates, steps, strict=True)
        ]


def _energy(block: LatentBlock, state: LangevinState, moved: bool) -> Tensor:
    """−log p (K, *B) at a state; where other blocks have moved since, at their new values."""
    f = block.f(state.u)[0] if moved else state.f
    constant = 0.5 * block.v.shape[-1] * math.log(2 * math.pi)
    base = 0.5 * (state.u**2).sum(-1) + constant
    return base + f - block.offset + block.log_abs_det(state.u)
