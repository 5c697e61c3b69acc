# SPDX-License-Identifier: Apache-2.0
"""Which phase a fit is in, and how long it will still take."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

_TOLD = 0.1
"""Share of a job that must be done before its time tells of the rest."""


class Progress:
    """Phases of a job, said on standard error as they begin and every few seconds.

    What is left is estimated from the time so far and the usual shares of the phases.

    Args:
        shares: Usual share of the time of each phase, by name, in their order.
        quiet: Say nothing.
        every: Seconds from one line to the next.
        stream: Where to write; standard error if None.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        *,
        quiet: bool = False,
        every: float = 5.0,
        stream: TextIO | None = None,
    ) -> None:
        self.shares, self.quiet, self.every = dict(shares), quiet, every
        self.stream = sys.stderr if stream is None else stream
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, *, bars: bool = False) -> Iterator[None]:
        """Run a phase.

        Args:
            name: One of the phases.
            bars: Whether the phase shows how far it is by itself.
        """
        start, done = time.perf_counter(), threading.Event()
        self._say(name, 0.0)
        beat = threading.Thread(target=self._beat, args=(name, start, done), daemon=True)
        if not self.quiet and not bars:
            beat.start()
        try:
            yield
        finally:
            done.set()
            if beat.is_alive():
                beat.join()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _beat(self, name: str, start: float, done: threading.Event) -> None:
        while not done.wait(self.every):
            self._say(name, time.perf_counter() - start)

    def left(self, name: str, spent: float) -> float | None:
        """Return the seconds that are still to come in a phase that has taken `spent`, or None."""
        over = sum(self.seconds.values())
        share = sum(self.shares[known] for known in self.seconds)
        if not over or share < _TOLD * sum(self.shares.values()):
            return None
        names = list(self.shares)
        later = sum(self.shares[after] for after in names[names.index(name) + 1 :])
        rate = over / share
        # A phase that takes longer than usual is taken to be nearly at its end.
        return rate * later + max(rate * self.shares[name] - spent, 0.1 * spent)

    def _say(self, name: str, spent: float) -> None:
        if self.quiet:
            return
        number = list(self.shares).index(name) + 1
        text = f"[{number}/{len(self.shares)}] {name}"
        text += f", {spent:.0f} s" if spent else ""
        left = self.left(name, spent)
        text += "" if left is None else f", about {_duration(left)} left in all"
        print(text, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
