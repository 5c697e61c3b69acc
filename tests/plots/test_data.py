# SPDX-License-Identifier: Apache-2.0
"""What is drawn of data: pairs of columns, and reconstructions."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure

from pyro_lvebm import plot_pairs, plot_reconstructions

# --- pairs ----------------------------------------------------------------------------------


def test_every_pair_of_columns_is_in_its_place() -> None:
    rng = np.random.default_rng(0)
    data, draws = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)) + 5.0
    grid = plot_pairs(data, draws, columns=(0, 2, 4), names=["a", "b", "c"])
    chosen = [0, 2, 4]
    assert grid.shape == (3, 3)
    for i in range(3):
        for j in range(3):
            if j > i:
                assert grid[i, j] is None
            elif j < i:
                clouds = [c for c in grid[i, j].collections if isinstance(c, PathCollection)]
                for cloud, rows in zip(clouds, (data, draws), strict=True):
                    expected = rows[:, [chosen[j], chosen[i]]]
                    np.testing.assert_array_equal(cloud.get_offsets(), expected)
        for bars, rows in zip(grid[i, i].containers, (data, draws), strict=True):
            area = sum(bar.get_height() * bar.get_width() for bar in bars)
            centre = sum(
                bar.get_height() * bar.get_width() * (bar.get_x() + 0.5 * bar.get_width())
                for bar in bars
            )
            assert area == pytest.approx(1.0)
            assert centre == pytest.approx(rows[:, chosen[i]].mean(), abs=0.3)
    assert [grid[2, j].get_xlabel() for j in range(3)] == ["a", "b", "c"]
    assert [grid[i, 0].get_ylabel() for i in (1, 2)] == ["b", "c"]
    (legend,) = grid[0, 0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["data", "model"]


def test_one_column_is_one_panel_with_its_own_legend() -> None:
    grid = plot_pairs(np.zeros((4, 1)), np.ones((3, 1)))
    assert grid.shape == (1, 1) and grid[0, 0].get_legend() is not None
    assert grid[0, 0].get_xlabel() == "x[0]" and not plt.get_fignums()


@pytest.mark.parametrize(
    ("data", "columns", "message"),
    [
        (np.zeros((4, 3)), None, r"\(N, D\) and \(M, D\); got \(4, 3\) and \(5, 2\)"),
        (np.zeros(4), None, r"got \(4,\) and \(5, 2\)"),
        (np.zeros((4, 2)), (0, 2), r"columns must be among 0 … 1; got \[0, 2\]"),
    ],
)
def test_pairs_that_do_not_fit(data: np.ndarray, columns: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_pairs(data, np.zeros((5, 2)), columns=columns)


# --- reconstructions ------------------------------------------------------------------------


@pytest.mark.parametrize("chains", [False, True])
def test_entries_are_drawn_against_what_was_observed(chains: bool) -> None:
    rng = np.random.default_rng(0)
    data, replicates = rng.normal(size=(7, 2)), rng.normal(size=(200, 7, 2)) + 3.0
    shaped = replicates.reshape(4, 50, 7, 2) if chains else replicates
    axes = plot_reconstructions(data, shaped, axes=Figure().subplots())
    points = [line for line in axes.lines if line.get_marker() == "o"]
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    for k, (line, bar) in enumerate(zip(points, bars, strict=True)):
        np.testing.assert_array_equal(line.get_xdata(), data[:, k])
        np.testing.assert_allclose(line.get_ydata(), replicates[..., k].mean(0))
        ends = np.array([segment[:, 1] for segment in bar.get_segments()])
        np.testing.assert_allclose(ends.T, np.quantile(replicates[..., k], [0.05, 0.95], axis=0))
    (diagonal,) = [line for line in axes.lines if line.get_linestyle() == "--"]
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    assert axes.get_ylabel() == "replicates, mean and 90 %"


def test_images_stand_above_their_means_and_one_replicate() -> None:
    images = np.arange(60.0).reshape(5, 3, 4)
    replicates = np.stack([images + 100.0, images + 300.0])
    axes = plot_reconstructions(images, replicates, num_images=3)
    (image,) = axes.images
    canvas = np.ma.masked_invalid(image.get_array())
    assert canvas.shape == (3 * 4 - 1, 3 * 5 - 1)
    for row, shift in enumerate((0.0, 200.0, 100.0)):
        for k in range(3):
            shown = canvas[4 * row : 4 * row + 3, 5 * k : 5 * k + 4]
            np.testing.assert_array_equal(shown, images[k] + shift)


def test_replicates_of_other_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(5, 4, 2\) for \(3, 2\)"):
        plot_reconstructions(np.zeros((3, 2)), np.zeros((5, 4, 2)))
