# SPDX-License-Identifier: Apache-2.0
"""Random generators from a seed, a named stream and counters; nothing touches the global one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum, auto
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """What random numbers are for. Two purposes never share a stream, so their noise is apart.

    A function that a user calls with a seed derives one of its own from the stream of that
    function, and hands it down: what a fit, a table, an evidence and an export draw inside is then
    apart, too. New members go to the end; the numbers of the others would change with it.
    """

    # Starting points of networks and guides.
    ENERGY_WEIGHTS = auto()
    ENCODER_WEIGHTS = auto()
    FLOW_WEIGHTS = auto()
    LOW_RANK_START = auto()
    # Runs of a model that are looked at for their sites only.
    PROBE = auto()
    PROBED_ENERGIES = auto()
    # The negative phase.
    POOL_START = auto()
    POOL_MOVES = auto()
    POOL_CONTEXTS = auto()
    POOL_AT_CONTEXT = auto()
    # A step of Saddle.
    PREPARATION = auto()
    MINIBATCH = auto()
    POSITIVE_PHASE = auto()
    GUIDE_DRAWS = auto()
    PARAMETER_NOISE = auto()
    HELD_OUT_EVALUATION = auto()
    # log Z and log p(x) of an LVEBM.
    LOG_PARTITION = auto()
    LOG_PARTITION_POOL = auto()
    CONDITIONAL_LOG_PARTITION = auto()
    LOG_EVIDENCE = auto()
    # log Z and log p(x) of a program.
    LOG_Z_OF_SITE = auto()
    MISSED_LOG_Z = auto()
    EVIDENCE = auto()
    EVIDENCE_PROTOTYPE = auto()
    EVIDENCE_FROM_PARTICLES = auto()
    CONTEXTS_OF_ROWS = auto()
    POINTWISE_LIKELIHOOD = auto()
    # The ELBO table.
    TABLE = auto()
    TABLE_PROTOTYPE = auto()
    TABLE_ROWS = auto()
    TABLE_REFITS = auto()
    TABLE_HELD_OUT = auto()
    PARTICLE_ROW = auto()
    GUIDE_ROW = auto()
    LAPLACE_ROW = auto()
    MCMC_ROW = auto()
    # Draws, and what is exported.
    POSTERIOR_START = auto()
    POSTERIOR_CHAINS = auto()
    EXPORT = auto()
    EXPORT_PROTOTYPE = auto()
    EXPORT_GUIDE = auto()
    EXPORT_REPLICATES = auto()
    IMPUTATION = auto()
    # Diagnostics.
    RATE_POOL = auto()
    RATE_DRAWS = auto()
    RATE_FLOW = auto()
    DISSIPATIVITY = auto()
    POOL_DIAGNOSTICS = auto()
    TRAVERSAL = auto()
    TRAVERSAL_START = auto()
    ENERGY_PLOT = auto()
    # The command line.
    HELD_OUT_SPLIT = auto()
    VALIDATION_SPLIT = auto()
    DEQUANTISATION = auto()
    MIXTURE_STARTS = auto()
    GUIDE_FIT = auto()
    FIGURE = auto()
    # Added later.
    AVERAGED_POOL = auto()
    MIXTURE_BASE = auto()
    # Probes of energies.
    ENERGY_CHECK = auto()
    RAYS = auto()
    # Generators.
    GENERATOR_WEIGHTS = auto()
    MUTUAL_INFORMATION = auto()
    GENERATOR_CHECK = auto()
    CARRIED = auto()


def device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of a model's arguments, that of the first tensor among them."""
    tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((value.device for value in tensors), torch.device("cpu"))


def derive_seed(seed: int, stream: Stream, *counters: int | str) -> int:
    """Return a 63-bit seed that depends on `seed`, the stream and every counter.

    Streams for different purposes and counters are independent in the sense of NumPy's
    `SeedSequence`. A counter may be a name, such as that of a site.
    """
    key = [int(stream)]
    key += [crc32(c.encode()) if isinstance(c, str) else int(c) for c in counters]
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def generator_for(
    seed: int, stream: Stream, *counters: int | str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return a fresh generator on `device` whose numbers are fixed by seed, stream and counters.

    State that a sampler must remember is then two integers, which a checkpoint carries on any
    device, instead of the opaque state of a generator.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, stream, *counters))


@contextmanager
def isolated_rng(
    seed: int, stream: Stream, *counters: int | str, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Run code that draws from the global generator, and leave that generator as it was.

    Pyro's guides and plates draw from the global generator. Inside this block it is seeded from
    seed, stream and counters; afterwards its former state is back.
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
            generator.manual_seed(derive_seed(seed, stream, *counters))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
