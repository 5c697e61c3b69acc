# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pyro.optim import Adam
from small_models import data_of, plate_model, quadratic_ebm

from pyro_lvebm import AutoParticles, ElboTable, LogEvidence, LogPartition, Saddle
from pyro_lvebm.cli.figures import Results, image_figure, informative_pairs, table_figure
from pyro_lvebm.plots.canvas import save_figure
from pyro_lvebm.plots.data import plot_images, plot_pair
from pyro_lvebm.plots.posterior import plot_elbo
from pyro_lvebm.plots.training import SMOOTHING, history_figure

ROWS = pd.DataFrame(
    {
        "elbo": [-3.25, -3.5, -4.75],
        "elbo_se": [0.01, 0.02, 0.03],
        "kl_gap": [-0.01, 0.24, 1.49],
        "kl_gap_se": [0.02, 0.05, 0.1],
    },
    index=pd.Index(["particles", "full covariance", "mean field"], name="posterior"),
)


def elbo_table(rows: pd.DataFrame = ROWS, theta: str = "fixed") -> ElboTable:
    return ElboTable(rows, theta, -3.26, 0.01, [], 10, {}, {})


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
    return image_figure(images(20), images(20, start=500), masked, reconstructed, elbo_table())


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
    axes = plot_elbo(elbo_table(), new_axes())
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
    axes = plot_elbo(elbo_table(), new_axes())
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
    axes = plot_elbo(elbo_table(ROWS.iloc[:1]), new_axes())
    assert [t.get_text() for t in axes.get_yticklabels()] == ["particles\nELBO -3.250"]


def test_refits_show_held_out_values() -> None:
    held_out = {"held_out": [-3.1, -3.3, -4.0], "held_out_se": [0.1, 0.2, 0.3]}
    axes = plot_elbo(elbo_table(ROWS.assign(**held_out), "refit"), new_axes())
    points = gap_markers(axes)
    np.testing.assert_array_equal(points.get_xdata(), held_out["held_out"])
    (bars,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    widths = [right[0] - left[0] for left, right in bars.get_segments()]
    np.testing.assert_allclose(widths, [0.4, 0.8, 1.2])
    assert axes.get_xlabel().startswith("held-out log p(x)") and "refitted" in axes.get_title()
    assert not [line for line in axes.lines if list(line.get_xdata()) == [0.0, 0.0]]


def test_a_figure_is_made_where_none_is_given(tmp_path: Path) -> None:
    axes = plot_elbo(elbo_table())
    save_figure(axes.figure, tmp_path / "forest.png")
    ink = matplotlib.image.imread(tmp_path / "forest.png")[..., :3].min(-1) < 0.5
    assert ink.mean() > 0.005 and not plt.get_fignums(), "drawn, and no figure left in pyplot"


def test_only_a_table_is_drawn() -> None:
    with pytest.raises(ValueError, match=r"must be an ElboTable.*got DataFrame"):
        plot_elbo(ROWS)  # type: ignore[arg-type]


# --- the history ----------------------------------------------------------------------------

PANELS = {
    "mean energy": "E, nats per datum",
    "log Z online": "log Z, nats, ± 2 se",
    "effective negatives": "ESS, chains",
    "moves of the pool": "acceptance rate",
    "exchanges of the pool": "swap rate",
    "moves of the latents": "acceptance rate",
    "held-out data": "log p(x), nats per datum, ± 2 se",
    "size of the update": "KL(old ‖ new), nats",
    "trust region": "halvings of the update",
}
LINES = {
    "mean energy": {
        "positive (data)": "positive_energy",
        "negative (model)": "negative_energy",
    },
    "effective negatives": {"ESS": "ess"},
    "moves of the pool": {f"level {k}": f"acceptance_{k}" for k in range(12)},
    "exchanges of the pool": {f"levels {k} and {k + 1}": f"swap_rate_{k}" for k in range(11)},
    "moves of the latents": {"scene_z": "latent_acceptance_scene_z", "w": "latent_acceptance_w"},
    "size of the update": {"KL": "kl"},
    "trust region": {"halvings": "halvings"},
}


def make_history(steps: int = 90) -> pd.DataFrame:
    """A history of one LVEBM with 12 levels, evaluated every 30 steps and before the first."""
    rng = np.random.default_rng(0)
    names = ["loss", "kl", "log_partition", "log_partition_se"]
    names += [name for lines in LINES.values() for name in lines.values() if name != "kl"]
    frame = pd.DataFrame({name: rng.uniform(size=steps) for name in names})
    frame["ess"] *= 200.0
    frame["halvings"] = rng.integers(0, 5, steps).astype(float)
    frame["log_partition"] -= 5.0
    frame.index = pd.RangeIndex(1, steps + 1)
    held_out = pd.DataFrame(
        {"log_evidence": -rng.uniform(size=4), "log_evidence_se": rng.uniform(size=4)},
        index=[0, 30, 60, 90],
    )
    return frame.join(held_out, how="outer").rename_axis("step")


def by_title(history: pd.DataFrame) -> dict[str, Axes]:
    axes = history_figure(history).axes
    found = {a.get_title(): a for a in axes}
    assert len(found) == len(axes)
    return found


@cache
def usual() -> dict[str, Axes]:
    """Panels of the whole history, for tests that only look."""
    return by_title(make_history())


def labelled(axes: Axes) -> dict[str, Line2D]:
    return {str(a.get_label()): a for a in axes.lines if not str(a.get_label()).startswith("_")}


def assert_line(line: Line2D, values: pd.Series) -> None:
    np.testing.assert_array_equal(np.asarray(line.get_xdata()), values.index)
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), values, rtol=1e-9)


