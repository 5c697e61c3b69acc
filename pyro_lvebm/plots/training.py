# SPDX-License-Identifier: Apache-2.0
"""Figures of a training: its history, log Z on the way, and the ladder of a pool."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pyro_lvebm.evidence import LogPartition
from pyro_lvebm.plots.canvas import axes_or_new, new_figure
from pyro_lvebm.pools import Pool, ladder_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 20
"""Steps over which the lines of a history are averaged."""


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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = history_panels(history)
    if not panels:
        raise ValueError("the history has no numbers to draw: take a step first")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    figure = new_figure(4.4 * num_columns, 2.8 * num_rows, layout)
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
    from matplotlib import colormaps

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


def plot_log_partition(
    history: pd.DataFrame, log_z: LogPartition, *, site: str = "", axes: Axes | None = None
) -> Axes:
    """Draw log Z of the pool at every step beside the annealed bracket of the last step.

    The bracket is a band from its lower to its upper end, with a line at the estimate. An online
    value that ends outside it has missed mass, or lags behind θ.

    Args:
        history: Rows by step, as `Saddle.history` has them.
        log_z: What `log_partition` returned for the present θ.
        site: Site of the LVEBM whose columns end in `@<site>`; the first if empty.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If it is not a history, or has no log Z of that site.

    Example:
        >>> import pandas as pd, torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, log_partition, plot_log_partition
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1)
        >>> log_z = log_partition(ebm, num_runs=2, num_refreshes=2)
        >>> history = pd.DataFrame({"log_partition": [0.1, 0.0]}, index=[1, 2])
        >>> plot_log_partition(history, log_z).get_xlabel()
        'step'
    """
    import pandas as pd

    if not isinstance(history, pd.DataFrame):
        raise ValueError(f"history must be that of a Saddle; got {type(history).__name__}")
    suffix = f"@{site}" if site else ""
    panels = {panel.title: panel for panel in history_panels(history)}
    title = f"log Z online {suffix}".rstrip()
    if title not in panels:
        raise ValueError(f"the history has no column log_partition{suffix}; it has {list(history)}")
    axes = plot_panel(axes_or_new(axes, 5, 3), history, panels[title])
    label = "annealed bracket" if log_z.is_reliable else "annealed bracket, NOT RELIABLE"
    axes.axhspan(log_z.lower, log_z.upper, color="C1", alpha=0.3, linewidth=0, label=label)
    axes.axhline(log_z.estimate, color="C1", label="annealed estimate")
    axes.lines[0].set_label("online, ± 2 se" if panels[title].error else "online")
    axes.legend(fontsize=8)
    axes.set_title("log Z, online and annealed", fontsize=10)
    return axes


def plot_ladder(pool: Pool, axes: Axes | None = None) -> Axes:
    """Draw the ladder of a pool: its inverse temperatures, exchanges and moves, by level.

    Level 0 is the base, the last the model. Bars are exchange rates between neighbours: a low bar
    cuts the ladder in two.

    Args:
        pool: A `TemperedPool` that has been refreshed.
        axes: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        ValueError: If the pool has no ladder, or has not been refreshed.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool, plot_ladder
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, pool=TemperedPool(4, 32))
        >>> ebm.pool.refresh(ebm)
        >>> plot_ladder(ebm.pool).get_xlabel()
        'level'
    """
    ladder = ladder_of(pool)
    swap_rate = ladder.swap_rate.double().cpu().numpy()
    if not np.isfinite(swap_rate).all():
        raise ValueError("the pool has no rates yet: take a step, or refresh it")
    axes = axes_or_new(axes, 5, 3)
    level = np.arange(len(ladder.betas))
    axes.bar(level[:-1] + 0.5, swap_rate, 0.7, color="C0", alpha=0.4, label="exchange rate")
    axes.plot(level, ladder.betas.double().cpu().numpy(), "o-", color="C1", label="β")
    rates = ladder.acceptance.double().cpu().numpy()
    axes.plot(level, rates, "x", color="C2", label="acceptance of moves")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(level[:: max(1, len(level) // 8)])
    axes.set_xlabel("level")
    axes.set_ylabel("β, or rate")
    axes.set_title("ladder of the pool", fontsize=10)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return axes
