# SPDX-License-Identifier: Apache-2.0
"""One step of a Pyro optimiser, refused and undone where it leaves state of no further use."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import is_scheduler
from torch import Tensor
from torch.optim import Optimizer

_RATES = {"lr", "eta"}

MAX_GROWTH = 1e12
"""Growth of an optimiser's state in one step, in units of what it was and at least 1, that is
refused. Fits that work reach 5e2, with a datum 1,000 σ away from all others 1e9."""


def check_needs_no_closure(optim: PyroOptim) -> None:
    """Refuse an optimiser that evaluates the loss again in its step, as LBFGS does.

    Raises:
        ValueError: If the step of the optimiser cannot be called without a closure.
    """
    kind = getattr(optim, "pt_optim_constructor", None)
    if not isinstance(kind, type) or not issubclass(kind, Optimizer):
        return
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{kind.__name__} needs a closure, which evaluates the loss several times in one step. "
            "Here each evaluation moves particles and pools, so two of them are not of one "
            "function, and no line search can compare them. Use Adam or ClippedAdam"
        )


def torch_optimiser(part: Any) -> Optimizer:
    """Return the optimiser of torch behind one parameter, which a scheduler may hold."""
    inner: Optimizer = part.optimizer if is_scheduler(part) else part
    return inner


def optimiser_snapshot(optim: PyroOptim, params: list[Tensor]) -> Callable[[], None]:
    """Return an action that puts the optimiser's state of these parameters back.

    Moments, counts and settings, such as a learning rate that decays in every step, are then as
    they are now, and optimisers that a step has created are gone.
    """
    parts = getattr(optim, "optim_objs", {})  # of any function that updates parameters, none
    waiting = dict(getattr(optim, "_state_waiting_to_be_consumed", {}))
    old = []
    for p in params:
        if p in parts:
            inner = torch_optimiser(parts[p])
            groups = [
                {key: copied(value) for key, value in group.items() if key != "params"}
                for group in inner.param_groups
            ]
            old.append((inner, {q: copied(state) for q, state in inner.state.items()}, groups))
    new = [p for p in params if p not in parts]

    def put_back() -> None:
        for inner, state, groups in old:
            inner.state.clear()
            inner.state.update(state)
            for group, settings in zip(inner.param_groups, groups, strict=True):
                group.update(settings)
        for p in new:
            if parts.pop(p, None) is not None:
                optim.grad_clip.pop(p, None)
                optim._state_waiting_to_be_consumed = waiting

    return put_back


def copied(value: Any) -> Any:
    """Return a copy of nested optimiser state: optimisers write into its tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([copied(part) for part in value])
    return value


def checked_step(optim: PyroOptim, params: list[Tensor], *, step: int) -> None:
    """Let the optimiser change parameters, and refuse what is left of it if that is spoilt.

    A second moment that is infinite makes all later updates exactly 0; one that is NaN makes them
    NaN. No later gradient mends either. One that a single gradient made 1e12 times larger makes
    them a millionth of what they were, and in an Adam takes some 27,000 steps to fade.

    Args:
        optim: The optimiser.
        params: Parameters with their gradients, changed in place.
        step: Number of this step, for messages.

    Raises:
        ValueError: If its learning rate, or its state of a parameter, is NaN or infinite, or the
            state has grown more than `MAX_GROWTH`-fold.
    """
    parts = getattr(optim, "optim_objs", {})
    known = [torch_optimiser(parts[p]) for p in params if p in parts]
    before = _sizes(known)
    optim(params)
    for p in params:
        if p in parts:
            check_state(torch_optimiser(parts[p]), step)
    _check_growth(known, before, step)


def _sizes(optimisers: list[Optimizer]) -> dict[tuple[int, str], Tensor]:
    """Return the largest entry, without a sign, of every state tensor, by optimiser and name."""
    return {
        (i, name): torch.linalg.vector_norm(value.detach(), math.inf)
        for i, inner in enumerate(optimisers)
        for state in inner.state.values()
        for name, value in state.items()
        if name != "step" and isinstance(value, Tensor) and value.numel() and not value.is_sparse
    }


def _check_growth(
    optimisers: list[Optimizer], before: dict[tuple[int, str], Tensor], step: int
) -> None:
    """Refuse state that one gradient has made so large that those before it no longer count.

    State that was not there before, or was 0, may have any size.
    """
    after = _sizes(optimisers)
    keys = [key for key in before if key in after]
    if not keys:
        return
    place = before[keys[0]].device
    old, new = (torch.stack([sizes[k].to(place) for k in keys]) for sizes in (before, after))
    growth = torch.where(old > 0, new / old.clamp(min=1.0), 0.0)
    if growth.max() > MAX_GROWTH:
        index, name = keys[int(growth.argmax())]
        raise ValueError(
            f"step {step} made the '{name}' of {type(optimisers[index]).__name__} "
            f"{float(growth.max()):.0e} times larger, next to which the gradients of all earlier "
            "steps, and of many later ones, are nothing; it was undone, in the optimiser too. One "
            "gradient was far too large: look at penalties and data, such as a gross outlier in "
            "this minibatch, or bound gradients as ClippedAdam does"
        )


def check_state(inner: Optimizer, step: int) -> None:
    """Refuse a learning rate or state that is not finite.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    for group in inner.param_groups:
        for name in _RATES & group.keys():
            if not _is_finite(group[name]):
                raise ValueError(
                    f"the learning rate is {float(group[name])} at step {step}; expected a finite "
                    "number. The step was undone; look at the settings and the schedule of the "
                    "optimiser"
                )
    for state in inner.state.values():
        for name, value in state.items():
            if not _is_finite(value):
                raise ValueError(
                    f"step {step} made the '{name}' of {type(inner).__name__} NaN or infinite, "
                    "from which no later update recovers; it was undone, in the optimiser too. "
                    "Gradients are too large: look at penalties and data, or bound gradients as "
                    "ClippedAdam does. An optimiser that came with such state must be replaced by "
                    "a new one"
                )


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_is_finite(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(part) for part in value)
    return not isinstance(value, float) or math.isfinite(value)
