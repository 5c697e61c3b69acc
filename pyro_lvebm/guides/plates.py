# SPDX-License-Identifier: Apache-2.0
"""The plates of a guide: their rows, and first draws of the size of all data."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import init_to_sample
from torch import Tensor

from pyro_lvebm.rng import Stream, device_of, isolated_rng
from pyro_lvebm.sites import (
    CheapLatents,
    GivenRows,
    LatentSite,
    cheap_draw,
    check_not_replaced,
    find_rows,
    is_improper,
    uniform_draw,
)
from pyro_lvebm.validation import DataError


class KnownRows:
    """Remembers the plates of a model, for every form of its arguments.

    A guide with rows for every datum opens plates of the size that it saw at its first call, and
    Pyro replays them in the model. For other data the model would then, without a word, run on
    rows that belong to the data of the first call. Where the model is given the rows of a
    minibatch, as in `pyro.plate(..., subsample=ids)`, the guide takes these.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[dict[str, int], frozenset[str]]] = {}

    def given(
        self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the rows that the model is given, by plate.

        Args:
            guide: The guide, perhaps before its first call.
            args: Arguments of the guide.
            kwargs: Keyword arguments of the guide.

        Raises:
            DataError: If they are no distinct rows of the plate.
        """
        form = _form((args, kwargs))
        if form in self._seen:
            plates = self._seen[form][1]
            return find_rows(guide.model, plates, args, kwargs) if plates else {}
        if guide.prototype_trace is not None and not (args or kwargs):
            return {}  # called for draws of what it knows, without the data
        sizes, rows = _plates(guide, args, kwargs)
        self._seen[form] = sizes, frozenset(rows)
        return rows

    def changed(
        self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[int, int]]:
        """Compare the plates of a guide with those of its model for arguments known to `given`.

        Returns:
            The sizes in the guide and in the model of every plate that differs.
        """
        sizes, _ = self._seen.get(_form((args, kwargs)), ({}, frozenset()))
        held = {name: f.full_size or f.size for name, f in guide._prototype_frames.items()}
        return {n: (held[n], sizes[n]) for n in held if sizes.get(n, held[n]) != held[n]}

    def check(self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse arguments for which a plate has another size; see `changed`.

        Raises:
            DataError: If a plate of the guide has another size in the model.
        """
        for name, (held, size) in self.changed(guide, args, kwargs).items():
            raise DataError(
                f"{type(guide).__name__} was made for {held} rows of plate '{name}', and these "
                f"arguments give the plate {size}. Other data need a new guide. For their "
                "posterior at the present parameters call Saddle(model, AutoParticles(model), "
                "optim).sample_posterior(...), which trains nothing; an amortised guide takes any "
                "number of rows"
            )


def open_plates(
    guide: AutoGuide, rows: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the plates of a guide, at the rows that its model is given.

    Args:
        guide: The guide, after its first call.
        rows: The rows that the model is given, by plate.
        args: Arguments of the guide.
        kwargs: Keyword arguments of the guide.

    Raises:
        DataError: If the guide's own `create_plates`, or an `AutoGuideList` around it, has taken
            other rows.
    """
    if rows and guide.master is None and guide.create_plates is None:
        plates = {}
        for name, frame in sorted(guide._prototype_frames.items()):
            ids, size = rows.get(name), frame.full_size or frame.size
            batch = frame.size if ids is None else None
            plates[name] = pyro.plate(name, size, batch, subsample=ids, dim=frame.dim)
        guide.plates = plates
    else:
        plates = guide._create_plates(*args, **kwargs)
    for name, ids in rows.items():
        if name in plates:
            check_not_replaced(name, ids, plates[name]._indices)
    return plates


def _plates(
    guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the sizes of the model's plates, and the rows that it is given for some of them."""
    # Handlers around the guide, such as a plate of particles, are not for this run.
    given = GivenRows(needed=True)
    noise = isolated_rng(0, Stream.PROBE, device=device_of(args, kwargs))
    with noise, torch.no_grad(), poutine.block():
        with CheapLatents():
            trace = poutine.trace(given(guide.model)).get_trace(*args, **kwargs)
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    sizes = {name: getattr(node.get("fn"), "size", None) for name, node in trace.nodes.items()}
    # `poutine.block(expose=...)` hides the sites of plates, but not the plates of other sites.
    sizes |= {frame.name: frame.full_size or frame.size for frame in frames}
    return {name: n for name, n in sizes.items() if isinstance(n, int)}, given.rows


def _form(value: Any) -> Any:
    """What plate sizes can depend on: shapes of arrays, and small values."""
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in sorted(value.items(), key=repr))
    if isinstance(value, (list, tuple)):
        return tuple(_form(item) for item in value)
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return type(value), tuple(getattr(value, "shape", ()))


def first_draw(site: dict[str, Any]) -> Tensor:
    """Draw a site of the run that finds the latents, whose values are thrown away."""
    easy = cheap_draw(site["fn"])
    value: Tensor = init_to_sample(site) if easy is None else easy
    return value


def tile_to_full_size(value: Tensor, site: dict[str, Any], event_dim: int) -> Tensor:
    """Repeat a value (*batch, *event) of a site along subsampled plates, to their full size."""
    for frame in site["cond_indep_stack"]:
        axis, full = frame.dim - event_dim, frame.full_size or frame.size
        if frame.size != full:
            rows = torch.arange(full, device=value.device) % frame.size
            value = value.index_select(axis, rows)
    return value


def draw_full_size(site: dict[str, Any], sample_shape: tuple[int, ...] = ()) -> Tensor:
    """Draw a latent site of a trace, (*sample_shape, *full_batch_shape, *event_shape).

    The trace knows the laws of one minibatch only. Those of a subsampled plate are repeated along
    it, as in Pyro's own autoguides; the draws are independent.

    Args:
        site: A sample site inside vectorised plates.
        sample_shape: Shape of further draws.
    """
    fn = site["fn"]
    batch, full = list(fn.batch_shape), list(fn.batch_shape)
    for frame in site["cond_indep_stack"]:
        full[frame.dim] = frame.full_size or frame.size
    if isinstance(fn, LatentSite) and fn.context is not None:
        # Draws at a context cost a run of annealing each, and a first draw need not be exact.
        fn = fn.ebm.base_z.distribution().expand(batch)
    if is_improper(fn):
        return uniform_draw(fn, torch.Size((*sample_shape, *full)))
    if full == batch or isinstance(fn, LatentSite):  # a LatentSite has the same law everywhere
        draws: Tensor = fn.expand(torch.Size(full)).sample(torch.Size(sample_shape))
        return draws
    repeats = [-(-n // b) for n, b in zip(full, batch, strict=True)]
    draws = fn.sample(torch.Size((*sample_shape, *repeats)))
    lead, depth = len(sample_shape), len(batch)
    paired = [axis for i in range(lead, lead + depth) for axis in (i, i + depth)]
    draws = draws.permute(*range(lead), *paired, *range(lead + 2 * depth, draws.dim()))
    tiled = [r * b for r, b in zip(repeats, batch, strict=True)]
    draws = draws.reshape(*sample_shape, *tiled, *fn.event_shape)
    for axis, n in enumerate(full, start=lead):
        draws = draws.narrow(axis, 0, n)
    return draws.contiguous()
