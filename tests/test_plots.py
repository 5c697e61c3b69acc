# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyro_lvebm.plots import (
    image_figure,
    plot_elbo,
    plot_images,
    plot_pair,
    save_figure,
    table_figure,
)

ROWS = pd.DataFrame(
    {
        "elbo": [-3.25, -3.5, -4.75],
        "elbo_se": [0.01, 0.02, 0.03],
        "kl_gap": [-0.01, 0.24, 1.49],
        "kl_gap_se": [0.02, 0.05, 0.1],
    },
    index=pd.Index(["particles", "full covariance", "mean field"], name="posterior"),
)


def images(count: int, height: int = 3, width: int = 4, start: int = 1) -> np.ndarray:
    """Images in which every pixel has a value of its own."""
    return start + np.arange(count * height * width, dtype=float).reshape(count, height, width)


def new_axes() -> Axes:
    return Figure().subplots()


def canvas(axes: Axes) -> np.ma.MaskedArray:
    (image,) = axes.images
    return np.ma.masked_invalid(image.get_array())


def cut(axes: Axes, k: int, columns: int, height: int = 3, width: int = 4) -> np.ma.MaskedArray:
    """The k-th image of a grid with gaps of one pixel."""
    row, column = divmod(k, columns)
    top, left = row * (height + 1), column * (width + 1)
    return canvas(axes)[top : top + height, left : left + width]


