# SPDX-License-Identifier: Apache-2.0
"""The pointwise log likelihood that goes to ArviZ, and what leave-one-out makes of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from linear_gaussian import draw_x, make_model, make_quadratic
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from referee import ALPHA, bracket, mean_p_value, normal
from scipy import stats
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, LogPartition, Saddle, TemperedPool, lvebm, to_arviz
from pyro_lvebm.evidence import programs as model_evidence

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

N, PRIOR_SD = 15, 0.8
NEW_API = int(az.__version__.split(".")[0]) >= 1
Model = Callable[..., None]


@pytest.fixture(scope="module")
def ebm() -> LVEBM:
    return make_quadratic(pool=TemperedPool(4, 64, seed=0))


@pytest.fixture(scope="module")
def x(ebm: LVEBM) -> Tensor:
    return draw_x(ebm, N, seed=2) + torch.tensor([1.5, -1.0, 0.5, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def exact_log_z() -> Iterator[None]:
    """The bracket of log Z has tests of its own; here it is exact, and quick."""

    def exact(ebm: LVEBM, *, seed: int) -> LogPartition:
        return bracket(float(ebm.f.log_partition().detach()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_evidence, "log_partition", exact)
        yield


def shifted(ebm: LVEBM, size: int | None = None) -> Model:
    """x_i − μ follows the LVEBM, and μ ~ N(0, PRIOR_SD² I) belongs to all data."""

    def model(x: Tensor) -> None:
        scale = torch.full((4,), PRIOR_SD, dtype=torch.float64)
        mu = pyro.sample("mu", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
        with pyro.plate("data", len(x), subsample_size=size) as i:
            lvebm("scene", ebm, obs=x[i] - mu)

    return model


def log_likelihood(idata: Any, name: str = "scene") -> np.ndarray:
    group = idata["log_likelihood"]
    assert list(group.data_vars) == [name]
    assert group[name].dims[:2] == ("chain", "draw")
    return group[name].to_numpy()


def conditional(ebm: LVEBM, x: Tensor, mu: np.ndarray) -> np.ndarray:
    """Exact log p(x_i | μ) (*mu, N)."""
    with torch.no_grad():
        moved = x - torch.from_numpy(mu)[..., None, :]
        return ebm.f.log_evidence(moved).numpy()


def marginal_of_x(ebm: LVEBM) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of x under the LVEBM, without the package's closed forms."""
    covariance = np.linalg.inv(ebm.f.precision.detach().numpy())
    mean = -covariance @ ebm.f.linear.detach().numpy()
    scale = ebm.base_x.scale.numpy()
    return ebm.base_x.loc.numpy() + scale @ mean[:4], scale @ covariance[:4, :4] @ scale.T


def exact_leave_one_out(ebm: LVEBM, x: Tensor) -> np.ndarray:
    """log p(x_i | x_−i) (N,), μ integrated out: all is Gaussian."""
    mean, covariance = marginal_of_x(ebm)
    precision, data = np.linalg.inv(covariance), x.numpy() - mean
    values = []
    for i in range(len(data)):
        rest = np.delete(data, i, 0)
        spread = np.linalg.inv(np.eye(4) / PRIOR_SD**2 + len(rest) * precision)
        centre = spread @ precision @ rest.sum(0)
        values.append(stats.multivariate_normal(centre, covariance + spread).logpdf(data[i]))
    return np.array(values)


