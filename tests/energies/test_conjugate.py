# SPDX-License-Identifier: Apache-2.0
"""The conjugate energy: its closed forms are referees of what is estimated on a neural model."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import make_model
from pyro.infer import Trace_ELBO
from pyro.optim import Adam
from referee import ALPHA, bracket, normal, variance_p_value
from scipy import stats
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    ConjugateEnergy,
    MixtureBase,
    MLPEnergy,
    PriorProposal,
    Saddle,
    TemperedPool,
    compare_elbo,
    log_evidence,
    log_partition,
)
from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.evidence import programs

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def trained(ebm: LVEBM, size: float) -> LVEBM:
    with torch.no_grad():
        for k, p in enumerate(ebm.f.network[-1].parameters()):
            p.add_(size * normal(tuple(p.shape), k + 1))
    return ebm


def neural(x_dim: int = 2, z_dim: int = 2, *, mixture: bool = False, size: float = 1.5) -> LVEBM:
    """With a full base_z in float64, and a posterior that moves with x."""
    tril = torch.tensor([[1.5, 0.0], [-0.8, 0.6]], dtype=torch.float64)[:z_dim, :z_dim]
    base_z = dist.MultivariateNormal(normal((z_dim,), 3), scale_tril=tril)
    base_x: Any = GaussianBase(normal((x_dim,), 1), 0.5 + normal((x_dim,), 2).abs())
    if mixture:
        means = normal((2, x_dim), 5)
        base_x = MixtureBase(
            base_x,
            torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
            means,
            0.5 * torch.eye(x_dim, dtype=torch.float64).expand(2, -1, -1),
        )
    energy = ConjugateEnergy(x_dim, z_dim, hidden=(8,), seed=1).double()
    return trained(LVEBM(energy, base_x, base_z, TemperedPool(4, 32, num_moves=2)), size)


def draw_x(ebm: LVEBM, n: int) -> Tensor:
    return ebm.base_x.unwhiten(normal((n, ebm.base_x.dim), 7))


@pytest.mark.parametrize("mixture", [False, True])
def test_joint_is_marginal_times_posterior(mixture: bool) -> None:
    """−E(x, z) = log C(x) + log p(z | x) at every pair."""
    ebm = neural(mixture=mixture)
    x, z = draw_x(ebm, 50), 2.0 * normal((50, 2), 9)
    q = ebm.f.posterior(x)
    assert q.mean.std(0).min() > 0.2
    torch.testing.assert_close(-ebm.energy(x, z), ebm.f.log_marginal(x) + q.log_prob(z))


def test_z_is_finite_however_large_the_network() -> None:
    ebm = neural(size=99.0)
    excess = ebm.f.log_marginal(draw_x(ebm, 99)) - ebm.base_x.log_prob(draw_x(ebm, 99))
    assert excess.max() <= 0.5 * 2 * 8.0**2


def test_log_partition_is_the_integral_of_the_marginal() -> None:
    """By quadrature over one x."""
    ebm = neural(1, 2)
    grid = ebm.base_x.unwhiten(torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None])
    exact = torch.trapezoid(ebm.f.log_marginal(grid).exp(), grid[:, 0]).log()
    found = log_partition(ebm, num_particles=64, num_runs=8)
    assert abs(found.estimate - exact) < 4 * found.std_error < 0.1


def test_log_evidence_is_the_marginal() -> None:
    """No more rows are beyond 3 standard errors than Student's law of 8 runs has there."""
    ebm = neural()
    x = draw_x(ebm, 200)
    found = log_evidence(ebm, x, log_z=bracket(0.3))
    error = (found.value - (ebm.f.log_marginal(x) - 0.3)).abs()
    beyond = int((error > 3 * found.std_error).sum())
    assert stats.binom.sf(beyond - 1, len(x), 2 * stats.t(7).sf(3)) > ALPHA
    assert found.std_error.max() < 0.3


