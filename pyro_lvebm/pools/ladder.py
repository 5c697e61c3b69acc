# SPDX-License-Identifier: Apache-2.0
"""What pools on a ladder of temperatures share: inverse temperatures, metrics and their moves."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.pools.base import Pool, ResidualEnergy
from pyro_lvebm.sampling import (
    MALA,
    STANDARD_NORMAL,
    Base,
    LangevinState,
    Tempered,
    adapt_ladder,
    inverse_root,
    num_gradients,
    running_fisher,
    temper,
)
from pyro_lvebm.validation import check_at_least


class LadderPool(Pool):
    """Chains on E_β = U(u) + β_l f(u), 0 = β_0 < … < β_L = 1, for each of `num_levels` levels.

    Args:
        num_levels: Number of temperatures, at least 2.
        num_chains: Number of chains at each temperature.
        num_moves: MALA steps in each refresh.
        kernel: A `MALA` kernel.
        step_size: First step size η in whitened coordinates; each level adapts its own.
        seed: Fixes every random number of the pool.

    Raises:
        ValueError: If a count is too small, or the step size is not positive.
    """

    kernel: MALA
    betas: Tensor  # (num_levels,)
    log_z: Tensor  # (num_levels,), nats
    log_z_variance: Tensor  # (num_levels,), nats²
    fisher: Tensor  # (num_levels - 1, d, d), mean of ∇E ∇Eᵀ at the levels above the base
    swap_rate: Tensor  # (num_levels - 1,)

    def __init__(
        self,
        num_levels: int,
        num_chains: int,
        *,
        num_moves: int,
        kernel: MALA,
        step_size: float,
        seed: int,
    ) -> None:
        check_at_least(2, num_levels=num_levels)
        super().__init__(
            num_levels,
            num_chains,
            num_moves=num_moves,
            kernel=kernel,
            step_size=step_size,
            seed=seed,
        )
        self.register_buffer("betas", torch.linspace(0.0, 1.0, num_levels) ** 1.5)
        self.register_buffer("log_z", torch.zeros(num_levels))
        self.register_buffer("log_z_variance", torch.full((num_levels,), torch.inf))
        self.register_buffer("fisher", torch.empty(num_levels - 1, 0, 0))
        self.register_buffer("swap_rate", torch.full((num_levels - 1,), torch.nan))

    def initialise(self, dim: int, base: Base = STANDARD_NORMAL) -> None:
        """Draw all chains from the base in `dim` dimensions, where log Z = 0 exactly."""
        super().initialise(dim, base)
        self.fisher = torch.eye(dim).to(self.u).repeat(self.num_levels - 1, 1, 1)

    def _draw_anew(self, base: Base) -> None:
        super()._draw_anew(base)
        self.log_z = torch.zeros_like(self.log_z)
        self.log_z_variance = torch.zeros_like(self.log_z)
        self.swap_rate = torch.ones_like(self.swap_rate)

    def _climb(
        self,
        ebm: ResidualEnergy,
        state: LangevinState,
        betas: Tensor,
        generator: torch.Generator,
    ) -> Tempered:
        """Move the chains on a ladder; step sizes and metrics are those of the last refresh."""
        return temper(
            ebm.residual_and_grad,
            state,
            betas,
            self.step_size[1:],
            self.scales(),
            kernel=self.kernel,
            num_moves=self.num_moves,
            generator=generator,
            base=ebm.base,
        )

    def next_betas(self) -> Tensor:
        """Return the ladder (num_levels,) of the next refresh."""
        return adapt_ladder(self.betas, self.swap_rate)

    def _record(self, ebm: ResidualEnergy, found: Tempered, betas: Tensor) -> None:
        """Keep chains, ladder and rates, and adapt metrics and step sizes to them."""
        self.fisher = running_fisher(self.fisher, found.state, betas, ebm.base)
        self.u, self.f, self.betas = found.state.u, found.state.f, betas
        self.log_partition = self.log_z[-1].clone()
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

    def statistics(self) -> dict[str, float]:
        """Return what a row of the history has of the pool; log Z in nats."""
        swaps = {f"swap_rate_{pair}": r for pair, r in enumerate(self.swap_rate.tolist())}
        return super().statistics() | swaps


def ladder_of(pool: Pool) -> LadderPool:
    """Return the pool, if it has a ladder of temperatures.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(pool, LadderPool):
        raise ValueError(
            f"a {type(pool).__name__} has no ladder of temperatures; look at pool.ess and "
            "pool.acceptance, or train with a TemperedPool"
        )
    return pool
