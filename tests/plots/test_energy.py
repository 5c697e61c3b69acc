# SPDX-License-Identifier: Apache-2.0
"""What is drawn of an energy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from linear_gaussian import assert_unchanged, make_quadratic
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from torch import Tensor

from pyro_lvebm import LVEBM, TemperedPool, plot_energy
from pyro_lvebm.plots.energy import DEPTH

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(2, 8, seed=0))


def exact_energy(ebm: LVEBM, x: Tensor, z: Tensor) -> np.ndarray:
    """½ uᵀPu + bᵀu in whitened coordinates, above nothing in particular."""
    scale = torch.block_diag(ebm.base_x.scale, ebm.base_z.scale.diag())
    loc = torch.cat([ebm.base_x.loc, ebm.base_z.loc])
    u = torch.linalg.solve(scale, (torch.cat([x, z], -1) - loc).T).T
    quadratic = 0.5 * ((u @ ebm.f.precision) * u).sum(-1) + u @ ebm.f.linear
    return quadratic.detach().numpy()


# --- energies -------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [2, 5])
def test_a_line_is_the_energy_above_its_minimum(ebm: LVEBM, column: int) -> None:
    """Along x[2], and along z[1]; the other coordinates are where they were put."""
    at = torch.arange(4.0).double(), torch.tensor([0.3, -0.2]).double()
    with assert_unchanged(ebm):
        axes = plot_energy(ebm, (column,), at=at, num_points=30)
    (line,) = axes.lines
    t = torch.as_tensor(np.asarray(line.get_xdata()))
    points = torch.cat(at).expand(30, -1).clone()
    points[:, column] = t
    expected = exact_energy(ebm, points[:, :4], points[:, 4:])
    np.testing.assert_allclose(line.get_ydata(), expected - expected.min(), atol=1e-6)
    base = ebm.base_x if column < 4 else ebm.base_z
    sd = (base.scale.norm(dim=1) if column < 4 else base.scale)[column % 4]
    torch.testing.assert_close(t[-1] - t[0], 6.0 * sd)
    torch.testing.assert_close(0.5 * (t[-1] + t[0]), base.loc[column % 4])
    assert axes.get_xlabel() == ("x[2]" if column == 2 else "z[1]")
    assert axes.get_ylabel() == "nats above the minimum" and axes.get_title() == "energy E"


def contours(axes: Axes) -> ContourSet:
    """The filled contours of a plane."""
    return next(c for c in axes.collections if isinstance(c, ContourSet) and c.filled)


def test_a_plane_has_its_minimum_where_the_energy_has(ebm: LVEBM) -> None:
    """Lowest level around the minimum of the quadratic in (x[0], z[0]), axes in that order."""
    axes = plot_energy(ebm, (0, 4), num_points=41)
    drawn = contours(axes)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("x[0]", "z[0]")
    assert drawn.levels[0] == 0.0 and drawn.levels[-1] == DEPTH
    x0, z0 = (np.linspace(*limits, 41) for limits in (axes.get_xlim(), axes.get_ylim()))
    points = torch.cat([ebm.base_x.loc, ebm.base_z.loc]).expand(41 * 41, -1).clone()
    points[:, 0] = torch.as_tensor(np.repeat(x0, 41))
    points[:, 4] = torch.as_tensor(np.tile(z0, 41))
    energy = exact_energy(ebm, points[:, :4], points[:, 4:])
    lowest = points[energy.argmin()][[0, 4]].numpy()
    inner = drawn.get_paths()[0]
    assert inner.contains_point(lowest) and not inner.contains_point([x0[0], z0[0]])
    assert not np.allclose(lowest, lowest[::-1], atol=0.2)
    (bar,) = [a for a in axes.figure.axes if a is not axes]
    assert bar.get_ylabel() == "nats above the minimum"


def test_the_marginal_is_the_evidence_upside_down(ebm: LVEBM) -> None:
    """−log ∫ exp(−E) dz along x[1], within the error of annealing; the slice differs by nats."""
    axes = plot_energy(ebm, (1,), marginal=True, num_points=15)
    (line,) = axes.lines
    x = ebm.base_x.loc.expand(15, -1).clone()
    x[:, 1] = torch.as_tensor(np.asarray(line.get_xdata()))
    expected = -ebm.f.log_evidence(x).detach().numpy()
    expected = expected - expected.min()
    np.testing.assert_allclose(line.get_ydata(), expected, atol=0.15)
    assert "∫ exp(−E) dz" in axes.get_title()
    (other,) = plot_energy(ebm, (1,), num_points=15).lines
    assert np.abs(np.asarray(other.get_ydata()) - expected).max() > 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": (0, 6)}, r"lie in 0 … 5, those of \(x, z\)"),
        ({"columns": (4,), "marginal": True}, "lie in 0 … 3, those of x, for z is integrated"),
        ({"columns": (1, 1)}, "two different coordinates"),
        ({"columns": ()}, "one or two different"),
        ({"columns": (0,), "num_points": 1}, "num_points must be at least 2; got 1"),
    ],
)
def test_coordinates_that_do_not_exist(ebm: LVEBM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_energy(ebm, **options)
