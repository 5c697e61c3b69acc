# SPDX-License-Identifier: Apache-2.0
"""Energy priors before any likelihood, against closed forms and quadrature."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from pyro.optim import Adam
from referee import ALPHA, bracket, normal
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_lvebm import (
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    EnergyPrior,
    LogEvidence,
    LogPartition,
    MLPEnergy,
    PriorProposal,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    energy_prior,
    log_evidence_of,
    log_partition,
    to_arviz,
)
from pyro_lvebm.evidence import programs

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

LOADINGS = 0.6 * normal((2, 3), 1)
MEAN, SD = normal((3,), 2), 0.7
PRECISION = torch.tensor([[1.9, 0.6], [0.6, 0.8]], dtype=torch.float64)
LINEAR = torch.tensor([0.4, -0.9], dtype=torch.float64)

Likelihood = Callable[[Tensor], Any]


def quadratic_prior(*, zero: bool = False) -> EnergyPrior:
    energy = QuadraticEnergy(2).double()
    if not zero:
        energy.set_precision(PRECISION, LINEAR)
    return EnergyPrior(energy, z_dim=2, pool=TemperedPool(4, 32, num_moves=2, seed=3))


def factor_analysis(z: Tensor) -> Any:
    return dist.Normal(MEAN + z @ LOADINGS, SD).to_event(1)


def model_of(prior: EnergyPrior, likelihood: Likelihood, batch: int | None = None) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            z = energy_prior("z", prior)
            pyro.sample("x", likelihood(z), obs=x[i])

    return model


def exact_joint(zero: bool) -> tuple[MultivariateNormal, MultivariateNormal]:
    """p(z) and p(x), written without the package's closed forms."""
    precision = torch.eye(2, dtype=torch.float64) if zero else PRECISION
    covariance = torch.linalg.inv(precision)
    loc = torch.zeros(2, dtype=torch.float64) if zero else -covariance @ LINEAR
    noise = SD**2 * torch.eye(3, dtype=torch.float64)
    of_x = LOADINGS.T @ covariance @ LOADINGS + noise
    return MultivariateNormal(loc, covariance), MultivariateNormal(MEAN + loc @ LOADINGS, of_x)


def beyond_p_value(found: LogEvidence, exact: Tensor) -> float:
    """Binomial test that no more rows are beyond 3 standard errors than Student's law has there.

    log Z is common to all rows, and its error is left out: the evidence is compared at the
    estimate of log Z.
    """
    log_z_error = found.log_partition.std_error
    error = (found.std_error**2 - log_z_error**2).clamp(min=1e-12).sqrt()
    beyond = int(((found.value - exact).abs() > 3 * error + 3 * log_z_error).sum())
    return float(stats.binom.sf(beyond - 1, len(exact), 2 * stats.t(7).sf(3)))


@pytest.mark.parametrize("zero", [True, False])
def test_evidence_of_a_linear_gaussian_model(zero: bool) -> None:
    """With f = 0 it is factor analysis, with log Z = 0 exactly; a minibatch changes nothing."""
    prior = quadratic_prior(zero=zero)
    _, of_x = exact_joint(zero)
    x = of_x.mean + normal((50, 3), 5) @ of_x.scale_tril.T
    found = log_evidence_of(model_of(prior, factor_analysis, 20), x, num_particles=48)
    log_z = found.log_partition
    if zero:
        assert (log_z.estimate, log_z.std_error) == (0.0, 0.0)
    exact_log_z = float(prior.f.log_partition().detach())
    assert abs(log_z.estimate - exact_log_z) <= 4 * log_z.std_error < 0.1
    assert beyond_p_value(found, of_x.log_prob(x)) > ALPHA
    assert beyond_p_value(found, of_x.log_prob(x) + 0.5) < ALPHA


class Bent(nn.Module):
    """A user's energy of one vector, with two modes, that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return -self.weight * (2.0 * z[..., 0]).sin() * z[..., 0].tanh()


LIKELIHOODS: dict[str, tuple[Likelihood, Tensor]] = {
    "Poisson": (
        lambda z: dist.Poisson((0.5 + 0.8 * z).exp()).to_event(1),
        torch.tensor([[0.0], [1.0], [9.0]], dtype=torch.float64),
    ),
    "Bernoulli": (
        lambda z: dist.Bernoulli(logits=torch.cat([2 * z, 1 - z], -1)).to_event(1),
        torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64),
    ),
    "categorical": (
        lambda z: dist.Categorical(logits=torch.cat([z, -z, z.square()], -1)),
        torch.tensor([0, 1, 2]),
    ),
    "Student": (
        lambda z: dist.StudentT(3.0, z.sin(), 0.3).to_event(1),
        torch.tensor([[0.2], [-3.0]], dtype=torch.float64),
    ),
}


@cache
def bent_prior() -> tuple[EnergyPrior, LogPartition]:
    prior = EnergyPrior(Bent(), 1, TemperedPool(4, 48, num_moves=2, seed=1))
    return prior, log_partition(prior)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_evidence_with_any_likelihood(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 3 standard errors of quadrature over z, for every datum."""
    likelihood, x = LIKELIHOODS[name]
    prior, log_z = bent_prior()
    monkeypatch.setattr(programs, "log_partition", lambda *_, **__: log_z)
    grid = torch.linspace(-9, 9, 6001, dtype=torch.float64)[:, None]
    p = (dist.Normal(0.0, 1.0).log_prob(grid[:, 0]) - Bent()(grid)).exp().detach()
    p = p / torch.trapezoid(p, grid[:, 0])
    weights = torch.stack([likelihood(grid).log_prob(row).exp() for row in x])
    exact = torch.trapezoid(p * weights, grid[:, 0]).log()
    found = log_evidence_of(model_of(prior, likelihood), x, num_particles=128)
    assert bool(((found.value - exact).abs() < 3 * found.std_error).all())
    assert found.std_error.max() < 0.1


