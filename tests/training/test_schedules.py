# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyro_lvebm.training.fit import half_cosine


@given(st.floats(0.0, 1.0))
def test_half_cosine_is_a_line_in_the_squared_cosine(progress: float) -> None:
    """By the double angle: 0.02 + 0.98 cos²(π progress / 2)."""
    expected = 0.02 + 0.98 * np.cos(0.5 * np.pi * progress) ** 2
    assert half_cosine(progress) == pytest.approx(expected, rel=1e-12)


def test_it_falls_from_one_to_a_fiftieth() -> None:
    values = [half_cosine(p) for p in np.linspace(0.0, 1.0, 101)]
    assert values[0] == 1.0 and values[-1] == pytest.approx(1 / 50, rel=1e-12)
    assert (np.diff(values) < 0.0).all()


def test_it_is_flat_at_both_ends_and_steepest_between() -> None:
    slope = np.diff([half_cosine(p) for p in np.linspace(0.0, 1.0, 1001)]) * 1000
    assert abs(slope[0]) < 0.01 > abs(slope[-1])
    assert slope.min() == pytest.approx(-0.49 * np.pi, rel=1e-5)
    assert 499 <= slope.argmin() <= 500


def test_its_mean_is_that_of_its_ends() -> None:
    grid = (np.arange(1000) + 0.5) / 1000
    mean = np.mean([half_cosine(p) for p in grid])
    assert mean == pytest.approx(0.51, rel=1e-9)
