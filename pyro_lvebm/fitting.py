# SPDX-License-Identifier: Apache-2.0
"""The loop of `Saddle.fit`: steps, schedule, evaluation of held-out data, and stopping."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import trange

from pyro_lvebm.annealing import RoughEnergyError
from pyro_lvebm.averaging import assign
from pyro_lvebm.rollback import pool_snapshot
from pyro_lvebm.schedules import Schedule

if TYPE_CHECKING:
    from pyro_lvebm.saddle import Saddle

LOG_Z_ERROR = 0.01
"""Nats, stated by a pool: noise of log Z is common to all data, and hides which step was best."""


@dataclass
class _Best:
    """The best parameters so far, by held-out log evidence."""

    value: float
    values: dict[Tensor, Tensor]
    restore_pools: Callable[[], None]
    misses: int = 0


def run_fit(
    saddle: Saddle,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_steps: int,
    batches: Iterable[Sequence[Any]] | None,
    schedule: Schedule,
    min_kl: float | None,
    held_out: tuple[Any, ...] | None,
    patience: int | None,
    evaluate_every: int,
    progress: bool,
    description: str,
) -> list[float]:
    """Take steps, and end with averaged parameters; see `Saddle.fit`."""
    _check(num_steps, held_out, patience, evaluate_every)
    if min_kl is not None and not min_kl >= 0:
        raise ValueError(f"min_kl must not be negative; got {min_kl}")
    if batches is not None and args:
        raise ValueError(
            f"give batches, or arguments of the model, and not both; got {len(args)} arguments "
            "beside batches"
        )
    stream = itertools.repeat(args) if batches is None else endless(batches)
    args = next(stream)
    stream = itertools.chain([args], stream)
    losses: list[float] = []
    best: _Best | None = None
    if held_out is not None:
        value = _evaluate(saddle, held_out, args, kwargs)
        start = {p: p.detach().clone() for p in saddle.parameters()} | saddle.average.copy()
        best = _Best(value, start, pool_snapshot(saddle.ebms))
    try:
        with trange(num_steps, disable=not progress, desc=description, unit="step") as bar:
            for t in bar:
                factor = schedule(t / num_steps)
                losses.append(saddle.scaled_step(factor, min_kl, next(stream), kwargs))
                if progress and t % 10 == 0:
                    bar.set_postfix(_status(saddle, losses), refresh=False)
                if best is None or held_out is None:
                    continue
                if (t + 1) % evaluate_every and t + 1 < num_steps:
                    continue
                value = _evaluate(saddle, held_out, args, kwargs)
                misses = 0 if value > best.value else best.misses + 1
                # Where only a guide is trained the evidence stays, and the last one is the best.
                if value >= best.value:
                    best = _Best(value, saddle.average.copy(), pool_snapshot(saddle.ebms))
                best.misses = misses
                if patience is not None and misses >= patience:
                    break
    except BaseException as error:
        # Averages of a fit that diverged are worse than what the failed step went back to.
        if losses and (best is not None or isinstance(error, KeyboardInterrupt)):
            _end_at_averages(saddle, best)
            which = "their averages" if best is None else "the averages that were best"
            error.add_note(f"fit: after {len(losses)} steps, parameters now have {which}")
        raise
    _end_at_averages(saddle, best)
    for ebm in saddle.ebms:
        ebm.settle(LOG_Z_ERROR)
    saddle.recorder.look(saddle.step_count)
    return losses


def _end_at_averages(saddle: Saddle, best: _Best | None) -> None:
    """Give parameters and pools the best averages, or the last where nothing was held out."""
    if best is not None:
        best.restore_pools()
        trained = saddle.average.values
        saddle.average.values = {p: v for p, v in best.values.items() if p in trained}
    assign(saddle.average.values)
    saddle.last_good = {}  # the averages are meant, and no failing step goes back behind them


def endless(batches: Iterable[Sequence[Any]]) -> Iterator[tuple[Any, ...]]:
    """Go through batches again and again.

    Args:
        batches: Tuples or lists of arguments; every new iteration starts again, as that of a
            `DataLoader`.

    Raises:
        ValueError: If an iteration has nothing, as the second one of a generator, or an item is
            no tuple or list.
    """
    for epoch in itertools.count():
        empty = True
        for batch in batches:
            if not isinstance(batch, tuple | list):
                raise ValueError(
                    "every item of batches must be a tuple or list of arguments of the model, as "
                    f"from DataLoader(TensorDataset(x, ids)); got {type(batch).__name__}"
                )
            empty = False
            yield tuple(batch)
        if empty:
            raise ValueError(
                f"batches had nothing at pass {epoch + 1}, before the last step. Give an iterable "
                "that starts again, such as a DataLoader or a list, and not a generator"
            )


def _check(
    num_steps: int, held_out: tuple[Any, ...] | None, patience: int | None, evaluate_every: int
) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    if evaluate_every < 1 or (patience is not None and patience < 1):
        raise ValueError(
            f"evaluate_every and patience must be at least 1; got {evaluate_every} and {patience}"
        )
    if held_out is None and patience is not None:
        raise ValueError("patience needs held-out data: give held_out=(x_held_out,)")
    if held_out is not None and not isinstance(held_out, tuple):
        raise ValueError(
            "held_out must be a tuple of arguments of the model, as in held_out=(x,); got "
            f"{type(held_out).__name__}"
        )


def _evaluate(
    saddle: Saddle, held_out: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> float:
    saddle.prepare(args, kwargs)
    try:
        value, error = saddle.log_evidence(*held_out, **kwargs)
    except RoughEnergyError as failure:
        text = f"held-out data could not be evaluated: {failure}"
        saddle.recorder.warn("evaluation", saddle.step_count, text)
        value, error = -math.inf, math.nan
    saddle.recorder.record(saddle.step_count, log_evidence=value, log_evidence_se=error)
    return value


def _status(saddle: Saddle, losses: list[float]) -> dict[str, str]:
    recent = losses[-50:]
    status = {"loss": f"{sum(recent) / len(recent):.4g}"}
    if saddle.ebms:
        pool = saddle.ebms[0].pool
        status["log Z"] = f"{float(pool.log_partition):.3f}"
        status["ESS"] = f"{float(pool.ess):.0f}/{len(pool.log_weights)}"
    return status
