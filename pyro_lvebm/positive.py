# SPDX-License-Identifier: Apache-2.0
"""The positive phase: Langevin moves of latent particles on p_θ(z | x)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.langevin import MALA, Kernel, init_state
from pyro_lvebm.local_energy import LatentBlock

# With a minibatch estimate of the energy, small steps are stochastic-gradient Langevin dynamics.
# The test on the same minibatch hardly ever refuses those; it stops a step that is still too large.
_NOISY_KERNEL = MALA(target_acceptance=0.95)


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

    Returns:
        Mean acceptance probability, a scalar.
    """
    kernel = kernel_for(block, kernel)
    step_size = guide.step_size(block.columns[0].name)
    state = init_state(block.f, block.v)
    eta = float(step_size)
    acceptance = torch.zeros_like(step_size)
    for _ in range(num_moves):
        state, accepted = kernel.step(block.f, state, eta, generator=generator)
        acceptance += accepted.mean() / num_moves
    block.fix(state.u)
    for name, value in block.split(state.u).items():
        guide.write(name, block.indices, value)
    step_size.copy_(kernel.adapt(step_size, acceptance))
    return acceptance


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
