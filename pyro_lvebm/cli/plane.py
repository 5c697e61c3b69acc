# SPDX-License-Identifier: Apache-2.0
"""The picture of a latent plane that a fit with a generator and two latents leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.bases import GeneratorBase
from pyro_lvebm.data import DigitsData, logit_to_levels
from pyro_lvebm.latents import Program, draw_guide
from pyro_lvebm.model import LVEBM
from pyro_lvebm.plots import new_figure, plot_plane
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sites import Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITE = "observations_z"

_SHOWN = 5
"""Data whose posteriors are drawn."""

_DRAWS = 400
"""Draws of a guide behind each of its ellipses."""


def has_plane(ebm: LVEBM) -> bool:
    """Whether the model has a picture: a generator, and two latents."""
    return isinstance(ebm.base_x, GeneratorBase) and ebm.base_z.dim == 2


def telling_data(draws: np.ndarray, count: int = _SHOWN) -> list[int]:
    """Return data whose posteriors differ most from a Gaussian, and typical ones, apart in z.

    Args:
        draws: Posterior draws (S, N, 2).
        count: How many data.
    """
    centred = draws - draws.mean(0)
    scatter = np.einsum("sni,snj->nij", centred, centred) / len(draws)
    root = np.linalg.cholesky(scatter + 1e-9 * np.eye(2))
    white = np.linalg.solve(root[None], centred[..., None])[..., 0]
    # |w|⁴ has a mean of 8 for a Gaussian in the plane; two separate clouds have less, tails more.
    odd = np.abs(((white**2).sum(-1) ** 2).mean(0) - 8.0)
    spread = np.sqrt(np.trace(scatter, axis1=1, axis2=2))
    means = draws.mean(0)
    inside = (np.abs(means) < 2.0).all(1)
    score = np.where(inside, odd * np.minimum(spread, 1.0), -1.0)
    order = [*np.argsort(-score)[:60], *np.argsort(np.abs(spread - np.median(spread)))[:60]]
    chosen: list[int] = []
    for place, start in ((order[:60], 0), (order[60:], (count + 1) // 2)):
        for i in place:
            if len(chosen) >= (count if start else (count + 1) // 2):
                break
            if inside[i] and all(np.linalg.norm(means[i] - means[j]) > 0.7 for j in chosen):
                chosen.append(int(i))
    return chosen or [int(np.abs(means).max(1).argmin())]


def plane_figure(
    ebm: LVEBM,
    model: Model,
    x: Tensor,
    draws: np.ndarray,
    guides: Mapping[str, Model],
    seed: int,
    digits: DigitsData | None,
    labels: Sequence[object] | np.ndarray,
) -> Figure:
    """Draw the latent plane, posteriors of a few rows with the guides' ellipses, and these rows.

    Args:
        ebm: The LVEBM, for which `has_plane` holds.
        model: The Pyro model.
        x: Training rows (N, d).
        draws: Posterior draws of z (S, N, 2).
        guides: Fitted guides, by name; ellipses are of two standard deviations.
        seed: Fixes the draws from guides.
        digits: The data set, if rows are its images.
        labels: What the input calls the rows (N).
    """
    chosen = telling_data(draws)
    program, ellipses = Program(model, (x,), {}), {}
    for name, guide in guides.items():
        with isolated_rng(seed, Stream.FIGURE, name), torch.no_grad():
            found = draw_guide(program, guide, _DRAWS)[SITE].flatten(2)[:, chosen].double().numpy()
        centred = found - found.mean(0)
        ellipses[name] = (
            found.mean(0),
            np.einsum("sni,snj->nij", centred, centred) / len(found),
        )
    figure = new_figure(9.6, 8)
    parts: Any = figure.subfigures(1, 2, width_ratios=(8, 1.6))
    left, right = parts
    shape = None if digits is None else digits.image_shape

    def levels(y: np.ndarray) -> np.ndarray:
        return y if digits is None else logit_to_levels(y, digits.num_levels)

    plot_plane(
        ebm,
        draws[:, chosen],
        image_shape=shape,
        guides=ellipses,
        levels=levels,
        num_cells=15,
        axes=left.subplots(),
    )
    column = right.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for k, (i, axes) in enumerate(zip(chosen, column, strict=True)):
        row = levels(x[i : i + 1].double().numpy())[0]
        if shape is None:
            axes.plot(row, color=f"C{k}")
        else:
            axes.imshow(row.reshape(shape), cmap="gray_r")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(f"C{k}")
            spine.set_linewidth(2.5)
        axes.set_title(f"row {labels[i]}", fontsize=8)
    return figure
