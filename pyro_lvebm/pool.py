# SPDX-License-Identifier: Apache-2.0
"""Pools of negatives: persistent chains on the joint p_θ(x, z), in whitened coordinates.

A pool is a module, so that its chains travel with `state_dict()` and `.to(device)`. It moves only
in `refresh`, with random numbers fixed by its seed and the number of refreshes so far.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_lvebm.langevin import MALA, ULA, Kernel, LangevinState, init_state
from pyro_lvebm.reweighting import ess, mbar
from pyro_lvebm.rng import generator_for


class ResidualEnergy(Protocol):
    """What a pool needs of an LVEBM: f and ∇f at whitened coordinates."""

    def residual(self, u: Tensor) -> Tensor:
        """Return f(u) (*b,) for u (*b, d)."""

    def residual_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) (*b,) and ∇f(u) (*b, d), without a graph."""


class Pool(nn.Module):
    """What the two pools share: chains u (num_levels, num_chains, d) and when they move.

    Args:
        num_levels: Number of temperatures.
        num_chains: Number of chains at each temperature.
        num_moves: Langevin steps in each refresh.
        kernel: `MALA()` or `ULA()`.
        step_size: First step size η, in whitened coordinates.
        seed: Fixes every random number of the pool.

    Raises:
        ValueError: If a count is too small, or the step size is not positive.
    """

    u: Tensor  # (num_levels, num_chains, d)
    f: Tensor  # (num_levels, num_chains), f(u) under the θ of the last refresh
    log_weights: Tensor  # (num_levels * num_chains,), normalised
    step_size: Tensor  # (num_levels, 1)
    log_partition: Tensor  # scalar, nats
    acceptance: Tensor  # (num_levels,), mean over the last refresh
    refreshes: Tensor  # scalar integer

    def __init__(
        self,
        num_levels: int,
        num_chains: int,
        *,
        num_moves: int,
        kernel: Kernel,
        step_size: float,
        seed: int,
    ) -> None:
        super().__init__()
        if num_chains < 2:
            raise ValueError(f"num_chains must be at least 2; got {num_chains}")
        if num_moves < 1:
            raise ValueError(f"num_moves must be at least 1; got {num_moves}")
        if not step_size > 0:
            raise ValueError(f"step_size must be positive; got {step_size}")
        self.num_levels, self.num_chains = num_levels, num_chains
        self.num_moves, self.kernel, self.seed = num_moves, kernel, seed
        n = num_levels * num_chains
        self.register_buffer("u", torch.empty(num_levels, num_chains, 0))
        self.register_buffer("f", torch.zeros(num_levels, num_chains))
        self.register_buffer("log_weights", torch.full((n,), float(n)).log().neg())
        self.register_buffer("step_size", torch.full((num_levels, 1), step_size))
        self.register_buffer("log_partition", torch.zeros(()))
        self.register_buffer("acceptance", torch.full((num_levels,), torch.nan))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.long))

    def initialise(self, dim: int) -> None:
        """Draw all chains from the base N(0, I) in `dim` dimensions, where log Z = 0 exactly."""
        generator = generator_for(self.seed, 0, device=self.u.device)
        shape = (self.num_levels, self.num_chains, dim)
        self.u = torch.empty(shape, dtype=self.u.dtype, device=self.u.device).normal_(
            generator=generator
        )

    def refresh(self, ebm: ResidualEnergy) -> None:
        """Move the chains towards p_θ under the present θ and update weights and log Z.

        Raises:
            ValueError: If f is NaN or infinite at a chain; the pool is then unchanged.
        """
        generator = generator_for(self.seed, 1, int(self.refreshes), device=self.u.device)
        state = init_state(ebm.residual_and_grad, self.u)
        _check_finite(state.f)
        self._advance(ebm, state, generator)
        self.refreshes = self.refreshes + 1

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        raise NotImplementedError

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return all chains (n, d) and their normalised log weights (n,) for p_θ."""
        return self.u.flatten(0, 1), self.log_weights

    @property
    def ess(self) -> Tensor:
        """Effective sample size of the weighted negatives, a scalar."""
        return ess(self.log_weights)

    def kl_to(self, f: Tensor) -> Tensor:
        """Return KL(p_old ‖ p_new) as the weighted negatives see it, a scalar, in nats.

            log w_new = log w − (f_new − f_old), normalised;    KL = Σ w (log w − log w_new)

        Args:
            f: f_new at the negatives (n,), under other parameters than those of the last refresh.
        """
        log_w = self.log_weights
        log_new = torch.log_softmax(log_w - (f - self.f.flatten()), 0)
        return (log_w.exp() * (log_w - log_new)).sum()

    def draw(
        self,
        ebm: ResidualEnergy,
        num_draws: int,
        *,
        num_moves: int = 10,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from p_θ: resample the weighted negatives, then move the copies by the kernel.

        Returns:
            Whitened coordinates (num_draws, d). The pool itself is unchanged.
        """
        index = torch.multinomial(
            self.log_weights.exp(), num_draws, replacement=True, generator=generator
        )
        state = init_state(ebm.residual_and_grad, self.u.flatten(0, 1)[index])
        for _ in range(num_moves):
            state, _ = self.kernel.step(
                ebm.residual_and_grad, state, self.step_size[-1], generator=generator
            )
        return state.u


def _check_finite(f: Tensor) -> None:
    bad = int((~torch.isfinite(f)).sum())
    if bad:
        raise ValueError(
            f"the energy is NaN or infinite at {bad} of {f.numel()} negatives; it must be finite "
            "everywhere. Check the energy and its parameters, or lower the learning rate"
        )


class PersistentPool(Pool):
    """Plain persistent chains at the model's own temperature, equally weighted.

    Each refresh moves every chain by `num_moves` Langevin steps on E_θ. `log_partition` adds up
    log mean exp(f_old − f_new) over the changes of θ; it holds as long as the chains follow p_θ
    and drifts where they do not.

    Args:
        num_chains: Number of chains.
        num_moves: Langevin steps in each refresh.
        kernel: `ULA()` as in the paper, or `MALA()`.
        step_size: Step size η in whitened coordinates; MALA adapts it.
        seed: Fixes every random number of the pool.

    Raises:
        ValueError: If a count is too small, or the step size is not positive.

    Source:
        Tang et al., arXiv 2510.15447, the joint negative particles; Tieleman (2008), Training
        restricted Boltzmann machines using approximations to the likelihood gradient.
    """

    def __init__(
        self,
        num_chains: int = 1024,
        *,
        num_moves: int = 8,
        kernel: Kernel | None = None,
        step_size: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(
            1,
            num_chains,
            num_moves=num_moves,
            kernel=ULA() if kernel is None else kernel,
            step_size=step_size,
            seed=seed,
        )

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        change = torch.logsumexp(self.f - state.f, -1) - math.log(self.num_chains)
        acceptance = torch.zeros_like(self.acceptance)
        for _ in range(self.num_moves):
            state, accepted = self.kernel.step(
                ebm.residual_and_grad, state, self.step_size, generator=generator
            )
            acceptance += accepted.mean() / self.num_moves
        _check_finite(state.f)
        self.u, self.f, self.acceptance = state.u, state.f, acceptance
        self.step_size = self.kernel.adapt(self.step_size, acceptance[:, None])
        self.log_partition = self.log_partition + change.squeeze(0)


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
        _check_finite(state.f)
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
