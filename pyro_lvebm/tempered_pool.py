# SPDX-License-Identifier: Apache-2.0
"""Chains on a ladder of temperatures, exchanged and reweighted: the default pool."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.langevin import MALA, ULA, LangevinState
from pyro_lvebm.pool import Pool, ResidualEnergy
from pyro_lvebm.preconditioning import inverse_root
from pyro_lvebm.reweighting import log_mixture, mbar_log_z, mbar_variance
from pyro_lvebm.tempering import Tempered, adapt_ladder, num_gradients, running_fisher, temper
from pyro_lvebm.tracking import LogZTrack, correct, predict


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
        found = temper(
            ebm.residual_and_grad,
            state,
            betas,
            self.step_size[1:],
            self.scales(),
            kernel=self.kernel,
            num_moves=self.num_moves,
            generator=generator,
        )
        state, snapshots = found.state, found.snapshots
        f = torch.cat([snapshot.f for snapshot in snapshots], 1)
        estimate = mbar_log_z(f, betas, track.log_z)
        # Snapshots of one refresh resemble each other: together they count as one.
        variance = len(snapshots) * mbar_variance(f, betas, estimate)
        track = correct(track, estimate, variance)
        self.log_z, self.log_z_variance = track
        mixture = log_mixture(state.f, betas, track.log_z)
        self.log_weights = torch.log_softmax(-state.f.flatten() - mixture, 0)
        self.fisher = running_fisher(self.fisher, state, betas)
        self.u, self.f, self.log_partition = state.u, state.f, self.log_z[-1].clone()
        self.betas = betas
        self._record(found)

    def _record(self, found: Tempered) -> None:
        """Keep the rates of the moves, and adapt the step sizes to them."""
        self.swap_rate = found.swap_rate
        # Level 0 makes no proposal: every draw of the base counts as accepted.
        acceptance = found.acceptance
        self.acceptance = torch.cat([torch.ones_like(acceptance[:1]), acceptance]).squeeze(-1)
        steps = self.kernel.adapt(self.step_size[1:], acceptance)
        self.step_size = torch.cat([self.step_size[:1], steps])

    def scales(self) -> Tensor:
        """Return the scales (L − 1, d, d) of MALA moves at the levels above the base."""
        return inverse_root(self.fisher, num_gradients(self.num_chains))

    def draw_scale(self) -> Tensor | None:
        """Return the scale (d, d) of MALA moves on p_θ."""
        return self.scales()[-1]

    @property
    def log_partition_std_error(self) -> Tensor:
        """Standard error of `log_partition`, a scalar, in nats, if the chains follow p_θ."""
        return self.log_z_variance[-1].sqrt()
