# SPDX-License-Identifier: Apache-2.0
"""Figures of posteriors: their ELBOs, latents of chosen data, and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvebm.comparison import ElboTable
from pyro_lvebm.plots.canvas import axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_elbo(table: ElboTable, axes: Axes | None = None) -> Axes:
    """Draw a forest plot of a table: a dot for every posterior, with two standard errors.

    With θ fixed it shows what each posterior loses, its KL gap; with θ refitted, the held-out
    log p(x) of each fit. The best is on top. A row that has not converged is marked. The axis ends
    before the row "prior" where its gap would hide all others.

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
    axes = axes_or_new(axes, 6, 1.2 + 0.5 * len(table.rows))
    rows, fixed = table.rows, table.theta == "fixed"
    column = "kl_gap" if fixed else "held_out"
    position = np.arange(len(rows))[::-1]
    axes.errorbar(rows[column], position, xerr=2 * rows[f"{column}_se"], fmt="o", capsize=3)
    marked = table.labels()
    labels = [f"{marked.get(str(n), n)}\nELBO {value:.3f}" for n, value in rows["elbo"].items()]
    axes.set_yticks(position, labels, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.locator_params(axis="x", nbins=5)
    if fixed:
        axes.axvline(0.0, color="0.6", linewidth=1)
    if fixed and "prior" in rows.index and len(rows) > 1:
        others = rows.drop("prior")
        right = float((others["kl_gap"] + 2 * others["kl_gap_se"]).max())
        if float(rows["kl_gap"]["prior"]) > 5.0 * right > 0.0:
            axes.set_xlim(right=1.5 * right)
    quantity = "KL(q ‖ p(z|x))" if fixed else "held-out log p(x)"
    axes.set_xlabel(f"{quantity}, nats per datum, ± 2 se")
    axes.set_title(f"ELBO table, θ {'fixed' if fixed else 'refitted for each row'}", fontsize=10)
    return axes


def plot_latents(
    draws: Any,
    data: Sequence[int],
    *,
    columns: Sequence[int] = (0, 1),
    labels: Sequence[str] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """Draw the latent posteriors of chosen data in one colour each.

    Two columns are scattered, with the mean and an ellipse of two standard deviations; of a latent
    with one column, or for one entry of `columns`, histograms are drawn on shared bins.

    Args:
        draws: Draws (chains, draws, N, *z_shape), such as `idata["posterior"]["scene_z"]`.
        data: Which of the N data.
        columns: One or two entries of z, flattened.
        labels: Names of the data; their numbers if None.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If draws have fewer than three axes, or a datum or column does not exist.

    Example:
        >>> import numpy as np
        >>> from pyro_lvebm import plot_latents
        >>> draws = np.random.default_rng(0).normal(size=(4, 100, 10, 2))
        >>> plot_latents(draws, [0, 3]).get_ylabel()
        'z[1]'
    """
    array = np.asarray(draws, dtype=float)
    if array.ndim < 3:
        raise ValueError(f"draws must be (chains, draws, N, …); got shape {array.shape}")
    array = array.reshape(-1, array.shape[2], max(1, int(np.prod(array.shape[3:]))))
    columns = list(columns)[: array.shape[2]]
    if not columns or len(columns) > 2 or not all(0 <= c < array.shape[2] for c in columns):
        raise ValueError(f"columns must be one or two of {array.shape[2]}; got {columns}")
    if not len(data) or not all(0 <= i < array.shape[1] for i in data):
        raise ValueError(f"data must be among 0 … {array.shape[1] - 1}; got {list(data)}")
    axes = axes_or_new(axes, 4.6, 4)
    names = [str(i) for i in data] if labels is None else list(labels)
    chosen = array[:, list(data)][..., columns]
    bins = np.histogram_bin_edges(chosen[..., 0], bins=30).tolist()
    for k, name in enumerate(names):
        rows, color = chosen[:, k], f"C{k}"
        if len(columns) == 1:
            axes.hist(rows[:, 0], bins=bins, density=True, color=color, alpha=0.15)
            axes.hist(rows[:, 0], bins, density=True, histtype="step", color=color, label=name)
            continue
        axes.scatter(rows[:, 0], rows[:, 1], s=4, alpha=0.25, color=color, linewidths=0)
        angle = np.linspace(0.0, 2 * np.pi, 100)
        values, vectors = np.linalg.eigh(np.cov(rows.T))
        circle = np.stack([np.cos(angle), np.sin(angle)])
        ellipse = rows.mean(0) + 2 * (vectors * np.sqrt(np.maximum(values, 0)) @ circle).T
        axes.plot(ellipse[:, 0], ellipse[:, 1], color=color, linewidth=1.5)
        axes.plot(*rows.mean(0), "o", color=color, markeredgecolor="white", label=name)
    axes.set_xlabel(f"z[{columns[0]}]")
    axes.set_ylabel("density" if len(columns) == 1 else f"z[{columns[1]}]")
    axes.set_title("posterior of each datum", fontsize=10)
    axes.legend(title="datum", fontsize=8)
    return axes
