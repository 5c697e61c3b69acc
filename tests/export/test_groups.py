# SPDX-License-Identifier: Apache-2.0
"""Names, labels and files of what `to_arviz` exports, its time and its memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from linear_gaussian import draw_x, initialise, make_model, make_quadratic
from pyro.optim import Adam
from referee import bracket
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, ElboTable, Saddle, TemperedPool, to_arviz
from pyro_lvebm.evidence import programs as model_evidence

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N = 12


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(3, 16, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, N, seed=1)


@pytest.fixture(scope="module")
def saddle(ebm: LVEBM, x: Tensor) -> Saddle:
    model = make_model(ebm)
    guide = AutoParticles(model, 2)
    initialise(guide, x)
    return Saddle(model, guide, Adam({"lr": 1e-3}))


@pytest.fixture
def table() -> ElboTable:
    rows = pd.DataFrame({"elbo": [-1.5], "kl_gap": [0.25]}, index=["Laplace"])
    return ElboTable(rows, "fixed", -1.25, 0.1, [bracket(0.5, 0.1)], N, {}, {})


def export(saddle: Saddle, x: Tensor, **options: Any) -> Any:
    return to_arviz(saddle, x, **{"num_samples": 4, "num_warmup": 1} | options)


# --- names and labels -----------------------------------------------------------------------


def test_dims_and_coords_name_axes_of_all_groups(saddle: Saddle, x: Tensor) -> None:
    names = [f"row {i}" for i in range(N)]
    idata = export(
        saddle,
        x,
        num_prior=3,
        dims={"scene_z": ["factor"], "scene": ["row", "column"]},
        coords={"data": names, "factor": ["size", "shape"], "column": [3, 5, 7, 9]},
    )
    z = idata["posterior"]["scene_z"]
    assert z.dims == ("chain", "draw", "data", "factor")
    assert float(z.sel(chain=1, draw=2, data="row 4", factor="shape")) == float(z[1, 2, 4, 1])
    assert idata["prior"]["scene_z"].dims == z.dims
    assert idata["sample_stats"]["energy"].coords["data"].to_numpy().tolist() == names
    for group in ("observed_data", "posterior_predictive", "prior_predictive"):
        scene = idata[group]["scene"]
        assert scene.dims[-2:] == ("row", "column")
        assert scene.coords["column"].to_numpy().tolist() == [3, 5, 7, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": {"scen_z": ["factor"]}}, r"dims names \['scen_z'\], which are not in the export"),
        ({"coords": {"factor": [1, 2]}}, r"coords names \['factor'\], which are not in"),
        ({"dims": {"scene_z": ["a", "b", "c"]}}, "names 3 axes of 'scene_z', which has 2"),
        ({"coords": {"data": [1, 2]}}, r"labels of shape \(2,\) for 'data', which has 12 places"),
    ],
)
def test_names_that_fit_nothing_are_refused(
    saddle: Saddle, x: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export(saddle, x, **options)


def test_a_table_alone_is_a_group(table: ElboTable) -> None:
    idata = to_arviz(table)
    assert list(idata["elbo_table"]["posterior"].to_numpy()) == ["Laplace"]
    np.testing.assert_array_equal(idata["elbo_table"]["elbo"], table.rows["elbo"])


# --- both generations, and files ------------------------------------------------------------


@pytest.fixture(params=["installed", "tree"])
def everything(
    request: pytest.FixtureRequest,
    saddle: Saddle,
    x: Tensor,
    table: ElboTable,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, xr.Dataset]:
    """All groups, as the installed ArviZ has them, and as `DataTree`."""
    monkeypatch.setattr(model_evidence, "log_partition", lambda *_, **__: bracket(0.5, 0.1))
    if request.param == "tree":
        monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__="1.0.0"))
    return export(
        saddle, x, num_prior=2, num_log_likelihood=2, table=table, coords={"data": np.arange(N)}
    )


def groups_of(idata: Any) -> dict[str, xr.Dataset]:
    if isinstance(idata, xr.DataTree):
        return {name: child.to_dataset() for name, child in idata.children.items()}
    return {name: idata[name] for name in idata.groups()}


def assert_same(after: Any, before: Any) -> None:
    old, new = groups_of(before), groups_of(after)
    assert set(new) == set(old) >= {"prior", "log_likelihood", "elbo_table", "sample_stats"}
    for name in old:
        assert old[name].equals(new[name].load()), name
        assert old[name].attrs == new[name].attrs
    assert dict(after.attrs) == dict(before.attrs)


def test_netcdf_gives_all_back(everything: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "all.nc")
    everything.to_netcdf(path, engine="h5netcdf")
    if isinstance(everything, xr.DataTree):
        after: Any = xr.open_datatree(path, engine="h5netcdf")
    else:
        after = az.from_netcdf(path, engine="h5netcdf")
    assert_same(after, everything)


def test_zarr_gives_all_back(everything: Any, tmp_path: Path) -> None:
    """As a tree: `InferenceData.to_zarr` of ArviZ 0.23 asks for zarr 2, which xarray has left."""
    pytest.importorskip("zarr", reason="zarr is not installed")
    tree = xr.DataTree.from_dict(groups_of(everything))
    tree.attrs.update(everything.attrs)
    store = str(tmp_path / "all.zarr")
    tree.to_zarr(store, consolidated=False, zarr_format=2)
    assert_same(xr.open_datatree(store, engine="zarr", consolidated=False), everything)


def test_the_new_generation_summarises_a_tree(everything: Any) -> None:
    arviz_stats = pytest.importorskip("arviz_stats")
    if not isinstance(everything, xr.DataTree):
        pytest.skip("of the installed generation")
    assert len(arviz_stats.summary(everything, var_names=["scene_z"])) == 2 * N


# --- time and memory ------------------------------------------------------------------------


PROBE = """
import time, torch, arviz
from pyro.optim import Adam
import pyro
from pyro_lvebm import LVEBM, AutoParticles, QuadraticEnergy, Saddle, lvebm, to_arviz
torch.set_num_threads(1)
x = torch.randn({n}, 3, generator=torch.Generator().manual_seed(0))
ebm = LVEBM.from_data(QuadraticEnergy(3, 2), x, z_dim=2)
def model(x):
    with pyro.plate("data", len(x), subsample_size=1000) as i:
        lvebm("scene", ebm, obs=x[i])
