# SPDX-License-Identifier: Apache-2.0
"""Rows that a plate is given with the data, as by a DataLoader, and that Pyro does not choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvebm.rng import Stream, device_of, isolated_rng
from pyro_lvebm.validation import DataError

GIVEN = "given_rows"
"""Key in `infer` of the site at which a plate takes its rows, where the model is given them."""


def is_subsample(node: Any) -> bool:
    """Return whether a site, or its message, is that at which a plate takes its minibatch."""
    return node["type"] == "sample" and type(node["fn"]).__name__ == "_Subsample"


class GivenRows(Messenger):
    """Guards the rows that a model gives its plates, as in `pyro.plate(..., subsample=ids)`.

    Directly around a model it refuses rows that no minibatch can have, and other rows in their
    place. The observations are those of the given rows; a guide that chose rows by itself, and
    that Pyro replays in the model, would put the latents of other data beside them, without a
    word. Around a guide it checks the rows that its `create_plates` gives. Some models give the
    data themselves, as in `pyro.plate(..., subsample=x)`, for the length of a minibatch: these are
    no rows, which only a guide with something for every datum needs.

    Args:
        until: Plates after which the run ends, once the rows of all of them are known.
        needed: Whether data in place of rows are refused.

    Raises:
        DataError: Under it, if rows are refused; see `check_rows`.
    """

    def __init__(self, until: frozenset[str] = frozenset(), *, needed: bool = False) -> None:
        super().__init__()
        self.until, self.needed = until, needed
        self.rows: dict[str, Tensor] = {}

    def __enter__(self) -> Any:
        """Start a run of the model."""
        self.rows = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if is_subsample(msg) and msg["value"] is not None:
            if self.needed or _are_indices(msg["value"]):
                check_rows(msg["name"], msg["value"], msg["fn"].size)
            self.rows[msg["name"]] = msg["value"]
            msg["infer"] = {**msg["infer"], GIVEN: True}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg) or msg["name"] not in self.rows:
            return
        check_not_replaced(msg["name"], self.rows[msg["name"]], msg["value"])
        if self.until and self.until <= self.rows.keys():
            raise _Found


class _Found(Exception):
    """Ends a run of a model whose rows are known."""


def find_rows(
    model: Callable[..., Any],
    plates: frozenset[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Tensor]:
    """Return the rows that a model gives these plates, from a run that ends where it has them.

    Args:
        model: The model.
        plates: Names of the plates.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Raises:
        DataError: If rows are refused.
    """
    given = GivenRows(until=plates, needed=True)
    # Handlers around, such as a plate of particles, are not for this run.
    noise = isolated_rng(0, Stream.PROBE, device=device_of(args, kwargs))
    with noise, torch.no_grad(), poutine.block():
        try:
            given(model)(*args, **kwargs)
        except _Found:
            pass
    return {name: ids for name, ids in given.rows.items() if name in plates}


def check_rows(plate: str, rows: Any, size: int) -> None:
    """Refuse rows that no minibatch of a plate can have.

    Args:
        plate: Name of the plate.
        rows: What it was given.
        size: Number of its rows.

    Raises:
        DataError: If they are not distinct indices in 0 … size − 1, or all of them in another
            order than the data.
    """
    if not _are_indices(rows):
        got = type(rows).__name__
        if isinstance(rows, Tensor):
            got = f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise DataError(
            f"the rows given to plate '{plate}' must be indices, a torch.LongTensor of shape "
            f"(B,); got {got}"
        )
    if len(rows) == 0:
        raise DataError(f"plate '{plate}' was given no rows; a minibatch has at least one")
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        raise DataError(
            f"the rows given to plate '{plate}' must lie in 0 … {size - 1}; got {low} … {high}. "
            "They are positions in the data that the plate has the size of"
        )
    values, counts = rows.unique(return_counts=True)
    if len(values) < len(rows):
        twice = int(values[counts > 1][0])
        raise DataError(
            f"plate '{plate}' was given row {twice} more than once, and its latents cannot move in "
            "two ways at a time. Draw minibatches without replacement"
        )
    if len(rows) == size and not torch.equal(rows, values):
        raise DataError(
            f"plate '{plate}' was given all of its {size} rows in another order, in which Pyro "
            "would not take the parameters of guides. Sort the minibatch by its rows "
            "(order = ids.argsort()), or take smaller ones"
        )


def _are_indices(rows: Any) -> bool:
    return isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.dim() == 1


def check_not_replaced(plate: str, given: Any, rows: Any) -> None:
    """Refuse rows that differ from those that the model is given.

    Raises:
        DataError: If they do.
    """
    both = isinstance(rows, Tensor) and isinstance(given, Tensor)
    if rows is given or (both and torch.equal(rows.to(given.device), given)):
        return
    if not isinstance(given, Tensor) and list(rows) == list(given):
        return
    raise DataError(
        f"the model is given rows of plate '{plate}', and the guide has taken others. Give the "
        "guide, or the AutoGuideList around it, create_plates=..., a function of the model's "
        f"arguments that returns pyro.plate('{plate}', ..., subsample=ids); in a guide written by "
        "hand, open the plate so"
    )
