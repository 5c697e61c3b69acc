# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from benchmarks.systems import SYSTEMS


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_follow_their_factors(name: str) -> None:
    """The same seed, the same rows; noise apart, rows of one factor pair are one curve."""
    first, again, other = (SYSTEMS[name](40, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.x, again.x) and not np.array_equal(first.x, other.x)
    assert first.x.shape[0] == len(first.factors) == 40 and np.isfinite(first.x).all()
    quiet, loud = (SYSTEMS[name](40, 1, noise) for noise in (0.0, 0.1))  # type: ignore[call-arg]
    spread = (loud.x - quiet.x).std()
    assert np.array_equal(quiet.factors, loud.factors) and 0.08 < spread < 0.12
