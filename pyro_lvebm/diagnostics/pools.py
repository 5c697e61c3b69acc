# SPDX-License-Identifier: Apache-2.0
"""Whether a tempered pool mixes: its weights, exchanges, round trips and modes at frozen θ."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.model import LVEBM, check_unconditional
from pyro_lvebm.pools import LadderPool, ladder_of
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import (
    LangevinState,
    check_finite,
    ess,
    exchange,
    init_state,
    log_mixture,
    mbar_log_z,
    move_levels,
)

if TYPE_CHECKING:
    import pandas as pd

Labels = Callable[[Tensor, Tensor], Tensor]
"""Maps x (n, *x_shape) and z (n, *z_shape) to integer labels (n,)."""

_BATCHES = 20
"""Of refreshes, whose means give standard errors."""


@dataclass(frozen=True)
class PoolDiagnostics:
    """How a tempered pool moved over refreshes at frozen θ."""

    levels: pd.DataFrame  # by level: beta, ess, acceptance, swap_rate, climbing
    round_trips: int  # chains that were drawn from the base, reached the model and came back
    round_trip_rate: float  # the same, for each refresh and chain
    climb_moves: float  # mean moves from the base to the model; NaN if no chain arrived
    modes: pd.DataFrame | None  # by mode: share, std_error
    num_refreshes: int

    @property
    def verdict(self) -> str:
        """Whether chains travel between the base and the model, in one sentence."""
        rates = self.levels["swap_rate"].to_numpy()[:-1]
        low = int(rates.argmin())
        lowest = f"levels {low} and {low + 1} exchange {rates[low]:.0%}"
        if self.round_trips == 0:
            return (
                f"no chain went from the base to the model and back in {self.num_refreshes} "
                f"refreshes: the model is cut off from the base ({lowest} of their chains), and "
                "may miss modes; add levels, or refreshes if swap rates are high"
            )
        return (
            f"{self.round_trips} round trips in {self.num_refreshes} refreshes; a climb takes "
            f"{self.climb_moves:.0f} moves; {lowest} of their chains, the fewest"
        )

    def __str__(self) -> str:
        return self.verdict


def pool_diagnostics(
    ebm: LVEBM,
    *,
    num_refreshes: int = 200,
    modes: Tensor | Labels | None = None,
    seed: int = 0,
) -> PoolDiagnostics:
    """Run a copy of a tempered pool at frozen θ, ladder and step sizes, and follow its chains.

    Each refresh takes the pool's own moves and exchanges. By level l of inverse temperature β_l:

    - `ess`: mean effective sample size, for p_β_l, of the chains of all levels at the end of a
      refresh, weighted by MBAR. The last is that of the negatives.
    - `acceptance`: of the MALA moves; 1 at level 0, which is drawn from the base.
    - `swap_rate`: mean acceptance of exchanges with the next level; NaN at the last.
    - `climbing`: of the chains at this level that were drawn from the base in this run, the share
      that has not yet been at the last level. It falls towards 0 at the last, in steps of two
      levels, as even and odd pairs take turns; where it falls all at once, chains do not get
      through.

    A chain is followed through exchanges by a mark that is exchanged with it. Level 0 is drawn
    afresh at each move, so every chain begins there; it makes a round trip when it comes back to
    level 0 after a visit to the last level. The share of a mode is the weighted share of
    negatives in it, with a standard error by 20 batch means, which is too small where modes are
    not visited anew within a batch: look at the round trips first.

    Args:
        ebm: The LVEBM, with a `TemperedPool`; unchanged.
        num_refreshes: Refreshes to run, a multiple of 20.
        modes: Locations of modes in x, (k, *x_shape), of which each negative goes to the nearest
            in coordinates whitened by the base; or a function of x and z that returns integer
            labels. None leaves modes out.
        seed: Fixes every random number.

    Raises:
        ValueError: If the LVEBM is conditional, the pool has no ladder, a number is out of range,
            the energy is not finite, or `modes` do not fit or are not on the support of x.

    Source:
        Katzgraber, Trebst, Huse and Troyer (2006), Feedback-optimized parallel tempering Monte
        Carlo, equation 3 (`climbing`); Flegal and Jones (2010), Batch means and spectral variance
        estimators in Markov chain Monte Carlo.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, pool_diagnostics
        >>> x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(1, 1), x, z_dim=1)  # untrained: f = 0
        >>> result = pool_diagnostics(ebm, num_refreshes=20)
        >>> float(result.levels["swap_rate"].iloc[0]), result.round_trips > 0
        (1.0, True)
    """
    import pandas as pd

    check_unconditional(ebm, "pool_diagnostics")
    pool = copy.deepcopy(ladder_of(ebm.pool))
    if num_refreshes < _BATCHES or num_refreshes % _BATCHES:
        raise ValueError(f"num_refreshes must be a multiple of {_BATCHES}; got {num_refreshes}")
    labels = None if modes is None else _labels(ebm, modes)
    generator = generator_for(seed, Stream.POOL_DIAGNOSTICS, pool.seed, device=pool.u.device)
    chains, shares = _Chains(pool), []
    ess_sum, accepted_sum, swapped_sum = (pool.u.new_zeros(pool.num_levels) for _ in range(3))
    with ebm.frozen():
        state, scales, log_z = init_state(ebm.residual_and_grad, pool.u), pool.scales(), pool.log_z
        check_finite(state.f)
        for _ in range(num_refreshes):
            for _ in range(pool.num_moves):
                state, accepted = move_levels(
                    ebm.residual_and_grad,
                    state,
                    pool.betas,
                    pool.step_size[1:],
                    scales,
                    kernel=pool.kernel,
                    generator=generator,
                    base=ebm.base,
                )
                state, swapped = chains.exchange(state, pool.betas, generator)
                accepted_sum[1:] += accepted.mean(-1)
                swapped_sum[:-1] += swapped
            check_finite(state.f, state.grad)
            log_z = mbar_log_z(state.f, pool.betas, log_z)
            mixture = log_mixture(state.f, pool.betas, log_z)
            log_w = -pool.betas[:, None] * state.f.reshape(1, -1) - mixture
            ess_sum += ess(log_w)
            if labels is not None:
                weights = torch.softmax(log_w[-1], 0).double()
                shares.append(_share_by_label(labels(state.u.flatten(0, 1)), weights))
    num_moves = num_refreshes * pool.num_moves
    accepted_sum[0], swapped_sum[-1] = num_moves, math.nan
    columns = {
        "beta": pool.betas,
        "ess": ess_sum / num_refreshes,
        "acceptance": accepted_sum / num_moves,
        "swap_rate": swapped_sum / num_moves,
        "climbing": chains.climbing,
    }
    levels = pd.DataFrame({name: value.double().cpu().numpy() for name, value in columns.items()})
    return PoolDiagnostics(
        levels=levels.rename_axis("level"),
        round_trips=chains.round_trips,
        round_trip_rate=chains.round_trips / (num_refreshes * pool.num_chains),
        climb_moves=chains.climb_moves / chains.climbs if chains.climbs else math.nan,
        modes=_mode_table(shares) if shares else None,
        num_refreshes=num_refreshes,
    )


class _Chains:
    """Marks that travel with chains: since which move from the base, and whether at the top."""

    def __init__(self, pool: LadderPool) -> None:
        shape = (pool.num_levels, pool.num_chains, 1)
        self.born = pool.u.new_full(shape, math.nan, dtype=torch.float64)  # NaN: before this run
        self.arrived = torch.zeros_like(self.born)
        self.moves = self.round_trips = self.climbs = 0
        self.climb_moves = 0.0
        self._seen = self.born.new_zeros(2, pool.num_levels)  # chains: still climbing, and all

    def exchange(
        self, state: LangevinState, betas: Tensor, generator: torch.Generator
    ) -> tuple[LangevinState, Tensor]:
        """As `tempering.exchange` of chains whose level 0 is new, with the marks."""
        self.moves += 1
        self.born[0], self.arrived[0] = self.moves, 0.0
        # Exchanges look at f only, so positions can carry marks.
        d = state.u.shape[-1]
        marked = torch.cat([state.u.double(), self.born, self.arrived], -1)
        marked_state = LangevinState(marked, state.f, state.grad)
        (marked, f, grad), swapped = exchange(marked_state, betas, generator)
        u, self.born, self.arrived = marked.split([d, 1, 1], -1)
        self.born, self.arrived = self.born.clone(), self.arrived.clone()
        known = ~self.born.isnan()
        new = known[-1] & (self.arrived[-1] == 0.0)
        self.climbs += int(new.sum())
        self.climb_moves += float((self.moves + 1 - self.born[-1])[new].sum())
        self.arrived[-1] = 1.0
        self.round_trips += int((known[0] & (self.arrived[0] == 1.0)).sum())
        climbing = known & (self.arrived == 0.0)
        self._seen += torch.stack([climbing, known]).sum((-2, -1))
        return LangevinState(u.to(state.u.dtype), f, grad), swapped

    @property
    def climbing(self) -> Tensor:
        """Share of chains at each level (L,) that have not been at the last; NaN if none came."""
        return self._seen[0] / self._seen[1]


def _labels(ebm: LVEBM, modes: Tensor | Labels) -> Callable[[Tensor], Tensor]:
    """Return what maps whitened u (n, d) to labels (n,)."""
    if isinstance(modes, Tensor):
        if modes.dim() != 1 + len(ebm.x_shape) or modes.shape[1:] != ebm.x_shape or len(modes) < 2:
            raise ValueError(
                f"modes has shape {tuple(modes.shape)}; expected (k, *{tuple(ebm.x_shape)}) with k "
                "at least 2"
            )
        centres = modes.to(ebm.base_x.loc)
        if not torch.isfinite(centres).all():
            raise ValueError("modes has NaN or infinite entries; expected locations in x")
        ebm.base_x.support.check(centres)
        centres = ebm.base_x.whiten(centres)
        d = ebm.base_x.dim
        return lambda u: torch.cdist(ebm.coordinates(u)[:, :d], centres).argmin(1)

    def evaluate(u: Tensor) -> Tensor:
        labels = modes(*ebm.unwhiten(u))
        if labels.shape != u.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"modes(x, z) returned {labels.dtype} of shape {tuple(labels.shape)}; expected "
                f"integers of shape {tuple(u.shape[:1])}"
            )
        return labels

    return evaluate


def _share_by_label(labels: Tensor, weights: Tensor) -> dict[int, float]:
    values, index = labels.unique(return_inverse=True)
    share = weights.new_zeros(len(values)).index_add_(0, index, weights)
    return dict(zip(values.tolist(), share.tolist(), strict=True))


def _mode_table(shares: list[dict[int, float]]) -> pd.DataFrame:
    """Mean share of each label, with its standard error by batch means."""
    import pandas as pd

    table = pd.DataFrame(shares).fillna(0.0).sort_index(axis=1)
    batch = np.arange(len(table)) * _BATCHES // len(table)
    means = table.groupby(batch).mean()
    error = means.std(ddof=1) / math.sqrt(_BATCHES)
    return pd.DataFrame({"share": table.mean(), "std_error": error}).rename_axis("mode")
