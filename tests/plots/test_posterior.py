# SPDX-License-Identifier: Apache-2.0
"""What is drawn of posteriors: latents of chosen data, and ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.patches import Polygon

from pyro_lvebm import plot_latents

RNG = np.random.default_rng(0)
DRAWS = RNG.normal(size=(4, 250, 6, 3)) @ np.array([[1.0, 0.8, 0.0], [0.0, 0.5, 0], [0, 0, 2.0]])
DRAWS += 4.0 * RNG.normal(size=(6, 3))


# --- latents --------------------------------------------------------------------------------


def test_chosen_data_are_scattered_with_mean_and_ellipse() -> None:
    axes = plot_latents(DRAWS, [4, 1], columns=(0, 1), labels=["cat", "dog"])
    clouds = [c for c in axes.collections if isinstance(c, PathCollection)]
    ellipses = [line for line in axes.lines if len(line.get_xdata()) == 100]
    means = [line for line in axes.lines if line.get_marker() == "o"]
    assert len(clouds) == len(ellipses) == len(means) == 2
    for datum, cloud, ellipse, mean in zip((4, 1), clouds, ellipses, means, strict=True):
        rows = DRAWS[:, :, datum, :2].reshape(-1, 2)
        np.testing.assert_array_equal(cloud.get_offsets(), rows)
        np.testing.assert_allclose(np.ravel(mean.get_data()), rows.mean(0))
        edge = np.stack(ellipse.get_data(), -1) - rows.mean(0)
        distance = np.einsum("ni,ij,nj->n", edge, np.linalg.inv(np.cov(rows.T)), edge)
        np.testing.assert_allclose(distance, 4.0)  # two standard deviations, squared
        assert mean.get_color() == ellipse.get_color()
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["cat", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("z[0]", "z[1]")


@pytest.mark.parametrize("shape", [(4, 250, 6), (4, 250, 6, 1), (4, 250, 6, 3)])
def test_one_column_is_a_histogram_for_each_datum(shape: tuple[int, ...]) -> None:
    draws = DRAWS if len(shape) == 4 and shape[3] == 3 else DRAWS[..., 2].reshape(shape)
    columns = (2,) if shape[-1] == 3 else (0, 1)
    axes = plot_latents(draws, [0, 5], columns=columns)
    lines = [p for p in axes.patches if isinstance(p, Polygon) and not p.get_fill()]
    assert len(lines) == 2
    for datum, line in zip((0, 5), lines, strict=True):
        xy = line.get_xy()
        heights, left = xy[1:-1:2, 1], xy[1:-1:2, 0]
        width = left[1] - left[0]
        assert heights.sum() * width == pytest.approx(1.0)
        centre = (heights * (left + 0.5 * width)).sum() * width
        assert centre == pytest.approx(DRAWS[:, :, datum, 2].mean(), abs=0.6 * width)
    assert axes.get_ylabel() == "density" and axes.get_xlabel() == f"z[{columns[0]}]"


@pytest.mark.parametrize(
    ("draws", "data", "columns", "message"),
    [
        (DRAWS[0, :, :, 0], [0], (0,), r"\(chains, draws, N, …\); got shape \(250, 6\)"),
        (DRAWS, [6], (0, 1), r"data must be among 0 … 5; got \[6\]"),
        (DRAWS, [], (0, 1), r"data must be among 0 … 5; got \[\]"),
        (DRAWS, [0], (0, 3), r"one or two of 3; got \[0, 3\]"),
        (DRAWS, [0], (0, 1, 2), r"one or two of 3; got \[0, 1, 2\]"),
    ],
)
def test_latents_that_do_not_exist(draws: Any, data: Any, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_latents(draws, data, columns=columns)


# --- ranks ----------------------------------------------------------------------------------
