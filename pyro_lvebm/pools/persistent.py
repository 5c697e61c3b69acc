# SPDX-License-Identifier: Apache-2.0
"""Plain persistent chains: the pool of the paper's own algorithm."""

from __future__ import annotations

import torch

from pyro_lvebm.pools.base import Pool, ResidualEnergy
from pyro_lvebm.sampling import ULA, Kernel, LangevinState, check_finite, log_mean_exp


class PersistentPool(Pool):
    """Plain persistent chains at the model's own temperature, equally weighted.

    Each refresh moves every chain u_j by `num_moves` Langevin steps on E_θ. From exact draws of
    the base, where log Z = 0, the changes of θ add up to

        log Z += log mean_j exp(f_old(u_j) − f_new(u_j))

    `log_partition` drifts where the chains do not follow p_θ: because θ moves faster than they
    do, or because ULA has another stationary law.

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

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import LVEBM, MALA, PersistentPool, QuadraticEnergy
        >>> energy, base = QuadraticEnergy(1, 1), dist.Normal(torch.zeros(1), 1.0).to_event(1)
        >>> ebm = LVEBM(energy, base, base, pool=PersistentPool(4000, kernel=MALA()))
        >>> for t in (1.05, 1.1, 1.15):
        ...     energy.set_precision(t * torch.eye(2))
        ...     for _ in range(10):
        ...         ebm.pool.refresh(ebm)
        >>> abs(ebm.log_partition - energy.log_partition()).item() < 0.01
        True
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
        log_z = self.log_partition + log_mean_exp((self.f - state.f).squeeze(0))
        acceptance = torch.zeros_like(self.acceptance)
        for _ in range(self.num_moves):
            state, accepted = self.kernel.step(
                ebm.residual_and_grad, state, self.step_size, base=ebm.base, generator=generator
            )
            acceptance += accepted.mean() / self.num_moves
        check_finite(state.f)
        self.u, self.f, self.acceptance = state.u, state.f, acceptance
        self.log_partition = log_z
        # Weights from before a change of dtype are equal only to the precision of then.
        self.log_weights = torch.full_like(self.log_weights, float(self.num_chains)).log_().neg_()
        self.step_size = self.kernel.adapt(self.step_size, acceptance[:, None])
