# SPDX-License-Identifier: Apache-2.0
"""x on bounded supports, through the whole package."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from bounded_models import CONSTRAINTS, log_jacobian, to_support, twins
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.optim import Adam
from referee import ALPHA, CERTAIN, bracket, global_seed, mean_p_value, normal
from scipy import stats
from small_models import condition, exact_joint, plate_model, snapshot, tiny_pool, warm
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    log_evidence,
    log_partition,
    lvebm,
)
from pyro_lvebm.bases.supports import Support
from pyro_lvebm.training.history import pool_statistics

pytestmark = pytest.mark.usefixtures("global_rng_untouched", "brief_brackets")

BOUNDED = pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
ELEMENTWISE = pytest.mark.parametrize("constraint", CONSTRAINTS[:3], ids=str)


def without_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Support, "log_abs_det", lambda self, y, x: y.new_zeros(()))


# --- an LVEBM that is its base --------------------------------------------------------------


def test_with_no_energy_densities_are_log_normal() -> None:
    x = normal((300, 2), 1).exp() * torch.tensor([1.0, 50.0])
    ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, support=constraints.positive)
    y = x.log().numpy()
    cov = ebm.base_x.scale @ ebm.base_x.scale.T
    expected = stats.multivariate_normal(y.mean(0), cov).logpdf(y) - y.sum(1)
    value = log_evidence(ebm, x, num_runs=2, num_particles=4, log_z=bracket(0.0)).value
    torch.testing.assert_close(value, torch.as_tensor(expected))
    one = LVEBM.from_data(QuadraticEnergy(1, 1), x[:, :1], z_dim=1, support=constraints.positive)
    exact = stats.lognorm(y[:, 0].std(), scale=math.exp(y[:, 0].mean())).logpdf(x[:, 0])
    torch.testing.assert_close(one.base_x.log_prob(x[:, :1]), torch.as_tensor(exact))


def test_with_no_energy_densities_are_logit_normal() -> None:
    x = torch.sigmoid(0.7 * normal((200, 1), 1) + 1.0)
    interval = constraints.interval(0.0, 1.0)
    ebm = LVEBM.from_data(QuadraticEnergy(1, 1), x, z_dim=1, support=interval)
    y = (x / (1 - x)).log()
    law = stats.norm(float(y.mean()), float(y.std(correction=0)))
    expected = torch.as_tensor(law.logpdf(y)) - x.log() - (1 - x).log()
    torch.testing.assert_close(ebm.base_x.log_prob(x), expected[:, 0])


def test_with_no_energy_densities_on_the_simplex_are_logistic_normal() -> None:
    """With respect to Lebesgue measure on all entries but one, and that integrates to one."""
    stick = dist.transforms.StickBreakingTransform()
    x = stick(normal((200, 2), 2))
    ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, support=constraints.simplex)
    assert ebm.x_shape == (3,) and ebm.dim == 3
    gaussian = dist.MultivariateNormal(ebm.base_x.loc, scale_tril=ebm.base_x.scale)
    expected = dist.TransformedDistribution(gaussian, [stick]).log_prob(x)
    torch.testing.assert_close(ebm.base_x.log_prob(x), expected)
    a = (torch.arange(400).double() + 0.5) / 400
    first, second = torch.cartesian_prod(a, a).T
    inside = first + second < 1 - 1e-9
    grid = torch.stack([first, second, 1 - first - second], -1)[inside]
    mass = float(ebm.base_x.log_prob(grid).exp().sum()) / 400**2
    assert mass == pytest.approx(1.0, abs=2e-3)  # the error is that of cells cut by the edge


@pytest.mark.parametrize(
    "base",
    [
        dist.LogNormal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 2.0])).to_event(1),
        dist.TransformedDistribution(
            dist.MultivariateNormal(torch.ones(2), torch.eye(2) + 0.5),
            [dist.transforms.SigmoidTransform()],
        ),
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), torch.tensor([1.0, 0.4])).to_event(1),
            dist.transforms.StickBreakingTransform(),
        ),
    ],
)
def test_bases_given_as_transformed_distributions(base: dist.TorchDistribution) -> None:
    ebm = LVEBM(MLPEnergy(2, 1), base, dist.Normal(torch.zeros(1), 1.0).to_event(1), tiny_pool())
    with global_seed(0):
        x = base.sample((20,))
    torch.testing.assert_close(ebm.base_x.log_prob(x), base.log_prob(x))
    torch.testing.assert_close(ebm.base_x.distribution().log_prob(x), base.log_prob(x))
    assert ebm.x_shape == base.event_shape
    torch.testing.assert_close(ebm.base_x.unwhiten(ebm.base_x.whiten(x)), x)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (dist.LogNormal(torch.zeros(2), 1.0), r"batch shape \(2,\).*by .to_event\(1\)"),
        (dist.InverseGamma(torch.ones(2), 1.0).to_event(1), "that base_x transforms.*got Gamma"),
        (
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1),
                [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(0.0, 3.0)],
            ),
            "support Real.*not the one that biject_to gives.*support=",
        ),
        (
            dist.TransformedDistribution(
                dist.Normal(torch.zeros(2), 1.0).to_event(1),
                [dist.transforms.AffineTransform(1.0, 2.0), dist.transforms.ExpTransform()],
            ),
            "support GreaterThan.*not the one that biject_to gives",
        ),
    ],
)
def test_bases_with_other_transforms_are_refused(
    base: dist.TorchDistribution, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LVEBM(MLPEnergy(2, 1), base, dist.Normal(torch.zeros(1), 1.0).to_event(1))


def test_the_latent_has_no_bounds() -> None:
    base_x = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"base_z must be a Gaussian over real vectors.*LogNormal"):
        LVEBM(MLPEnergy(2, 1), base_x, dist.LogNormal(torch.zeros(1), 1.0).to_event(1))


# --- normalisation --------------------------------------------------------------------------


class Wave(nn.Module):
    """An energy of x in data coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.2).double())

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.weight * (torch.sin(2 * x[..., 0]) * z[..., 0].tanh() + x[..., 0].cos())


