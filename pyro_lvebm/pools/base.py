# SPDX-License-Identifier: Apache-2.0
"""What pools of negatives share: persistent chains on the joint p_θ(x, z), whitened.

A pool is a module, so that its chains travel with `state_dict()` and `.to(device)`. It moves only
in `refresh`, with random numbers fixed by its seed and the number of refreshes so far.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import (
    MALA,
    STANDARD_NORMAL,
    Base,
    Kernel,
    LangevinState,
    check_finite,
    ess,
    init_state,
)
from pyro_lvebm.validation import check_at_least

_SETTLING_REFRESHES = 20

_MAX_REFRESHES = 80

_DRAW_KERNEL = MALA()
"""Leaves the model invariant, even if the chains of a pool move by ULA."""


class ResidualEnergy(Protocol):
    """What a pool needs of a density: f and ∇f at whitened coordinates, and their base."""

    @property
    def base(self) -> Base:
        """The law of u where f = 0."""

    @property
    def is_base(self) -> bool:
        """Whether f = 0 everywhere."""

    def residual_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(u) (*b,) and ∇f(u) (*b, d), without a graph."""

    def given(self, context: Tensor) -> ResidualEnergy:
        """Return the density at contexts (*b, *context_shape)."""


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
    theta: list[Tensor]  # parameters at the last refresh that `mark` was told of
    takes_contexts = False

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
        check_at_least(2, num_chains=num_chains)
        check_at_least(1, num_moves=num_moves)
        if not step_size > 0:
            raise ValueError(f"step_size must be positive; got {step_size}")
        self.num_levels, self.num_chains = num_levels, num_chains
        self.num_moves, self.kernel, self.seed = num_moves, kernel, seed
        self.site = ""
        self.theta = []
        n = num_levels * num_chains
        self.register_buffer("u", torch.empty(num_levels, num_chains, 0))
        self.register_buffer("f", torch.zeros(num_levels, num_chains))
        self.register_buffer("log_weights", torch.full((n,), float(n)).log().neg())
        self.register_buffer("step_size", torch.full((num_levels, 1), step_size))
        self.register_buffer("log_partition", torch.zeros(()))
        self.register_buffer("acceptance", torch.full((num_levels,), torch.nan))
        self.register_buffer("refreshes", torch.zeros((), dtype=torch.long))

    def initialise(self, dim: int, base: Base = STANDARD_NORMAL) -> None:
        """Draw all chains from the base in `dim` dimensions, where log Z = 0 exactly."""
        generator = self._generator(Stream.POOL_START)
        self.u = base.draw((self.num_levels, self.num_chains, dim), self.u, generator)

    def check_free(self, context_shape: tuple[int, ...] | None) -> None:
        """Refuse a place in an LVEBM with contexts of this shape, or without any.

        Raises:
            ValueError: If the LVEBM has contexts and the pool is not one for them, or the other
                way round, or the pool belongs to another LVEBM.
        """
        if self.u.shape[-1] > 0:
            raise ValueError(
                "the pool belongs to another LVEBM, whose chains and log Z it holds; give each "
                "LVEBM a pool of its own"
            )
        if self.takes_contexts != (context_shape is not None):
            raise ValueError(
                "a conditional LVEBM needs a ContextPool, and others none; got "
                f"{type(self).__name__} with context_shape={context_shape}"
            )

    def prepare(self, dim: int, base: Base, context_shape: torch.Size | None) -> None:
        """Take a place in an LVEBM of `dim` dimensions, after `check_free`."""
        self.initialise(dim, base)

    def belong_to(self, site: str) -> None:
        """Take random numbers of one's own from the name of the site of x that it stands at.

        Without it, pools of equal seeds would start from the same chains and move by the same
        noise, so that the errors of several log Z in one model would be one error. The first
        refresh draws the chains of a pool with a site anew. At several sites the last one counts.
        """
        self.site = site

    def refresh(self, ebm: ResidualEnergy, context: Tensor | None = None) -> None:
        """Move the chains towards p_θ under the present θ and update weights and log Z.

        Args:
            ebm: The LVEBM.
            context: Contexts (*m, *context_shape) of a minibatch, which only a `ContextPool`
                takes: some of them replace its oldest.

        Raises:
            RuntimeError: If a `ContextPool` has never had contexts.
            ValueError: If f is NaN or infinite at a chain, or contexts do not fit; the pool is
                then unchanged.
        """
        if context is not None and not self.takes_contexts:
            raise ValueError(f"a {type(self).__name__} takes no contexts; that is a ContextPool")
        put_back = self.snapshot()
        try:
            if self.site and not self.refreshes:
                self.initialise(self.u.shape[-1], ebm.base)
            self._refresh(ebm, context)
        except BaseException:
            put_back()
            raise

    def _refresh(self, ebm: ResidualEnergy, context: Tensor | None) -> None:
        if ebm.is_base:
            self._draw_anew(ebm.base)
        else:
            self._move(ebm)

    def _draw_anew(self, base: Base) -> None:
        """Draw all chains from the base, which is the model, so that log Z = 0 exactly."""
        self.u = base.draw(tuple(self.u.shape), self.u, self._generator(Stream.POOL_MOVES))
        self.f, self.log_partition = torch.zeros_like(self.f), torch.zeros_like(self.log_partition)
        equal = torch.full_like(self.log_weights, float(len(self.log_weights)))
        self.log_weights = equal.log_().neg_()
        self.acceptance = torch.ones_like(self.acceptance)
        self.refreshes = self.refreshes + 1

    def _move(self, ebm: ResidualEnergy) -> None:
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

    def settle(self, ebm: ResidualEnergy, log_z_error: float | None = None) -> None:
        """Refresh until the chains have followed θ: 20 times, and on until log Z is known.

        Args:
            ebm: The LVEBM.
            log_z_error: Go on, up to 80 refreshes in all, until `log_partition_std_error` is at
                most this, in nats; it does not count where there is none.
        """
        for count in range(_MAX_REFRESHES):
            error = self.log_partition_std_error
            wanted = log_z_error is not None and error is not None and float(error) > log_z_error
            if count >= _SETTLING_REFRESHES and not wanted:
                break
            self.refresh(ebm)

    def mark(self, params: Iterable[Tensor]) -> None:
        """Record the parameters that the chains have been refreshed under."""
        self.theta = [p.detach().clone() for p in params]

    def is_fresh(self, params: Iterable[Tensor]) -> bool:
        """Return whether the chains have been refreshed under these parameters."""
        params = list(params)
        return len(params) == len(self.theta) and all(
            p.shape == q.shape and p.device == q.device and p.dtype == q.dtype and torch.equal(p, q)
            for p, q in zip(params, self.theta, strict=True)
        )

    def snapshot(self) -> Callable[[], None]:
        """Return an action that puts the pool back to where it is now."""
        buffers, theta, seed = dict(self.named_buffers()), self.theta, self.seed

        def put_back() -> None:
            # A pool replaces its buffers and never writes into them, so these are the old values.
            for name, value in buffers.items():
                setattr(self, name, value)
            self.theta, self.seed = theta, seed

        return put_back

    def copy_for(self, seed: int) -> Self:
        """Return a copy with random numbers of its own, from this seed."""
        pool = copy.deepcopy(self)
        pool.seed = seed
        return pool

    def draw_scale(self) -> Tensor | None:
        """Return the scale (d, d) of MALA moves on p_θ, or None for the identity."""
        return None

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return all chains (n, d) and their normalised log weights (n,) for p_θ."""
        return self.u.flatten(0, 1), self.log_weights

    def negative_contexts(self) -> Tensor | None:
        """Return the contexts (n, *context_shape) of the negatives, None where there are none."""
        return None

    @property
    def log_partition_std_error(self) -> Tensor | None:
        """Standard error of `log_partition`, a scalar, in nats; None where the pool has none."""
        return None

    def statistics(self) -> dict[str, float]:
        """Return what a row of the history has of the pool; log Z in nats."""
        found = {"log_partition": float(self.log_partition), "ess": float(self.ess)}
        found |= {f"acceptance_{level}": r for level, r in enumerate(self.acceptance.tolist())}
        if self.log_partition_std_error is not None:
            found["log_partition_se"] = float(self.log_partition_std_error)
        return found

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
        if ebm.is_base:
            return ebm.base.draw((num_draws, self.u.shape[-1]), self.u, generator)
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
                base=ebm.base,
                scale=scale,
                generator=generator,
            )
        return state.u
