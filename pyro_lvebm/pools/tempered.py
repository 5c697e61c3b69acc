# SPDX-License-Identifier: Apache-2.0
"""Chains on a ladder of temperatures, exchanged and reweighted: the default pool."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.pools.base import ResidualEnergy
from pyro_lvebm.pools.ladder import LadderPool
from pyro_lvebm.pools.log_z_filter import LogZTrack, correct, predict
from pyro_lvebm.sampling import MALA, ULA, LangevinState, log_mixture, mbar_log_z, mbar_variance


class TemperedPool(LadderPool):
    """Chains on a ladder of temperatures from the base to the model, exchanged and reweighted.

    Level l has chains on E_β = ½ |u|² + β_l f(u), 0 = β_0 < … < β_L = 1. A refresh takes several
    moves. In each, level 0 is drawn afresh from the base, all other levels move by MALA in the
    metric of their mean curvature E[∇E ∇Eᵀ] (`inverse_root`), and neighbours exchange chains with
    probability min(1, exp((β_{l+1} − β_l)(f_{l+1} − f_l))). The refresh then estimates log Z of
    every level by MBAR, and combines that with what is known of it from earlier refreshes
    (`log_z_filter`). With these log Z, all chains of all levels are reweighted to the model. The
    inner β_l move slowly to where all neighbours exchange equally often.

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

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        betas = self.next_betas()
        track = LogZTrack(self.log_z, self.log_z_variance)
        track = predict(track, self.f, state.f, self.betas, betas)
        found = self._climb(ebm, state, betas, generator)
        f = torch.cat([snapshot.f for snapshot in found.snapshots], 1)
        estimate = mbar_log_z(f, betas, track.log_z)
        # Snapshots of one refresh resemble each other: together they count as one.
        variance = len(found.snapshots) * mbar_variance(f, betas, estimate)
        track = correct(track, estimate, variance)
        self.log_z, self.log_z_variance = track
        mixture = log_mixture(found.state.f, betas, track.log_z)
        self.log_weights = torch.log_softmax(-found.state.f.flatten() - mixture, 0)
        self._record(ebm, found, betas)

    @property
    def log_partition_std_error(self) -> Tensor:
        """Standard error of `log_partition`, a scalar, in nats, if the chains follow p_θ."""
        return self.log_z_variance[-1].sqrt()