def moving_mean(values: pd.Series) -> pd.Series:
    """Means over the last steps, without pandas' own."""
    last = [values.iloc[max(0, k + 1 - SMOOTHING) : k + 1].dropna() for k in range(len(values))]
    return pd.Series([v.mean() if len(v) else np.nan for v in last], values.index)


def test_history_has_nine_panels_with_units() -> None:
    axes = usual()
    assert {title: a.get_ylabel() for title, a in axes.items()} == PANELS
    assert all(a.get_xlabel() == "step" for a in axes.values())


@pytest.mark.parametrize("title", LINES)
def test_lines_are_the_steps_and_their_moving_means(title: str) -> None:
    history = make_history()
    axes = usual()[title]
    shown = labelled(axes)
    assert list(shown) == list(LINES[title])
    faint = [line for line in axes.lines if line not in shown.values()]
    assert len(faint) == len(shown)
    for single, (label, name) in zip(faint, LINES[title].items(), strict=True):
        assert_line(single, history[name])
        assert_line(shown[label], moving_mean(history[name]))
        assert single.get_color() == shown[label].get_color()
        assert (single.get_alpha() or 1.0) < 0.5 and shown[label].get_alpha() is None


def test_log_z_is_shown_as_it_is_with_two_standard_errors() -> None:
    history = make_history()
    axes = usual()["log Z online"]
    (line,) = axes.lines
    assert_line(line, history["log_partition"])
    (band,) = [c for c in axes.collections if isinstance(c, PolyCollection)]
    corners = {(x, round(y, 9)) for x, y in np.concatenate([p.vertices for p in band.get_paths()])}
    for step, row in history.loc[1:].iterrows():
        for sign in (-2, 2):
            edge = row["log_partition"] + sign * row["log_partition_se"]
            assert (step, round(edge, 9)) in corners


@pytest.mark.parametrize("error", [None, np.inf])
def test_log_z_without_an_error_has_no_band(error: float | None) -> None:
    """A plain pool has no such column; before the first measurement the error is infinite."""
    history = make_history().drop(columns="log_partition_se")
    if error is not None:
        history["log_partition_se"] = error
    axes = by_title(history)["log Z online"]
    assert_line(axes.lines[0], history["log_partition"])
    assert not any(len(p.vertices) for c in axes.collections for p in c.get_paths())
    assert axes.get_ylabel() == "log Z, nats"
    low, high = axes.get_ylim()
    assert -5.2 < low < high < -3.8


