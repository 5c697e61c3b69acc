# SPDX-License-Identifier: Apache-2.0
"""Figures of a fit: data beside model draws, reconstructions, and the ELBO table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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


def plot_elbo(axes: Axes, rows: pd.DataFrame) -> Axes:
    """Draw the KL gap of every posterior with two standard errors, best ELBO on top.

    Args:
        axes: Where to draw.
        rows: An `ElboTable` as a data frame.

    Returns:
        The axes.
    """
    position = np.arange(len(rows))[::-1]
    axes.errorbar(rows["kl_gap"], position, xerr=2 * rows["kl_gap_se"], fmt="o", capsize=3)
    labels = [f"{name}\nELBO {value:.3f}" for name, value in rows["elbo"].items()]
    axes.set_yticks(position, labels, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(0.0, color="0.6", linewidth=1)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("KL(q ‖ p(z|x)), nats per datum, ± 2 se")
    axes.set_title("ELBO table, θ fixed", fontsize=10)
    return axes


def image_figure(
    data: np.ndarray,
    draws: np.ndarray,
    masked: np.ndarray,
    reconstructed: np.ndarray,
    rows: pd.DataFrame,
) -> Figure:
    """Data, model draws, masked images with reconstructions, and the ELBO table in one figure.

    Args:
        data: Images (n, height, width).
        draws: Model draws (n, height, width).
        masked: Held-out images with hidden pixels as NaN, (m, height, width).
        reconstructed: Draws of the same images with hidden pixels filled in, and below them the
            truth, (2 m, height, width).
        rows: An `ElboTable` as a data frame.
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
    plot_elbo(axes[1, 1], rows)
    return figure


def table_figure(data: np.ndarray, draws: np.ndarray, rows: pd.DataFrame) -> Figure:
    """Data beside model draws, and the ELBO table, for observations that are not images."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_pair(left, data, draws, "data and model draws")
    plot_elbo(right, rows)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130)
