# SPDX-License-Identifier: Apache-2.0
"""Chains on a ladder of temperatures, exchanged and reweighted: the default pool."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.langevin import MALA, ULA, LangevinState, init_state
from pyro_lvebm.pool import Pool, ResidualEnergy, check_finite
from pyro_lvebm.reweighting import mbar


class TemperedPool(Pool):
    """Chains on a ladder of temperatures from the base to the model, exchanged and reweighted.

    Level l has chains on E_β = ½ |u|² + β_l f(u), 0 = β_0 < … < β_L = 1. A refresh draws level 0
    afresh from the base, moves all levels by MALA, lets neighbours exchange chains with
    probability min(1, exp((β_{l+1} − β_l)(f_{l+1} − f_l))), and reweights all chains of all
    levels to the model by MBAR, which also gives log Z.

    Args:
        num_levels: Number of temperatures, at least 2.
        num_chains: Number of chains at each temperature.
        num_moves: MALA steps in each refresh.
        kernel: A `MALA` kernel; the weights need one that leaves its target invariant.
        step_size: First step size η in whitened coordinates; each level adapts its own.
        seed: Fixes every random number of the pool.

    Raises:
        ValueError: If a count is too small, the step size is not positive, or the kernel is ULA.

    Source:
        Geyer (1991), Markov chain Monte Carlo maximum likelihood (exchange); Shirts and Chodera
        (2008), equations 11 and 13 (weights).
    """

    betas: Tensor  # (num_levels,)
    log_z: Tensor  # (num_levels,), nats
    swap_rate: Tensor  # (num_levels - 1,)

    def __init__(
        self,
        num_levels: int = 8,
        num_chains: int = 128,
        *,
        num_moves: int = 8,
        kernel: MALA | None = None,
        step_size: float = 0.1,
        seed: int = 0,
    ) -> None:
        if num_levels < 2:
            raise ValueError(f"num_levels must be at least 2; got {num_levels}")
        if isinstance(kernel, ULA):
            raise ValueError("a TemperedPool needs MALA: its weights are wrong for a biased kernel")
        super().__init__(
            num_levels,
            num_chains,
            num_moves=num_moves,
            kernel=MALA() if kernel is None else kernel,
            step_size=step_size,
            seed=seed,
        )
        self.register_buffer("betas", torch.linspace(0.0, 1.0, num_levels) ** 1.5)
        self.register_buffer("log_z", torch.zeros(num_levels))
        self.register_buffer("swap_rate", torch.full((num_levels - 1,), torch.nan))

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        betas = self.betas[:, None]
        swap_rate = torch.zeros_like(self.swap_rate)
        fresh = torch.empty_like(state.u[:1]).normal_(generator=generator)
        state = _replace_level(state, 0, init_state(ebm.residual_and_grad, fresh))
        acceptance = torch.zeros_like(self.step_size)
        for _ in range(self.num_moves):
            state, accepted = self.kernel.step(
                ebm.residual_and_grad,
                state,
                self.step_size,
                inverse_temperature=betas,
                generator=generator,
            )
            acceptance += accepted.mean(-1, keepdim=True) / self.num_moves
            state, swapped = exchange(state, self.betas, generator)
            swap_rate += swapped / self.num_moves
        check_finite(state.f)
        # MBAR starts from the last answer, which is close; the first refresh starts from nothing.
        num_iterations = 50 if int(self.refreshes) == 0 else 5
        self.log_z, self.log_weights = mbar(state.f, self.betas, self.log_z, num_iterations)
        self.u, self.f, self.log_partition = state.u, state.f, self.log_z[-1].clone()
        self.acceptance, self.swap_rate = acceptance.squeeze(-1), swap_rate
        self.step_size = self.kernel.adapt(self.step_size, acceptance)


def _replace_level(state: LangevinState, level: int, new: LangevinState) -> LangevinState:
    parts = [torch.cat([a[:level], b, a[level + 1 :]]) for a, b in zip(state, new, strict=True)]
    return LangevinState(*parts)


def exchange(
    state: LangevinState, betas: Tensor, generator: torch.Generator | None = None
) -> tuple[LangevinState, Tensor]:
    """Exchange chains between neighbouring temperatures, even pairs first, then odd pairs.

    Args:
        state: Chains u (L, n, d) with f and ∇f.
        betas: Inverse temperatures (L,).
        generator: Source of randomness; None means torch's global generator.

    Returns:
        The new state, and the mean acceptance probability (L − 1,) of each pair.
    """
    u, f, grad = (part.clone() for part in state)
    rate = torch.zeros_like(betas[1:])
    for start in (0, 1):
        low = torch.arange(start, len(betas) - 1, 2, device=betas.device)
        if not len(low):
            continue
        high = low + 1
        log_alpha = (betas[high] - betas[low])[:, None] * (f[high] - f[low])
        accept = torch.empty_like(log_alpha).exponential_(generator=generator).neg_() < log_alpha
        rate[low] = log_alpha.clamp(max=0.0).exp().mean(-1)
        for part in (u, f, grad):
            mask = accept[..., None] if part.dim() == 3 else accept
            a, b = part[low], part[high]
            part[low], part[high] = torch.where(mask, b, a), torch.where(mask, a, b)
    return LangevinState(u, f, grad), rate
