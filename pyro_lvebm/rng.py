# SPDX-License-Identifier: Apache-2.0
"""Random generators from a seed and counters, so that no code here touches the global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of a model's arguments, that of the first tensor among them."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((value.device for value in tensors), torch.device("cpu"))


def derive_seed(seed: int, *counters: int) -> int:
    """Return a 63-bit seed that depends on ``seed`` and on every counter.

    Streams for different counters are independent in the sense of NumPy's ``SeedSequence``.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=counters)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator_for(seed: int, *counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator on ``device`` whose stream is fixed by ``seed`` and ``counters``.

    State that a sampler must remember is then two integers, which a checkpoint carries on any
    device, instead of the opaque state of a generator.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, *counters))


@contextmanager
def isolated_rng(seed: int, *counters: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Run code that draws from the global generator, and leave that generator as it was.

    Pyro's guides and plates draw from the global generator. Inside this block it is seeded from
    ``seed`` and ``counters``; afterwards its former state is back.
    """
    # `torch.manual_seed` would reseed every accelerator too, and `fork_rng` costs as much as a
    # small Langevin step, so the generators concerned are named one by one.
    generators = [torch.default_generator]
    device = torch.device(device)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(derive_seed(seed, *counters))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
