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
from pyro_lvebm.sampling import (
    MALA,
    Kernel,
    LangevinState,
    Linearised,
    Residuals,
    ValueAndGrad,
    find_mode,
    gauss_newton_root,
    init_state,
    linearise,
    linearised_step,
)
from pyro_lvebm.sites import Model, Node, subsample_nodes

# With a minibatch estimate of the energy, small steps are stochastic-gradient Langevin dynamics.
# The test on the same minibatch hardly ever refuses those; it stops a step that is still too large.
_NOISY_KERNEL = MALA(target_acceptance=0.95)

_SEARCHES = 0.25
"""Share of positive phases that look for modes."""

_STEPS_TO_MODE = 8
"""Damped Gauss–Newton steps to one."""


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
    if block.residuals is not None:
        return _move_in_metric(block, guide, kernel, num_moves, generator)
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
    _store(block, guide, state.u)
    step_size.copy_(eta)
    return torch.stack(rates or shortened).mean()


def _store(block: LatentBlock, guide: AutoParticles, v: Tensor) -> None:
    block.fix(v)
    for name, value in block.split(v).items():
        guide.write(name, block.indices, value)


def _move_in_metric(
    block: LatentBlock,
    guide: AutoParticles,
    kernel: Kernel,
    num_moves: int,
    generator: torch.Generator,
) -> Tensor:
    """Move the particles of a block, each half of those of a datum in the metric of the others.

    The mean Gauss–Newton curvature at the other half does not vary with the half that moves, so
    p(z | x) stays invariant. One particle has no others, and takes the curvature near a mode, which
    costs more. First every particle may go to a Gaussian near a mode of its datum: from the base it
    is a long way to a sharp posterior.

    Returns:
        Mean acceptance probability, a scalar, of the moves in the metric.
    """
    residuals, step_size = block.residuals, guide.step_size(block.columns[0].name)
    assert residuals is not None
    f, eta = particles_last(block.f), step_size.clone()
    state = init_state(f, block.v.movedim(0, -2).contiguous())  # u (*B, K, D)
    law = _proposal(block, residuals, generator)
    state, _ = linearised_step(f, state, law, generator)
    halves = torch.arange(len(block.v), device=block.v.device).chunk(2)
    rates: list[Tensor] = []
    for mine, others in zip(halves, halves[::-1], strict=True):
        scale = law.root
        if others is not mine:
            scale = gauss_newton_root(residuals, state.u[..., others, :].movedim(-2, 0))
        part = LangevinState(state.u[..., mine, :], state.f[..., mine], state.grad[..., mine, :])
        for _ in range(num_moves):
            part, accepted = kernel.step(f, part, float(eta), scale=scale, generator=generator)
            rates.append(accepted.mean())
            eta = kernel.adapt(eta, rates[-1])
        state.u[..., mine, :], state.f[..., mine], state.grad[..., mine, :] = part
    _store(block, guide, state.u.movedim(-2, 0))
    step_size.copy_(eta)
    return torch.stack(rates).mean()


def _proposal(block: LatentBlock, r: Residuals, generator: torch.Generator) -> Linearised:
    """Return a Gaussian for each datum, that does not depend on its particles.

    It is the posterior that the datum would have if the generator were linear at 0; or, for one in
    four moves, at what damped Gauss–Newton steps find from a draw of the base. A single particle
    has that which they find from 0.
    """
    start = torch.zeros_like(block.v[0])
    if len(block.v) > 1:
        coin = torch.rand((), generator=generator, device=start.device)
        if float(coin) > _SEARCHES:
            return linearise(r, start)
        start.normal_(generator=generator)
    return linearise(r, find_mode(r, start, _STEPS_TO_MODE))


def particles_last(f: ValueAndGrad) -> ValueAndGrad:
    """Turn f on v (K, *B, D) into one on u (*B, K, D)."""

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = f(u.movedim(-2, 0))
        return value.movedim(0, -1), grad.movedim(0, -2)

    return evaluate


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
