# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: tensors as safetensors, all else as JSON in the header; nothing is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.optim import _get_state_dict, _load_state_dict
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pyro_lvebm.model import LVEBM
from pyro_lvebm.training.averaging import ParameterAverage
from pyro_lvebm.training.course import Course
from pyro_lvebm.training.header import FORMAT, columns_of, integer, member, pools_of, settings_of
from pyro_lvebm.training.header import text as text_of
from pyro_lvebm.training.history import History
from pyro_lvebm.training.replacing import replacing
from pyro_lvebm.training.saved_course import (
    PREFIX,
    check_course,
    course_from,
    course_state,
    targets_of,
)
from pyro_lvebm.training.saved_optimiser import check_saved_state, kind_of

_MOST_SAID = 6  # of many things that do not fit


class Parts(NamedTuple):
    """The parts of a Saddle that have state."""

    modules: dict[str, nn.Module]  # by role
    loose_params: dict[str, Tensor]  # unconstrained parameters outside these modules, by name
    ebms: list[LVEBM]  # for the seeds of their pools
    optim: PyroOptim
    average: ParameterAverage
    history: History
    course: Course | None


def write_checkpoint(path: Path, settings: dict[str, Any], parts: Parts) -> None:
    """Write the state of a Saddle to one file, whole or not at all.

    Args:
        path: The file; replaced if it exists.
        settings: Plain numbers of the Saddle.
        parts: All else.

    Raises:
        ValueError: If the optimiser holds state that is neither a tensor nor JSON.
        OSError: If the file cannot be written; the old one is then there still.
    """
    modules, loose_params, ebms, optim, average, history, course = parts
    tensors = _targets(modules, loose_params)
    # Keyed by our own names: those of Pyro's store are lost when someone clears it.
    keys = {id(value): key for key, value in tensors.items()}
    state = {
        keys[id(param)]: _get_state_dict(part)
        for param, part in optim.optim_objs.items()
        if id(param) in keys
    }
    columns, rows = history.state()
    fit, best = (None, {}) if course is None else course_state(course, ebms, keys)
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
        "optimiser": kind_of(optim),
        "average": average.count,
        "history": columns,
        "fit": fit,
    }
    kept = {p: value for p, value in average.values.items() if id(p) in keys}
    tensors |= {f"average/{keys[id(p)]}": value for p, value in kept.items()}
    tensors |= best
    tensors["history"] = rows
    # safetensors refuses tensors that share memory, so every tensor is written as its own copy.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    try:
        text = json.dumps({**header, "sha256": _digest(header, tensors)})
    except TypeError as error:
        raise ValueError(f"the optimiser holds state that JSON cannot store: {error}") from error
    contents = save(tensors, metadata={"saddle": text})
    with replacing(path) as file:
        file.write(contents)


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a file written by `write_checkpoint`."""

    settings: dict[str, Any]
    pools: list[dict[str, Any]]
    optim: dict[str, Any]
    optimiser: str  # class of torch's optimisers; empty where the file does not say
    average_count: int
    history_columns: list[str]
    fit: dict[str, Any] | None
    tensors: dict[str, Tensor]

    def restore(self, parts: Parts) -> Course | None:
        """Copy the saved state into the parts of a Saddle; return the fit that it was in.

        Raises:
            ValueError: If names, shapes, types or bases differ, the optimiser is another, or a
                tensor is not finite; nothing is changed then.
        """
        self._check(parts)
        modules, loose_params, ebms, optim, average, history, _ = parts
        targets = _targets(modules, loose_params)
        with torch.no_grad():
            for key, target in targets.items():
                target.copy_(self.tensors[key])
        for ebm, pool in zip(ebms, self.pools, strict=True):
            ebm.pool.seed, ebm.pool.site = pool["seed"], pool["site"]
            ebm.mark_pool(fresh=pool["fresh"])
        for key, param in targets.items():
            if key not in self.optim:
                optim.optim_objs.pop(param, None)
                continue
            if param not in optim.optim_objs:
                optim.optim_objs[param] = optim._get_optim(param)
                optim.grad_clip[param] = optim._get_grad_clip(param)  # type: ignore[arg-type]
            _load_state_dict(optim.optim_objs[param], self.optim[key])
        average.count = self.average_count
        average.values = {
            targets[k]: v.to(device=targets[k].device, copy=True)
            for k, v in _named("average/", self.tensors).items()
        }
        history.load(self.history_columns, self.tensors["history"])
        return course_from(self.fit, self.tensors, targets, ebms)

    def _check(self, parts: Parts) -> None:
        """Refuse parts that the saved state does not fit, before any of them is changed."""
        targets = _targets(parts.modules, parts.loose_params)
        saved = {k: v for k, v in self.tensors.items() if not k.startswith(_BESIDE)}
        if other := _of_other_bases(targets, saved, parts.ebms):
            raise ValueError(
                "the checkpoint does not fit this model and guide: " + "; ".join(sorted(other))
            )
        problems = [f"'{k}' is not in the file" for k in targets.keys() - saved.keys()]
        problems += [f"'{k}' is only in the file" for k in saved.keys() - targets.keys()]
        for key in targets.keys() & saved.keys():
            problems += _differences(key, targets[key], saved[key])
        for key, value in _named("average/", self.tensors).items():
            if isinstance(targets.get(key), nn.Parameter) or key.startswith("param/"):
                name = f"average of '{key}'"
                problems += _differences(name, targets[key], value) if key in targets else []
            else:
                problems.append(f"the average of '{key}' is of no parameter")
        problems += [f"the optimiser's '{k}' is no parameter" for k in self.optim.keys() - targets]
        if len(parts.ebms) != len(self.pools):
            problems.append(f"the model has {len(parts.ebms)} LVEBMs, the file {len(self.pools)}")
        problems += [
            f"x has support {ebm.base_x.support}, in the file {pool['support']}"
            for ebm, pool in zip(parts.ebms, self.pools, strict=False)
            if str(ebm.base_x.support) != pool["support"]
        ]
        if not problems:
            problems = self._of_fit(targets, parts.ebms) or self._unusable(targets, parts.optim)
        if problems:
            # What is said of the whole comes before what is said of one tensor.
            ordered = sorted(problems, key=lambda said: (said.startswith("'"), said))
            said = "; ".join(ordered[:_MOST_SAID])
            more = f"; and {len(problems) - _MOST_SAID} more" * (len(problems) > _MOST_SAID)
            raise ValueError(f"the checkpoint does not fit this model and guide: {said}{more}")

    def _of_fit(self, targets: dict[str, Tensor], ebms: list[LVEBM]) -> list[str]:
        """Say what is wrong with the fit that the file was written in."""
        saved = {k: v for k, v in self.tensors.items() if k.startswith(PREFIX)}
        wanted = targets_of(self.fit, targets, ebms, saved.keys())
        found = [f"'{k}' is not in the file" for k in wanted.keys() - saved.keys()]
        found += [f"'{k}' is only in the file" for k in saved.keys() - wanted.keys()]
        for key in wanted.keys() & saved.keys():
            found += _differences(key, wanted[key], saved[key])
            if not _finite_where(saved[key], wanted[key]):
                found.append(f"'{key}' is NaN or infinite in the file")
        return found

    def _unusable(self, targets: dict[str, Tensor], optim: PyroOptim) -> list[str]:
        """Say what training could not go on from, where names and shapes are right."""
        found = []
        for key, target in targets.items():
            value = self.tensors[key]
            if not _finite_where(value, target) and not self._never_refreshed(key):
                found.append(f"'{key}' is NaN or infinite in the file")
            if key.endswith("pool.refreshes") and int(value) < 0:
                found.append(f"'{key}' is {int(value)}; expected a count")
        for key, state in self.optim.items():
            try:
                param, value = targets[key], self.tensors[key]
                check_saved_state(optim, param, value, state, self.optimiser, key)
            except ValueError as error:
                found.append(str(error))
                break  # what is wrong with one is mostly wrong with all
        return found

    def _never_refreshed(self, key: str) -> bool:
        """Whether a tensor is that of a pool that has no statistics yet, which are NaN."""
        pool, _, rest = key.partition("/pool.")
        return bool(rest) and int(self.tensors.get(f"{pool}/pool.refreshes", 1)) == 0


_BESIDE = ("optim/", "average/", "history", PREFIX)


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _differences(key: str, target: Tensor, value: Tensor) -> list[str]:
    if value.shape != target.shape:
        return [f"'{key}' has shape {tuple(target.shape)}, in the file {tuple(value.shape)}"]
    if value.dtype != target.dtype:
        return [f"'{key}' has type {target.dtype}, in the file {value.dtype}"]
    return []


def _of_other_bases(
    targets: dict[str, Tensor], saved: dict[str, Tensor], ebms: list[LVEBM]
) -> list[str]:
    """Say so where a base is to take one of another kind."""
    found = []
    for i in range(len(ebms)):
        prefix = f"ebm{i}/base_x."
        kind, choice = _kind_of_base(prefix, saved)
        if f"{prefix}loc" in saved and kind != _kind_of_base(prefix, targets)[0]:
            found.append(
                f"this file was written with a {kind} base of x; build with "
                f"LVEBM.from_data({choice})"
            )
    return found


def _kind_of_base(prefix: str, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Name a base by its tensors, and how it is chosen."""
    if f"{prefix}log_weights" in tensors:
        return "mixture", "base='mixture'"
    if f"{prefix}log_noise" in tensors:
        return "generator", "generator=..."
    return "Gaussian", "base='gaussian'"