def loo(idata: Any) -> Any:
    """PSIS leave-one-out by the installed ArviZ, pointwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter")
        return az.loo(idata, pointwise=True)


def elpd(result: Any) -> float:
    return float(result.elpd if NEW_API else result.elpd_loo)


# --- the values -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_particles(ebm: LVEBM, x: Tensor) -> Any:
    model = shifted(ebm)
    saddle = Saddle(model, AutoParticles(model, 14), Adam({"lr": 1e-3}), seed=1)
    return to_arviz(
        saddle,
        x,
        num_samples=20,
        num_warmup=90,
        num_predictive=0,
        num_log_likelihood=20,
    )


def test_values_follow_each_draw(by_particles: Any, ebm: LVEBM, x: Tensor) -> None:
    """Estimates are unbiased on the scale of p, with the same errors for all draws.

    Student's test over 15 data that mean_s p̂ / p is 1; false alarm ALPHA. Draws of μ in another
    order fail.
    """
    found = log_likelihood(by_particles)
    mu = by_particles["posterior"]["mu"].to_numpy()
    assert found.shape == (14, 20, N)
    exact = conditional(ebm, x, mu)
    assert exact.std((0, 1)).min() > 0.05
    assert np.abs(found - exact).max() < 0.4 and (found - exact).std() < 0.06
    ratio = np.exp(found - exact).mean((0, 1))
    assert mean_p_value(ratio, 1.0) > ALPHA
    assert np.abs(found - np.roll(exact, 1, 1)).max() > 1.0


def test_values_of_one_theta_differ_by_noise_only(ebm: LVEBM, x: Tensor) -> None:
    """Without latents of all data: elpd_loo is Σ log p(x_i), p_loo next to nothing; k̂ is fine.

    elpd_loo is low by about the variance of the noise, here at most 0.2 nats in all.
    """
    model = make_model(ebm, 10)
    saddle = Saddle(model, AutoParticles(model, 4), Adam({"lr": 1e-3}))
    idata = to_arviz(
        saddle, x, num_samples=50, num_warmup=100, num_predictive=0, num_log_likelihood=50
    )
    exact = ebm.f.log_evidence(x).detach().numpy()
    found = log_likelihood(idata)
    assert found.shape == (4, 50, N) and len(np.unique(found)) == found.size
    assert mean_p_value(np.exp(found - exact).mean((0, 1)), 1.0) > ALPHA
    result = loo(idata)
    assert elpd(result) == pytest.approx(exact.sum(), abs=0.2)
    assert abs(result.p if NEW_API else result.p_loo) < 0.2
    assert float(result.pareto_k.max()) < 0.7


def test_guides_of_one_theta_have_the_same_values(ebm: LVEBM, x: Tensor) -> None:
    """A point mass, whose draws cannot say where to start, too; within Monte Carlo error."""
    model = make_model(ebm)
    exact = ebm.f.log_evidence(x).detach().numpy()
    for guide in (AutoNormal(model), AutoDelta(model)):
        pyro.clear_param_store()
        with torch.random.fork_rng():
            guide(x)
        idata = to_arviz(guide, x, num_samples=20, num_predictive=0, num_log_likelihood=20)
        found = log_likelihood(idata)
        assert found.shape == (1, 20, N)
        mean = np.log(np.exp(found - exact).mean((0, 1)))
        error = np.exp(found - exact).std((0, 1)) / 20**0.5
        assert (np.abs(mean) < 5.0 * error + 0.01).all()


def test_other_sites_of_a_datum_count(ebm: LVEBM, x: Tensor) -> None:
    """p(x, y | w) with y ~ N(w·z, 0.3²): y given x and w is Gaussian. Its name joins the sites."""
    y = 0.4 * normal((N,), 5)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal((z * w).sum(-1), 0.3), obs=y)

    guide = AutoNormal(model, init_scale=0.3)
    with torch.random.fork_rng():
        guide(x, y)
    idata = to_arviz(guide, x, y, num_samples=20, num_predictive=0, num_log_likelihood=20)
    found = log_likelihood(idata, "scene+y")[0]
    w = torch.from_numpy(idata["posterior"]["w"].to_numpy())[0]
    with torch.no_grad():
        posterior = ebm.f.posterior(x)
        mean = posterior.mean @ w.T  # (N, S)
        variance = ((w @ posterior.covariance_matrix[0]) * w).sum(-1) + 0.09
        exact = dist.Normal(mean, variance.sqrt()).log_prob(y[:, None]).T
        exact = (exact + ebm.f.log_evidence(x)).numpy()
    assert exact.std(0).max() > 0.5
    ratio = np.exp(found - exact)
    assert mean_p_value(ratio.mean(0), 1.0) > ALPHA and np.abs(found - exact).max() < 2.0


def test_without_latents_of_single_data_values_are_exact() -> None:
    """A regression in minibatches, with an enumerated outlier label summed out."""
    x, y = normal((30, 2), 1), normal((30,), 2)

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", 30, subsample_size=8) as i:
            out = pyro.sample("out", dist.Bernoulli(0.1), infer={"enumerate": "parallel"})
            law = dist.Normal((x[i] * w).sum(-1), 0.5 + 2.0 * out)
            pyro.sample("y", law, obs=y[i])

    guide = AutoNormal(pyro.poutine.block(model, expose=["w"]), init_scale=0.4)
    with torch.random.fork_rng():
        guide(x, y)
    idata = to_arviz(
        guide, x, y, model=model, num_samples=20, num_predictive=0, num_log_likelihood=7
    )
    w = torch.from_numpy(idata["posterior"]["w"].to_numpy())[0, -7:]
    mean = w @ x.T
    parts = [
        dist.Normal(mean, 0.5).log_prob(y) + np.log(0.9),
        dist.Normal(mean, 2.5).log_prob(y) + np.log(0.1),
    ]
    np.testing.assert_allclose(
        log_likelihood(idata, "y")[0], torch.logsumexp(torch.stack(parts), 0), rtol=1e-6
    )


# --- leave-one-out --------------------------------------------------------------------------


def test_loo_is_exact_leave_one_out_within_its_standard_error(
    by_particles: Any, ebm: LVEBM, x: Tensor
) -> None:
    """elpd_loo with μ as particles is within a fifth of its standard error of the exact value.

    That error is over data; the rest is Monte Carlo error of 280 draws of 14 chains. In sample,
    with the μ of all data, the figure would be too high by p_loo, and fail.
    """
    exact = exact_leave_one_out(ebm, x)
    result = loo(by_particles)
    assert float(result.pareto_k.max()) < 0.7
    assert abs(elpd(result) - exact.sum()) < 0.2 * result.se
    in_sample = np.log(np.exp(log_likelihood(by_particles)).mean((0, 1))).sum()
    assert in_sample - exact.sum() > 0.4 * result.se


def test_loo_of_nuts_draws_agrees_too(ebm: LVEBM, x: Tensor) -> None:
    model = shifted(ebm)
    with torch.random.fork_rng(), ebm.frozen():
        torch.manual_seed(0)
        mcmc = MCMC(
            NUTS(model, max_tree_depth=3), num_samples=40, warmup_steps=25, disable_progbar=True
        )
        mcmc.run(x)
        idata = to_arviz(mcmc, x, num_predictive=0, num_log_likelihood=40)
    exact = exact_leave_one_out(ebm, x).sum()
    found = loo(idata)  # of few draws, for NUTS is slow here
    assert abs(elpd(found) - exact) < 0.3 * found.se


def test_compare_prefers_the_model_of_the_data(by_particles: Any, ebm: LVEBM, x: Tensor) -> None:
    """The difference to a model without μ is that of exact leave-one-out to Σ log p(x_i)."""
    model = make_model(ebm)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-3}))
    plain = to_arviz(
        saddle, x, num_samples=50, num_warmup=50, num_predictive=0, num_log_likelihood=50
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The inplace keyword")
        # ArviZ 1 rounds to the standard error unless told not to, and counts from the best down.
        exactly: dict[str, Any] = {"round_to": "none"} if NEW_API else {}
        table = az.compare({"moved": by_particles, "at rest": plain}, **exactly)
    assert list(table.index) == ["moved", "at rest"]
    exact = exact_leave_one_out(ebm, x).sum() - float(ebm.f.log_evidence(x).detach().sum())
    ahead = -table.elpd_diff["at rest"] if NEW_API else table.elpd_diff["at rest"]
    assert ahead == pytest.approx(exact, abs=0.5) and exact > 3.0


def test_the_new_generation_finds_the_same(by_particles: Any, ebm: LVEBM, x: Tensor) -> None:
    arviz_stats = pytest.importorskip("arviz_stats")
    names = ("posterior", "log_likelihood")
    tree = xr.DataTree.from_dict({n: xr.Dataset(by_particles[n].data_vars) for n in names})
    result = arviz_stats.loo(tree, pointwise=True)
    exact = exact_leave_one_out(ebm, x)
    assert abs(result.elpd - exact.sum()) < 0.2 * result.se
    assert elpd(loo(by_particles)) == pytest.approx(result.elpd, abs=0.1)


# --- refusals -------------------------------------------------------------------------------


def test_latents_in_two_kinds_of_plates_are_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("groups", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("data", 5, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    y = torch.zeros(3, 5)
    guide = AutoNormal(model)
    with torch.random.fork_rng():
        guide(y)
    with pytest.raises(ValueError, match=r"plates of one kind; got latents in .*'groups'"):
        to_arviz(guide, y, num_samples=2, num_predictive=0, num_log_likelihood=2)


def test_data_in_no_plate_have_no_datum() -> None:
    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0).expand([5]).to_event(1), obs=y)

    guide = AutoNormal(model)
    with torch.random.fork_rng():
        guide(torch.zeros(5))
    with pytest.raises(ValueError, match=r"plates of one kind.*data in \{'y': \[\]\}"):
        to_arviz(guide, torch.zeros(5), num_samples=2, num_predictive=0, num_log_likelihood=2)


def test_latents_of_all_data_need_draws(ebm: LVEBM, x: Tensor) -> None:
    model = shifted(ebm)
    guide = AutoNormal(pyro.poutine.block(model, expose=["scene_z"]))
    with torch.random.fork_rng():
        guide(x)
    with pytest.raises(ValueError, match=r"no draws of \['mu'\], which all data share"):
        to_arviz(guide, x, model=model, num_samples=2, num_predictive=0, num_log_likelihood=2)