def test_draws_have_the_law_of_the_prior() -> None:
    prior, (of_z, _) = quadratic_prior(), exact_joint(False)
    for _ in range(30):
        prior.pool.refresh(prior)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with pyro.plate("data", 4000):
            z = energy_prior("z", prior)
    y = torch.linalg.solve_triangular(of_z.scale_tril, (z - of_z.mean).T, upper=False)
    assert z.shape == (4000, 2)
    # Draws are copies of 128 chains, moved on: their mean is as uncertain as that of so many.
    assert y.mean(1).abs().max() < 4 / 128**0.5 and (y.var(1) - 1).abs().max() < 0.4


@pytest.mark.usefixtures("short_chains")
def test_rows_of_the_elbo_table_and_arviz(monkeypatch: pytest.MonkeyPatch) -> None:
    """Particles reach the evidence; a guide loses what it loses; the base is the prior's row."""
    prior, (of_z, of_x) = quadratic_prior(), exact_joint(False)
    model = model_of(prior, factor_analysis)
    x = of_x.mean + normal((12, 3), 5) @ of_x.scale_tril.T
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-3}), seed=0)
    exact = bracket(float(prior.f.log_partition().detach()))
    monkeypatch.setattr(programs, "log_partition", lambda *_, **__: exact)
    with prior.frozen():
        for _ in range(10):
            saddle.step(x)
        prior.settle()
        guide = AutoPerDatumMultivariateNormal(model)
        rows = {"particles": saddle, "guide": guide, "base": PriorProposal()}
        table = compare_elbo(model, rows, x, num_samples=64).rows
        data = to_arviz(saddle, x, num_samples=20, num_warmup=10)
    noise = LOADINGS @ LOADINGS.T / SD**2
    precision = PRECISION + noise
    mean = ((x - MEAN) @ LOADINGS.T / SD**2 - LINEAR) @ torch.linalg.inv(precision)
    posterior = MultivariateNormal(mean, precision_matrix=precision)
    start = MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    gap = float(torch.distributions.kl_divergence(start, posterior).mean())
    assert abs(table.loc["base", "kl_gap"] - gap) < 5 * table.loc["base", "kl_gap_se"]
    assert table.loc["particles", "kl_gap"] < 0.05 < table.loc["guide", "kl_gap"]
    assert data.posterior["z"].shape[-2:] == (12, 2)
    error = data.posterior["z"].values.reshape(-1, 12, 2).mean(0) - mean.numpy()
    assert abs(error).max() < 1.0
    assert of_z.mean.abs().max() > 0.1  # the posterior is not that of a standard normal


class Decoder(PyroModule[nn.Module]):
    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.linear(z)
        return out


def bimodal() -> Tensor:
    sign = torch.where(torch.arange(200) % 4 == 0, 1.0, -1.0)[:, None]
    return 2.0 * sign + 0.3 * normal((200, 1), 0, torch.float32)


def decoder_model(prior: EnergyPrior, decoder: Decoder) -> Any:
    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=40) as i:
            z = energy_prior("z", prior)
            pyro.sample("x", dist.Normal(decoder(z), 0.3).to_event(1), obs=x[i])

    return model


def untrained() -> tuple[EnergyPrior, Decoder]:
    energy = MLPEnergy(1, hidden=(16,), kl_penalty=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return EnergyPrior(energy, 1, TemperedPool(3, 48, num_moves=2)), Decoder()


def test_particles_train_prior_and_decoder_and_go_on_from_a_file(tmp_path: Path) -> None:
    """The prior of a linear decoder learns two modes, which a normal prior cannot."""
    x = bimodal()
    model = decoder_model(*untrained())
    saddle = Saddle(model, AutoParticles(model, 1), Adam({"lr": 3e-2}), num_moves=3, seed=0)
    losses = saddle.fit(x, num_steps=70, progress=False)
    assert (saddle.history["kl"] > 0).any() and saddle.halvings >= 0
    found, error = saddle.log_evidence(x[:40])
    normal_best = dist.Normal(x.mean(), x.std()).log_prob(x[:40]).mean()  # of all linear decoders
    assert found > float(normal_best) + 0.3 + 3 * error and len(losses) == 70
    saddle.save(tmp_path / "fit.pt")
    prior, decoder = untrained()
    again = decoder_model(prior, decoder)
    pyro.clear_param_store()
    guide = AutoParticles(again, 1)
    other = Saddle.load(tmp_path / "fit.pt", again, guide, Adam({"lr": 3e-2}), x)
    assert other.step(x) == saddle.step(x)
    prior.save(tmp_path / "prior")
    loaded = EnergyPrior.load(tmp_path / "prior")
    z = torch.linspace(-2, 2, 5)[:, None]
    assert torch.equal(loaded.base_x.log_prob(z), prior.base_x.log_prob(z))
    assert torch.equal(loaded.residual(z), prior.residual(z))


def test_plain_svi_trains_it() -> None:
    """The pool follows θ by itself, and no update collapses the energy."""
    x = bimodal()
    prior, decoder = untrained()
    model = decoder_model(prior, decoder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        svi = SVI(model, AutoNormal(model), Adam({"lr": 1e-2}), Trace_ELBO())
        losses = [svi.step(x) for _ in range(60)]
    assert int(prior.pool.refreshes) >= 59
    assert sum(losses[-10:]) < sum(losses[:10]) and abs(float(prior.log_partition)) < 5.0