def test_held_out_evidence_stands_where_it_was_evaluated() -> None:
    history = make_history()
    axes = usual()["held-out data"]
    (points,) = [line for line in axes.lines if line.get_marker() == "o"]
    evaluated = history["log_evidence"].dropna()
    assert list(evaluated.index) == [0, 30, 60, 90]
    assert_line(points, evaluated)
    (bars,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    error = 2 * history["log_evidence_se"].dropna()
    shown = np.array(bars.get_segments(), dtype=float)
    assert shown.shape == (4, 2, 2)
    np.testing.assert_array_equal(shown[:, :, 0], np.array([evaluated.index] * 2).T)
    np.testing.assert_allclose(shown[:, 0, 1], evaluated - error)
    np.testing.assert_allclose(shown[:, 1, 1], evaluated + error)


def test_a_history_of_other_guides_and_no_held_out_data() -> None:
    history = make_history().loc[1:]
    absent = [name for name in history if str(name).startswith(("latent", "log_evidence"))]
    axes = by_title(history.drop(columns=absent))
    assert list(axes) == [t for t in PANELS if t not in ("moves of the latents", "held-out data")]


def test_a_history_of_a_plain_pool_has_no_exchanges() -> None:
    history = make_history()
    absent = [name for name in history if str(name).startswith(("swap", "acceptance"))]
    axes = by_title(history.drop(columns=absent).assign(acceptance_0=0.5))
    assert "exchanges of the pool" not in axes
    assert list(labelled(axes["moves of the pool"])) == ["level 0"]


def test_a_model_without_an_lvebm_has_its_updates_alone() -> None:
    axes = by_title(make_history()[["loss", "kl", "halvings"]].loc[1:])
    assert list(axes) == ["size of the update", "trust region"]


def test_columns_of_nothing_are_left_out() -> None:
    history = make_history()
    history[["swap_rate_3", "ess", "log_evidence", "log_evidence_se"]] = np.nan
    history.loc[10:20, "kl"] = np.nan
    axes = by_title(history)
    assert set(PANELS) - set(axes) == {"effective negatives", "held-out data"}
    assert "levels 3 and 4" not in labelled(axes["exchanges of the pool"])
    (faint,) = [line for line in axes["size of the update"].lines if line.get_label() != "KL"]
    assert_line(faint, history["kl"])


def test_several_lvebms_have_panels_of_their_own() -> None:
    history = make_history()
    own = ["positive_energy", "negative_energy", "log_partition", "ess", "acceptance_0"]
    other = (history[own] + 1.0).add_suffix("@other")
    axes = by_title(history.join(other))
    ends = ["mean energy", "log Z online", "effective negatives", "moves of the pool"]
    titles = list(PANELS)
    assert list(axes) == [*titles[:5], *(f"{t} @other" for t in ends), *titles[5:]]
    for end, label, name in (
        ("", "positive (data)", "positive_energy"),
        (" @other", "positive (data)", "positive_energy@other"),
    ):
        line = labelled(axes[f"mean energy{end}"])[label]
        assert_line(line, moving_mean(history.join(other)[name]))
    assert list(labelled(axes["moves of the pool @other"])) == ["level 0"]
    assert len(labelled(axes["moves of the pool"])) == 12


def test_rates_and_counts_are_drawn_from_zero() -> None:
    axes = by_title(make_history().assign(ess=256.0, halvings=0.0, latent_acceptance_w=0.01))
    for title in ("moves of the pool", "exchanges of the pool", "moves of the latents"):
        low, high = axes[title].get_ylim()
        assert -0.1 < low < 0.0 and 1.0 < high < 1.1
    assert axes["effective negatives"].get_ylim()[0] < 0.0 < 256.0
    assert axes["effective negatives"].get_ylim()[1] > 256.0
    low, high = axes["trust region"].get_ylim()
    assert -0.1 < low < 0.0 and high > 1.0


def test_a_long_ladder_has_a_short_legend() -> None:
    axes = by_title(make_history())
    legend = axes["exchanges of the pool"].get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.get_texts()] == ["levels 0 and 1", "levels 10 and 11"]
    colors = [line.get_color() for line in labelled(axes["exchanges of the pool"]).values()]
    assert len(set(colors)) == 11
    legend = axes["moves of the latents"].get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["scene_z", "w"]


def test_an_empty_history_is_refused() -> None:
    for empty in (pd.DataFrame(), make_history()[[]], make_history()[["loss"]]):
        with pytest.raises(ValueError, match="no numbers to draw: take a step first"):
            history_figure(empty)


def test_a_short_history_can_be_drawn(tmp_path: Path) -> None:
    for panel in panels(history_figure(make_history(90).loc[[1]]), tmp_path / "figure.png"):
        assert panel.size > 10_000


