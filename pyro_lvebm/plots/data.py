# SPDX-License-Identifier: Apache-2.0
"""Figures of data: beside model draws, and beside their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvebm.plots.canvas import axes_or_new, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    from matplotlib import colormaps

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


def plot_pair(
    axes: Axes,
    data: np.ndarray,
    draws: np.ndarray,
    title: str,
    *,
    columns: tuple[int, int] = (0, 1),
    names: Sequence[str] | None = None,
) -> Axes:
    """Scatter two columns of data and model draws, or histograms of a single column.

    Args:
        axes: Where to draw.
        data: Observations (N, D), NaN where missing.
        draws: Model draws (M, D).
        title: Title of the panel.
        columns: Which two columns; of one column, or one given twice, histograms are drawn.
        names: Names of the D columns; `x[…]` if None.

    Returns:
        The axes.
    """
    i, j = columns
    names = [f"x[{k}]" for k in range(data.shape[1])] if names is None else names
    if data.shape[1] == 1 or i == j:
        _histograms(axes, [rows[~np.isnan(rows[:, i]), i] for rows in (data, draws)])
        axes.set_xlabel(names[i])
    else:
        for rows, label in ((data, "data"), (draws, "model")):
            axes.scatter(rows[:, i], rows[:, j], s=4, alpha=0.5, label=label)
        axes.set_xlabel(names[i])
        axes.set_ylabel(names[j])
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    return axes


def plot_pairs(
    data: Any,
    draws: Any,
    *,
    columns: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw data beside model draws for every pair of columns, with histograms on the diagonal.

    Args:
        data: Observations (N, D).
        draws: Model draws (M, D).
        columns: Which of the D columns; the first five if None.
        names: Names of these columns; `x[…]` if None.

    Returns:
        The axes (n, n) of a new figure; those above the diagonal are None.

    Raises:
        ValueError: If data and draws have other columns, or one that is asked for does not exist.

    Example:
        >>> import numpy as np
        >>> from pyro_lvebm import plot_pairs
        >>> rng = np.random.default_rng(0)
        >>> plot_pairs(rng.normal(size=(50, 3)), rng.normal(size=(80, 3))).shape
        (3, 3)
    """
    rows = [np.asarray(values, dtype=float) for values in (data, draws)]
    if any(values.ndim != 2 for values in rows) or rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"data and draws must be (N, D) and (M, D); got {rows[0].shape} and {rows[1].shape}"
        )
    width = rows[0].shape[1]
    chosen = list(range(min(5, width))) if columns is None else list(columns)
    if not chosen or not all(0 <= c < width for c in chosen):
        raise ValueError(f"columns must be among 0 … {width - 1}; got {chosen}")
    titles = [f"x[{c}]" for c in chosen] if names is None else list(names)
    n = len(chosen)
    figure = new_figure(1.0 + 1.9 * n, 1.0 + 1.9 * n)
    grid: Any = figure.subplots(n, n, squeeze=False, sharex="col")
    for i, j in np.ndindex(n, n):
        if j > i:
            grid[i, j].remove()
            grid[i, j] = None
        elif j == i:
            _histograms(grid[i, i], [values[:, chosen[i]] for values in rows])
            grid[i, i].set_yticks([])
        else:
            for k, values in enumerate(rows):
                alpha = float(np.clip(300 / len(values), 0.1, 0.6))
                x, y = values[:, chosen[j]], values[:, chosen[i]]
                grid[i, j].scatter(x, y, s=5, alpha=alpha, color=f"C{k}", linewidths=0)
            if j > 0:
                grid[i, j].sharey(grid[i, 0])
                grid[i, j].tick_params(labelleft=False)
            else:
                grid[i, 0].set_ylabel(titles[i])
    for j in range(n):
        grid[n - 1, j].set_xlabel(titles[j])
    # Above the diagonal there is room, unless there is a single panel.
    place = {"loc": "upper right", "borderaxespad": 1.0} if n > 1 else {"loc": "best"}
    legend = figure.legend if n > 1 else grid[0, 0].legend
    legend(*grid[0, 0].get_legend_handles_labels(), **place)
    found: np.ndarray = grid
    return found


def _histograms(axes: Axes, values: list[np.ndarray]) -> None:
    """Draw densities of data and model draws on the same bins."""
    bins = np.histogram_bin_edges(np.concatenate(values), bins=40).tolist()
    for rows, label in zip(values, ("data", "model"), strict=True):
        axes.hist(rows, bins=bins, density=True, alpha=0.5, label=label)


def plot_reconstructions(
    data: Any, replicates: Any, *, num_images: int = 8, axes: Axes | None = None
) -> Axes:
    """Draw data beside their replicates, such as the posterior predictive of `to_arviz`.

    Images are drawn in three rows: data, the mean of the replicates, and one replicate. Other
    data are drawn entry by entry: the mean of the replicates, with an interval that holds 90 % of
    them, against what was observed. On the dashed line they agree.

    Args:
        data: Observations (N, H, W), (N, D) or (N,).
        replicates: (S, N, …), or (chains, draws, N, …).
        num_images: Images to draw, the first ones; of other data all are drawn.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import numpy as np
        >>> from pyro_lvebm import plot_reconstructions
        >>> x = np.random.default_rng(0).normal(size=(20, 2))
        >>> plot_reconstructions(x, x + np.zeros((5, 1, 1))).get_xlabel()
        'observed'
    """
    seen, drawn = np.asarray(data, dtype=float), np.asarray(replicates, dtype=float)
    if drawn.ndim == seen.ndim + 2:
        drawn = drawn.reshape(-1, *drawn.shape[2:])
    if drawn.shape[1:] != seen.shape or not 1 <= seen.ndim <= 3:
        raise ValueError(
            f"replicates must be (S, N, …) or (chains, draws, N, …) of data (N, …); got "
            f"{np.shape(replicates)} for {seen.shape}"
        )
    if seen.ndim == 3:
        n = min(num_images, len(seen))
        axes = axes_or_new(axes, 1.0 * n, 3.2)
        rows = np.concatenate([seen[:n], drawn[:, :n].mean(0), drawn[0, :n]])
        return plot_images(axes, rows, "data, mean of replicates, one replicate", n)
    axes = axes_or_new(axes, 4.6, 4)
    observed = seen.reshape(len(seen), -1)
    drawn = drawn.reshape(len(drawn), len(seen), -1)
    mean = drawn.mean(0)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    for column in range(observed.shape[1]):
        axes.errorbar(
            observed[:, column],
            mean[:, column],
            yerr=np.abs([low, high] - mean)[:, :, column],
            fmt="o",
            color=f"C{column}",
            ecolor=(f"C{column}", 0.25),
            markersize=3,
            elinewidth=0.6,
            label=f"x[{column}]",
        )
    ends = [np.nanmin(observed), np.nanmax(observed)]
    axes.plot(ends, ends, "--", color="0.3", zorder=0)
    axes.set_xlabel("observed")
    axes.set_ylabel("replicates, mean and 90 %")
    axes.set_title("reconstructions", fontsize=10)
    if 1 < observed.shape[1] <= 8:
        axes.legend(fontsize=8)
    return axes