def _finite_where(value: Tensor, like: Tensor) -> bool:
    """Whether a tensor is finite, or at least where another one is."""
    if not value.is_floating_point():
        return True
    finite = value.isfinite()
    return bool(finite.all()) or bool((finite | ~like.detach().cpu().isfinite()).all())


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file written by `write_checkpoint`.

    Raises:
        ValueError: If the file is missing, damaged or of another kind.
    """
    # Whatever a damaged file makes the parsers raise, the file is to blame.
    try:
        if not path.is_file():
            raise FileNotFoundError
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("saddle", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError as error:
        raise ValueError(f"no checkpoint at '{path}'") from error
    except Exception as error:
        raise ValueError(f"'{path}' is not a readable checkpoint: {error}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise ValueError(f"'{path}' has format {found!r:.80}; expected {FORMAT!r}")
    try:
        return _contents(header, tensors)
    except Exception as error:
        raise ValueError(f"'{path}' is no checkpoint that Saddle.save wrote: {error}") from error


def _contents(header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    """Check all that can be checked without a model."""
    settings, pools = settings_of(member(header, "settings")), pools_of(member(header, "pools"))
    optim = _push_tensors(member(header, "optim"), tensors)
    if not isinstance(optim, dict):
        raise ValueError("the optimiser has no state by parameter")
    columns, rows = columns_of(member(header, "history")), member(tensors, "history")
    _check_history(columns, rows)
    for key in [*_named("average/", tensors), *optim]:
        for name in (key, f"average/{key}"):
            if name in tensors and not _finite_where(tensors[name], torch.zeros(())):
                raise ValueError(f"'{name}' is NaN or infinite")
    fit = check_course(header.get("fit"))
    average = integer(member(header, "average"), "the count of the average", 0)
    optimiser = text_of(header.get("optimiser", ""), "the class of the optimiser")
    # Files from before they had one lack the digest.
    if "sha256" in header:
        written = {key: value for key, value in header.items() if key != "sha256"}
        if _digest(written, tensors) != header["sha256"]:
            raise ValueError("it is damaged, its SHA-256 is another than when it was written")
    return Checkpoint(settings, pools, optim, optimiser, average, columns, fit, tensors)


@contextmanager
def store_unchanged_on_error() -> Iterator[None]:
    """Put Pyro's parameter store back after an error."""
    store = pyro.get_param_store()
    before = store.get_state()
    try:
        yield
    except BaseException:
        store.clear()
        store.set_state(before)
        raise


def _check_history(columns: list[str], rows: Tensor) -> None:
    if rows.dim() != 2 or rows.dtype != torch.float64 or rows.shape[-1] != len(columns):
        raise ValueError(
            f"the history has {len(columns)} columns, and values of shape {tuple(rows.shape)} and "
            f"type {rows.dtype}"
        )
    if len(rows):
        steps = rows[:, 0]
        if not bool(((steps >= 0) & (steps < 2**53) & (steps == steps.floor())).all()):
            raise ValueError("the history has steps that are no counts")


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of all that is in a file."""
    digest = hashlib.sha256(json.dumps(header).encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
