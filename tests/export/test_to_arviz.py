# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from linear_gaussian import (
    PlainQuadratic,
    assert_unchanged,
    draw_x,
    initialise,
    make_model,
    make_quadratic,
)
from pyro.optim import Adam
from referee import ALPHA, CERTAIN, mean_p_value, normal, variance_p_value
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    ULA,
    AutoParticles,
    ElboTable,
    LaplaceApproximation,
    PriorProposal,
    Saddle,
    TemperedPool,
    compare_elbo,
    log_partition,
    lvebm,
    to_arviz,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N, BATCH, CHAINS = 90, 40, 6  # the last of three minibatches has 10 data of its own
NEW_API = int(az.__version__.split(".")[0]) >= 1
ATTRIBUTES = {
    "inference_library": "pyro_lvebm",
    "inference_library_version": version("pyro-lvebm"),
    "num_training_steps": 0,
}
GROUPS = {"posterior", "sample_stats", "observed_data", "posterior_predictive"}


def make_saddle(model: Callable[..., None], *args: Any, chains: int = 2, **options: Any) -> Saddle:
    guide = AutoParticles(model, chains)
    initialise(guide, *args)
    return Saddle(model, guide, Adam({"lr": 1e-3}), seed=0, **options)


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(full_z=True, pool=TemperedPool(4, 32, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, N, seed=1)


@pytest.fixture(scope="module")
def saddle(ebm: LVEBM, x: Tensor) -> Saddle:
    return make_saddle(make_model(ebm, BATCH), x, chains=CHAINS)


@pytest.fixture(scope="module")
def idata(saddle: Saddle, x: Tensor) -> Any:
    return to_arviz(
        saddle, x, num_samples=120, num_warmup=150, thinning=2, num_predictive=CHAINS, seed=3
    )


@pytest.fixture
def pair(ebm: LVEBM, x: Tensor) -> Saddle:
    """Two chains, for ArviZ warns of fewer draws than chains."""
    return make_saddle(make_model(ebm, BATCH), x)


def attributes(idata: Any) -> dict[str, Any]:
    return dict(idata.attrs)


def last_replicates(idata: Any) -> np.ndarray:
    """One replicate of each chain and datum: those of one chain share nearly the same z."""
    return group(idata, "posterior_predictive")["scene"].to_numpy()[:, -1:]


def group(idata: Any, name: str) -> Any:
    """A group as a Dataset, in either generation of ArviZ."""
    return idata[name].to_dataset() if NEW_API else idata[name]


def whitened(draws: np.ndarray, ebm: LVEBM, x: Tensor) -> np.ndarray:
    """Draws (chain, draw, N, 2) in coordinates where each posterior is N(0, I)."""
    posterior = ebm.f.posterior(x)
    centred = draws - posterior.mean.detach().numpy()
    return centred @ np.linalg.inv(posterior.scale_tril[0].detach().numpy()).T


def moments_p_value(draws: np.ndarray, ebm: LVEBM, x: Tensor) -> float:
    """Student's tests of mean 0 and second moments I, with chains as independent replicates.

    Each chain is averaged over its draws and all data, so that autocorrelation does not matter.
    """
    y = whitened(draws, ebm, x)
    second = np.einsum("csni,csnj->cij", y, y) / (y.shape[1] * y.shape[2])
    means = y.mean((1, 2))
    identity = np.eye(2)[None].repeat(len(y), 0).mean(0)
    return 2.0 * min(mean_p_value(means, 0.0), mean_p_value(second, identity))


# --- what is in the file --------------------------------------------------------------------


def test_groups_dims_coords_and_attributes(idata: Any, ebm: LVEBM, x: Tensor) -> None:
    names = set(idata.children) if NEW_API else set(idata.groups())
    assert names == GROUPS  # no log_likelihood: a site's log_prob is not log p(x | z)
    posterior = group(idata, "posterior")["scene_z"]
    assert posterior.dims == ("chain", "draw", "data", "scene_z_dim_0")
    assert posterior.shape == (CHAINS, 120, N, 2)
    sample_stats = group(idata, "sample_stats")
    log_z = sample_stats["log_partition"]
    assert log_z.dims == ("chain", "draw") and (log_z == float(ebm.log_partition)).all()
    assert set(sample_stats) == {"energy", "acceptance_rate", "step_size", "log_partition"}
    for stat in sample_stats.drop_vars("log_partition").values():
        assert stat.dims == ("chain", "draw", "data") and stat.shape == (CHAINS, 120, N)
    sizes = sample_stats["step_size"].to_numpy()
    assert (sizes > 0).all() and (sizes == sizes[:1, :1]).all(), "fixed since the warm-up"
    assert len(np.unique(sizes)) == N, "of each datum its own"
    observed = group(idata, "observed_data")["scene"]
    assert observed.dims == ("data", "scene_dim_0") and observed.shape == (N, 4)
    predictive = group(idata, "posterior_predictive")["scene"]
    assert predictive.dims == ("chain", "draw", "data", "scene_dim_0")
    assert predictive.shape == (CHAINS, CHAINS, N, 4)
    for name, size in (("chain", CHAINS), ("draw", 120), ("data", N), ("scene_z_dim_0", 2)):
        np.testing.assert_array_equal(posterior.coords[name], np.arange(size))
    assert attributes(idata) == ATTRIBUTES
    np.testing.assert_array_equal(observed.to_numpy(), x.numpy())


def test_draws_are_those_of_sample_posterior(idata: Any, saddle: Saddle, x: Tensor) -> None:
    draws = saddle.sample_posterior(x, num_samples=120, num_warmup=150, thinning=2)
    np.testing.assert_array_equal(group(idata, "posterior")["scene_z"], draws["scene_z"].numpy())


@pytest.mark.parametrize("full_z", [False, True])
def test_energies_are_those_of_the_model(full_z: bool) -> None:
    """−log p(x, z) with the pool's log Z, at every draw; acceptance is a probability."""
    if full_z:
        ebm = make_quadratic(full_z=True, pool=TemperedPool(2, 8, seed=0))
        x = draw_x(ebm, 12, 1)
        assert abs(ebm.base_z.log_det) > 0.1
    else:
        ebm, x = image_ebm(), normal((12, 2, 3), 1)
    ebm.pool.refresh(ebm)
    idata = to_arviz(make_saddle(make_model(ebm, 5), x), x, num_samples=30, num_warmup=200)
    z = torch.from_numpy(group(idata, "posterior")["scene_z"].to_numpy())
    with torch.no_grad():
        expected = ebm.energy(x.expand(2, 30, *x.shape), z) + ebm.log_partition
    sample_stats = group(idata, "sample_stats")
    rate = sample_stats["acceptance_rate"].to_numpy()
    assert rate.min() >= 0.0 and rate.max() <= 1.0
    assert 0.4 < rate.mean() < 0.8 and rate.std() > 0.05
    assert abs(float(ebm.log_partition)) > 0.01
    np.testing.assert_allclose(sample_stats["energy"], expected, rtol=1e-7)


# --- the draws are of the posterior ---------------------------------------------------------


def test_posterior_moments_are_exact(idata: Any, ebm: LVEBM, x: Tensor) -> None:
    """False alarm ALPHA."""
    draws = group(idata, "posterior")["scene_z"].to_numpy()
    assert moments_p_value(draws, ebm, x) > ALPHA


@pytest.mark.parametrize("fault", ["rows shifted", "chain swapped for draw", "kernel"])
def test_moments_check_fails_for_broken_draws(
    idata: Any, ebm: LVEBM, x: Tensor, fault: str
) -> None:
    draws = group(idata, "posterior")["scene_z"].to_numpy()
    if fault == "rows shifted":
        draws = np.roll(draws, 1, axis=2)
    elif fault == "chain swapped for draw":
        draws = draws.reshape(CHAINS, 120, 2, N).swapaxes(2, 3)
    else:
        biased = make_saddle(
            make_model(ebm, BATCH), x, chains=CHAINS, kernel=ULA(target_acceptance=0.8)
        )
        draws = biased.sample_posterior(x, num_samples=120)["scene_z"].numpy()
    assert moments_p_value(draws, ebm, x) < 1e-4


def test_posterior_means_are_exact_within_arviz_standard_errors(
    idata: Any, ebm: LVEBM, x: Tensor
) -> None:
    """`az.summary` runs without a warning, and 180 means are right by its own MCSE.

    Nominally 0.3 % are beyond 3 MCSE; 4 % are allowed, for MCSE is itself an estimate (from 720
    correlated draws). By the binomial law 8 or more of 180 have probability < 1e-6 at 0.3 % and
    ALPHA at 1.2 %. The means of other rows fail.
    """
    summary = az.summary(idata, var_names=["scene_z"], round_to="none")
    assert len(summary) == 2 * N and summary["r_hat"].max() < 1.1
    exact = ebm.f.posterior(x).mean.detach().numpy()
    z = (summary["mean"].to_numpy().reshape(N, 2) - exact) / summary[
        "mcse_mean"
    ].to_numpy().reshape(N, 2)
    assert (np.abs(z) > 3.0).sum() < 8
    z = (summary["mean"].to_numpy().reshape(N, 2) - np.roll(exact, 1, 0)) / summary[
        "mcse_mean"
    ].to_numpy().reshape(N, 2)
    assert (np.abs(z) > 3.0).mean() > 0.5


# --- the replicates are of the posterior predictive -----------------------------------------


def predictive_law(ebm: LVEBM, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Means (N, 4) and covariance (4, 4) of x_new with z ~ p(z | x_i), x_new ~ p(x | z)."""
    p = ebm.f.precision.detach().numpy()
    b = ebm.f.linear.detach().numpy()
    posterior = ebm.f.posterior(x)
    z = ebm.base_z.whiten(posterior.mean.detach()).numpy()
    inverse_z = np.linalg.inv(ebm.base_z.scale.numpy())
    z_covariance = inverse_z @ posterior.covariance_matrix[0].detach().numpy() @ inverse_z.T
    given_z = np.linalg.inv(p[:4, :4])
    slope = -given_z @ p[:4, 4:]
    mean = z @ slope.T - given_z @ b[:4]
    covariance = given_z + slope @ z_covariance @ slope.T
    scale = ebm.base_x.scale.numpy()
    return ebm.base_x.loc.numpy() + mean @ scale.T, scale @ covariance @ scale.T


def predictive_p_value(replicates: np.ndarray, ebm: LVEBM, x: Tensor) -> float:
    """Chi-square test of the whitened replicates (chain, draw, N, 4), which are independent."""
    mean, covariance = predictive_law(ebm, x)
    y = (replicates - mean).reshape(-1, 4) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    pairs = np.stack([y[:, i] * y[:, j] for i in range(4) for j in range(i)], -1)
    checks = [variance_p_value(y, 1.0), mean_p_value(y, 0.0), mean_p_value(pairs, 0.0)]
    return min(1.0, 3.0 * min(checks))


def test_replicates_have_the_predictive_moments(idata: Any, ebm: LVEBM, x: Tensor) -> None:
    """540 replicates, one of each chain and datum; false alarm ALPHA."""
    assert predictive_p_value(last_replicates(idata), ebm, x) > ALPHA


def test_predictive_check_fails_for_other_replicates(idata: Any, ebm: LVEBM, x: Tensor) -> None:
    replicates = last_replicates(idata)
    observed = group(idata, "observed_data")["scene"].to_numpy()
    assert predictive_p_value(np.roll(replicates, 1, 2), ebm, x) < CERTAIN
    assert predictive_p_value(np.broadcast_to(observed, (CHAINS, 1, N, 4)), ebm, x) < CERTAIN


def test_replicates_of_ordinary_sites(ebm: LVEBM, x: Tensor) -> None:
    """y ~ N(z·w, 0.1²) with the z of the kept draws; false alarm ALPHA."""
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def model(x: Tensor, *, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=20) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Normal(z @ w, 0.1), obs=y[i])

    few, y = x[:30], normal((30,), 4)
    guide = AutoParticles(model, 2)
    with torch.random.fork_rng():
        guide(few, y=y)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}))
    idata = to_arviz(saddle, few, y=y, num_samples=15, num_warmup=150, thinning=8, num_predictive=5)
    replicates = group(idata, "posterior_predictive")["y"]
    assert replicates.dims == ("chain", "draw", "data") and replicates.shape == (2, 5, 30)
    np.testing.assert_array_equal(group(idata, "observed_data")["y"], y.numpy())
    last = group(idata, "posterior")["scene_z"].to_numpy()[:, -5:]
    residual = (replicates.to_numpy() - last @ w.numpy()) / 0.1
    assert variance_p_value(residual.reshape(-1, 1), 1.0) > ALPHA
    first = group(idata, "posterior")["scene_z"].to_numpy()[:, :5]
    residual = (replicates.to_numpy() - first @ w.numpy()) / 0.1
    assert variance_p_value(residual.reshape(-1, 1), 1.0) < CERTAIN


# --- files, and both generations of ArviZ ---------------------------------------------------


def test_netcdf_round_trip(idata: Any, tmp_path: Path) -> None:
    path = tmp_path / "posterior.nc"
    if NEW_API:
        idata.to_netcdf(path, engine="h5netcdf")
        again: Any = xr.open_datatree(path, engine="h5netcdf")
    else:
        idata.to_netcdf(str(path), engine="h5netcdf")
        again = az.from_netcdf(str(path), engine="h5netcdf")
    assert path.stat().st_size > 10_000
    for name in GROUPS:
        before, after = group(idata, name), group(again, name)
        assert before.equals(after.load()) and set(before.dims) == set(after.dims)
    assert attributes(again) == ATTRIBUTES


@pytest.fixture(scope="module")
def table(ebm: LVEBM, saddle: Saddle, x: Tensor) -> ElboTable:
    rows = {"prior & base": PriorProposal(), "Laplace": LaplaceApproximation()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("num_particles", 64), ("num_runs", 6), ("num_refreshes", 3)):
            patch.setitem(log_partition.__kwdefaults__, name, value)
        return compare_elbo(saddle.model, rows, x)


def check_table(dataset: Any, table: ElboTable) -> None:
    assert list(dataset["posterior"].to_numpy()) == list(table.rows.index)
    for name, column in table.rows.items():
        assert dataset[name].dims == ("posterior",)
        np.testing.assert_array_equal(dataset[name], column)
    (log_z,) = table.log_partitions
    for name in ("estimate", "std_error", "lower", "upper"):
        np.testing.assert_array_equal(dataset[f"log_partition_{name}"], [getattr(log_z, name)])
    assert dataset.attrs["theta"] == "fixed" and dataset.attrs["num_data"] == N
    assert dataset.attrs["log_evidence"] == table.log_evidence


def test_an_elbo_table_is_a_group_also_in_a_file(
    saddle: Saddle, x: Tensor, table: ElboTable, tmp_path: Path
) -> None:
    idata: Any = to_arviz(saddle, x, num_samples=6, num_warmup=1, table=table)
    check_table(group(idata, "elbo_table"), table)
    path = str(tmp_path / "with_table.nc")
    idata.to_netcdf(path, engine="h5netcdf")
    read: Any = xr.open_datatree if NEW_API else az.from_netcdf
    check_table(group(read(path, engine="h5netcdf"), "elbo_table"), table)


def test_only_a_table_is_a_group(saddle: Saddle, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be an ElboTable.*got str"):
        to_arviz(saddle, x, table="elbo")  # type: ignore[arg-type]


@pytest.mark.parametrize("release", ["1.0.0", "1.2.0rc1", "10.3"])
def test_arviz_from_1_on_gets_a_tree_of_the_same_content(
    pair: Saddle, x: Tensor, table: ElboTable, monkeypatch: pytest.MonkeyPatch, release: str
) -> None:
    """What ArviZ 1 has; `arviz_base` reads it, and installs beside 0.23."""
    settings: dict[str, Any] = {"num_samples": 3, "num_warmup": 1, "table": table, "num_prior": 2}
    monkeypatch.setitem(sys.modules, "arviz", SimpleNamespace(__version__=release))
    tree = to_arviz(pair, x, **settings)
    monkeypatch.undo()
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == GROUPS | {"elbo_table", "prior", "prior_predictive"}
    check_table(tree["elbo_table"], table)
    assert tree.attrs == ATTRIBUTES
    base = pytest.importorskip("arviz_base")
    assert base.extract(tree).dims == ("data", "scene_z_dim_0", "sample")
    if not NEW_API:
        old = to_arviz(pair, x, **settings)
        assert set(old.groups()) == set(tree.children)
        for name in tree.children:
            assert old[name].identical(tree[name].to_dataset())


def test_default_settings_give_no_warning(ebm: LVEBM, x: Tensor) -> None:
    """ArviZ 0.2x warns of fewer draws than chains, also of the replicates."""
    model = make_model(ebm)
    guide = AutoParticles(model)
    initialise(guide, x)
    idata = to_arviz(Saddle(model, guide, Adam({"lr": 1e-3})), x)
    assert group(idata, "posterior")["scene_z"].shape == (4, 100, N, 2)
    assert group(idata, "posterior_predictive")["scene"].shape == (4, 4, N, 4)


# --- reproducible, and nothing moves --------------------------------------------------------


def test_draws_are_fixed_by_saddle_and_replicates_by_the_seed(pair: Saddle, x: Tensor) -> None:
    first, again, other = (
        to_arviz(pair, x, num_samples=2, num_warmup=2, seed=s) for s in (1, 1, 2)
    )
    for name in GROUPS:
        assert group(first, name).equals(group(again, name))
    assert group(first, "posterior").equals(group(other, "posterior"))
    assert not group(first, "posterior_predictive").equals(group(other, "posterior_predictive"))


def test_the_saddle_stays_as_it_is(pair: Saddle, ebm: LVEBM, x: Tensor) -> None:
    ebm.mark_pool(fresh=True)
    with assert_unchanged(ebm, pair.guide):
        to_arviz(pair, x, num_samples=2, num_warmup=3)
    assert ebm.pool_is_fresh() and pair.step_count == 0


def test_a_trained_saddle_states_its_steps(x: Tensor) -> None:
    ebm = make_quadratic(pool=TemperedPool(2, 8, seed=0))
    saddle = make_saddle(make_model(ebm, 20), x, chains=1)
    for _ in range(3):
        saddle.step(x)
    idata = to_arviz(saddle, x, num_samples=2, num_warmup=1)
    assert attributes(idata)["num_training_steps"] == 3
    assert group(idata, "posterior")["scene_z"].shape == (1, 2, N, 2)


# --- shapes of models -----------------------------------------------------------------------


def image_ebm() -> LVEBM:
    base = dist.Normal(torch.zeros(2, 3, dtype=torch.float64), 1.0).to_event(2)
    base_z = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    energy = PlainQuadratic(0.1 * torch.eye(8, dtype=torch.float64), normal((8,), 0), 2)
    return LVEBM(energy, base, base_z, TemperedPool(2, 8))


def test_event_axes_are_named_in_order() -> None:
    ebm, x = image_ebm(), normal((7, 2, 3), 1)
    model = make_model(ebm, 3)
    idata = to_arviz(make_saddle(model, x), x, num_samples=2, num_warmup=1)
    observed = group(idata, "observed_data")["scene"]
    assert observed.dims == ("data", "scene_dim_0", "scene_dim_1") and observed.shape == (7, 2, 3)
    np.testing.assert_array_equal(observed, x.numpy())
    assert group(idata, "posterior_predictive")["scene"].shape == (2, 2, 7, 2, 3)


def test_a_model_of_one_observation_has_no_plate() -> None:
    ebm, x = image_ebm(), normal((2, 3), 1)

    def model(x: Tensor) -> None:
        lvebm("scene", ebm, obs=x)

    idata = to_arviz(make_saddle(model, x), x, num_samples=5, num_warmup=1)
    posterior = group(idata, "posterior")["scene_z"]
    assert posterior.dims == ("chain", "draw", "scene_z_dim_0") and posterior.shape == (2, 5, 2)
    assert group(idata, "sample_stats")["energy"].dims == ("chain", "draw")
    np.testing.assert_array_equal(group(idata, "observed_data")["scene"], x.numpy())
    assert group(idata, "posterior_predictive")["scene"].shape == (2, 2, 2, 3)


def test_a_subsampled_plate_around_another() -> None:
    ebm, x = image_ebm(), normal((7, 4, 2, 3), 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 7, 3, dim=-2) as i, pyro.plate("views", 4, dim=-1):
            lvebm("scene", ebm, obs=x[i])

    idata = to_arviz(make_saddle(model, x), x, num_samples=2, num_warmup=1)
    posterior = group(idata, "posterior")["scene_z"]
    assert posterior.dims == ("chain", "draw", "data", "views", "scene_z_dim_0")
    assert posterior.shape == (2, 2, 7, 4, 2)
    np.testing.assert_array_equal(group(idata, "observed_data")["scene"], x.numpy())


@pytest.mark.parametrize("event_shape", [(), (5,)])
def test_observed_sites_outside_the_plate_appear_once(
    ebm: LVEBM, x: Tensor, event_shape: tuple[int, ...]
) -> None:
    """A scalar site and a vector beside a subsampled plate, and the factor of a regulariser."""
    seen = 2.0 + torch.arange(5.0)[: math.prod(event_shape)].reshape(event_shape)

    def model(x: Tensor) -> None:
        pyro.factor("penalty", torch.tensor(-1.0))
        law = dist.Normal(torch.zeros(event_shape), 1.0).to_event(len(event_shape))
        pyro.sample("t", law, obs=seen)
        with pyro.plate("data", len(x), subsample_size=40) as i:
            lvebm("scene", ebm, obs=x[i])

    idata = to_arviz(make_saddle(model, x), x, num_samples=2, num_warmup=1)
    observed = group(idata, "observed_data")["t"].to_numpy()
    np.testing.assert_array_equal(observed, seen.numpy())
    assert set(group(idata, "observed_data")) == {"t", "scene"}
    assert group(idata, "posterior_predictive")["t"].shape == (2, 2, *event_shape)
    assert group(idata, "observed_data")["scene"].shape == (N, 4)


def test_a_subsampled_plate_inside_another() -> None:
    ebm, x = image_ebm(), normal((4, 7, 2, 3), 1)

    def model(x: Tensor) -> None:
        with pyro.plate("views", 4, dim=-2), pyro.plate("data", 7, 3, dim=-1) as i:
            lvebm("scene", ebm, obs=x[:, i])

    saddle = make_saddle(model, x)
    idata = to_arviz(saddle, x, num_samples=2, num_warmup=1)
    posterior = group(idata, "posterior")["scene_z"]
    assert posterior.dims == ("chain", "draw", "views", "data", "scene_z_dim_0")
    assert posterior.shape == (2, 2, 4, 7, 2)
    np.testing.assert_array_equal(group(idata, "observed_data")["scene"], x.numpy())
    assert group(idata, "posterior_predictive")["scene"].shape == (2, 2, 4, 7, 2, 3)


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 5, "num_predictive": 6}, r"num_predictive must lie in 0 … 5; got 6"),
        ({"num_samples": 5, "num_log_likelihood": 6}, r"num_log_likelihood must lie in 0 … 5"),
        ({"num_samples": 5, "num_predictive": -1}, r"num_predictive must lie in 0 … 5; got -1"),
        ({"num_samples": 5, "num_prior": -1}, r"num_prior must be at least 0; got -1"),
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_warmup": -1}, "num_warmup must be at least 0; got -1"),
        ({"thinning": 0}, "thinning must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range(
    saddle: Saddle, ebm: LVEBM, x: Tensor, options: dict[str, int], message: str
) -> None:
    with assert_unchanged(ebm, saddle.guide), pytest.raises(ValueError, match=message):
        to_arviz(saddle, x, **options)