LINE = {"positive": constraints.positive, "interval": constraints.interval(-1.0, 2.0)}


@cache
def line_ebm(name: str) -> LVEBM:
    x = Support(LINE[name], torch.Size([1])).constrain(0.4 + 0.8 * normal((300, 1), 3))
    return LVEBM.from_data(Wave(), x, z_dim=1, support=LINE[name], pool=tiny_pool())


def mass_on_the_line(ebm: LVEBM, name: str) -> tuple[float, float]:
    """∫ exp(log p(x)) dx by midpoints of 400 cells of data coordinates, and its standard error."""
    low, high = (0.0, 30.0) if name == "positive" else (-1.0, 2.0)
    edges = low + (high - low) * torch.linspace(0, 1, 401).double() ** (3 if low == 0 else 1)
    x, width = 0.5 * (edges[1:] + edges[:-1])[:, None], edges.diff()
    result = log_evidence(ebm, x, num_particles=64, num_runs=4)
    parts = width * result.value.exp()
    log_z = result.log_partition.std_error
    own = (result.std_error.square() - log_z**2).clamp(min=0.0).sqrt()
    mass = float(parts.sum())
    return mass, math.hypot(float((parts * own).square().sum().sqrt()), mass * log_z)


@pytest.mark.parametrize("name", LINE)
def test_evidence_integrates_to_one_in_data_coordinates(name: str) -> None:
    """Within four standard errors: false alarm 6e-5."""
    ebm = line_ebm(name)
    mass, error = mass_on_the_line(ebm, name)
    assert error < 0.01
    assert abs(mass - 1.0) < 4 * error


