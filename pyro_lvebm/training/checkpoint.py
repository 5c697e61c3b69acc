# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors as safetensors, all else as JSON in the header; nothing is ever executed."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import _get_state_dict, _load_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pyro_lvebm.model import LVEBM
from pyro_lvebm.training.averaging import ParameterAverage
from pyro_lvebm.training.history import History

FORMAT = "pyro_lvebm saddle 2"

SETTINGS = ("step_count", "num_moves", "max_kl", "average_decay", "seed")


class Parts(NamedTuple):
    """The parts of a Saddle that have state."""

    modules: dict[str, nn.Module]  # by role
    loose_params: dict[str, Tensor]  # unconstrained parameters outside these modules, by name
    ebms: list[LVEBM]  # for the seeds of their pools
    optim: PyroOptim
    average: ParameterAverage
    history: History


def write_checkpoint(path: Path, settings: dict[str, Any], parts: Parts) -> None:
    """Write the state of a Saddle to one file, whole or not at all.

    Args:
        path: The file; replaced if it exists.
        settings: Plain numbers of the Saddle.
        parts: All else.

    Raises:
        ValueError: If the optimiser holds state that is neither a tensor nor JSON.
    """
    modules, loose_params, ebms, optim, average, history = parts
    tensors = _targets(modules, loose_params)
    # Keyed by our own names: those of Pyro's store are lost when someone clears it.
    keys = {id(value): key for key, value in tensors.items()}
    state = {
        keys[id(param)]: _get_state_dict(part)
        for param, part in optim.optim_objs.items()
        if id(param) in keys
    }
    columns, rows = history.state()
    header = {
        "format": FORMAT,
        "settings": settings,
        "pools": [
            {
                "seed": e.pool.seed,
                "site": e.pool.site,
                "fresh": e.pool_is_fresh(),
                "support": str(e.base_x.support),
            }
            for e in ebms
        ],
        "optim": _pull_tensors(state, "optim", tensors),
        "average": average.count,
        "history": columns,
    }
    kept = {p: value for p, value in average.values.items() if id(p) in keys}
    tensors |= {f"average/{keys[id(p)]}": value for p, value in kept.items()}
    tensors["history"] = rows
    try:
        text = json.dumps(header)
    except TypeError as error:
        raise ValueError(f"the optimiser holds state that JSON cannot store: {error}") from error
    # safetensors refuses tensors that share memory, so every tensor is written as its own copy.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"saddle": text})
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file written by `write_checkpoint`."""

    settings: dict[str, Any]
    pools: list[dict[str, Any]]
    optim: dict[str, Any]
    average_count: int
    history_columns: list[str]
    tensors: dict[str, Tensor]

    def restore(self, parts: Parts) -> None:
        """Copy the saved state into the parts of a Saddle.

        Raises:
            ValueError: If names or shapes differ; nothing is changed then.
        """
        modules, loose_params, ebms, optim, average, history = parts
        targets = _targets(modules, loose_params)
        beside = ("optim/", "average/", "history")
        saved = {k: v for k, v in self.tensors.items() if not k.startswith(beside)}
        averaged = {
            k.removeprefix("average/"): v
            for k, v in self.tensors.items()
            if k.startswith("average/")
        }
        problems = [f"'{k}' is not in the file" for k in targets.keys() - saved.keys()]
        problems += [f"'{k}' is only in the file" for k in saved.keys() - targets.keys()]
        problems += [
            f"'{k}' has shape {tuple(v.shape)}, in the file {tuple(saved[k].shape)}"
            for k, v in targets.items()
            if k in saved and v.shape != saved[k].shape
        ]
        problems += [
            f"'{k}' has type {v.dtype}, in the file {saved[k].dtype}"
            for k, v in targets.items()
            if k in saved and v.dtype != saved[k].dtype
        ]
        problems += [
            f"x has support {ebm.base_x.support}, in the file {pool['support']}"
            for ebm, pool in zip(ebms, self.pools, strict=False)
            if str(ebm.base_x.support) != pool["support"]
        ]
        problems += [f"the optimiser's '{k}' is no parameter" for k in self.optim.keys() - targets]
        problems += [f"the average of '{k}' is of no parameter" for k in averaged.keys() - targets]
        if problems:
            raise ValueError(
                "the checkpoint does not fit this model and guide: " + "; ".join(sorted(problems))
            )
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(saved[key])
        for ebm, pool in zip(ebms, self.pools, strict=True):
            ebm.pool.seed, ebm.pool.site = pool["seed"], pool["site"]
            ebm.mark_pool(fresh=pool["fresh"])
        for key, state in self.optim.items():
            param = targets[key]
            if param not in optim.optim_objs:
                optim.optim_objs[param] = optim._get_optim(param)
                optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]
            _load_state_dict(optim.optim_objs[param], state)
        average.count = self.average_count
        average.values = {
            targets[k]: v.to(device=targets[k].device, copy=True) for k, v in averaged.items()
        }
        history.load(self.history_columns, self.tensors["history"])


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file written by `write_checkpoint`.

    Raises:
        ValueError: If the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("saddle", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"'{path}' is not a readable checkpoint: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"'{path}' has format {found!r}; expected {FORMAT!r}")
    try:
        settings = {name: header["settings"][name] for name in SETTINGS}
        pools = [
            {
                "seed": int(p["seed"]),
                "site": str(p.get("site", "")),
                "fresh": bool(p["fresh"]),
                "support": str(p.get("support", "Real()")),
            }
            for p in header["pools"]
        ]
        optim = _push_tensors(header["optim"], tensors)
        average, columns = int(header["average"]), [str(name) for name in header["history"]]
        if tensors["history"].shape[-1] != len(columns):
            raise ValueError("the history does not fit its columns")
        return Checkpoint(settings, pools, dict(optim.items()), average, columns, tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"'{path}' is no checkpoint that Saddle.save wrote: {error!r}") from error


def _targets(modules: dict[str, nn.Module], loose_params: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a Saddle, not copies of them, by the names they have in a file."""
    targets = {f"param/{name}": param for name, param in loose_params.items()}
    for role, module in modules.items():
        targets |= {f"{role}/{k}": v for k, v in module.state_dict(keep_vars=True).items()}
    return targets


def _pull_tensors(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """Move the tensors of nested optimiser state into `tensors`, leaving references."""
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {"__tensor__": prefix}
    if isinstance(value, dict):
        items = [[k, _pull_tensors(v, f"{prefix}/{k}", tensors)] for k, v in value.items()]
        return {"__items__": items}
    if isinstance(value, list | tuple):
        return [_pull_tensors(v, f"{prefix}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _push_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `_pull_tensors`."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: _push_tensors(v, tensors) for k, v in value["__items__"]}
    if isinstance(value, list):
        return [_push_tensors(v, tensors) for v in value]
    return value