def particle_residuals(ebm: LVEBM, x: Tensor) -> Tensor:
    """Particles of θ at rest in units of the exact posterior, one a datum."""
    model = make_model(ebm)
    guide = AutoParticles(model, 1)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}), num_moves=15)
    with ebm.frozen():
        for _ in range(8):
            saddle.step(x)
    q = ebm.f.posterior(x)
    z = guide.particles("scene_z")[0]
    y: Tensor = torch.linalg.solve_triangular(q.scale_tril, (z - q.mean)[..., None], upper=False)
    return y.squeeze(-1).detach()


def test_particles_have_the_exact_posterior() -> None:
    """Means and variances over data, false alarm ALPHA; the posterior of others fails by far."""
    ebm = neural()
    x = draw_x(ebm, 400)
    y = particle_residuals(ebm, x)
    assert variance_p_value(y, 1.0) > ALPHA
    wrong = ebm.f.posterior(x.flip(0)).mean - ebm.f.posterior(x).mean
    assert variance_p_value(y + wrong, 1.0) < ALPHA


def exact_guide(ebm: LVEBM, batch: int | None = None) -> Any:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch) as i:
            pyro.sample("scene_z", ebm.f.posterior(x[i]))

    return guide


def test_as_a_guide_it_loses_nothing_and_others_what_the_closed_form_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every draw of its ELBO is log p(x); base_z as a guide loses ½ |h|²."""
    ebm = neural()
    x, model = draw_x(ebm, 30), make_model(ebm)
    monkeypatch.setattr(programs, "log_partition", lambda *_, **__: bracket(0.0))
    with ebm.frozen(), torch.random.fork_rng():
        loss = Trace_ELBO().loss(model, exact_guide(ebm), x)
        rows = {"exact": exact_guide(ebm), "prior": PriorProposal()}
        table = compare_elbo(model, rows, x, num_samples=200)
    exact = (ebm.f.log_marginal(x) - ebm.log_partition).sum()
    assert loss == pytest.approx(-float(exact.detach()), rel=1e-9)
    h = torch.linalg.solve_triangular(
        ebm.base_z.tril, (ebm.f.posterior(x).mean - ebm.base_z.loc)[..., None], upper=False
    )
    gap, frame = float(0.5 * (h * h).sum((1, 2)).mean().detach()), table.rows
    assert abs(frame.loc["exact", "kl_gap"]) < 4 * frame.loc["exact", "kl_gap_se"] < 0.1
    assert abs(frame.loc["prior", "kl_gap"] - gap) < 4 * frame.loc["prior", "kl_gap_se"] < 0.3 * gap


def variance_of_posterior_means(energy: Any) -> float:
    """Over data, in units of a posterior's own variance, after a fit to three clusters."""
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    x = centres[torch.arange(300) % 3] + 0.3 * normal((300, 2), 0, torch.float32)
    pool = TemperedPool(3, 48, num_moves=3)
    ebm = LVEBM.from_data(energy, x, z_dim=2, base="gaussian", pool=pool)
    model = make_model(ebm, 128)
    conjugate = isinstance(energy, ConjugateEnergy)
    guide = exact_guide(ebm, 128) if conjugate else AutoParticles(model, 1)
    saddle = Saddle(model, guide, Adam({"lr": 3e-2}), num_moves=4)
    saddle.fit(x, num_steps=45, progress=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        z = ebm.posterior(x[:60]).sample((20,))
    return float(z.mean(0).var(0).sum() / z.var(0).mean(0).sum())


def test_its_latents_carry_more_than_those_of_a_free_energy() -> None:
    """The exact posterior as guide trains it, and z tells clusters apart."""
    carried = variance_of_posterior_means(ConjugateEnergy(2, 2, hidden=(16,), kl_penalty=0.0))
    free = variance_of_posterior_means(MLPEnergy(2, 2, hidden=(16,), kl_penalty=0.0))
    assert carried > 1.0 > 5.0 * free


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"z_dim": 0}, "z_dim must be at least 1; got 0"),
        ({"z_dim": 1, "hidden": ()}, r"hidden must name at least one positive width; got \(\)"),
        ({"z_dim": 1, "fourier_features": -1}, "fourier_features must be 0 or more; got -1"),
        ({"z_dim": 1, "kl_penalty": -1.0}, "kl_penalty must be finite and not negative; got -1"),
    ],
)
def test_sizes_that_make_no_energy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConjugateEnergy(2, **settings)
