# SPDX-License-Identifier: Apache-2.0
"""Names in Pyro's parameter store, which are those of classes: each guide gets its own."""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER, param_with_module_name
from pyro.poutine import Trace
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_HOLDERS: Any = WeakTensorKeyDictionary()
"""Weak references to the module or function that each parameter was trained for, by parameter."""


def root_of(fn: Any) -> Any:
    """Return the module, object or function that has the parameters of a model or guide."""
    fn = inspect.unwrap(fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__self__", fn) if inspect.ismethod(fn) else fn


def keep_apart(fn: Callable[..., Any]) -> None:
    """Give a module a name of its own, where Pyro's store has others' parameters under its names.

    Pyro names the parameters of a `PyroModule` by the class of the guide, or by attribute alone,
    and a module takes whatever the store has under these names, for good: two guides of one class
    would be one. A new guide takes only what belongs to nobody, as after the store's `load`.
    """
    module = root_of(fn)
    if not isinstance(module, PyroModule):
        return
    others = list(_others(module).values())
    is_new = getattr(module, "prototype_trace", module) is None
    if not others or (is_new and not any(t in _HOLDERS for t in others) and not _held(others)):
        return
    stem, stored = module._pyro_name or type(module).__name__, list(pyro.get_param_store())
    free = (f"{stem}_{count}" for count in itertools.count(1))
    _rename(module, next(n for n in free if not any(s.startswith(n) for s in stored)))


def claim(fn: Callable[..., Any], trace: Trace, shared: Trace | None = None) -> None:
    """Note whose the parameters in a trace are, and refuse those of another model or guide.

    Args:
        fn: The model or guide.
        trace: A trace of it.
        shared: For a guide, a trace of its model. What `pyro.param` names there is the model's,
            which other models may share; what a guide names alone is its own.

    Raises:
        ValueError: If a parameter is that of another guide or module, or a module's own is hidden
            by another in Pyro's store.
    """
    root = root_of(fn)
    parts = list(root.modules()) if isinstance(root, nn.Module) else []
    holder = {id(p): part for part in parts for p in part._parameters.values() if p is not None}
    for name, node in trace.nodes.items():
        if node["type"] != "param" or not hasattr(node["value"], "unconstrained"):
            continue
        value: Any = node["value"]
        param, first = value.unconstrained(), (*node["args"], None, None)[1]
        in_module = isinstance(first, nn.Parameter) and _MODULE_NAMESPACE_DIVIDER in name
        if in_module and first is not param and _held([first]):
            raise ValueError(
                f"parameter '{name}' of Pyro's store is another than that of the module which is "
                "announced under this name, and which would stay untrained. Call "
                "pyro.clear_param_store() first, or give the module a name of its own; after "
                "loading a store, pyro.module(name, module, update_module_params=True)"
            )
        # A module that a function announces is the caller's, who may share it.
        own = shared is not None and name not in shared.nodes and not in_module
        owner = holder.get(id(param), root if own else None)
        if owner is None or not param.requires_grad:
            continue
        known = _HOLDERS.setdefault(param, weakref.ref(owner))()
        if known is not owner and not any(known is part for part in parts):
            raise ValueError(
                f"parameter '{name}' is that of another guide or model, trained before: Pyro's "
                "store gives it to all that use this name, and training would change both. Give "
                "it a name of its own (another in pyro.param, or a guide that is not called "
                "before Saddle has it), or call pyro.clear_param_store() first"
            )


@contextmanager
def own_parameters(guide: Callable[..., Any]) -> Iterator[None]:
    """Run a guide with the parameters that it holds, whatever Pyro's store has under its names."""
    module = root_of(guide)
    if not isinstance(module, PyroModule):
        yield
        return
    store, hidden = pyro.get_param_store(), _others(module)
    state: dict[str, Any] = {**store.get_state()}
    kept: Any = {part: {n: v for n, v in state[part].items() if n not in hidden} for part in state}
    with store.scope(kept):
        yield


def _others(module: PyroModule) -> dict[str, Tensor]:
    """Return what Pyro's store has under the names of a module, and is not its own."""
    names, own = set(_names(module, module._pyro_name)), {id(p) for p in module.parameters()}
    # A guide that was never called has no parameters yet.
    prefix = f"{module._pyro_name}." if getattr(module, "prototype_trace", 0) is None else None
    stored: dict[str, Tensor] = dict(pyro.get_param_store().named_parameters())
    return {
        name: value
        for name, value in stored.items()
        if (name in names or (prefix and name.startswith(prefix))) and id(value) not in own
    }


def _names(module: PyroModule, name: str) -> Iterator[str]:
    def inside(key: str) -> str:
        return f"{name}.{key}" if name else key

    yield from map(inside, module._pyro_params)
    yield from (inside(key) for key in module._parameters if not key.endswith("_unconstrained"))
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from _names(child, inside(key))
        elif child is not None:
            for param, _ in child.named_parameters():
                yield param_with_module_name(inside(key), param)


def _rename(module: PyroModule, name: str) -> None:
    module._pyro_name = name
    for key, child in module._modules.items():
        if isinstance(child, PyroModule):
            _rename(child, f"{name}.{key}")


def _held(params: list[Tensor]) -> bool:
    """Whether any module has one of these parameters, such as one that plain SVI has trained."""
    gc.collect()  # a guide that is gone, and its model, hold each other for a while
    wanted = {id(p) for p in params}
    return any(
        id(p) in wanted
        for module in gc.get_objects()
        if issubclass(type(module), nn.Module)
        for p in module.__dict__.get("_parameters", {}).values()
    )
