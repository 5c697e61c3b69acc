# SPDX-License-Identifier: Apache-2.0
"""A fit under way as JSON and tensors: where it is, and what was best so far."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from pyro_lvebm.model import LVEBM
from pyro_lvebm.training.course import BestSoFar, Course
from pyro_lvebm.training.header import array, integer, member, number, truth
from pyro_lvebm.training.step import pool_snapshot

PREFIX = "fit/"


def course_state(
    course: Course, ebms: list[LVEBM], keys: dict[int, str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file keeps of a fit: an object of JSON, and tensors by name.

    Args:
        course: The fit.
        ebms: The LVEBMs, whose pools were somewhere else when the fit was best.
        keys: Names of the parameters, by their identity.
    """
    header: dict[str, Any] = {
        "start": course.start,
        "settings": course.settings,
        "ended": course.ended,
    }
    best = course.best
    tensors: dict[str, Tensor] = {}
    if best is None:
        return {**header, "best": None}, tensors
    header["best"] = {
        "value": best.value,
        "misses": best.misses,
        "evaluated": best.evaluated,
    }
    for param, value in best.values.items():
        if id(param) in keys:
            tensors[f"{PREFIX}best/{keys[id(param)]}"] = value
    put_back = pool_snapshot(ebms)
    try:
        best.put_pools_back()
        for i, ebm in enumerate(ebms):
            buffers = ebm.pool.named_buffers()
            tensors |= {f"{PREFIX}pool{i}/{name}": value for name, value in buffers}
        header["seeds"] = [ebm.pool.seed for ebm in ebms]
    finally:
        put_back()
    return header, tensors


def check_course(header: Any) -> dict[str, Any] | None:
    """Return what a header says of a fit, checked; None where there was none.

    Raises:
        ValueError: If something is missing or of another type.
    """
    if header is None:
        return None
    integer(member(header, "start"), "the start of the fit", 0)
    settings = member(header, "settings")
    for name, least in (("num_steps", 1), ("evaluate_every", 1)):
        integer(member(settings, name), name, least)
    if member(settings, "patience") is not None:
        integer(settings["patience"], "patience", 1)
    if member(settings, "min_kl") is not None and not number(settings["min_kl"], "min_kl") >= 0:
        raise ValueError(f"min_kl is {settings['min_kl']}; expected no negative number")
    truth(member(settings, "held_out"), "whether the fit has held-out data")
    if member(header, "ended") is not None:
        integer(header["ended"], "the end of the fit", 0)
    best = member(header, "best")
    if best is not None:
        number(member(best, "value"), "the best log evidence")
        integer(member(best, "misses"), "the number of evaluations that were not better", 0)
        integer(member(best, "evaluated"), "the step of the last evaluation", 0)
        for seed in array(member(header, "seeds"), "the seeds of the best pools"):
            integer(seed, "the seed of a pool", 0)
    checked: dict[str, Any] = header
    return checked


def targets_of(
    header: dict[str, Any] | None,
    targets: dict[str, Tensor],
    ebms: list[LVEBM],
    saved: Collection[str],
) -> dict[str, Tensor]:
    """Return tensors of the shapes and types that those of a fit must have, by name.

    Args:
        header: What the file says of the fit.
        targets: Parameters and buffers of the Saddle, by name.
        ebms: The LVEBMs.
        saved: Names of the tensors in the file.

    Raises:
        ValueError: If the file has another number of LVEBMs.
    """
    if header is None or header["best"] is None:
        return {}
    if len(header["seeds"]) != len(ebms):
        raise ValueError(f"the fit has {len(header['seeds'])} LVEBMs, the model {len(ebms)}")
    found = {f"{PREFIX}best/{key}": value for key, value in targets.items()}
    found = {name: value for name, value in found.items() if name in saved}
    for i, ebm in enumerate(ebms):
        found |= {f"{PREFIX}pool{i}/{name}": value for name, value in ebm.pool.named_buffers()}
    return found


def course_from(
    header: dict[str, Any] | None,
    tensors: dict[str, Tensor],
    targets: dict[str, Tensor],
    ebms: list[LVEBM],
) -> Course | None:
    """Return the fit that `course_state` has described, for these parameters and pools."""
    if header is None:
        return None
    course = Course(header["start"], header["settings"], ended=header["ended"])
    if header["best"] is None:
        return course
    values = {
        target: tensors[f"{PREFIX}best/{key}"].to(device=target.device, copy=True)
        for key, target in targets.items()
        if f"{PREFIX}best/{key}" in tensors
    }
    put_back = pool_snapshot(ebms)
    for i, ebm in enumerate(ebms):
        for name, buffer in list(ebm.pool.named_buffers()):
            value = tensors[f"{PREFIX}pool{i}/{name}"].to(device=buffer.device, copy=True)
            setattr(ebm.pool, name, value)
        ebm.pool.seed = header["seeds"][i]
        ebm.mark_pool(fresh=False)
    then = pool_snapshot(ebms)
    put_back()
    best = header["best"]
    course.best = BestSoFar(best["value"], values, then, best["misses"], best["evaluated"])
    return course
