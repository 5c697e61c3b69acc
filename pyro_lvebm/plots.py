# SPDX-License-Identifier: Apache-2.0
"""Figures of a fit: its history, data beside model draws, reconstructions, and the ELBO table."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from pyro_lvebm.elbo_table import ElboTable

SMOOTHING = 20
"""Steps over which the lines of a history are averaged."""


def plot_images(axes: Axes, images: np.ndarray, title: str, num_columns: int) -> Axes:
    """Draw images (n, height, width) as one grid, row by row.

    Args:
        axes: Where to draw.
        images: Grey values on one scale; NaN pixels are drawn in blue.
        title: Title of the panel.
        num_columns: Images in a row.

    Returns:
        The axes.
    """
    n, height, width = images.shape
    num_rows = -(-n // num_columns)
    canvas = np.full((num_rows * (height + 1) - 1, num_columns * (width + 1) - 1), np.nan)
    for k, image in enumerate(images):
        row, column = divmod(k, num_columns)
        top, left = row * (height + 1), column * (width + 1)
        canvas[top : top + height, left : left + width] = image
    hidden = colormaps["gray_r"].with_extremes(bad="#d6e2f0")
    axes.imshow(canvas, cmap=hidden, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    return axes


def plot_pair(axes: Axes, data: np.ndarray, draws: np.ndarray, title: str) -> Axes:
    """Scatter the first two columns of data and model draws, or histograms of a single column.

    Args:
        axes: Where to draw.
        data: Observations (N, D).
        draws: Model draws (M, D).
        title: Title of the panel.

    Returns:
        The axes.
    """
    if data.shape[1] == 1:
        bins = np.histogram_bin_edges(np.concatenate([data, draws]), bins=40).tolist()
        axes.hist(data[:, 0], bins=bins, density=True, alpha=0.5, label="data")
        axes.hist(draws[:, 0], bins=bins, density=True, alpha=0.5, label="model")
        axes.set_xlabel("x[0]")
    else:
        for rows, label in ((data, "data"), (draws, "model")):
            axes.scatter(rows[:, 0], rows[:, 1], s=4, alpha=0.5, label=label)
        axes.set_xlabel("x[0]")
        axes.set_ylabel("x[1]")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return axes


def plot_elbo(table: ElboTable, axes: Axes | None = None) -> Axes:
    """Draw a forest plot of a table: a dot for every posterior, with two standard errors.

    With θ fixed it shows what each posterior loses, its KL gap; with θ refitted, the held-out
    log p(x) of each fit. The best is on top.

    Args:
        table: What `compare_elbo` returned.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If `table` is not an `ElboTable`.
    """
    if not isinstance(table, ElboTable):
        raise ValueError(f"table must be an ElboTable, of compare_elbo; got {type(table).__name__}")
    if axes is None:
        figure = Figure(figsize=(6, 1.2 + 0.5 * len(table.rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
    rows, fixed = table.rows, table.theta == "fixed"
    column = "kl_gap" if fixed else "held_out"
    position = np.arange(len(rows))[::-1]
    axes.errorbar(rows[column], position, xerr=2 * rows[f"{column}_se"], fmt="o", capsize=3)
    labels = [f"{name}\nELBO {value:.3f}" for name, value in rows["elbo"].items()]
    axes.set_yticks(position, labels, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.locator_params(axis="x", nbins=5)
    if fixed:
        axes.axvline(0.0, color="0.6", linewidth=1)
    quantity = "KL(q ‖ p(z|x))" if fixed else "held-out log p(x)"
    axes.set_xlabel(f"{quantity}, nats per datum, ± 2 se")
    axes.set_title(f"ELBO table, θ {'fixed' if fixed else 'refitted for each row'}", fontsize=10)
    return axes


def image_figure(
    data: np.ndarray,
    draws: np.ndarray,
    masked: np.ndarray,
    reconstructed: np.ndarray,
    table: ElboTable,
) -> Figure:
    """Data, model draws, masked images with reconstructions, and the ELBO table in one figure.

    Args:
        data: Images (n, height, width).
        draws: Model draws (n, height, width).
        masked: Held-out images with hidden pixels as NaN, (m, height, width).
        reconstructed: Draws of the same images with hidden pixels filled in, and below them the
            truth, (2 m, height, width).
        table: The ELBO table.
    """
    figure = Figure(figsize=(10, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    columns = len(masked)
    plot_images(axes[0, 0], data, "data", 10)
    plot_images(axes[0, 1], draws, "model draws", 10)
    plot_images(
        axes[1, 0],
        np.concatenate([masked, reconstructed]),
        "held-out: masked, reconstructed, true",
        columns,
    )
    plot_elbo(table, axes[1, 1])
    return figure


def table_figure(data: np.ndarray, draws: np.ndarray, table: ElboTable) -> Figure:
    """Data beside model draws, and the ELBO table, for observations that are not images."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_pair(left, data, draws, "data and model draws")
    plot_elbo(table, right)
    return figure


