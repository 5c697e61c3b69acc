# SPDX-License-Identifier: Apache-2.0
"""One optimiser step on the parameters, inside the trust region, and undone where it fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
)
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from torch.linalg import LinAlgError

from pyro_lvebm.model import LVEBM
from pyro_lvebm.sites import PositivePairs, all_nodes
from pyro_lvebm.training.averaging import ParameterAverage
from pyro_lvebm.training.history import History
from pyro_lvebm.training.loss import Loss
from pyro_lvebm.training.optimiser import checked_step, optimiser_snapshot
from pyro_lvebm.training.trust_region import TrustRegion, bounded_step, restore
from pyro_lvebm.validation import DataError

_REPLAYED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


def check_not_replayed(loss: ELBO, ebms: list[LVEBM], with_particles: bool) -> None:
    """Refuse a loss that replays its first run where particles or pools are to move.

    Raises:
        ValueError: If the loss is one of Pyro's that `torch.jit.trace` compiles, and the guide
            holds particles or an energy can change.
    """
    if not isinstance(loss, _REPLAYED) or not (with_particles or any(e.is_trained for e in ebms)):
        return
    name = type(loss).__name__
    what = "particles" if with_particles else "the pool of negatives, as θ can change,"
    raise ValueError(
        f"{name} replays a graph of its first run, in which {what} would never move. Use "
        f"{name.removeprefix('Jit')}, which runs the model in every step; {name} is for guides "
        "without particles at frozen θ, ebm.requires_grad_(False)"
    )


class Ascent(NamedTuple):
    """What one step on the parameters did."""

    loss: Loss  # before the update, nats
    positive: dict[str, float]  # mean positive energy before the update, by the site of x, nats
    before: dict[Tensor, Tensor]  # the values before the update, by parameter
    halvings: int
    kl: float  # KL(p_old ‖ p_new), nats
    lengthening: float  # factor on the update of the energies, at least 1


def ascend(
    loss_and_grads: Callable[[], Loss],
    optim: PyroOptim,
    ebms: list[LVEBM],
    region: TrustRegion,
    last_good: dict[Tensor, Tensor],
    step: int,
    undo: list[Callable[[], None]],
) -> Ascent:
    """Take one optimiser step on all parameters that a loss meets.

    Args:
        loss_and_grads: Runs model and guide, leaves gradients, and returns the loss in nats.
        optim: The optimiser.
        ebms: The LVEBMs of the model.
        region: How far the update may and should move the LVEBMs.
        last_good: For each parameter, the last value whose loss was finite.
        step: Number of this step, for messages.
        undo: Takes actions that put parameters and optimiser back, should what follows fail.

    Raises:
        ValueError: If the loss, a gradient, the update or what the optimiser remembers of it is
            NaN or infinite; parameters are then back at the last values with a finite loss, and
            the optimiser is as before the step.
    """
    pairs, capture = PositivePairs(), poutine.trace(param_only=True)
    try:
        with warnings.catch_warnings(), pairs, capture:
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
            loss = _loss_of(loss_and_grads, last_good, step)
        params = _params_met(capture.trace)
        check_finite(loss, params, last_good, step)
        positive = pairs.mean_energies()
        undo.append(optimiser_snapshot(optim, params))
        update = partial(checked_step, optim, step=step)
        before, halvings, kl, longer = bounded_step(update, params, ebms, region, step)
        undo.append(partial(restore, list(before.keys()), list(before.values())))
    finally:
        zero_grads(_params_met(capture.trace))
    return Ascent(loss, positive, before, halvings, kl, longer)


def _loss_of(
    loss_and_grads: Callable[[], Loss], last_good: dict[Tensor, Tensor], step: int
) -> Loss:
    """Run the loss; where the model cannot be evaluated, put parameters back first."""
    try:
        return loss_and_grads()
    except DataError:
        raise
    except (ValueError, LinAlgError) as error:
        restore_last_good(last_good)
        raise ValueError(
            f"the loss could not be computed at step {step}; parameters are back at the last "
            f"values with a finite loss: {error}"
        ) from error


def _params_met(trace: poutine.Trace) -> list[Tensor]:
    return list({n["value"].unconstrained() for n in all_nodes(trace).values()})


def check_finite(
    loss: Loss, params: list[Tensor], last_good: dict[Tensor, Tensor], step: int
) -> None:
    """Refuse a loss or gradient that is not finite, and put parameters back first.

    Args:
        loss: The loss of this step.
        params: Parameters with their gradients.
        last_good: For each parameter, the last value whose loss was finite.
        step: Number of this step, for the message.

    Raises:
        ValueError: If the loss or a gradient is NaN or infinite.
    """
    grads = [p.grad for p in params if p.grad is not None]
    parts = loss if isinstance(loss, tuple) else (loss,)
    finite = all(map(math.isfinite, parts))
    if finite and all(bool(torch.isfinite(_entries(g)).all()) for g in grads):
        return
    restore_last_good(last_good)
    what = "a gradient" if finite else f"the loss ({loss})"
    raise ValueError(
        f"{what} is not finite at step {step}; parameters are back at the last values with a "
        "finite loss. Check the data and the energy for NaN, or lower the learning rate"
    )


def _entries(grad: Tensor) -> Tensor:
    """Return the entries of a gradient, of a sparse one those that it has."""
    return grad.coalesce().values() if grad.is_sparse else grad


def restore_last_good(last_good: dict[Tensor, Tensor]) -> None:
    """Set parameters to the last values whose loss was finite, in place."""
    restore(list(last_good.keys()), list(last_good.values()))


def pool_snapshot(ebms: list[LVEBM]) -> Callable[[], None]:
    """Return an action that puts the pools back to where they are now."""
    snapshots = [ebm.pool.snapshot() for ebm in ebms]

    def put_back() -> None:
        for put_pool_back in snapshots:
            put_pool_back()

    return put_back


class Records(Protocol):
    """What a `Saddle` keeps of its steps beside parameters, particles and pools."""

    average: ParameterAverage
    last_good: dict[Tensor, Tensor]
    step_count: int
    recorder: History


def records_snapshot(saddle: Records) -> Callable[[], None]:
    """Return an action that puts averages, counts and history back to where they are now."""
    average, count = saddle.average.values, saddle.average.count
    last_good, step_count = saddle.last_good, saddle.step_count
    num_rows = len(saddle.recorder.rows)

    def put_back() -> None:
        saddle.average.values, saddle.average.count = average, count
        saddle.last_good, saddle.step_count = last_good, step_count
        del saddle.recorder.rows[num_rows:]

    return put_back


@contextmanager
def unchanged_on_error(ebms: list[LVEBM]) -> Iterator[list[Callable[[], None]]]:
    """Put the pools back after an error, and run whatever was appended to the yielded list."""
    put_back = pool_snapshot(ebms)
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        put_back()
        for action in undo:
            action()
        raise
