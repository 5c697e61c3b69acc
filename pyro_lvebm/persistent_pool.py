# SPDX-License-Identifier: Apache-2.0
"""Plain persistent chains: the pool of the paper's own algorithm."""

from __future__ import annotations

import math

import torch

from pyro_lvebm.langevin import ULA, Kernel, LangevinState
from pyro_lvebm.pool import Pool, ResidualEnergy, check_finite


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
        check_finite(state.f)
        self.u, self.f, self.acceptance = state.u, state.f, acceptance
        self.step_size = self.kernel.adapt(self.step_size, acceptance[:, None])
        self.log_partition = self.log_partition + change.squeeze(0)