@pytest.mark.parametrize("name", LINE)
def test_without_the_jacobian_it_does_not(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ebm = line_ebm(name)
    without_jacobian(monkeypatch)
    mass, error = mass_on_the_line(ebm, name)
    assert abs(mass - 1.0) > 20 * error


@pytest.mark.parametrize("name", LINE)
def test_log_z_is_that_of_quadrature_in_data_coordinates(name: str) -> None:
    """∬ exp(−E(x, z)) dx dz. Within four standard errors: false alarm 6e-5."""
    ebm = line_ebm(name)
    low, high = (0.0, 60.0) if name == "positive" else (-1.0, 2.0)
    edges = low + (high - low) * torch.linspace(0, 1, 1201).double() ** (3 if low == 0 else 1)
    x, dx = 0.5 * (edges[1:] + edges[:-1]), edges.diff()
    z = torch.linspace(-7, 7, 401).double()
    with torch.no_grad():
        energy = ebm.energy(*torch.broadcast_tensors(x[:, None, None], z[None, :, None]))
        value = float((-energy + dx.log()[:, None]).exp().sum() * (z[1] - z[0]))
    estimate = log_partition(ebm)
    assert estimate.std_error < 0.01
    assert abs(estimate.estimate - math.log(value)) < 4 * estimate.std_error


# --- invariance -----------------------------------------------------------------------------


def random_energy(dim: int) -> MLPEnergy:
    energy = MLPEnergy(dim, 1, hidden=(16,), seed=1).double()
    with torch.no_grad():
        energy.out.weight.copy_(normal((1, 16), 4))
    return energy


@pytest.mark.parametrize(("constraint", "dim"), [(CONSTRAINTS[0], 2), (constraints.simplex, 2)])
def test_the_model_of_x_is_that_of_its_unconstrained_coordinates(
    constraint: Constraint, dim: int
) -> None:
    """The same log Z to the bit, and log p(x) less by the Jacobian."""
    y = normal((60, dim), 5)
    pairs = [(y, None)]
    size = dim + (constraint is constraints.simplex)
    support = Support(constraint, torch.Size([size]))
    pairs.append((support.constrain(y), constraint))
    found = []
    for x, given in pairs:
        ebm = LVEBM.from_data(random_energy(dim), x, z_dim=1, support=given, pool=tiny_pool())
        log_z = log_partition(ebm, num_particles=256, num_runs=4, num_refreshes=5)
        found.append((ebm, log_evidence(ebm, x[:20], num_runs=2, log_z=log_z)))
    (_, plain), (ebm, bounded) = found
    assert abs(plain.log_partition.estimate) > 0.01
    assert bounded.log_partition.estimate == pytest.approx(plain.log_partition.estimate, abs=1e-9)
    jacobian = log_jacobian(ebm, y[:20])
    torch.testing.assert_close(bounded.value, plain.value - jacobian)


@BOUNDED
def test_energies_and_closed_forms_of_twins(constraint: Constraint) -> None:
    plain, ebm = twins(constraint)
    y, z = normal((2, 10, 3), 1), normal((2, 10, 2), 2)
    x, jacobian = to_support(ebm, y), log_jacobian(ebm, y)
    torch.testing.assert_close(ebm.energy(x, z), plain.energy(y, z) + jacobian)
    torch.testing.assert_close(ebm.f.log_evidence(x), plain.f.log_evidence(y) - jacobian)
    torch.testing.assert_close(ebm.f.posterior(x).mean, plain.f.posterior(y).mean)
    torch.testing.assert_close(ebm.whiten(x, z), plain.whiten(y, z))
    u = plain.whiten(y, z)
    torch.testing.assert_close(ebm.unwhiten(u)[0], x)
    volume = plain.base_x.log_det + jacobian
    torch.testing.assert_close(ebm.base_x.log_abs_det(u[..., :3]), volume)
    with global_seed(3):
        draws = ebm.posterior(x[0]).sample((5,))
    with global_seed(3):
        expected = plain.posterior(y[0]).sample((5,))
    torch.testing.assert_close(draws, expected)


@BOUNDED
def test_the_energy_of_negatives_is_in_data_coordinates(constraint: Constraint) -> None:
    _, ebm = twins(constraint)
    warm(ebm, 2)
    u, log_w = ebm.pool.negatives()
    with torch.no_grad():
        expected = float((log_w.exp() * ebm.energy(*ebm.unwhiten(u))).sum())
    assert pool_statistics(ebm)["negative_energy"] == pytest.approx(expected)


# --- the sites ------------------------------------------------------------------------------


@BOUNDED
def test_sites_have_the_support_and_the_joint_density(constraint: Constraint) -> None:
    plain, ebm = twins(constraint)
    y, z = normal((6, 3), 1), normal((6, 2), 2)
    x = to_support(ebm, y)
    with ebm.frozen():
        model = poutine.condition(plate_model(ebm), {"scene_z": z})
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    total = trace.nodes["scene"]["log_prob"] + trace.nodes["scene_z"]["log_prob"]
    expected = -plain.energy(y, z) - log_jacobian(ebm, y) - ebm.log_partition
    torch.testing.assert_close(total, expected.detach())
    support = trace.nodes["scene"]["fn"].support
    assert support.event_dim == 1 and support.check(x).all() and not support.check(-x - 9).any()
    assert str(trace.nodes["scene_z"]["fn"].support) == "IndependentConstraint(Real(), 1)"


@BOUNDED
def test_predictive_draws_lie_on_the_support(constraint: Constraint) -> None:
    _, ebm = twins(constraint)

    def model() -> None:
        with pyro.plate("data", 5):
            lvebm("scene", ebm)

    with global_seed(0), ebm.frozen():
        prior = Predictive(model, num_samples=4)()
        given = {"scene_z": prior["scene_z"].flip(0)}
        posterior = Predictive(model, posterior_samples=given)()
    for draws in (prior["scene"], posterior["scene"]):
        assert draws.shape == (4, 5, *ebm.x_shape)
        ebm.base_x.support.check(draws)


def shifted(ebm: LVEBM, y: Tensor) -> MultivariateNormal:
    """The exact law of (log x, z) given y ~ N(log x, ½²) of a linear-Gaussian LVEBM."""
    law = exact_joint(ebm)
    d = ebm.base_x.dim
    cov = torch.block_diag(law.covariance_matrix, torch.zeros(d, d).double())
    cov[len(law.mean) :, :] = torch.cat([cov[:d], cov[:d, :]], 0)[:d]
    lift = torch.cat([torch.eye(len(law.mean)), torch.eye(len(law.mean))[:d]]).double()
    noise = torch.zeros(len(lift)).double()
    noise[len(law.mean) :] = 0.25
    full = MultivariateNormal(lift @ law.mean, lift @ law.covariance_matrix @ lift.T + noise.diag())
    return condition(full, list(range(len(law.mean), len(lift))), y)


Sampler = Callable[[Callable[[], None], LVEBM], dict[str, Tensor]]


def run_nuts(model: Callable[[], None], ebm: LVEBM) -> dict[str, Tensor]:
    with global_seed(0), ebm.frozen():
        mcmc = MCMC(NUTS(model), num_samples=40, warmup_steps=25, disable_progbar=True)
        mcmc.run()
    return mcmc.get_samples()


def run_particles(model: Callable[[], None], ebm: LVEBM) -> dict[str, Tensor]:
    with ebm.frozen():
        saddle = Saddle(model, AutoParticles(model, 8), Adam({"lr": 1e-3}), seed=0)
        saddle.fit(num_steps=10, progress=False)
        kept = saddle.sample_posterior(num_samples=40, num_warmup=60, thinning=2)
    return {name: value.flatten(0, 1) for name, value in kept.items()}


def posterior_of_x_p_value(sampler: Sampler) -> float:
    """p-value of chain averages of log x and z, whitened by the exact posterior; 24 data."""
    plain, ebm = twins(constraints.positive, 1)
    y = normal((24, 1), 7)

    def model() -> None:
        with pyro.plate("data", 24):
            x, _ = lvebm("scene", ebm)
            pyro.sample("y", dist.Normal(x.log(), 0.5).to_event(1), obs=y)

    draws = sampler(model, ebm)
    law = shifted(plain, y)
    pairs = torch.cat([draws["scene"].log(), draws["scene_z"]], -1) - law.mean
    tril = torch.linalg.cholesky(law.covariance_matrix)
    white = torch.linalg.solve_triangular(tril, pairs[..., None], upper=False)[..., 0].detach()
    return mean_p_value(torch.cat([white.mean(0), (white**2).mean(0)], -1), [0.0] * 3 + [1.0] * 3)


@pytest.mark.parametrize("sampler", [run_nuts, run_particles])
def test_the_exact_posterior_of_an_unobserved_x(sampler: Sampler) -> None:
    """Student's test over data. False alarm ALPHA."""
    assert posterior_of_x_p_value(sampler) > ALPHA


def test_that_check_fails_without_the_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    without_jacobian(monkeypatch)
    assert posterior_of_x_p_value(run_particles) < CERTAIN


# --- refusals -------------------------------------------------------------------------------


def outside() -> tuple[LVEBM, Tensor]:
    _, ebm = twins(constraints.positive)
    x = to_support(ebm, normal((4, 3), 1))
    x[2, 1] = 0.0
    return ebm, x


@pytest.mark.parametrize("entry", [0.0, -1.0])
def test_every_door_refuses_data_outside(entry: float) -> None:
    ebm, x = outside()
    x[2, 1] = entry
    holed = x.clone()
    holed[0, 0] = math.nan
    message = rf"1 of 12 entries.*x\[2, 1\] = {entry:g}, lie"
    for data in (x, holed):
        with pytest.raises(ValueError, match=message):
            log_evidence(ebm, data, log_z=bracket(0.0))
        with pytest.raises(ValueError, match=message), pyro.plate("data", 4):
            lvebm("scene", ebm, obs=data)
        with pytest.raises(ValueError, match=message):
            LVEBM.from_data(MLPEnergy(3, 1), data, z_dim=1, support=constraints.positive)
    with pytest.raises(ValueError, match=message):
        ebm.posterior(x)
    with pytest.raises(ValueError, match=message):
        ebm.impute(holed)


def test_a_simplex_has_no_missing_entries() -> None:
    _, ebm = twins(constraints.simplex)
    x = to_support(ebm, normal((40, 3), 1))
    x[2, 1] = math.nan
    message = r"support Simplex\(\) ties the entries of an x together"
    with pytest.raises(ValueError, match=message):
        log_evidence(ebm, x, log_z=bracket(0.0))
    with pytest.raises(ValueError, match=message), pyro.plate("data", 40):
        lvebm("scene", ebm, obs=x)
    with pytest.raises(ValueError, match=message):
        ebm.impute(x)
    with pytest.raises(ValueError, match=message):
        LVEBM.from_data(MLPEnergy(3, 1), x, z_dim=1, support=constraints.simplex)


def test_an_energy_that_depends_on_another_latent_is_found() -> None:
    """Its check evaluates the energy inside the support."""
    x = to_support(twins(constraints.positive)[1], normal((8, 3), 1))

    class Tilted(nn.Module):
        tilt = 0.0

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.tilt * x.log().sum(-1) + 0.0 * z.sum(-1)

    energy = Tilted()
    ebm = LVEBM.from_data(energy, x, z_dim=1, support=constraints.positive, pool=tiny_pool())

    def model(x: Tensor) -> None:
        energy.tilt = pyro.sample("tilt", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x)

    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}))
    with pytest.raises(ValueError, match="depends on the latent 'tilt'"):
        saddle.step(x)


