# SPDX-License-Identifier: Apache-2.0
"""Figures that pyplot does not know, so that nobody's open figures or backend change.

Colours are those of matplotlib's present style, such as `arviz.style.context("arviz-white")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import LayoutEngine


def new_figure(width: float, height: float, layout: LayoutEngine | None = None) -> Figure:
    """Return an empty figure of this size in inches, by default in a constrained layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine() if layout is None else layout
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def axes_or_new(axes: Axes | None, width: float, height: float) -> Axes:
    """Return the axes, or those of a new figure of this size in inches."""
    return new_figure(width, height).subplots() if axes is None else axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=130)
