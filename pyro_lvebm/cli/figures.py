# SPDX-License-Identifier: Apache-2.0
"""Figures of a whole fit, as the command line writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_lvebm.comparison import ElboTable
from pyro_lvebm.evidence import LogEvidence
from pyro_lvebm.plots import (
    new_figure,
    plot_elbo,
    plot_images,
    plot_log_partition,
    plot_pair,
)
from pyro_lvebm.rng import Stream, derive_seed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAIRS = 3
"""Pairs of columns that are drawn."""

_SCREENED = 12
"""Columns whose pairs are compared by mutual information, those with the strongest ranks."""

_SMOOTHING = 20
"""Steps over which the loss is averaged."""


@dataclass(frozen=True)
class Results:
    """What stands beside the data: how the fit went, and how good it is."""

    history: pd.DataFrame
    table: ElboTable
    evidence: LogEvidence
    baselines: pd.DataFrame


def informative_pairs(data: np.ndarray, seed: int) -> list[tuple[int, int]]:
    """Return the pairs of columns with the largest mutual information, best first.

    Args:
        data: Observations (N, D), NaN where missing; pairs are judged by the rows that have both.
        seed: Fixes the noise of the estimate.

    Source:
        Kraskov, Stögbauer and Grassberger (2004), Estimating mutual information.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(300, 4))
        >>> x[:, 3] = x[:, 1] ** 2 + 0.1 * x[:, 0]
        >>> informative_pairs(x, seed=0)[0]
        (1, 3)
    """
    from scipy.stats import rankdata
    from sklearn.feature_selection import mutual_info_regression

    width = data.shape[1]
    if width < 2:
        return [(0, 0)]
    chosen = np.arange(width)
    if width > _SCREENED:
        ranks = rankdata(np.nan_to_num(data, nan=np.inf), axis=0)
        spread = ranks - ranks.mean(0)
        # Distances from the middle have a rank correlation where a bent relation has none.
        both = np.concatenate([spread, rankdata(np.abs(spread), axis=0)], 1)
        with np.errstate(invalid="ignore"):
            strength = np.abs(np.nan_to_num(np.corrcoef(both.T))).reshape(2, width, 2, width)
        strength[:, np.arange(width), :, np.arange(width)] = 0.0
        chosen = np.sort(np.argsort(-strength.max((0, 2, 3)), kind="stable")[:_SCREENED])
    found: dict[tuple[int, int], float] = {}
    random_state = derive_seed(seed, Stream.FIGURE, 1) % 2**32
    for a, i in enumerate(chosen):
        for j in chosen[a + 1 :]:
            pair = data[:, [i, j]]
            pair = pair[~np.isnan(pair).any(1)]
            if len(pair) < 8 or (np.ptp(pair, axis=0) == 0).any():
                continue
            # The estimate adds noise in units of the columns.
            pair = (pair - pair.mean(0)) / np.ptp(pair, axis=0)
            found[int(i), int(j)] = float(
                mutual_info_regression(pair[:, :1], pair[:, 1], random_state=random_state)[0]
            )
    ranked = sorted(found, key=lambda pair: -found[pair])
    return ranked[:_PAIRS] or [(0, 1)]


def image_figure(
    data: np.ndarray,
    draws: np.ndarray,
    masked: np.ndarray,
    reconstructed: np.ndarray,
    table: ElboTable,
    results: Results | None = None,
) -> Figure:
    """Data, model draws, masked images with reconstructions, and the ELBO table in one figure.

    Args:
        data: Images (n, height, width).
        draws: Model draws (n, height, width).
        masked: Held-out images with hidden pixels as NaN, (m, height, width).
        reconstructed: Draws of the same images with hidden pixels filled in, and below them the
            truth, (2 m, height, width).
        table: The ELBO table.
        results: How the fit went, in a column of its own; left out if None.
    """
    figure = new_figure(10 if results is None else 15, 8)
    if results is None:
        top, bottom = figure.subplots(2, 2)
    else:
        # Two grids apart, or the widest label of one would make room in the other.
        parts: Any = figure.subfigures(1, 2, width_ratios=(5, 3))
        left, right = parts
        top, bottom = left.subplots(2, 2)
        _draw_results(right.subplots(3, 1), results)
    columns = len(masked)
    plot_images(top[0], data, "data", 10)
    plot_images(top[1], draws, "model draws", 10)
    plot_images(
        bottom[0],
        np.concatenate([masked, reconstructed]),
        "held-out: masked, reconstructed, true",
        columns,
    )
    plot_elbo(table, bottom[1])
    return figure


def table_figure(
    data: np.ndarray,
    draws: np.ndarray,
    table: ElboTable,
    pairs: Sequence[tuple[int, int]] | None = None,
    names: Sequence[str] | None = None,
    results: Results | None = None,
) -> Figure:
    """Data beside model draws, and the ELBO table, for observations that are not images.

    Args:
        data: Observations (N, D).
        draws: Model draws (M, D).
        table: The ELBO table.
        pairs: Columns of each panel; the first two if None.
        names: Names of the D columns.
        results: How the fit went, in a row below; left out if None.
    """
    pairs = [(0, min(1, data.shape[1] - 1))] if pairs is None else list(pairs)
    width = len(pairs) + 1
    if results is None:
        figure = new_figure(5 * width, 4.5)
        top: Any = figure.subplots(1, width)
    else:
        figure = new_figure(max(14.0, 4.4 * width), 8.0)
        parts: Any = figure.subfigures(2, 1)
        above, below = parts
        top = above.subplots(1, width)
        _draw_results(below.subplots(1, 3), results)
    for axes, pair in zip(top, pairs, strict=False):
        plot_pair(axes, data, draws, "data and model draws", columns=pair, names=names)
    plot_elbo(table, top[len(pairs)])
    return figure


def _draw_results(panels: Sequence[Axes], results: Results) -> None:
    """Draw the training curve, log Z and the comparison on held-out rows."""
    curve, log_z, comparison = panels
    history = results.history
    smooth = history["loss"].rolling(_SMOOTHING, min_periods=1).mean()
    curve.plot(history.index, history["loss"], color="C0", alpha=0.3, linewidth=0.8)
    curve.plot(history.index, smooth, color="C0")
    # The first steps, from the base, are far above all others.
    settled = history["loss"].iloc[len(history) // 20 :]
    low, high = np.nanquantile(settled, [0.005, 0.995])
    margin = 0.1 * (high - low) + 1e-3 * abs(high)
    if np.isfinite([low, high]).all() and margin > 0:
        curve.set_ylim(low - margin, high + margin)
    curve.set_title("training", fontsize=10)
    curve.set_xlabel("step")
    curve.set_ylabel("loss")
    plot_log_partition(history, results.evidence.log_partition, axes=log_z)
    evidence, baselines = results.evidence, results.baselines
    names = ["LVEBM", *baselines["baseline"]]
    values = np.array([float(evidence.lower.double().mean()), *baselines["log_evidence"]])
    errors = np.array([evidence.mean_std_error, *baselines["std_error"]])
    order = np.argsort(values)
    position = np.arange(len(names))
    for place, k in enumerate(order):
        color = "C1" if k == 0 else "C0"
        comparison.errorbar(
            values[k], position[place], xerr=2 * errors[k], fmt="o", capsize=3, color=color
        )
    labels = [names[k].replace(", ", ",\n").replace(" (not", "\n(not") for k in order]
    comparison.set_yticks(position, labels, fontsize=7)
    comparison.set_ylim(-0.6, len(names) - 0.4)
    comparison.locator_params(axis="x", nbins=5)
    comparison.set_xlabel("log p(x), nats per datum, ± 2 se")
    comparison.set_title("held-out rows", fontsize=10)
