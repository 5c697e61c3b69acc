# SPDX-License-Identifier: Apache-2.0
"""Figures of the energy of an LVEBM along one or two coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.evidence import log_evidence, total
from pyro_lvebm.model import LVEBM
from pyro_lvebm.plots.canvas import axes_or_new
from pyro_lvebm.rng import Stream, derive_seed
from pyro_lvebm.validation import check_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPAN = 3.0
"""Standard deviations of the base to either side of its mean that an energy is drawn over."""

DEPTH = 12.0
"""Nats above the minimum at which contours of an energy end."""


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

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, plot_energy
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> axes = plot_energy(LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1), (0, 2))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('x[0]', 'z[0]')
    """
    num_x = ebm.base_x.dim
    limit = num_x if marginal else ebm.dim
    if not 1 <= len(columns) <= 2 or len(set(columns)) < len(columns):
        raise ValueError(f"columns must be one or two different coordinates; got {list(columns)}")
    if not all(0 <= c < limit for c in columns):
        of = "x, for z is integrated out" if marginal else "(x, z)"
        raise ValueError(f"columns must lie in 0 … {limit - 1}, those of {of}; got {list(columns)}")
    check_at_least(2, num_points=num_points)
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
            own = derive_seed(seed, Stream.ENERGY_PLOT)
            found = log_evidence(ebm, x, seed=own, num_particles=count, log_z=total([]))
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