saddle = Saddle(model, AutoParticles(model, 8), Adam({{"lr": 1e-3}}))
def peak():
    (line,) = [s for s in open("/proc/self/status") if s.startswith("VmHWM")]
    return 1024 * int(line.split()[1])
saddle.draw_posterior(x, num_samples=1, num_warmup=1)
before, clock = peak(), time.perf_counter()
idata = to_arviz(saddle, x, num_samples={draws}, num_warmup=20, num_predictive=0)
seconds = time.perf_counter() - clock
grown = peak() - before
copies = [idata["posterior"]["scene_z"].copy(deep=True) for _ in range(4)]
own = idata["posterior"]["scene_z"].nbytes
own += sum(idata["sample_stats"][name].nbytes for name in ("energy", "acceptance_rate"))
print(grown / own, (peak() - before) / own, seconds)
"""


def memory_and_time() -> tuple[float, float, float]:
    """Growth of the largest resident set over the size of what is returned, and seconds.

    The growth comes twice: before and after four copies are made of the draws.

    In a process of its own: the largest resident set of this one has seen other tests, and
    `resource.getrusage` would tell that of the parent.
    """
    code = PROBE.format(n=4000, draws=100)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    ratio, with_copies, seconds = map(float, done.stdout.split())
    return ratio, with_copies, seconds


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_export_takes_at_most_twice_its_own_memory() -> None:
    """4,000 data × 8 particles × 100 draws × 2 latents, 51 MB; four copies of the draws fail.

    The full size, and its time, are in docs/measurements.md.
    """
    ratio, with_copies, seconds = memory_and_time()
    assert ratio < 2.0 and seconds < 10.0
    assert with_copies > 2.0
