# SPDX-License-Identifier: Apache-2.0
"""Refusing data of another size than those a guide has rows for."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide

from pyro_lvebm.rng import device_of, isolated_rng
from pyro_lvebm.validation import DataError


class KnownRows:
    """Remembers for what arguments the plates of a guide are those of its model.

    A guide with rows for every datum opens plates of the size that it saw at its first call, and
    Pyro replays them in the model. For other data the model would then, without a word, run on
    rows that belong to the data of the first call.
    """

    def __init__(self) -> None:
        self._seen: set[Any] = set()

    def changed(
        self, guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, tuple[int, int]]:
        """Run the model where the arguments have a new form, and compare its plates.

        Args:
            guide: The guide, after its first call.
            args: Arguments of the guide.
            kwargs: Keyword arguments of the guide.

        Returns:
            The sizes in the guide and in the model of every plate that differs.
        """
        form = _form((args, kwargs))
        if form in self._seen or not (args or kwargs):
            return {}
        sizes = _plate_sizes(guide, args, kwargs)
        held = {name: f.full_size or f.size for name, f in guide._prototype_frames.items()}
        differ = {n: (held[n], sizes[n]) for n in held if sizes.get(n, held[n]) != held[n]}
        if not differ:
            self._seen.add(form)
        return differ

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

    def forget(self) -> None:
        """Start again, for a guide that has taken the plates of new arguments."""
        self._seen.clear()


def _plate_sizes(guide: AutoGuide, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, int]:
    # Handlers around the guide, such as a plate of particles, are not for this run.
    with isolated_rng(0, device=device_of(args, kwargs)), torch.no_grad(), poutine.block():
        trace = poutine.trace(guide.model).get_trace(*args, **kwargs)
    frames = [f for node in trace.nodes.values() for f in node.get("cond_indep_stack", ())]
    sizes = {name: getattr(node.get("fn"), "size", None) for name, node in trace.nodes.items()}
    # `poutine.block(expose=...)` hides the sites of plates, but not the plates of other sites.
    sizes |= {frame.name: frame.full_size or frame.size for frame in frames}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _form(value: Any) -> Any:
    """What plate sizes can depend on: shapes of arrays, and small values."""
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in sorted(value.items(), key=repr))
    if isinstance(value, (list, tuple)):
        return tuple(_form(item) for item in value)
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return type(value), tuple(getattr(value, "shape", ()))