def test_an_energy_belongs_to_one_support() -> None:
    x = torch.sigmoid(normal((30, 2), 1))
    energy = MLPEnergy(2, 1).double()
    loc, scale = torch.zeros(2).double(), torch.ones(2).double()
    base_z = dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    LVEBM(energy, dist.LogNormal(loc, scale).to_event(1), base_z)
    LVEBM(energy, dist.LogNormal(loc, scale).to_event(1), base_z)
    with pytest.raises(ValueError, match="already belongs to an LVEBM with other bases"):
        LVEBM(energy, dist.Normal(loc, scale).to_event(1), base_z)
    with pytest.raises(ValueError, match=r"bases have 1 and 1 \(unconstrained\) dimensions"):
        x = torch.cat([x[:, :1], 1 - x[:, :1]], -1)
        LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1, support=constraints.simplex)


# --- training -------------------------------------------------------------------------------


def test_training_on_positive_data_finds_their_density() -> None:
    """Gamma(½): twice as near as its log-normal, and normalised in data coordinates."""
    gamma = torch.distributions.Gamma(torch.tensor(0.5), torch.tensor(1.0))
    x, new = torch.as_tensor(
        stats.gamma(0.5).rvs((2, 1000, 1), random_state=0), dtype=torch.float32
    ).clamp(min=1e-12)
    energy = MLPEnergy(1, 1, hidden=(32,), fourier_features=0)
    pool = TemperedPool(4, 128, num_moves=4)
    ebm = LVEBM.from_data(
        energy, x, z_dim=1, support=constraints.positive, base="gaussian", pool=pool
    )
    exact = gamma.log_prob(new[:, 0])
    gap = float((exact - ebm.base_x.log_prob(new)).mean())
    assert gap > 0.1
    model = plate_model(ebm, 256)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}), seed=0)
    saddle.fit(x, num_steps=120, progress=False)
    log_z = log_partition(ebm, num_particles=512, num_runs=4, num_refreshes=10)
    evidence = log_evidence(ebm, new, num_runs=2, num_particles=16, log_z=log_z)
    loss = exact - evidence.value
    error = math.hypot(float(loss.std()) / math.sqrt(len(loss)), evidence.log_partition.std_error)
    assert -4 * error < float(loss.mean()) < 0.25 * gap
    without = loss - new[:, 0].log()  # as if log p(log x) were reported
    assert not -4 * error < float(without.mean()) < 0.25 * gap


