# SPDX-License-Identifier: Apache-2.0
"""Figures of a whole fit, as the command line writes them."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pyro_lvebm.comparison import ElboTable
from pyro_lvebm.plots import new_figure, plot_elbo, plot_images, plot_pair


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
    figure = new_figure(10, 8)
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
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    plot_pair(left, data, draws, "data and model draws")
    plot_elbo(table, right)
    return figure
