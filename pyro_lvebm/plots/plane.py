# SPDX-License-Identifier: Apache-2.0
"""A latent plane: what a generator makes of it, and where the posteriors of a few data lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyro_lvebm.bases import GeneratorBase
from pyro_lvebm.model import LVEBM
from pyro_lvebm.plots.canvas import axes_or_new
from pyro_lvebm.validation import check_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Gaussians = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Means (n, 2) and covariances (n, 2, 2) of guides at the same data, by name."""

_STYLES = ("--", ":", "-.")

_SPAN = 2.4
"""Half the width of the plane, in standard deviations of base_z."""


def plot_plane(
    ebm: LVEBM,
    draws: Any,
    *,
    image_shape: tuple[int, int] | None = None,
    guides: Gaussians | None = None,
    num_cells: int = 11,
    levels: Any = None,
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw a plane of latents as a grid of E[x | z], with posterior draws of a few data over it.

    An x with one axis is drawn as a curve, one with two as an image. Guides are ellipses of two
    standard deviations, in the colour of their datum.

    Args:
        ebm: An LVEBM with a `GeneratorBase` and two latent dimensions.
        draws: Posterior draws of z (draws, n, 2) of n data.
        image_shape: Draw x as images of this shape.
        guides: Gaussian guides of the same data.
        num_cells: Cells of the grid along each side.
        levels: Maps x (n, d) as an array to what is shown, such as the inverse of a logit.
        labels: Names of the data, for a legend.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If z is no plane, there is no generator, or draws have another shape.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, MLPGenerator, ZeroEnergy, plot_plane
        >>> x = torch.randn(99, 5, generator=torch.Generator().manual_seed(0)).cumsum(1)
        >>> ebm = LVEBM.from_data(ZeroEnergy(5, 2), x, z_dim=2, generator=MLPGenerator(2, (5,)))
        >>> plot_plane(ebm, torch.zeros(50, 1, 2), num_cells=3).get_xlabel()
        'z[0]'
    """
    base = ebm.base_x
    if not isinstance(base, GeneratorBase) or ebm.base_z.dim != 2:
        raise ValueError(
            "a plane needs an LVEBM with a GeneratorBase and two latent dimensions; got a "
            f"{type(base).__name__} and {ebm.base_z.dim}"
        )
    draws = np.asarray(draws, dtype=float)
    if draws.ndim != 3 or draws.shape[2] != 2:
        raise ValueError(f"draws must be (draws, n, 2); got shape {draws.shape}")
    check_at_least(2, num_cells=num_cells)
    axes = axes_or_new(axes, 7, 7)
    half = (_SPAN * (num_cells - 1)) / num_cells
    steps = torch.linspace(-half, half, num_cells).to(base.loc)
    grid = torch.cartesian_prod(steps, steps)
    with torch.no_grad():
        z = ebm.base_z.unwhiten(grid)
        means = base.mean(z.reshape(-1, *ebm.z_shape)).flatten(1).double().cpu().numpy()
    centres = z.double().cpu().numpy()
    corner = ebm.base_z.unwhiten(torch.full((1, 2), _SPAN).to(base.loc)).flatten().cpu().numpy()
    origin = ebm.base_z.unwhiten(torch.zeros(1, 2).to(base.loc)).flatten().cpu().numpy()
    cell = 2.0 * (corner - origin) / num_cells
    shown = means if levels is None else np.asarray(levels(means))
    _draw_cells(axes, shown, centres, cell, image_shape)
    for k in range(draws.shape[1]):
        color, rows = f"C{k}", draws[:, k]
        name = None if labels is None else labels[k]
        axes.scatter(rows[:, 0], rows[:, 1], s=7, color=color, alpha=0.5, linewidths=0, label=name)
        for style, (loc, cov) in zip(_STYLES, (guides or {}).values(), strict=False):
            axes.plot(*_ellipse(loc[k], cov[k]), color=color, linestyle=style, linewidth=1.6)
    for style, name in zip(_STYLES, guides or {}, strict=False):
        axes.plot([], [], color="0.2", linestyle=style, label=name)
    axes.set_xlim(origin[0] - (corner - origin)[0], corner[0])
    axes.set_ylim(origin[1] - (corner - origin)[1], corner[1])
    axes.set_xlabel("z[0]")
    axes.set_ylabel("z[1]")
    axes.set_title("E[x | z] over the latent plane, and posteriors of a few data", fontsize=10)
    if labels is not None or guides:
        legend = axes.legend(fontsize=8, loc="upper right", framealpha=0.9)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
    return axes


def _draw_cells(
    axes: Axes,
    x: np.ndarray,
    centres: np.ndarray,
    cell: np.ndarray,
    image_shape: tuple[int, int] | None,
) -> None:
    """Draw every x (n, d) in its cell, all on one scale."""
    low, high = np.nanquantile(x, [0.005, 0.995])
    span = max(float(high - low), 1e-300)
    for row, (a, b) in zip(x, centres, strict=True):
        left, bottom = a - 0.5 * cell[0], b - 0.5 * cell[1]
        if image_shape is not None:
            box = (left, left + cell[0], bottom, bottom + cell[1])
            image = row.reshape(image_shape)
            axes.imshow(image, cmap="gray_r", vmin=low, vmax=high, extent=box, alpha=0.55, zorder=0)
            continue
        places = left + cell[0] * np.linspace(0.08, 0.92, len(row))
        heights = bottom + cell[1] * (0.1 + 0.8 * (row - low) / span)
        axes.plot(places, heights, color="0.55", linewidth=0.9, zorder=0)
    axes.set_aspect("auto")


def _ellipse(loc: np.ndarray, cov: np.ndarray) -> np.ndarray:
    """Return points (2, 100) two standard deviations from the mean."""
    angle = np.linspace(0.0, 2 * np.pi, 100)
    values, vectors = np.linalg.eigh(cov)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    points: np.ndarray = loc[:, None] + 2 * (vectors * np.sqrt(np.maximum(values, 0.0))) @ circle
    return points
