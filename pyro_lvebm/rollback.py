# SPDX-License-Identifier: Apache-2.0
"""Leaving pools and particles as they were when a step fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.model import LVEBM


def pool_snapshot(ebms: list[LVEBM]) -> Callable[[], None]:
    """Return an action that puts the pools back to where they are now."""
    snapshots = [ebm.pool.snapshot() for ebm in ebms]

    def put_back() -> None:
        for restore in snapshots:
            restore()

    return put_back


@contextmanager
def unchanged_on_error(ebms: list[LVEBM]) -> Iterator[list[Callable[[], None]]]:
    """Put the pools back after an error, and run whatever was appended to the yielded list."""
    put_back = pool_snapshot(ebms)
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        put_back()
        for action in undo:
            action()
        raise


def undo_particles(
    guide: AutoParticles, indices: dict[str, Tensor], names: list[str]
) -> Callable[[], None]:
    """Return an action that puts particles of a minibatch, and their step sizes, back.

    Args:
        guide: The particles.
        indices: Data indices of each plate.
        names: The sites.
    """
    values = {name: guide.read(name, indices).clone() for name in names}
    steps = {name: guide.step_size(name).clone() for name in names}

    def undo() -> None:
        for name, value in values.items():
            guide.write(name, indices, value)
            guide.step_size(name).copy_(steps[name])

    return undo
