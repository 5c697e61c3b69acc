# SPDX-License-Identifier: Apache-2.0
"""Figures of a model: its energy, its draws beside data, and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from torch import Tensor

from pyro_lvebm.evidence_of import total
from pyro_lvebm.figures import axes_or_new, new_figure
from pyro_lvebm.log_evidence import log_evidence
from pyro_lvebm.model import LVEBM

SPAN = 3.0
"""Standard deviations of the base to either side of its mean that an energy is drawn over."""

DEPTH = 12.0
"""Nats above the minimum at which contours of an energy end."""


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


def plot_energy(
    ebm: LVEBM,
    columns: Sequence[int] = (0, 1),
    *,
    at: tuple[Tensor, Tensor] | None = None,
    marginal: bool = False,
    num_points: int = 60,
    seed: int = 0,
    axes: Axes | None = None,
) -> Axes:
    """Draw the energy along one or two coordinates, in nats above its minimum there.

        slice:     E(x, z) with all other coordinates at `at`
        marginal:  F(x) = −log ∫ exp(−E(x, z)) dz, with all other coordinates of x at `at`

    The range is three standard deviations of the base around its mean. Colours of a plane end at
    12 nats; the probability beyond is next to nothing.

    Args:
        ebm: The LVEBM; unchanged.
        columns: One or two coordinates of (x, z), flattened, those of x first.
        at: Where the others are, x (*x_shape) and z (*z_shape); the means of the bases if None.
        marginal: Integrate z out, by annealing (`log_evidence`); then only x can vary.
        num_points: Points on each axis, at least 2.
        seed: Fixes the annealing.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If a coordinate does not exist, or is one of z in a marginal.
    """
    num_x = ebm.base_x.dim
    limit = num_x if marginal else ebm.dim
    if not 1 <= len(columns) <= 2 or len(set(columns)) < len(columns):
        raise ValueError(f"columns must be one or two different coordinates; got {list(columns)}")
    if not all(0 <= c < limit for c in columns):
        of = "x, for z is integrated out" if marginal else "(x, z)"
        raise ValueError(f"columns must lie in 0 … {limit - 1}, those of {of}; got {list(columns)}")
    if num_points < 2:
        raise ValueError(f"num_points must be at least 2; got {num_points}")
    bases = (ebm.base_x, ebm.base_z)
    mean = torch.cat([base.loc for base in bases])
    scales = [base.scale if base.diagonal else base.scale.norm(dim=1) for base in bases]
    spread = SPAN * torch.cat(scales)
    centre = mean if at is None else torch.cat([part.reshape(-1).to(mean) for part in at])
    steps = torch.linspace(-1.0, 1.0, num_points).to(mean)
    lines = [mean[c] + spread[c] * steps for c in columns]
    grid = torch.cartesian_prod(*lines).reshape(-1, len(columns))
    points = centre.expand(len(grid), -1).clone()
    points[:, list(columns)] = grid
    x, z = points[:, :num_x], points[:, num_x:]
    x, z = x.reshape(-1, *ebm.x_shape), z.reshape(-1, *ebm.z_shape)
    with ebm.frozen(), torch.no_grad():
        if marginal:
            # Noise that colours hide would show in a line, which has fewer points.
            count = 256 if len(columns) == 1 else 32
            found = log_evidence(ebm, x, seed=seed, num_particles=count, log_z=total([]))
            energy = -found.value
        else:
            energy = ebm.energy(x, z)
    above = (energy - energy.min()).double().cpu().numpy()
    names = [f"x[{c}]" if c < num_x else f"z[{c - num_x}]" for c in columns]
    title = "marginal energy −log ∫ exp(−E) dz" if marginal else "energy E"
    return _draw_energy(axes, above, [line.cpu().numpy() for line in lines], names, title)


def _draw_energy(
    axes: Axes | None, above: np.ndarray, lines: list[np.ndarray], names: list[str], title: str
) -> Axes:
    axes = axes_or_new(axes, 5, 4 if len(lines) == 2 else 3)
    axes.set_xlabel(names[0])
    axes.set_title(title, fontsize=10)
    if len(lines) == 1:
        axes.plot(lines[0], above)
        axes.set_ylabel("nats above the minimum")
        return axes
    plane = above.reshape(len(lines[0]), len(lines[1])).T
    levels = np.linspace(0.0, DEPTH, 25)
    drawn = axes.contourf(*lines, plane, levels=levels, cmap="viridis_r", extend="max")
    axes.contour(*lines, plane, levels=levels[::4], colors="white", linewidths=0.4)
    axes.figure.colorbar(drawn, ax=axes, label="nats above the minimum", ticks=levels[::4])
    axes.set_ylabel(names[1])
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
        _histograms(axes, [data[:, 0], draws[:, 0]])
        axes.set_xlabel("x[0]")
    else:
        for rows, label in ((data, "data"), (draws, "model")):
            axes.scatter(rows[:, 0], rows[:, 1], s=4, alpha=0.5, label=label)
        axes.set_xlabel("x[0]")
        axes.set_ylabel("x[1]")
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
    # Above the diagonal there is room, but where there is a single panel.
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