def test_nothing_in_a_history_overlaps(tmp_path: Path) -> None:
    history = make_history()
    own = ["positive_energy", "negative_energy", "log_partition", "ess", "acceptance_0"]
    figure = history_figure(history.join(1e9 * history[own].add_suffix("@other")))
    for panel in panels(figure, tmp_path / "figure.png"):
        assert panel.size > 10_000 and panel.std() > 0.02
    boxes = [a.get_tightbbox() for a in figure.axes]
    for k, box in enumerate(boxes):
        assert box is not None and figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 + 1
        assert not any(other is not None and box.overlaps(other) for other in boxes[:k])


@pytest.mark.usefixtures("brief_settling")
def test_the_history_of_a_saddle_can_be_drawn() -> None:
    ebm = quadratic_ebm()
    model = plate_model(ebm, 8)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=2)
    x = data_of(ebm, 16)
    saddle.fit(x, num_steps=3, held_out=(x,), evaluate_every=2, progress=False)
    axes = by_title(saddle.history)
    assert {title: a.get_ylabel() for title, a in axes.items()} == PANELS
    for title, lines in LINES.items():
        present = [label for label, name in lines.items() if name in saddle.history]
        if title != "moves of the latents":
            assert list(labelled(axes[title])) == present


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
    figure = table_figure(data, draws, elbo_table())
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
    save_figure(table_figure(np.ones((3, 2)), np.zeros((3, 2)), elbo_table()), tmp_path / "b.png")
    save_figure(history_figure(make_history(3)), tmp_path / "c.png")
    assert plt.get_fignums() == before and matplotlib.get_backend() == backend


def make_results(steps: int = 60) -> Results:
    bracket = LogPartition(0.05, 0.02, 0.0, 0.1, 0.05, 0.05, 0.1, 9.0, 3, 4, 1.0)
    value = -3.0 + 0.1 * torch.randn(20, generator=torch.Generator().manual_seed(0))
    evidence = LogEvidence(value, torch.full((20,), 0.1), bracket, torch.tensor(0.05))
    baselines = pd.DataFrame(
        {
            "baseline": ["full Gaussian", "diagonal mixture, 5 components (not converged)"],
            "log_evidence": [-2.0, -5.0],
            "std_error": [0.1, 0.2],
        }
    )
    return Results(make_history(steps), elbo_table(), evidence, baselines)


def test_the_pairs_that_matter_are_drawn_by_name(tmp_path: Path) -> None:
    """A bent relation has no correlation; missing entries do not hide it."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 15))
    x[:, 9] = x[:, 4] ** 2 + 0.2 * x[:, 9]
    x[:, 11] = 1e-13 * (x[:, 2] + 0.5 * x[:, 11])
    x[rng.random(x.shape) < 0.03] = np.nan
    pairs = informative_pairs(x, seed=0)
    assert pairs[:2] == [(4, 9), (2, 11)] and len(pairs) == 3
    assert informative_pairs(x[:, :1], seed=0) == [(0, 0)]
    names = [f"column {k}" for k in range(15)]
    figure = table_figure(x, x, elbo_table(), pairs[:2], names, make_results())
    panels = figure.get_axes()
    assert [axes.get_xlabel() for axes in panels[:2]] == ["column 4", "column 2"]
    assert [axes.get_ylabel() for axes in panels[:2]] == ["column 9", "column 11"]
    titles = [axes.get_title() for axes in panels[2:]]
    assert titles == [
        "ELBO table, θ fixed",
        "training",
        "log Z, online and annealed",
        "held-out rows",
    ]
    labels = [label.get_text() for label in panels[-1].get_yticklabels()]
    assert labels[1:] == ["LVEBM", "full Gaussian"]  # the best on top
    assert "(not converged)" in labels[0]
    save_figure(figure, tmp_path / "a.png")  # a layout that fails warns


def test_figure_of_images_with_results(tmp_path: Path) -> None:
    masked, below = images(5), images(10)
    figure = image_figure(images(20), images(20), masked, below, elbo_table(), make_results())
    assert [axes.get_title() for axes in figure.get_axes()][-3:] == [
        "training",
        "log Z, online and annealed",
        "held-out rows",
    ]
    save_figure(figure, tmp_path / "a.png")