def history_figure(history: pd.DataFrame) -> Figure:
    """What happened at every step of a training, as `Saddle.history` has it.

    Bold lines are means over the last `SMOOTHING` steps, faint ones the steps themselves. Panels
    without numbers are left out, such as the evidence without held-out data, or the acceptance of
    latents whose guide has no particles. With several LVEBMs, the panels of all but the first end
    in `@<site>`, as their columns do.

    Args:
        history: Rows by step, with the columns of `Saddle.history`.

    Raises:
        ValueError: If no column has a finite number.
    """
    panels = history_panels(history)
    if not panels:
        raise ValueError("the history has no numbers to draw: take a step first")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = Figure(figsize=(4.4 * num_columns, 2.8 * num_rows), layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        plot_panel(axes, history, panel)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


@dataclass(frozen=True)
class Panel:
    """Lines of a history that are drawn together."""

    title: str
    y_label: str
    columns: dict[str, str]  # column by label
    error: str | None = None  # column of the standard error, for a single line
    kind: str = "smoothed"  # or "exact", or "sparse": evaluated at some steps only
    bounds: tuple[float, float] | None = None  # that the vertical axis shows at least
    ladder: bool = False  # the lines have an order, which their colours follow


def history_panels(history: pd.DataFrame) -> list[Panel]:
    """Return the panels that a history has numbers for, in the order of the figure."""
    shown = [str(name) for name in history if np.isfinite(history[name]).any()]
    suffixes = list(dict.fromkeys("@".join(["", *name.split("@")[1:]]) for name in shown))

    def numbered(stem: str, suffix: str, label: str) -> dict[str, str]:
        pattern = re.compile(rf"{stem}_(\d+){re.escape(suffix)}")
        found = sorted((int(m[1]), m[0]) for name in shown if (m := pattern.fullmatch(name)))
        return {label.format(k, k + 1): name for k, name in found}

    panels = []
    for suffix in sorted(suffixes, key=bool):
        energies = {
            "positive (data)": f"positive_energy{suffix}",
            "negative (model)": f"negative_energy{suffix}",
        }
        log_z, error = f"log_partition{suffix}", f"log_partition_se{suffix}"
        interval = ", ± 2 se" if error in shown else ""
        levels = numbered("acceptance", suffix, "level {0}")
        pairs = numbered("swap_rate", suffix, "levels {0} and {1}")
        end = f" {suffix}" if suffix else ""
        panels += [
            Panel(f"mean energy{end}", "E, nats per datum", energies),
            Panel(
                f"log Z online{end}",
                f"log Z, nats{interval}",
                {"log Z": log_z},
                error if interval else None,
                "exact",
            ),
            Panel(
                f"effective negatives{end}", "ESS, chains", {"ESS": f"ess{suffix}"}, bounds=(0, 1)
            ),
            Panel(f"moves of the pool{end}", "acceptance rate", levels, bounds=(0, 1), ladder=True),
            Panel(f"exchanges of the pool{end}", "swap rate", pairs, bounds=(0, 1), ladder=True),
        ]
    stem = "latent_acceptance_"
    latents = {name.removeprefix(stem): name for name in shown if name.startswith(stem)}
    panels += [
        Panel("moves of the latents", "acceptance rate", latents, bounds=(0, 1)),
        Panel(
            "held-out data",
            "log p(x), nats per datum, ± 2 se",
            {"log p(x)": "log_evidence"},
            "log_evidence_se",
            "sparse",
        ),
        Panel("size of the update", "KL(old ‖ new), nats", {"KL": "kl"}),
        Panel("trust region", "halvings of the update", {"halvings": "halvings"}, bounds=(0, 1)),
    ]
    panels = [
        replace(panel, columns={k: v for k, v in panel.columns.items() if v in shown})
        for panel in panels
    ]
    return [panel for panel in panels if panel.columns]


def plot_panel(axes: Axes, history: pd.DataFrame, panel: Panel) -> Axes:
    """Draw the lines of a panel against the steps.

    Args:
        axes: Where to draw.
        history: Rows by step.
        panel: What to draw.

    Returns:
        The axes.
    """
    steps = history.index.to_numpy()
    faint = 0.15 if panel.ladder else 0.35
    last = max(1, len(panel.columns) - 1)
    for k, (label, name) in enumerate(panel.columns.items()):
        values = history[name]
        color = colormaps["viridis"](0.9 * k / last) if panel.ladder else f"C{k}"
        error = np.full(len(values), np.nan) if panel.error is None else history[panel.error]
        error = 2 * np.where(np.isfinite(error), error, np.nan)
        if panel.kind == "sparse":
            kept = values.notna().to_numpy()
            bars = np.nan_to_num(error[kept])
            axes.errorbar(steps[kept], values[kept], yerr=bars, fmt="o-", capsize=3, label=label)
        elif panel.kind == "exact":
            axes.plot(steps, values, color=color, label=label)
            axes.fill_between(
                steps, values - error, values + error, color=color, alpha=0.3, linewidth=0
            )
        else:
            smooth = values.rolling(SMOOTHING, min_periods=1).mean()
            axes.plot(steps, values, color=color, alpha=faint, linewidth=0.8)
            axes.plot(steps, smooth, color=color, label=label)
    handles, labels = axes.get_legend_handles_labels()
    if panel.ladder:
        # A ladder may have many levels; the ends tell the colours of the others.
        handles, labels = handles[:: len(handles) - 1 or 1], labels[:: len(labels) - 1 or 1]
    if len(handles) > 1 or panel.title == "moves of the latents":
        axes.legend(handles, labels, fontsize=8)
    if panel.bounds is not None:
        low, high = panel.bounds
        numbers = history[list(panel.columns.values())].to_numpy()
        top = max(high, float(numbers[np.isfinite(numbers)].max()))
        margin = 0.03 * (top - low)
        axes.set_ylim(low - margin, top + margin)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.y_label, fontsize=9)
    axes.set_title(panel.title, fontsize=10)
    return axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130)