def test_encoders_see_unconstrained_coordinates() -> None:
    _, ebm = twins(constraints.simplex)
    x = to_support(ebm, normal((12, 3), 1))
    model = plate_model(ebm)
    guide = AutoAmortisedNormal(model, hidden=(8,))
    with global_seed(0):
        guide(x)
    assert guide.encoder[0].in_features == 3
    torch.testing.assert_close(guide.encode(x).mean, ebm.base_z.loc.expand(12, 2))


# --- state ----------------------------------------------------------------------------------


@BOUNDED
def test_copies_are_the_same_model(constraint: Constraint) -> None:
    _, ebm = twins(constraint)
    x, z = to_support(ebm, normal((5, 3), 1)), normal((5, 2), 2)
    for other in (copy.deepcopy(ebm), pickle.loads(pickle.dumps(ebm))):
        assert torch.equal(other.energy(x, z), ebm.energy(x, z))
        assert torch.equal(other.log_partition, ebm.log_partition)
    state = snapshot(ebm)
    _, fresh = twins(constraint)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.energy(x, z), ebm.energy(x, z))


def test_bounds_follow_the_module() -> None:
    bounds = constraints.interval(torch.tensor([0.0, -1.0]).double(), torch.tensor([1, 3]))
    x = Support(bounds, torch.Size([2])).constrain(normal((50, 2), 1)).float()
    ebm = LVEBM.from_data(
        MLPEnergy(2, 1), x, z_dim=1, base="gaussian", support=bounds, pool=tiny_pool()
    )
    u = normal((4, 3), 2)
    assert ebm.unwhiten(u.float())[0].dtype == torch.float32
    single = ebm.base_x.log_prob(x)
    ebm.double()
    assert ebm.unwhiten(u)[0].dtype == torch.float64
    torch.testing.assert_close(ebm.base_x.log_prob(x.double()).float(), single)
    assert ebm.to("meta").unwhiten(u.to("meta"))[0].is_meta


def test_a_checkpoint_of_another_support_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "saddle.safetensors"
    x = torch.sigmoid(normal((30, 2), 1)).float()

    def parts(support: Constraint | None) -> tuple[Any, AutoParticles, Adam]:
        pyro.clear_param_store()
        ebm = LVEBM.from_data(
            MLPEnergy(2, 1), x, z_dim=1, base="gaussian", support=support, pool=tiny_pool()
        )
        model = plate_model(ebm)
        return model, AutoParticles(model, 2), Adam({"lr": 1e-3})

    first = Saddle(*parts(constraints.unit_interval))
    first.step(x)
    first.save(path)
    assert Saddle.load(path, *parts(constraints.unit_interval), x).step_count == 1
    for other in (constraints.positive, None):
        with pytest.raises(ValueError, match=r"x has support .*, in the file Interval\(lower"):
            Saddle.load(path, *parts(other), x)
