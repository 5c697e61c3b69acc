# SPDX-License-Identifier: Apache-2.0
"""One step of `Saddle`: the positive phase, then the ascent on θ, in which pools refresh."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pyro_lvebm.ascent import Ascent, ascend
from pyro_lvebm.given_rows import GivenRows
from pyro_lvebm.penalties import add_penalties
from pyro_lvebm.positive import move_minibatch
from pyro_lvebm.rng import Stream, generator_for, isolated_rng
from pyro_lvebm.rollback import unchanged_on_error
from pyro_lvebm.tracing import Node, SamePlates, at_minibatch, frozen

if TYPE_CHECKING:
    from pyro_lvebm.saddle import Saddle


def run_step(
    saddle: Saddle,
    factor: float,
    min_kl: float | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    """Move particles and pools, take one optimiser step and record it; see `Saddle.step`."""
    anatomy = saddle.prepare(args, kwargs)
    device = saddle.device(args, kwargs)
    with isolated_rng(saddle.seed, Stream.MINIBATCH, saddle.step_count, device=device):
        with unchanged_on_error(saddle.ebms) as undo:
            choices = _positive_phase(saddle, undo, device, args, kwargs)
            ascent = _ascend(saddle, factor, min_kl, choices, device, args, kwargs)
    saddle.average.update(list(ascent.before))
    saddle.last_good, saddle.halvings = ascent.before, ascent.halvings
    saddle.step_count += 1
    row = {"loss": ascent.loss, "kl": ascent.kl, "halvings": float(ascent.halvings)}
    row["lengthening"] = ascent.lengthening
    row |= {f"latent_acceptance_{name}": rate for name, rate in saddle.acceptance.items()}
    saddle.recorder.record_step(saddle.step_count, row, ascent.positive, anatomy.ebms)
    return ascent.loss


def _positive_phase(
    saddle: Saddle,
    undo: list[Callable[[], None]],
    device: torch.device,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Node]:
    """Move the particles of one minibatch; return the nodes that fix it."""
    if saddle.particles is None:
        return {}
    with frozen(saddle.ebms):
        choices, saddle.acceptance = move_minibatch(
            saddle.model,
            saddle.guide,
            saddle.particles,
            saddle.kernel,
            saddle.num_moves,
            generator_for(saddle.seed, Stream.POSITIVE_PHASE, saddle.step_count, device=device),
            undo,
            saddle.prepare(args, kwargs).nesting,
            _guide_noise(saddle, device),
            args,
            kwargs,
        )
    return choices


def _guide_noise(
    saddle: Saddle, device: torch.device
) -> Callable[[], AbstractContextManager[None]]:
    """What seeds the draws of a guide that holds more than particles, twice in each step."""
    if saddle.particles is None or saddle.particles is saddle.guide:
        return nullcontext
    return partial(isolated_rng, saddle.seed, Stream.GUIDE_DRAWS, saddle.step_count, device=device)


def _ascend(
    saddle: Saddle,
    factor: float,
    min_kl: float | None,
    choices: dict[str, Node],
    device: torch.device,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Ascent:
    """Take one optimiser step on the chosen minibatch."""
    guide, model = GivenRows()(saddle.guide), GivenRows()(saddle.model)
    if choices:
        guide, model = at_minibatch(guide, choices), at_minibatch(model, choices)
    guide_noise = _guide_noise(saddle, device)

    def loss_and_grads() -> float:
        with SamePlates(), guide_noise():
            loss = float(saddle.loss_and_grads(model, guide, *args, **kwargs))
        return loss + add_penalties(saddle.penalties, saddle.ebms)

    return ascend(
        loss_and_grads,
        saddle.optim,
        saddle.ebms,
        factor=factor,
        max_kl=saddle.max_kl,
        min_kl=min_kl,
        last_good=saddle.last_good,
        step=saddle.step_count,
    )
