# SPDX-License-Identifier: Apache-2.0
"""Random numbers of the benchmarks' own, fixed by a seed and a key."""

from __future__ import annotations

import numpy as np
import torch


def noise(seed: int, *key: int) -> torch.Generator:
    """Return a fresh generator whose stream depends on the seed and every part of the key."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
