# SPDX-License-Identifier: Apache-2.0
"""What pools of negatives share: persistent chains on the joint p_θ(x, z), whitened.

A pool is a module, so that its chains travel with `state_dict()` and `.to(device)`. It moves only
in `refresh`, with random numbers fixed by its seed and the number of refreshes so far.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_lvebm.langevin import MALA, Kernel, LangevinState, init_state
from pyro_lvebm.reweighting import ess
from pyro_lvebm.rng import Stream, generator_for

_DRAW_KERNEL = MALA()
"""Leaves the model invariant, also where the chains of a pool move by ULA."""


class ResidualEnergy(Protocol):
    """What a pool needs of an LVEBM: f and ∇f at whitened coordinates."""

    def residual(self, u: Tensor) -> Tensor:
        """Return f(u) (*b,) for u (*b, d)."""

    def residual_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) (*b,) and ∇f(u) (*b, d), without a graph."""


class Pool(nn.Module):
    """What pools share: chains u (num_levels, num_chains, d) and when they move.

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
        self.site = ""
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
        generator = self._generator(Stream.POOL_START)
        shape = (self.num_levels, self.num_chains, dim)
        self.u = torch.empty(shape, dtype=self.u.dtype, device=self.u.device).normal_(
            generator=generator
        )

    def belong_to(self, site: str) -> None:
        """Take random numbers of one's own from the name of the site of x, for good.

        Without it, pools of equal seeds would start from the same chains and move by the same
        noise, so that the errors of several log Z in one model would be one error. A pool that
        has not moved yet draws its chains anew.
        """
        if not self.site:
            self.site = site
            if not self.refreshes:
                self.initialise(self.u.shape[-1])

    def refresh(self, ebm: ResidualEnergy) -> None:
        """Move the chains towards p_θ under the present θ and update weights and log Z.

        Raises:
            ValueError: If f is NaN or infinite at a chain; the pool is then unchanged.
        """
        generator = self._generator(Stream.POOL_MOVES)
        state = init_state(ebm.residual_and_grad, self.u)
        check_finite(state.f)
        self._advance(ebm, state, generator)
        self.refreshes = self.refreshes + 1

    def _generator(self, stream: Stream) -> torch.Generator:
        """Return the generator of this refresh for one purpose."""
        key = (self.site, int(self.refreshes))
        return generator_for(self.seed, stream, *key, device=self.u.device)

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        raise NotImplementedError

    def draw_scale(self) -> Tensor | None:
        """Return the scale (d, d) of MALA moves on p_θ, or None for the identity."""
        return None

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return all chains (n, d) and their normalised log weights (n,) for p_θ."""
        return self.u.flatten(0, 1), self.log_weights

    def negative_residuals(self) -> Tensor:
        """Return f at the negatives (n,) under the θ of the last refresh, in nats."""
        return self.f.flatten()

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
        log_new = torch.log_softmax(log_w - (f - self.negative_residuals()), 0)
        return (log_w.exp() * (log_w - log_new)).sum()

    def kl_from_base(self) -> Tensor:
        """Return KL(p_θ ‖ base) as the weighted negatives see it, a scalar, in nats.

        Where no negative comes from the base, as in a `PersistentPool`, it is too small for a
        model that is much narrower than its base.
        """
        return self.kl_to(torch.zeros_like(self.negative_residuals()))

    def variance(self, f: Tensor) -> Tensor:
        """Return Var f under p_θ as the weighted negatives see it, a scalar, with a graph.

        Args:
            f: f at the negatives (n,), in nats.
        """
        w = self.log_weights.exp()
        variance: Tensor = (w * (f - (w * f).sum()) ** 2).sum()
        return variance

    def draw(
        self,
        ebm: ResidualEnergy,
        num_draws: int,
        *,
        num_moves: int = 10,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from p_θ: resample the weighted negatives, then move the copies by MALA.

        Returns:
            Whitened coordinates (num_draws, d). The pool itself is unchanged.
        """
        index = torch.multinomial(
            self.log_weights.exp(), num_draws, replacement=True, generator=generator
        )
        state, scale = (
            init_state(ebm.residual_and_grad, self.u.flatten(0, 1)[index]),
            self.draw_scale(),
        )
        for _ in range(num_moves):
            state, _ = _DRAW_KERNEL.step(
                ebm.residual_and_grad,
                state,
                self.step_size[-1],
                scale=scale,
                generator=generator,
            )
        return state.u


def check_finite(f: Tensor, grad: Tensor | None = None) -> None:
    """Refuse energies f, or gradients, that are NaN or infinite at some negative.

    Raises:
        ValueError: If there are any.
    """
    for what, bad in (
        ("energy", ~torch.isfinite(f)),
        ("gradient of the energy", ~torch.isfinite(f if grad is None else grad.sum(-1))),
    ):
        if bad.any():
            raise ValueError(
                f"the {what} is NaN or infinite at {int(bad.sum())} of {f.numel()} negatives; it "
                "must be finite everywhere. Check the energy and its parameters, or lower the "
                "learning rate"
            )