# --- images ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "columns"), [(6, 3), (7, 3), (1, 1), (2, 5), (4, 1)])
def test_every_image_is_in_its_place(count: int, columns: int) -> None:
    axes, shown = new_axes(), images(count)
    assert plot_images(axes, shown, "digits", columns) is axes
    rows = -(-count // columns)
    assert canvas(axes).shape == (rows * 4 - 1, columns * 5 - 1)
    for k, image in enumerate(shown):
        np.testing.assert_array_equal(cut(axes, k, columns).filled(np.nan), image)
    # Gaps, and places without an image, are blank.
    assert canvas(axes).count() == shown.size
    assert axes.get_title() == "digits" and not axes.axison


def test_one_grey_scale_for_all_images_with_ink_dark() -> None:
    axes = new_axes()
    plot_images(axes, images(4), "", 2)
    (image,) = axes.images
    assert image.get_clim() == (1.0, 48.0)
    light, dark = (image.to_rgba(np.array([[v]]))[0, 0, :3].mean() for v in (1.0, 48.0))
    assert dark < 0.1 and light > 0.9


def test_hidden_pixels_are_blank() -> None:
    axes, shown = new_axes(), images(3)
    shown[:, 1:, 2] = np.nan
    plot_images(axes, shown, "", 3)
    for k in range(3):
        np.testing.assert_array_equal(np.ma.getmaskarray(cut(axes, k, 3)), np.isnan(shown[k]))
        np.testing.assert_array_equal(cut(axes, k, 3).filled(np.nan), shown[k])
    (image,) = axes.images
    red, green, blue, _ = image.to_rgba(canvas(axes))[1, 2]
    assert blue > green > red, "no grey value of the scale looks like a hidden pixel"
    red, green, blue, _ = image.to_rgba(canvas(axes))[0, 2]
    assert red == green == blue


def make_image_figure() -> Figure:
    masked = images(5, start=1000)
    masked[:, 2:] = np.nan
    reconstructed = images(15, start=2000)
    return image_figure(images(20), images(20, start=500), masked, reconstructed, ROWS)


def test_image_figure_has_four_panels() -> None:
    data, draws, _, table = make_image_figure().axes
    for k in range(20):
        np.testing.assert_array_equal(cut(data, k, 10).filled(np.nan), images(20)[k])
        np.testing.assert_array_equal(cut(draws, k, 10).filled(np.nan), images(20, start=500)[k])
    assert data.get_title() == "data" and draws.get_title() == "model draws"
    assert table.get_title() == "ELBO table, θ fixed" and not table.images


def test_masked_images_are_above_their_reconstructions() -> None:
    held_out = make_image_figure().axes[2]
    assert held_out.get_title() == "held-out: masked, reconstructed, true"
    for k in range(5):
        shown = cut(held_out, k, 5)
        np.testing.assert_array_equal(shown[:2].filled(np.nan), images(5, start=1000)[k, :2])
        assert shown[2:].mask.all(), "hidden pixels must not be shown"
        for row in (1, 2, 3):
            index = 5 * (row - 1) + k
            below = cut(held_out, 5 * row + k, 5)
            np.testing.assert_array_equal(below.filled(np.nan), images(15, start=2000)[index])


# --- points ---------------------------------------------------------------------------------


def offsets(axes: Axes) -> dict[str, np.ndarray]:
    return {
        str(c.get_label()): np.asarray(c.get_offsets())
        for c in axes.collections
        if isinstance(c, PathCollection)
    }


def test_the_first_two_columns_of_data_and_draws() -> None:
    rng = np.random.default_rng(0)
    data, draws = rng.normal(size=(30, 3)), rng.normal(size=(20, 3)) + 9.0
    axes = plot_pair(new_axes(), data, draws, "pair")
    shown = offsets(axes)
    assert set(shown) == {"data", "model"}
    np.testing.assert_array_equal(shown["data"], data[:, :2])
    np.testing.assert_array_equal(shown["model"], draws[:, :2])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("x[0]", "x[1]", "pair")
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["data", "model"]


def test_one_column_is_two_densities_on_the_same_bins() -> None:
    rng = np.random.default_rng(0)
    data, draws = rng.normal(size=(400, 1)), rng.normal(size=(100, 1)) + 2.0
    axes = plot_pair(new_axes(), data, draws, "one")
    assert len(axes.containers) == 2 and not axes.collections
    edges = []
    for bars, rows in zip(axes.containers, (data, draws), strict=True):
        left = np.array([bar.get_x() for bar in bars])
        width = np.array([bar.get_width() for bar in bars])
        height = np.array([bar.get_height() for bar in bars])
        assert (height * width).sum() == pytest.approx(1.0)
        count = np.histogram(rows, np.append(left, left[-1] + width[-1]))[0]
        np.testing.assert_allclose(height * width * len(rows), count, atol=1e-6)
        edges.append(left)
    np.testing.assert_array_equal(*edges)
    assert edges[0][0] == pytest.approx(min(data.min(), draws.min()))
    assert axes.get_xlabel() == "x[0]"


# --- the ELBO table -------------------------------------------------------------------------


def gap_markers(axes: Axes) -> Line2D:
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    return points


def test_gaps_and_errors_are_those_of_the_table() -> None:
    axes = plot_elbo(new_axes(), ROWS)
    (points,) = [
        line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "o"
    ]
    np.testing.assert_array_equal(points.get_xdata(), ROWS["kl_gap"])
    height = np.asarray(points.get_ydata())
    assert (np.diff(height) < 0).all(), "the best ELBO is on top"
    (bars,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    for (left, right), gap, error, y in zip(
        bars.get_segments(), ROWS["kl_gap"], ROWS["kl_gap_se"], height, strict=True
    ):
        np.testing.assert_allclose([left[0], right[0]], [gap - 2 * error, gap + 2 * error])
        assert left[1] == right[1] == y


def test_labels_stand_beside_their_rows() -> None:
    axes = plot_elbo(new_axes(), ROWS)
    labels = dict(zip(axes.get_yticks(), axes.get_yticklabels(), strict=True))
    (points,) = [
        line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "o"
    ]
    texts = [labels[y].get_text() for y in points.get_ydata()]
    assert texts == [
        "particles\nELBO -3.250",
        "full covariance\nELBO -3.500",
        "mean field\nELBO -4.750",
    ]
    low, high = axes.get_ylim()
    assert low < min(points.get_ydata()) and high > max(points.get_ydata())
    assert "KL(q ‖ p(z|x))" in axes.get_xlabel() and "2 se" in axes.get_xlabel()
    zero = [line for line in axes.lines if list(line.get_xdata()) == [0.0, 0.0]]
    assert len(zero) == 1


def test_one_row_is_enough() -> None:
    axes = plot_elbo(new_axes(), ROWS.iloc[:1])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["particles\nELBO -3.250"]


# --- files ----------------------------------------------------------------------------------


def panels(figure: Figure, path: Path) -> list[np.ndarray]:
    """The pixels of every panel of a saved figure, (height, width, rgb)."""
    save_figure(figure, path)
    pixels = matplotlib.image.imread(path)[..., :3]
    height = pixels.shape[0]
    cuts = []
    for axes in figure.axes:
        box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted())
        x0, x1, y0, y1 = (int(130 * v) for v in (box.x0, box.x1, box.y0, box.y1))
        cuts.append(pixels[height - y1 : height - y0, x0:x1])
    return cuts


def test_saved_figure_of_images_has_ink_in_every_panel(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    found = panels(make_image_figure(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and len(found) == 4
    for panel in found:
        assert panel.size > 10_000 and panel.std() > 0.02
    assert matplotlib.image.imread(path).shape[:2] == (1040, 1300)


def test_an_empty_panel_fails_that_check(tmp_path: Path) -> None:
    figure = make_image_figure()
    figure.axes[1].images[0].remove()
    assert panels(figure, tmp_path / "figure.png")[1].std() == 0.0


@pytest.mark.parametrize("columns", [1, 2, 5])
def test_saved_figure_of_a_table_has_ink_in_both_panels(tmp_path: Path, columns: int) -> None:
    rng = np.random.default_rng(1)
    data, draws = rng.normal(size=(50, columns)), rng.normal(size=(40, columns))
    figure = table_figure(data, draws, ROWS)
    left, right = figure.axes
    assert left.get_title() == "data and model draws"
    assert right.get_title() == "ELBO table, θ fixed"
    if columns > 1:
        np.testing.assert_array_equal(offsets(left)["data"], data[:, :2])
    for panel in panels(figure, tmp_path / "figure.png"):
        assert panel.size > 10_000 and panel.std() > 0.02


def test_figures_leave_pyplot_alone(tmp_path: Path) -> None:
    """No global figure, no backend chosen: a notebook keeps its own."""
    import matplotlib.pyplot as plt

    before, backend = plt.get_fignums(), matplotlib.get_backend()
    save_figure(make_image_figure(), tmp_path / "a.png")
    save_figure(table_figure(np.ones((3, 2)), np.zeros((3, 2)), ROWS), tmp_path / "b.png")
    assert plt.get_fignums() == before and matplotlib.get_backend() == backend
