# SPDX-License-Identifier: Apache-2.0
"""Saved state of an optimiser, tried on a copy of its parameter before it is taken."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import _get_state_dict, _load_state_dict, is_scheduler
from torch import Tensor
from torch.optim import Optimizer

from pyro_lvebm.training.optimiser import check_state, copied, torch_optimiser


def kind_of(optim: PyroOptim) -> str:
    """Return the class of torch's optimisers, and that of the schedule if there is one."""
    part = next(iter(optim.optim_objs.values()), None)
    return "" if part is None else _kind(part)


def _kind(part: Any) -> str:
    name = type(torch_optimiser(part)).__name__
    return f"{name} under {type(part).__name__}" if is_scheduler(part) else name


def check_saved_state(
    optim: PyroOptim, param: Tensor, value: Tensor, state: Any, kind: str, key: str
) -> None:
    """Refuse saved state with which the next step of this optimiser would fail.

    A new optimiser, made as for the parameter, takes the state and one step on a copy of it.

    Args:
        optim: The optimiser that is to take the state; unchanged.
        param: The parameter, known to Pyro by its name; unchanged.
        value: Its value in the file.
        state: Its state in the file.
        kind: Class of the optimiser in the file; empty in files that do not say.
        key: Name of the parameter in the file.

    Raises:
        ValueError: If the optimiser is of another class or has other settings, or the state has
            other shapes or cannot be stepped from.
    """
    scratch = value.to(device=param.device, copy=True).requires_grad_()
    scratch.grad = torch.ones_like(scratch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            part, reference = _new_part(optim, param, scratch), _new_part(optim, param, scratch)
            _check_kind(part, kind)
            state = copied(state)
            expected, found = _get_state_dict(part), state
            if is_scheduler(part):
                _compare(state, dict.fromkeys(("scheduler", "optimizer")), "", exact=True)
                _compare(state["scheduler"], expected["scheduler"], "schedule: ", exact=True)
                expected, found = expected["optimizer"], state["optimizer"]
            _compare(found, dict.fromkeys(("state", "param_groups")), "", exact=True)
            _compare(found["param_groups"], expected["param_groups"], "")
            _check_settings(torch_optimiser(part), found["param_groups"])
            torch_optimiser(reference).step()
            if found["state"]:
                stepped = torch_optimiser(reference).state_dict()["state"]
                _compare(found["state"], stepped, "state ", settings=False)
            with torch.no_grad():
                scratch.copy_(value)
            _load_state_dict(part, state)
            torch_optimiser(part).step()
            check_state(torch_optimiser(part), 0)
            if not bool(torch.isfinite(scratch).all()):
                raise ValueError("a step from it makes the parameter NaN or infinite")
        except Exception as error:
            raise ValueError(f"the optimiser's state of '{key}' does not fit: {error}") from error


def _new_part(optim: PyroOptim, param: Tensor, scratch: Tensor) -> Any:
    """Return what Pyro would make for a parameter, on a copy of it."""
    part: Any = optim.pt_optim_constructor([scratch], **optim._get_optim_args(param))  # type: ignore
    if isinstance(optim, PyroLRScheduler):
        part = optim.pt_scheduler_constructor(part, **optim.kwargs)
    return part


def _check_kind(part: Any, kind: str) -> None:
    if kind and kind != _kind(part):
        raise ValueError(f"the optimiser is {_kind(part)}, in the file {kind}")


def _check_settings(new: Optimizer, groups: list[dict[str, Any]]) -> None:
    """Let the constructor of an optimiser refuse the saved settings, as it would a user's."""
    known = inspect.signature(type(new)).parameters.keys()
    for group, own in zip(groups, new.param_groups, strict=True):
        settings: dict[str, Any] = {}
        for name in known & group.keys() - {"params"}:
            value = group[name]
            settings[name] = tuple(value) if isinstance(value, list) else value
        type(new)(own["params"], **settings)


def _compare(
    found: Any, expected: Any, path: str, *, exact: bool = False, settings: bool = True
) -> None:
    """Raise a ValueError where nested state has other names, types, lengths or shapes.

    Args:
        found: What is in the file.
        expected: What an optimiser of this kind has.
        path: Where in the state this is, for messages.
        exact: Whether names that are missing in the file are refused, beside those that it has
            over; other versions of torch have fewer settings, for which they have defaults.
        settings: Whether this is about settings, and not about moments, which may be missing only
            all together.
    """
    if isinstance(expected, dict):
        if not isinstance(found, dict):
            raise ValueError(f"{path}is {type(found).__name__}; expected names and values")
        if isinstance(expected, Counter):
            return
        over, missing = found.keys() - expected.keys(), expected.keys() - found.keys()
        if over and settings:
            raise ValueError(f"{path}{sorted(map(str, over))} is only in the file")
        if missing and (exact or not settings):
            raise ValueError(f"{path}{sorted(map(str, missing))} is not in the file")
        for name in expected.keys() & found.keys():
            inner = {"exact": exact, "settings": settings}
            _compare(found[name], expected[name], f"{path}'{name}' ", **inner)
    elif isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(expected):
            raise ValueError(f"{path}is {found!r:.80}; expected {len(expected)} values")
        for part, own in zip(found, expected, strict=True):
            _compare(part, own, path, exact=exact, settings=settings)
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{path}has shape {tuple(found.shape)} and type {found.dtype}; expected "
                f"{tuple(expected.shape)} and {expected.dtype}"
            )
    elif found is not None and expected is not None and _sort(found) != _sort(expected):
        raise ValueError(f"{path}is {found!r:.80}; expected something like {expected!r:.80}")


def _sort(value: Any) -> str:
    """Return of which sort a value is; one number is like another, in a tensor or not."""
    if isinstance(value, bool):
        return "truth"
    one = isinstance(value, Tensor) and value.dim() == 0
    return "number" if one or isinstance(value, int | float) else type(value).__name__
