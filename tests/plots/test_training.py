# SPDX-License-Identifier: Apache-2.0
"""What is drawn of log Z beside its bracket, and of the ladder; the history is in test_plots."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from referee import bracket
from small_models import quadratic_ebm, warm

from pyro_lvebm import PersistentPool, TemperedPool, plot_ladder, plot_log_partition

STEPS = np.arange(1, 31)
HISTORY = pd.DataFrame(
    {
        "log_partition": np.log(STEPS),
        "log_partition_se": np.full(30, 0.1),
        "log_partition@other": -np.log(STEPS),
    },
    index=pd.Index(STEPS, name="step"),
)


def test_log_z_online_stands_beside_the_bracket() -> None:
    axes = plot_log_partition(HISTORY, bracket(3.2, 0.05, 3.0, 3.5))
    online, estimate = axes.lines
    np.testing.assert_array_equal(online.get_xdata(), STEPS)
    np.testing.assert_array_equal(online.get_ydata(), np.log(STEPS))
    assert list(estimate.get_ydata()) == [3.2, 3.2]
    (band,) = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((3.0, 3.5))
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == [
        "online, ± 2 se",
        "annealed bracket",
        "annealed estimate",
    ]


def test_the_log_z_of_another_site_has_no_error() -> None:
    axes = plot_log_partition(HISTORY, bracket(-3.0), site="other")
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), -np.log(STEPS))
    assert axes.get_legend().get_texts()[0].get_text() == "online"
    with pytest.raises(ValueError, match="no column log_partition@none"):
        plot_log_partition(HISTORY, bracket(0.0), site="none")


def test_a_bracket_that_failed_says_so() -> None:
    """The estimate lies below the lower end, and has no error that would explain it."""
    axes = plot_log_partition(HISTORY, bracket(3.0, 0.0, 3.5, 4.0))
    texts = [t.get_text() for t in axes.get_legend().get_texts()]
    assert "annealed bracket, NOT RELIABLE" in texts


def test_the_ladder_shows_temperatures_and_rates() -> None:
    pool = TemperedPool(5, 32, seed=0)
    ebm = warm(quadratic_ebm(pool=pool), 3)
    axes = plot_ladder(ebm.pool)
    betas, moves = axes.lines
    np.testing.assert_allclose(betas.get_ydata(), pool.betas)
    np.testing.assert_allclose(moves.get_ydata(), pool.acceptance)
    bars = [p for p in axes.patches if isinstance(p, Rectangle)]
    np.testing.assert_allclose([b.get_height() for b in bars], pool.swap_rate)
    centres = [b.get_x() + 0.5 * b.get_width() for b in bars]
    np.testing.assert_allclose(centres, [0.5, 1.5, 2.5, 3.5])
    assert axes.get_xlabel() == "level" and axes.get_ylabel() == "β, or rate"


def test_a_pool_without_a_ladder_is_refused() -> None:
    with pytest.raises(ValueError, match="a PersistentPool has no ladder"):
        plot_ladder(PersistentPool(8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rates yet: take a step"):
        plot_ladder(TemperedPool(3, 8))
