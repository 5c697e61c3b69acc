# SPDX-License-Identifier: Apache-2.0
"""A fit that was broken off: loaded if it is that of the same command, or what differs is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pyro_lvebm.cli.settings import JobSettings
from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.model import LVEBM
from pyro_lvebm.sites import Model
from pyro_lvebm.training import Checkpoint, Saddle, read_checkpoint


def load_fit(
    path: Path,
    model: Model,
    guide: AutoParticles,
    optim: PyroOptim,
    ebm: LVEBM,
    x: Tensor,
    settings: JobSettings,
    stops_early: bool,
) -> Saddle:
    """Return the Saddle of a file, which must be of these data and settings.

    Args:
        path: The file.
        model: The model, with `ebm`.
        guide: Its guide.
        optim: The optimiser.
        ebm: The LVEBM with its bases fitted to x.
        x: Training rows (N, D).
        settings: What to fit.
        stops_early: Whether validation rows decide when to stop.

    Raises:
        ValueError: If the file is damaged, or of other data or settings; each that differs has a
            line of its own.
    """
    try:
        saved = read_checkpoint(path)
    except ValueError as error:
        raise ValueError(f"{error}. --force starts anew") from error
    if other := list(_differences(saved, ebm, x, settings, stops_early)):
        raise ValueError(
            "\n  ".join([f"{path} is another fit than this command's:", *other])
            + "\n--resume takes the same data and options as before, and --force starts anew"
        )
    return Saddle.load(path, model, guide, optim, x)


def _differences(
    saved: Checkpoint, ebm: LVEBM, x: Tensor, settings: JobSettings, stops_early: bool
) -> Iterator[str]:
    """Say what differs, in the terms of the command line."""
    then = saved.fit["settings"] if saved.fit is not None else {}
    options = (
        ("--seed", settings.seed, saved.settings["seed"]),
        ("--steps", settings.num_steps, then.get("num_steps", settings.num_steps)),
        ("--z-dim", ebm.base_z.dim, _size(saved, "ebm0/base_z.loc", 0)),
    )
    for name, now, before in options:
        if before is not None and now != before:
            yield f"{name} is {now}, and was {before}"
    # Other validation rows are other training rows.
    if then and then["held_out"] != stops_early:
        had = ("no", "some")
        yield (
            f"there are {had[stops_early]} rows for --validation, and were {had[not stops_early]}"
        )
    columns, rows = _size(saved, "ebm0/base_x.loc", 0), _size(saved, _PARTICLES, 1)
    if columns is not None and columns != x.shape[1]:
        yield f"the data have {x.shape[1]} columns, and had {columns}"
    elif rows is not None and rows != len(x):
        yield (
            f"{len(x)} rows are for training, and {rows} were: other data, --held-out or "
            "--validation"
        )
    elif {key for key in saved.tensors if key.startswith(_BASE)} != {
        f"{_BASE}{name}" for name in ebm.base_x.state_dict()
    }:
        yield "the base of x is of another kind: other data or another --base"
    elif settings.seed == saved.settings["seed"] and not _same_base(saved, ebm):
        yield "the training rows have other values: other data, order of columns or --dequantise"


_BASE, _PARTICLES = "ebm0/base_x.", "guide/particles_observations_z"


def _size(saved: Checkpoint, key: str, axis: int) -> int | None:
    """A length in the file, or None where it has none."""
    shape = saved.tensors[key].shape if key in saved.tensors else ()
    return shape[axis] if len(shape) > axis else None


def _same_base(saved: Checkpoint, ebm: LVEBM) -> bool:
    """Whether what the base of x has fitted to the training rows is what is in the file.

    The parameters of a generator are trained on, and differ.
    """
    now = {f"{_BASE}{name}": value for name, value in ebm.base_x.named_buffers()}
    there = {key: saved.tensors[key] for key in now if key in saved.tensors}
    return all(
        key in there and there[key].dtype == value.dtype and torch.equal(there[key], value.cpu())
        for key, value in now.items()
    )
