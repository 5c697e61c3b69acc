# SPDX-License-Identifier: Apache-2.0
"""Chains on a ladder of temperatures, exchanged and reweighted: the default pool."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.langevin import MALA, ULA, LangevinState, init_state
from pyro_lvebm.pool import Pool, ResidualEnergy, check_finite
from pyro_lvebm.preconditioning import inverse_root
from pyro_lvebm.reweighting import log_mixture, mbar_log_z, mbar_variance
from pyro_lvebm.tracking import LogZTrack, correct, predict

_STRIDE = 2
"""Moves between the positions that MBAR sees within a refresh."""

_FORGETTING = 0.05
"""Weight of the newest chains in the running mean of ∇E ∇Eᵀ."""


class TemperedPool(Pool):
    """Chains on a ladder of temperatures from the base to the model, exchanged and reweighted.

    Level l has chains on E_β = ½ |u|² + β_l f(u), 0 = β_0 < … < β_L = 1. A refresh takes several
    moves. In each, level 0 is drawn afresh from the base, all other levels move by MALA in the
    metric of their mean curvature E[∇E ∇Eᵀ] (`inverse_root`), and neighbours exchange chains with
    probability min(1, exp((β_{l+1} − β_l)(f_{l+1} − f_l))). The refresh then estimates log Z of
    every level by MBAR, and combines that with what is known of it from earlier refreshes
    (`tracking`). With these log Z, all chains of all levels are reweighted to the model. The inner
    β_l move slowly to where all neighbours exchange equally often.

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
        (2008), equations 11 and 13 (log Z and weights); Titsias (2023), arXiv 2305.14442 (metric).
    """

    kernel: MALA
    betas: Tensor  # (num_levels,)
    log_z: Tensor  # (num_levels,), nats
    log_z_variance: Tensor  # (num_levels,), nats²
    fisher: Tensor  # (num_levels - 1, d, d), mean of ∇E ∇Eᵀ at the levels above the base
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
        self.register_buffer("log_z_variance", torch.full((num_levels,), torch.inf))
        self.register_buffer("fisher", torch.empty(num_levels - 1, 0, 0))
        self.register_buffer("swap_rate", torch.full((num_levels - 1,), torch.nan))

    def initialise(self, dim: int) -> None:
        """Draw all chains from the base N(0, I) in `dim` dimensions, where log Z = 0 exactly."""
        super().initialise(dim)
        self.fisher = torch.eye(dim).to(self.u).repeat(self.num_levels - 1, 1, 1)

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        betas = adapt_ladder(self.betas, self.swap_rate)
        track = LogZTrack(self.log_z, self.log_z_variance)
        track = predict(track, self.f, state.f, self.betas, betas)
        swap_rate = torch.zeros_like(self.swap_rate)
        acceptance = torch.zeros_like(self.step_size[1:])
        scales = self.scales()
        snapshots = []
        for move in range(self.num_moves):
            state, accepted = self.move(ebm, state, betas, scales, generator)
            acceptance += accepted.mean(-1, keepdim=True) / self.num_moves
            state, swapped = exchange(state, betas, generator)
            swap_rate += swapped / self.num_moves
            if (self.num_moves - 1 - move) % _STRIDE == 0:
                snapshots.append(state.f)
        check_finite(state.f, state.grad)
        f = torch.cat(snapshots, 1)
        estimate = mbar_log_z(f, betas, track.log_z)
        # Snapshots of one refresh resemble each other: together they count as one.
        variance = len(snapshots) * mbar_variance(f, betas, estimate)
        track = correct(track, estimate, variance)
        self.log_z, self.log_z_variance = track
        mixture = log_mixture(state.f, betas, track.log_z)
        self.log_weights = torch.log_softmax(-state.f.flatten() - mixture, 0)
        grad = state.u[1:] + betas[1:, None, None] * state.grad[1:]
        self.fisher = torch.lerp(self.fisher, grad.mT @ grad / self.num_chains, _FORGETTING)
        self.u, self.f, self.log_partition = state.u, state.f, self.log_z[-1].clone()
        self.swap_rate, self.betas = swap_rate, betas
        # Level 0 makes no proposal: every draw of the base counts as accepted.
        self.acceptance = torch.cat([torch.ones_like(acceptance[:1]), acceptance]).squeeze(-1)
        steps = self.kernel.adapt(self.step_size[1:], acceptance)
        self.step_size = torch.cat([self.step_size[:1], steps])

    def move(
        self,
        ebm: ResidualEnergy,
        state: LangevinState,
        betas: Tensor,
        scales: Tensor,
        generator: torch.Generator,
    ) -> tuple[LangevinState, Tensor]:
        """Draw level 0 afresh and move all others by MALA; the pool is unchanged.

        Returns:
            The new state, and the acceptance probability (L − 1, n) of the levels above the base.
        """
        moved, accepted = self.kernel.step(
            ebm.residual_and_grad,
            LangevinState(*(part[1:] for part in state)),
            self.step_size[1:],
            inverse_temperature=betas[1:, None],
            scale=scales,
            generator=generator,
        )
        fresh = torch.empty_like(state.u[:1]).normal_(generator=generator)
        base = init_state(ebm.residual_and_grad, fresh)
        return LangevinState(*map(torch.cat, zip(base, moved, strict=True))), accepted

    def scales(self) -> Tensor:
        """Return the scales (L − 1, d, d) of MALA moves at the levels above the base."""
        return inverse_root(self.fisher, round(self.num_chains / _FORGETTING))

    def draw_scale(self) -> Tensor | None:
        """Return the scale (d, d) of MALA moves on p_θ."""
        return self.scales()[-1]

    @property
    def log_partition_std_error(self) -> Tensor:
        """Standard error of `log_partition`, a scalar, in nats, if the chains follow p_θ."""
        return self.log_z_variance[-1].sqrt()


def adapt_ladder(betas: Tensor, swap_rate: Tensor, rate: float = 0.05) -> Tensor:
    """Widen the gaps that are easily crossed and narrow the others, β_0 = 0 and β_L = 1 fixed.

        β_{l+1} − β_l ∝ (β_{l+1} − β_l) exp(rate (s_l − mean s))

    At rest all neighbours exchange equally often.

    Args:
        betas: Inverse temperatures (L,).
        swap_rate: s, acceptance (L − 1,) of the exchange of each pair; NaN before the first.
        rate: How fast gaps change at each call.

    Source:
        Miasojedow, Moulines and Vihola (2013), An adaptive parallel tempering algorithm, section 3,
        with equal rates in place of a given one.
    """
    s = torch.nan_to_num(swap_rate, nan=0.0)
    gaps = betas.diff() * torch.exp(rate * (s - s.mean()))
    inner = (gaps.cumsum(0) / gaps.sum())[:-1]
    return torch.cat([betas[:1], inner, betas[-1:]])


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
