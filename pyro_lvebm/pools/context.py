# SPDX-License-Identifier: Apache-2.0
"""The pool of a conditional LVEBM: negatives that carry contexts."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.pools.base import ResidualEnergy
from pyro_lvebm.pools.ladder import LadderPool
from pyro_lvebm.rng import Stream
from pyro_lvebm.sampling import MALA, SNAPSHOT_STRIDE, STANDARD_NORMAL, Base, LangevinState
from pyro_lvebm.validation import check_at_least

_BURN_IN_MOVES = 32
"""Moves before the chains of a new context count."""

_LIFETIME = 8
"""How long a context stays, in times of its burn-in."""


class ContextPool(LadderPool):
    """Chains on a ladder of temperatures, each with a context c of the data: p_θ(x, z | c).

    There are two chains for each context at each temperature. Neighbours exchange chains of one
    context, so Z(c) cancels, and the chains of β = 1 are the negatives, with equal weights: those
    after every second move of a refresh. A refresh that is given the contexts of a minibatch
    replaces the oldest contexts of the pool by some of them; chains with a new context do not
    count for their first 32 moves. So contexts of the negatives have the law of those of the data.

    `log_partition` is the mean of log Z(c) over the contexts of the pool, by thermodynamic
    integration with the trapezoidal rule and its end correction,

        log Z(c) = −∫ E_β[f] dβ ≈ −Σ_l [h_l (E_l[f] + E_{l+1}[f]) / 2 + h_l² (V_{l+1} − V_l) / 12],

    with h_l = β_{l+1} − β_l and V_l = Var_{β_l}(f | c) from the differences of the two chains. Of
    each datum's own log Z(c), `conditional_log_partition` gives a bracket.

    Args:
        num_levels: Number of temperatures, at least 2.
        num_contexts: Number of contexts.
        num_moves: MALA steps in each refresh.
        step_size: First step size η in whitened coordinates; each level adapts its own.
        seed: Fixes every random number of the pool.

    Raises:
        ValueError: If a count is too small, or the step size is not positive.

    Source:
        docs/maths.md, "Contexts"; Gelman and Meng (1998), Simulating normalizing constants,
        section 4 (thermodynamic integration).
    """

    takes_contexts = True
    context: Tensor  # (num_contexts, *context_shape), zero before the first refresh
    age: Tensor  # (num_contexts,), refreshes with the present context
    negative_u: Tensor  # (snapshots * 2 * num_contexts, d)
    negative_f: Tensor  # (snapshots * 2 * num_contexts,)

    def __init__(
        self,
        num_levels: int = 8,
        num_contexts: int = 128,
        *,
        num_moves: int = 8,
        step_size: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_at_least(_LIFETIME, num_contexts=num_contexts)
        super().__init__(
            num_levels,
            2 * num_contexts,
            num_moves=num_moves,
            kernel=MALA(),
            step_size=step_size,
            seed=seed,
        )
        self.num_contexts = num_contexts
        self.burn_in = -(-_BURN_IN_MOVES // num_moves)
        n = -(-num_moves // SNAPSHOT_STRIDE) * self.num_chains
        self.log_weights = torch.full((n,), float(n)).log().neg()
        self.register_buffer("context", torch.empty(0))
        self.register_buffer("age", torch.zeros(num_contexts, dtype=torch.long))
        self.register_buffer("negative_u", torch.empty(n, 0))
        self.register_buffer("negative_f", torch.zeros(n))

    def prepare(self, dim: int, base: Base, context_shape: torch.Size | None) -> None:
        """Take a place in a conditional LVEBM; see `Pool.prepare`."""
        super().prepare(dim, base, context_shape)
        assert context_shape is not None
        self.context = self.u.new_zeros(self.num_contexts, *context_shape)

    def initialise(self, dim: int, base: Base = STANDARD_NORMAL) -> None:
        """Draw all chains from the base in `dim` dimensions; contexts come later."""
        super().initialise(dim, base)
        self.context = torch.zeros_like(self.context)
        self.age = torch.full_like(self.age, -1)
        self.negative_u = self.u.new_zeros(len(self.log_weights), dim)

    @property
    def is_empty(self) -> bool:
        """Whether the pool has never had contexts."""
        return bool((self.age < 0).all())

    def _refresh(self, ebm: ResidualEnergy, context: Tensor | None) -> None:
        empty = self.is_empty
        shape = self.context.shape[1:]
        if context is not None:
            if context.shape[context.dim() - len(shape) :] != shape or not context.numel():
                raise ValueError(
                    f"context has shape {tuple(context.shape)}; expected (*rows, *{tuple(shape)}) "
                    "with at least one row"
                )
            self._take(context.detach().reshape(-1, *shape), empty)
        elif empty:
            raise RuntimeError("the pool has no contexts yet: give those of some data first")
        energy = ebm.given(self.chain_contexts())
        for _ in range(self.burn_in if empty else 1):
            self._move(energy)

    def settle(self, ebm: ResidualEnergy, log_z_error: float | None = None) -> None:
        """Refresh until the chains have followed θ; an empty pool has none that could."""
        if not self.is_empty:
            super().settle(ebm)

    def _take(self, context: Tensor, everything: bool) -> None:
        """Replace the oldest contexts, or all of them, by random rows of others."""
        generator = self._generator(Stream.POOL_CONTEXTS)
        life, now = _LIFETIME * self.burn_in, int(self.refreshes)
        due = (now + 1) * self.num_contexts // life - now * self.num_contexts // life
        count = self.num_contexts if everything else due
        if not count:
            return
        # A permutation in rounds, so that few rows are taken equally often.
        rounds = -(-count // len(context))
        rows = torch.cat(
            [
                torch.randperm(len(context), generator=generator, device=context.device)
                for _ in range(rounds)
            ]
        )[:count]
        oldest = self.age.argsort(descending=True, stable=True)[:count]
        if everything:
            oldest = torch.arange(count, device=context.device)
        self.context = self.context.index_copy(0, oldest, context[rows].to(self.context))
        fresh = torch.full_like(oldest, self.burn_in if everything else 0)
        self.age = self.age.index_copy(0, oldest, fresh)

    def chain_contexts(self) -> Tensor:
        """Return the context (2 * num_contexts, *context_shape) of each chain of a level."""
        return torch.cat([self.context, self.context])

    def _advance(
        self, ebm: ResidualEnergy, state: LangevinState, generator: torch.Generator
    ) -> None:
        betas = self.next_betas()
        found = self._climb(ebm, state, betas, generator)
        active = self.age >= self.burn_in
        f = torch.stack([snapshot.f for snapshot in found.snapshots])  # (S, L, 2 n)
        log_z = integrate(f.unflatten(-1, (2, -1))[..., active], betas)
        self.log_z = log_z.mean(-1)
        self.log_z_variance = log_z.var(-1) / log_z.shape[-1]
        counts = torch.where(active, 0.0, -torch.inf).to(f).repeat(2 * len(f))
        self.log_weights = torch.log_softmax(counts, 0)
        self.negative_u = torch.cat([snapshot.u[-1] for snapshot in found.snapshots])
        self.negative_f = f[:, -1].flatten()
        self.age = self.age + 1
        self._record(ebm, found, betas)

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return the chains (n, d) of β = 1 and their normalised log weights (n,)."""
        return self.negative_u, self.log_weights

    def negative_residuals(self) -> Tensor:
        """Return f at the negatives (n,) under the θ of the last refresh, in nats."""
        return self.negative_f

    def negative_contexts(self) -> Tensor:
        """Return the contexts (n, *context_shape) of the negatives."""
        contexts = self.chain_contexts()
        return contexts.repeat(len(self.log_weights) // len(contexts), *[1] * (contexts.dim() - 1))

    def kl_to(self, f: Tensor) -> Tensor:
        """Return the mean over contexts of KL(p_old(· | c) ‖ p_new(· | c)), a scalar, in nats.

            KL ≈ ½ Var(Δ | c) = ¼ E[(Δ_1 − Δ_2)²],    Δ = f_new − f_old

        to second order in Δ, with Δ_1 and Δ_2 at the two chains of a context.

        Args:
            f: f_new at the negatives (n,), under other parameters than those of the last refresh.
        """
        return 0.5 * self.variance(f - self.negative_f)

    def kl_from_base(self) -> Tensor:
        """Return the mean over contexts of KL(p_θ(· | c) ‖ base), a scalar, in nats.

        It is −E[f | c] − log Z(c).
        """
        kl = -(self.log_weights.exp() * self.negative_f).sum() - self.log_partition
        return kl.clamp(min=0.0)

    def variance(self, f: Tensor) -> Tensor:
        """Return the mean over contexts of Var(f | c) = ½ E[(f_1 − f_2)²], a scalar, with a graph.

        Args:
            f: f at the negatives (n,), in nats.
        """
        pairs = f.reshape(-1, 2, self.num_contexts)
        weights = self.log_weights.exp().reshape(pairs.shape).sum((0, 1))
        variance: Tensor = (weights * 0.5 * (pairs[:, 0] - pairs[:, 1]).square().mean(0)).sum()
        return variance


def integrate(f: Tensor, betas: Tensor) -> Tensor:
    """Return log Z_β(c) (L, n) of every level and context, by thermodynamic integration.

    Args:
        f: Residual energies (S, L, 2, n) of S snapshots of two chains for each context.
        betas: Inverse temperatures (L,), from 0.
    """
    mean = f.mean((0, 2))  # (L, n)
    variance = 0.5 * (f[:, :, 0] - f[:, :, 1]).square().mean((0, 2))  # (L,), of all contexts
    h = betas.diff()[:, None]
    steps = 0.5 * h * (mean[:-1] + mean[1:]) + h**2 / 12.0 * variance.diff()[:, None]
    return torch.cat([torch.zeros_like(mean[:1]), -steps.cumsum(0)])
