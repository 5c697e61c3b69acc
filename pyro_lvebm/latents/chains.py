# SPDX-License-Identifier: Apache-2.0
"""Particles run on as Markov chains at frozen θ: warm-up, metrics, and blocks in turn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.latents.blocks import LatentBlock
from pyro_lvebm.latents.energy import as_problems, residuals_of_problems
from pyro_lvebm.latents.positive_phase import kernel_for, particles_last, step_factors
from pyro_lvebm.sampling import (
    MALA,
    Kernel,
    Residuals,
    anneal_problems,
    gauss_newton_root,
    init_state,
    secant_root,
)
from pyro_lvebm.validation import check_at_least

_MOVES_IN_TURN = 4
"""Moves of a block before the next one has its turn."""


@dataclass(frozen=True)
class ChainSettings:
    """How long chains run.

    Raises:
        ValueError: If a number is too small.
    """

    num_samples: int  # draws to keep
    num_warmup: int  # steps before the first of them
    thinning: int  # steps from one draw to the next

    def __post_init__(self) -> None:
        """Refuse chains without draws."""
        check_at_least(1, num_samples=self.num_samples, thinning=self.thinning)
        check_at_least(0, num_warmup=self.num_warmup)


class Chain(NamedTuple):
    """Draws of one block and their statistics."""

    v: Tensor  # (num_samples, K, *B, D)
    energy: Tensor  # (num_samples, K, *B), −log p of the block given all others, nats
    acceptance: Tensor  # (num_samples, K, *B)


class Kept(NamedTuple):
    """One draw of one block, and what its chains did on the way."""

    v: Tensor  # (K, *B, D)
    energy: Tensor  # (K, *B), −log p of the block given all others, nats
    acceptance: Tensor  # (K, *B), mean of the last turn
    step_size: Tensor  # (*B), fixed since the warm-up


def run_chains(
    blocks: Sequence[LatentBlock],
    step_sizes: Sequence[Tensor],
    kernel: Kernel,
    settings: ChainSettings,
    generator: torch.Generator,
) -> list[Chain]:
    """Return a chain for each block, of all that `chain_draws` yields."""
    draws = chain_draws(blocks, step_sizes, kernel, settings, generator)
    return [
        Chain(*(torch.stack(part) for part in list(zip(*kept, strict=True))[:3]))
        for kept in zip(*draws, strict=True)
    ]


def chain_draws(
    blocks: Sequence[LatentBlock],
    step_sizes: Sequence[Tensor],
    kernel: Kernel,
    settings: ChainSettings,
    generator: torch.Generator,
) -> Iterator[list[Kept]]:
    """Run the particles of all blocks on as Markov chains, and keep every `thinning`-th position.

    One block takes one move in each step. Several take four moves each in turn, given the present
    values of the others (Gibbs sampling). Where a generator makes posteriors sharp, chains do not
    begin at the particles but at annealed draws. In the warm-up the step size adapts, separately
    for each datum, and with MALA a metric too where more than an LVEBM steers the latents, or a
    generator (`secant_root`), from the positions and gradients of windows that grow by a half; its
    last quarter is for the step sizes alone. Afterwards both are fixed.

    Args:
        blocks: The blocks of one minibatch, with all else fixed. Their `fix` is called.
        step_sizes: First step size of each block, a scalar.
        kernel: `MALA()` or `ULA()`.
        settings: How many steps, and which are kept.
        generator: Source of randomness.

    Yields:
        The draws of all blocks, one position at a time.

    Source:
        Seyboldt, Carlson and Carpenter (2026), Preconditioning Hamiltonian Monte Carlo by
        minimizing Fisher divergence, arXiv 2603.18845 (metric); Stan's warm-up (growing windows).
    """
    walks = [_Walk(b, s, kernel, generator) for b, s in zip(blocks, step_sizes, strict=True)]
    ends = window_ends(settings.num_warmup)
    for step in range(1, settings.num_warmup + 1):
        _sweep(walks, generator, warming=True)
        if step in ends:
            for walk in walks:
                walk.renew_metric()
    for _ in range(settings.num_samples):
        for _ in range(settings.thinning):
            _sweep(walks, generator, warming=False)
        yield [
            Kept(walk.v, walk.energy(), walk.acceptance.movedim(-1, 0), walk.steps)
            for walk in walks
        ]


def window_ends(num_warmup: int) -> list[int]:
    """Return the steps of the warm-up after which metrics are renewed; none if it is short.

    Example:
        >>> window_ends(200)
        [20, 50, 150]
    """
    end, width, ends = 3 * num_warmup // 4, 20, [0]
    while ends[-1] + width <= end:
        ends.append(ends[-1] + width)
        width += width // 2
    return [*ends[1:-1], end] if len(ends) > 1 else []


def _sweep(walks: list[_Walk], generator: torch.Generator, *, warming: bool) -> None:
    if len(walks) == 1:
        walks[0].move(generator, 1, warming=warming)
        return
    for walk in walks:
        walk.look_again()
        walk.move(generator, _MOVES_IN_TURN, warming=warming)
        walk.block.fix(walk.v)


def _annealed(block: LatentBlock, r: Residuals, generator: torch.Generator) -> Tensor:
    """Return starts u (*B, K, D) near p(z | x), annealed from the modes of each datum.

    Between the modes of a sharp posterior chains hardly ever cross, so the starts must have their
    shares.
    """
    batch, (count, dim) = block.v.shape[1:-1], (len(block.v), block.v.shape[-1])
    n = max(count, _MIN_STARTS)
    found = anneal_problems(
        as_problems(block.f, batch),
        residuals_of_problems(r, batch),
        (batch.numel(), n, dim),
        block.v,
        generator=generator,
    )
    picked = torch.randperm(n, generator=generator, device=block.v.device)[:count]
    return found.state.u[0][:, picked].reshape(*batch, count, dim)


_MIN_STARTS = 64
"""Particles of the annealing from which as many starts as there are chains are picked."""


class _Walk:
    """The particles of one block on their way, with the batch before the particles."""

    def __init__(
        self,
        block: LatentBlock,
        step_size: Tensor,
        kernel: Kernel,
        generator: torch.Generator,
    ) -> None:
        self.block, self.kernel = block, kernel_for(block, kernel)
        self.f = particles_last(block.f)
        start = (
            block.v.movedim(0, -2).contiguous()
            if block.residuals is None
            else _annealed(block, block.residuals, generator)
        )
        self.state = init_state(self.f, start)  # u (*B, K, D)
        self.steps = step_size.expand(self.state.f.shape[:-1])  # (*B,)
        self.scale: Tensor | None = None  # (*B, D, D)
        if block.residuals is not None:
            self.scale = gauss_newton_root(block.residuals, self.v)
            if isinstance(self.kernel, MALA):
                self.steps = torch.full_like(self.steps, block.v.shape[-1] ** (-1 / 3))
        self.acceptance = torch.zeros_like(self.state.f)  # (*B, K)
        self._open_window()

    @property
    def v(self) -> Tensor:
        """Positions (K, *B, D)."""
        return self.state.u.movedim(-2, 0)

    def energy(self) -> Tensor:
        """−log p (K, *B) of the block given all others, as they were at its turn, in nats."""
        u = self.state.u
        base = 0.5 * (u * u).sum(-1) + 0.5 * u.shape[-1] * math.log(2 * math.pi)
        conditional = (base + self.state.f).movedim(-1, 0)
        return conditional - self.block.offset + self.block.log_abs_det(self.v)

    def look_again(self) -> None:
        """Evaluate the energy anew, after other blocks have moved."""
        self.state = init_state(self.f, self.state.u)

    def move(self, generator: torch.Generator, num_moves: int, *, warming: bool) -> None:
        self.acceptance = torch.zeros_like(self.acceptance)
        for factor in step_factors(self.block, self.kernel, num_moves, generator):
            options: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
            self.state, accepted = self.kernel.step(
                self.f, self.state, factor * self.steps[..., None], generator=generator, **options
            )
            accepted = accepted.expand(self.state.f.shape)
            self.acceptance += accepted / num_moves
            if warming:
                self._learn(accepted, factor)

    def _learn(self, accepted: Tensor, factor: float) -> None:
        if factor == 1.0:
            # Fast at first: the first step size may be a thousand times too large.
            self.age += 1
            rate = max(0.1, self.age**-0.5)
            self.steps = self.kernel.adapt(self.steps, accepted.mean(-1), rate)
        if not self.block.is_direct:
            moved = self._pairs() - self.origin
            self.first += moved.sum(-2)
            self.second += moved.mT @ moved
            self.count += moved.shape[-2]

    def renew_metric(self) -> None:
        """Take the metric of the window that ends, and open the next."""
        if self.block.is_direct or not isinstance(self.kernel, MALA):
            return
        mean, d = self.first / self.count, self.state.u.shape[-1]
        cov = self.second / self.count - mean[..., :, None] * mean[..., None, :]
        self.scale = secant_root(cov[..., :d, :d], cov[..., d:, d:], self.count)
        self.steps = torch.full_like(self.steps, d ** (-1 / 3))
        self._open_window()

    def _open_window(self) -> None:
        self.origin = self._pairs().mean(-2, keepdim=True)  # sums lose fewer digits from here
        self.first = torch.zeros_like(self.origin[..., 0, :])
        self.second = torch.zeros_like(self.origin.mT @ self.origin)
        self.count = self.age = 0

    def _pairs(self) -> Tensor:
        """Positions and gradients of the energy there, (*B, K, 2 D)."""
        return torch.cat([self.state.u, self.state.u + self.state.grad], -1)
