# SPDX-License-Identifier: Apache-2.0
"""An LVEBM on a generator base in the whole package, beside closed forms and quadrature."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyro
import pytest
import torch
from generator_models import (
    SHARP,
    Curve,
    Sheet,
    conditional,
    decoder,
    line_posterior,
    simulate,
)
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam, ClippedAdam
from referee import ALPHA, CERTAIN, global_seed, normal, plane_grid, seeded
from scipy import stats
from small_models import plate_model, same, snapshot, tiny_pool
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, constraints

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    ConjugateEnergy,
    ContextPool,
    ConvGenerator,
    GeneratorBase,
    MLPEnergy,
    MLPGenerator,
    PersistentPool,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    ZeroEnergy,
    check_dissipativity,
    conditional_log_partition,
    log_evidence,
    log_evidence_of,
    log_partition,
    lvebm,
    plot_energy,
    pool_diagnostics,
    to_arviz,
    traverse,
)
from pyro_lvebm.evidence import LogPartition
from pyro_lvebm.guides import AutoPerDatumMultivariateNormal

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

KNOWN = LogPartition(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2, 2, 1.0)
"""What log Z is where f = 0."""

DIM, Z = 4, 2


def linear_rows(count: int = 300, seed: int = 0) -> Tensor:
    """Rows of a factor analysis, with noise in every entry."""
    noise = torch.linspace(0.2, 0.8, DIM).double() * normal((count, DIM), seed + 1)
    return normal((count, Z), seed) @ normal((Z, DIM), 7) + noise + 2.0


def linear_ebm(x: Tensor, **options: Any) -> LVEBM:
    options = {"pool": tiny_pool(), "generator": "linear"} | options
    return LVEBM.from_data(ZeroEnergy(DIM, Z), x, z_dim=Z, **options)


def joint(ebm: LVEBM) -> MultivariateNormal:
    """The law of (z, x) of a linear generator."""
    base = ebm.base_x
    assert isinstance(base, GeneratorBase)
    with torch.no_grad():
        law = conditional(base, torch.zeros(Z).double())
        slope = base.unit[:, None] * base.linear
    mean = torch.cat([torch.zeros(Z).double(), law.mean])
    top = torch.cat([torch.eye(Z).double(), slope.T], 1)
    bottom = torch.cat([slope, slope @ slope.T + law.covariance_matrix], 1)
    return MultivariateNormal(mean, torch.cat([top, bottom]))


def given(law: MultivariateNormal, seen: Tensor, value: Tensor) -> MultivariateNormal:
    """The law of the entries that are not seen, given those that are."""
    c, other = law.covariance_matrix, ~seen
    gain = c[other][:, seen] @ torch.linalg.inv(c[seen][:, seen])
    mean = law.mean[other] + gain @ (value - law.mean[seen])
    cov = c[other][:, other] - gain @ c[seen][:, other]
    return MultivariateNormal(mean, 0.5 * (cov + cov.T))


def marginal(ebm: LVEBM, x: Tensor) -> Tensor:
    """log p(x) (rows,) of a linear generator, of the observed entries of each row."""
    law, found = joint(ebm), []
    for row in x:
        at = torch.cat([torch.zeros(Z, dtype=torch.bool), ~row.isnan()])
        part = MultivariateNormal(law.mean[at], law.covariance_matrix[at][:, at])
        found.append(part.log_prob(row[~row.isnan()]))
    return torch.stack(found)


def holed(x: Tensor) -> Tensor:
    result = x.clone()
    result[::3, 1] = torch.nan
    result[1::3, 0] = result[1::3, 3] = torch.nan
    return result


# --- f = 0: factor analysis, with closed forms ------------------------------------------------


@pytest.mark.parametrize("noise", ["diagonal", "low-rank", "full"])
def test_the_evidence_of_an_untrained_model_is_that_of_factor_analysis(noise: Any) -> None:
    """Mean over 12 rows, a third of them complete, within 4 standard errors, which are small.

    False alarms: 1e-4.
    """
    x = linear_rows()
    ebm = linear_ebm(x, noise=noise, generator=MLPGenerator(Z, (DIM,), (4,)))
    rows = holed(x)[:12]
    found = log_evidence(ebm, rows, num_particles=64, num_runs=6)
    error = float(found.std_error.square().sum().sqrt()) / len(rows)
    assert found.log_partition.estimate == found.log_partition.std_error == 0.0
    gap = float((found.value - marginal(ebm, rows)).mean())
    assert abs(gap) < 4.0 * error + 1e-6 < 0.05


def test_the_evidence_of_a_pyro_model_is_too() -> None:
    x = holed(linear_rows())
    ebm = linear_ebm(x)
    model = plate_model(ebm)
    with ebm.frozen():
        found = log_evidence_of(model, x[:15], num_runs=4)
    error = float(found.std_error.square().sum().sqrt()) / 15
    gap = float((found.value - marginal(ebm, x[:15])).mean())
    assert abs(gap) < 4.0 * error + 1e-6 < 0.05


def test_log_z_is_zero_exactly_and_draws_are_those_of_the_base() -> None:
    """After training steps too: a pool has nothing to follow, and its chains are drawn anew."""
    for pool in (TemperedPool(3, 40, num_moves=1), PersistentPool(40, num_moves=1)):
        pyro.clear_param_store()
        x = linear_rows(60)
        ebm = linear_ebm(x, pool=pool)
        model = plate_model(ebm)
        saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=1)
        for _ in range(2):
            saddle.step(x)
        assert float(ebm.log_partition) == 0.0 == float(ebm.log_norm())
        before = ebm.pool.u
        ebm.pool.refresh(ebm)
        alike = torch.stack([before[-1].flatten(), ebm.pool.u[-1].flatten()]).corrcoef()[0, 1]
        assert abs(float(alike)) < 4.0 / math.sqrt(240) and not ebm.pool.f.any()
        one, two = (ebm.pool.draw(ebm, 500, generator=seeded(s)) for s in (1, 1))
        assert torch.equal(one, two) and len(one.unique(dim=0)) == 500
        found = log_partition(ebm, num_particles=16, num_runs=2, num_refreshes=2)
        assert found.lower == found.estimate == found.upper == 0.0 and found.is_reliable


def test_imputed_entries_have_their_gaussian() -> None:
    """Kolmogorov's test of x_1 given the others; false alarms: 1e-3. Its prior fails."""
    x = linear_rows()
    ebm = linear_ebm(x)
    row = x[:1].clone()
    row[0, 1] = torch.nan
    draws = ebm.impute(row, num_samples=300)[:, 0, 1]
    seen = torch.tensor([False, False, True, False, True, True])
    law = joint(ebm)
    exact = given(
        MultivariateNormal(law.mean[2:], law.covariance_matrix[2:, 2:]), seen[2:], row[0, seen[2:]]
    )

    def p_value(mean: Tensor, variance: Tensor) -> float:
        score = (draws - mean) / variance.sqrt()
        return float(stats.kstest(score.numpy(), stats.norm.cdf).pvalue)

    assert p_value(exact.mean[0], exact.covariance_matrix[0, 0]) > ALPHA
    assert p_value(law.mean[3], law.covariance_matrix[3, 3]) < CERTAIN


def test_posterior_draws_have_their_gaussian() -> None:
    """Kolmogorov's test along both latents; false alarms: 1e-3. The prior fails."""
    x = linear_rows()
    ebm = linear_ebm(x)
    with global_seed(2):
        draws = ebm.posterior(x[0]).sample((400,))
    seen = torch.tensor([False] * Z + [True] * DIM)
    exact = given(joint(ebm), seen, x[0])
    tril = torch.linalg.cholesky(exact.covariance_matrix)
    white = torch.linalg.solve_triangular(tril, (draws - exact.mean).T, upper=False)

    def p_value(values: Tensor) -> float:
        return 2.0 * min(float(stats.kstest(v.numpy(), stats.norm.cdf).pvalue) for v in values)

    assert p_value(white) > ALPHA
    assert p_value(draws.T) < CERTAIN
    z = normal((5, Z), 3)
    gap = ebm.posterior(x[0]).log_prob(z) - exact.log_prob(z)
    torch.testing.assert_close(gap, gap[:1].expand(5))


def test_particles_reach_the_maximum_likelihood_of_factor_analysis() -> None:
    """From half of its loadings, with a decreasing rate, within 0.005 nats a datum."""
    x = linear_rows(100)
    best = float(marginal(linear_ebm(x), x).mean())
    pyro.clear_param_store()
    ebm = linear_ebm(x)
    with torch.no_grad():
        ebm.base_x.linear.mul_(0.5)
        ebm.base_x.log_noise.add_(0.5)
    assert best - float(marginal(ebm, x).mean()) > 0.3
    model = plate_model(ebm)
    saddle = Saddle(model, AutoParticles(model, 6), Adam({"lr": 0.05}), num_moves=1, seed=1)
    saddle.fit(x, num_steps=80, progress=False)
    gap = best - float(marginal(ebm, x).mean())
    assert -1e-4 < gap < 0.005


# --- f on top: log Z and its gradient ---------------------------------------------------------


class Bump(nn.Module):
    """An energy of a user in the coordinates of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.tensor(1.2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.height * torch.tanh(x.sum(-1)) * torch.cos(z[..., 0])


def on_a_line(energy: str, num_chains: int = 400) -> LVEBM:
    """x and z in one dimension each, with both generator and f away from 0."""
    pool = TemperedPool(3, num_chains, num_moves=4, seed=2)
    f = Bump() if energy == "user" else MLPEnergy(1, 1, (8,), 2)
    ebm = decoder(MLPGenerator(1, (1,), (6,), scale=True), 1, 1, 0.4, energy=f, pool=pool)
    with torch.no_grad():
        for k, p in enumerate([*ebm.base_x.parameters(), *ebm.f.parameters()]):
            p.add_(0.4 * normal(tuple(p.shape), k))
    return ebm


def exact_log_z(ebm: LVEBM) -> Tensor:
    """log ∫ exp(−f) N(u; 0, I) du by the trapezoidal rule, with a graph."""
    u, cell = plane_grid(7.0, 141)
    log_density = -0.5 * u.square().sum(-1) - math.log(2 * math.pi)
    f = ebm.f(*ebm.unwhiten(u))
    return torch.logsumexp(log_density - f, 0) + math.log(cell)


@pytest.mark.parametrize("energy", ["user", "MLP"])
def test_log_z_and_its_gradient_are_those_of_quadrature(energy: str) -> None:
    """log Z within 4 standard errors (false alarms: 1e-4); its gradient in θ and φ along that of
    quadrature, which is one of central differences, and not along the opposite one."""
    ebm = on_a_line(energy)
    for _ in range(10):
        ebm.pool.refresh(ebm)
    ebm.mark_pool(fresh=True)
    expected = exact_log_z(ebm)
    error = 4.0 * float(ebm.pool.log_partition_std_error) + 1e-3
    assert abs(float(ebm.log_partition) - float(expected.detach())) < error < 0.1
    theta = ebm.theta()
    exact = torch.autograd.grad(expected, theta, allow_unused=True)
    found = torch.autograd.grad(ebm.log_norm(), theta, allow_unused=True)
    parts = []
    for own in (list(ebm.f.parameters()), list(ebm.base_x.parameters())):
        index = [k for k, p in enumerate(theta) if any(p is q for q in own)]
        flat = [
            torch.cat([torch.zeros(1).double() if g[k] is None else g[k].flatten() for k in index])
            for g in (exact, found)
        ]
        parts.append(flat)
        size = float(flat[0].norm())
        assert size > 0.02 and float((flat[1] - flat[0]).norm()) < 0.35 * size
    p, step = ebm.base_x.offset, 1e-4
    ends = []
    for shift in (step, -2.0 * step):
        with torch.no_grad():
            p.add_(shift)
            ends.append(float(exact_log_z(ebm).detach()))
    slope = (ends[0] - ends[1]) / (2.0 * step)
    which = next(k for k, q in enumerate(theta) if q is p)
    assert slope == pytest.approx(float(exact[which]), rel=1e-4)


@pytest.mark.parametrize("energy", ["user", "MLP"])
def test_both_ways_to_the_energy_agree(energy: str) -> None:
    """In coordinates u, in those that do not vary with z, and in the data's."""
    ebm = on_a_line(energy, 8)
    u = normal((5, 2), 1)
    x, z = ebm.unwhiten(u)
    torch.testing.assert_close(ebm.whiten(x, z), u)
    torch.testing.assert_close(ebm.residual(u), ebm.f(x, z))
    value, grad = ebm.residual_and_grad(u)
    v = u.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(ebm.residual(v).sum(), v)
    torch.testing.assert_close(value, ebm.f(x, z))
    torch.testing.assert_close(grad, expected)
    w = ebm.coordinates(u).detach().requires_grad_(True)
    total = ebm.energy(ebm.base_x.unwhiten(w[:, :1]), ebm.base_z.unwhiten(w[:, 1:]))
    above, slope = ebm.at_coordinates(w.detach())
    log_normal = -0.5 * w.square().sum(-1)
    torch.testing.assert_close(
        (total + log_normal - above).detach(), (total + log_normal - above)[:1].detach().expand(5)
    )
    (expected,) = torch.autograd.grad((total + log_normal).sum(), w)
    torch.testing.assert_close(slope, expected)
    torch.testing.assert_close(ebm.base_energy(u), ebm.energy(x, z) - ebm.f(x, z))


def test_evidence_with_an_energy_and_contexts_is_that_of_quadrature() -> None:
    """f(x, z; c): evidence of rows at their contexts, within 4 standard errors."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))

        def forward(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
            return self.weight * torch.tanh(z[..., 0] + c[..., 0]) * torch.tanh(x[..., 0])

    plain = decoder(Curve(), 1, 2, 0.3)
    ebm = LVEBM(Shift().double(), plain.base_x, plain.base_z, ContextPool(3, 8), context_shape=(1,))
    x, z = simulate(plain, 6)
    c = normal((6, 1), 4)
    grid = torch.linspace(-7.0, 7.0, 4001).double()[:, None]
    exact = [
        torch.logsumexp(-ebm.energy(row.expand(4001, 2), grid, at.expand(4001, 1)).detach(), 0)
        for row, at in zip(x, c, strict=True)
    ]
    expected = torch.stack(exact) + math.log(14.0 / 4000)
    log_z = conditional_log_partition(ebm, c, num_particles=32, num_runs=3)
    found = log_evidence(ebm, x, context=c, log_z=log_z, num_particles=64, num_runs=6)
    log_c = found.value + log_z.estimate
    assert (abs(log_c - expected) < 5.0 * found.std_error + 0.02).all()
    with global_seed(2):
        draws = ebm.posterior(x, c).sample((3,))
    assert draws.shape == (3, 6, 1) and (abs(draws - z) < 3.0).all()


# --- sharp posteriors -------------------------------------------------------------------------


def test_evidence_of_sharp_posteriors_is_that_of_quadrature() -> None:
    ebm = decoder(Curve(), 1, 2)
    x, z = simulate(ebm, 10)
    x[:5, 1] = torch.nan
    exact = line_posterior(ebm, x, z).log_evidence
    found = log_evidence(ebm, x, num_particles=64, num_runs=6)
    assert (abs(found.value - exact) < 5.0 * found.std_error + 1e-3).all()
    assert float(found.std_error.max()) < 0.2


ROWS, DRAWS = 300, 19


@pytest.fixture(scope="module")
def sheet() -> tuple[LVEBM, Tensor, Tensor, Saddle]:
    with global_seed(0):
        ebm = decoder(Sheet(), 2, 3, SHARP)
        x, z = simulate(ebm, ROWS)
        model = plate_model(ebm)
        saddle = Saddle(model, AutoParticles(model, 2), SGD({"lr": 0.0}), num_moves=3, seed=1)
        with ebm.frozen():
            for _ in range(15):
                saddle.step(x)
    return ebm, x, z, saddle


def rank_p_values(z: Tensor, draws: Tensor) -> list[float]:
    """Chi-square tests that ranks of z (rows, 2) among draws (L, rows, 2) are uniform."""
    found = []
    for part in (draws[..., 0] < z[:, 0], draws[..., 1] < z[:, 1], draws.sum(-1) < z.sum(-1)):
        counts = np.bincount(part.sum(0).numpy() * 10 // (DRAWS + 1), minlength=10)
        found.append(float(stats.chisquare(counts).pvalue))
    return found


def test_ranks_of_sharp_posteriors_are_uniform(
    sheet: tuple[LVEBM, Tensor, Tensor, Saddle],
) -> None:
    """False alarms: 3e-3. Draws that are half as wide again fail."""
    ebm, x, z, saddle = sheet
    with ebm.frozen():
        draws = saddle.sample_posterior(x, num_samples=DRAWS, num_warmup=60, thinning=8)["scene_z"]
    assert min(rank_p_values(z, draws[0])) > ALPHA
    mean = draws[0].mean(0)
    assert min(rank_p_values(z, mean + 1.5 * (draws[0] - mean))) < CERTAIN


def test_chains_on_sharp_posteriors_agree(sheet: tuple[LVEBM, Tensor, Tensor, Saddle]) -> None:
    """R-hat of a mean over data, and the largest of eight data, under 1.05."""
    import arviz

    ebm, x, _, _ = sheet
    model = plate_model(ebm)
    saddle = Saddle(model, AutoParticles(model, 4), SGD({"lr": 0.0}), num_moves=3, seed=2)
    with ebm.frozen():
        for _ in range(15):
            saddle.step(x[:8])
        idata = to_arviz(saddle, x[:8], num_samples=250, num_warmup=100)
    r_hat = arviz.rhat(arviz.convert_to_dataset({"z": idata.posterior["scene_z"].to_numpy()}))
    assert float(r_hat["z"].max()) < 1.05


# --- training ---------------------------------------------------------------------------------


def curved_rows(count: int = 80, seed: int = 0) -> Tensor:
    z = normal((count, 1), seed)
    return torch.cat([z, z.square(), torch.sin(2.0 * z)], -1) + 0.1 * normal((count, 3), seed + 1)


def build(x: Tensor, energy: nn.Module | None = None, **options: Any) -> LVEBM:
    energy = MLPEnergy(3, 1, (8,), 2) if energy is None else energy
    network = MLPGenerator(1, (3,), (8,))
    options = {"generator": network, "pool": tiny_pool(), "z_dim": 1} | options
    return LVEBM.from_data(energy, x, **options)


def trained(x: Tensor, num_steps: int = 6, **options: Any) -> tuple[LVEBM, Saddle]:
    pyro.clear_param_store()
    ebm = build(x, **options)
    model = plate_model(ebm, 40)
    saddle = Saddle(model, AutoParticles(model, 3), ClippedAdam({"lr": 0.02}), seed=3)
    for _ in range(num_steps):
        saddle.step(x)
    return ebm, saddle


def test_training_moves_generator_and_energy() -> None:
    x = curved_rows()
    start, (ebm, saddle) = snapshot(build(x)), trained(x)
    moved = {n for n, v in snapshot(ebm).items() if not torch.equal(v, start[n])}
    assert {"base_x.linear", "base_x.log_noise", "base_x.generator.out.weight"} <= moved
    assert {"f.out.weight"} <= moved
    assert np.isfinite(saddle.history[["loss", "kl", "log_partition"]].to_numpy()).all()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"support": constraints.positive}, torch.float64),
        ({"support": constraints.interval(-1.0, 1e3)}, torch.float32),
        ({"noise": "low-rank"}, torch.float32),
        ({"noise": "full"}, torch.float64),
        ({"generator": MLPGenerator(1, (3,), (6,), scale=True)}, torch.float32),
        ({"pool": PersistentPool(24, num_moves=1)}, torch.float64),
    ],
    ids=["positive", "interval", "low-rank", "full", "scale", "persistent"],
)
def test_missing_entries_on_any_base(options: dict[str, Any], dtype: torch.dtype) -> None:
    """A few steps, evidence, and completed rows on the support."""
    x = curved_rows().to(dtype)
    x = x.exp() if "support" in options else x
    x[normal((80, 3), 9) > 1.2] = torch.nan
    ebm, saddle = trained(x, 3, **copy.deepcopy(options))
    assert np.isfinite(saddle.history["loss"]).all()
    found = log_evidence(ebm, x[:4], log_z=KNOWN, num_particles=8, num_runs=2)
    assert found.value.isfinite().all() and found.value.dtype is dtype
    rows = x[x.isnan().any(1)][:3]
    filled = ebm.impute(rows)
    assert ebm.base_x.support.constraint.check(filled).all()
    assert torch.equal(filled[0][~rows.isnan()], rows[~rows.isnan()])


def test_plain_svi_trains_generator_and_energy() -> None:
    pyro.clear_param_store()
    x = curved_rows()
    ebm = build(x)
    start = snapshot(ebm)
    model = plate_model(ebm)
    with global_seed(0):
        svi = SVI(model, AutoNormal(model), Adam({"lr": 0.02}), Trace_ELBO())
        losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    now = snapshot(ebm)
    for name in ("base_x.linear", "base_x.generator.out.weight", "f.out.weight"):
        assert not torch.equal(now[name], start[name])
    assert any(name.startswith("scene_base$$$") for name in pyro.get_param_store().keys())


def test_one_network_may_serve_two_models() -> None:
    """Its gradient is the sum of both; each base has the rest of its own."""
    pyro.clear_param_store()
    network, x = MLPGenerator(1, (3,), (6,)), curved_rows()
    ebms = [build(rows, ZeroEnergy(3, 1), generator=network) for rows in (x, x[:50] + 1.0)]

    def model(x: Tensor) -> None:
        for name, ebm, rows in zip("ab", ebms, (x, x[:50] + 1.0), strict=True):
            with pyro.plate(f"rows of {name}", len(rows)):
                lvebm(name, ebm, obs=rows)

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.01}), num_moves=1)
    before = network.out.weight.detach().clone()
    saddle.step(x)
    assert not torch.equal(network.out.weight, before)
    assert ebms[0].base_x.generator is ebms[1].base_x.generator is network


@pytest.mark.parametrize("energy", [QuadraticEnergy, ConjugateEnergy])
def test_an_energy_without_a_closed_form_here_is_refused(energy: Any) -> None:
    with pytest.raises(ValueError, match=f"a {energy.__name__} has closed forms only where base_x"):
        build(curved_rows(), energy(3, 1))


def test_a_generator_needs_something_to_generate_from() -> None:
    with pytest.raises(ValueError, match="z_dim must be at least 1; got 0"):
        LVEBM.from_data(ZeroEnergy(3, 0), curved_rows(), z_dim=0, generator="linear")


# --- files ------------------------------------------------------------------------------------


def test_a_fit_goes_on_bit_for_bit(tmp_path: Path) -> None:
    x, file = curved_rows(), tmp_path / "fit.safetensors"
    whole, _ = trained(x, 4)
    _, saddle = trained(x, 2)
    saddle.save(file)
    pyro.clear_param_store()
    ebm = build(x)
    model = plate_model(ebm, 40)
    optim = ClippedAdam({"lr": 0.02})
    again = Saddle.load(file, model, AutoParticles(model, 3), optim, x)
    for _ in range(2):
        again.step(x)
    assert same(snapshot(ebm), snapshot(whole))


@pytest.mark.parametrize("written", ["generator", "gaussian"])
def test_a_file_of_another_base_is_refused(written: str, tmp_path: Path) -> None:
    x, file = curved_rows(), tmp_path / "fit.safetensors"
    options = {"generator": {}, "gaussian": {"generator": None, "base": "gaussian"}}
    _, saddle = trained(x, 1, **options[written])
    saddle.save(file)
    pyro.clear_param_store()
    other = "gaussian" if written == "generator" else "generator"
    model = plate_model(build(x, **options[other]), 40)
    message = {"generator": r"a generator base of x; build with LVEBM.from_data\(generator="}
    with pytest.raises(ValueError, match=message.get(written, "a Gaussian base of x")):
        Saddle.load(file, model, AutoParticles(model, 3), ClippedAdam({"lr": 0.02}), x)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"energy": ZeroEnergy(3, 1)}, torch.float64),
        ({"noise": "full", "generator": MLPGenerator(1, (3,), (6, 5), scale=True)}, torch.float32),
        ({"noise": "low-rank", "generator": "linear"}, torch.float64),
    ],
    ids=["zero", "full", "linear"],
)
def test_a_model_in_a_folder(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    x = curved_rows().to(dtype)
    ebm, _ = trained(x, 2, **copy.deepcopy(options))
    ebm.base_x.noise_penalty = 7.0
    ebm.save(tmp_path / "model")
    again = LVEBM.load(tmp_path / "model")
    assert again.base_x.noise_penalty == (0.0 if ebm.base_x.noise == "diagonal" else 7.0)
    z = normal((80, 1), 1).to(dtype)
    assert torch.equal(again.energy(x, z), ebm.energy(x, z))
    assert same(snapshot(again), snapshot(ebm))
    for twin in (copy.deepcopy(ebm), pickle.loads(pickle.dumps(ebm))):
        assert torch.equal(twin.energy(x, z), ebm.energy(x, z))


def test_a_model_of_images_in_a_folder(tmp_path: Path) -> None:
    x = normal((30, 6, 6), 1, torch.float32)
    network = ConvGenerator(2, (6, 6), 8)
    ebm = LVEBM.from_data(ZeroEnergy(36, 2), x, z_dim=2, generator=network, pool=tiny_pool())
    ebm.save(tmp_path / "model")
    again, z = LVEBM.load(tmp_path / "model"), normal((30, 2), 2, torch.float32)
    assert torch.equal(again.energy(x, z), ebm.energy(x, z))


def test_a_network_of_a_user_is_not_written(tmp_path: Path) -> None:
    ebm = decoder(Curve(), 1, 2)
    with pytest.raises(ValueError, match=r"the generator is a .*Curve, whose code a model file"):
        ebm.save(tmp_path / "model")
    assert not (tmp_path / "model" / "model.json").exists()


# --- the rest of the package ------------------------------------------------------------------


def test_what_looks_at_a_model_takes_a_generator() -> None:
    matplotlib.use("Agg")
    x = curved_rows()
    ebm, saddle = trained(x, 3)
    values = torch.tensor([-1.0, 1.0]).double()
    walk = traverse(ebm, x[:2], 0, values, num_runs=2)
    assert walk.mean.shape == (2, 2, 3) and np.isfinite(walk.mean.numpy()).all()
    found = pool_diagnostics(ebm, modes=x[:3], num_refreshes=20)
    assert found is not None
    for columns, marginal_of in (((0, 3), False), ((0,), True)):
        assert plot_energy(ebm, columns, marginal=marginal_of, num_points=5) is not None
    assert check_dissipativity(ebm) is not None
    idata = to_arviz(saddle, x, num_samples=3, num_warmup=5)
    assert dict(idata.posterior.sizes)["chain"] == 3
    with ebm.frozen(), global_seed(1):
        pairs = ebm.joint().sample((7,))
        assert ebm.joint().log_prob(pairs).isfinite().all()


def test_traversals_follow_the_generator() -> None:
    """f = 0: the mean of x given z is what the generator makes of it."""
    ebm = decoder(Curve(), 1, 2, 0.05)
    x, _ = simulate(ebm, 2)
    values = torch.tensor([-1.0, 0.0, 1.5]).double()
    walk = traverse(ebm, x, 0, values, num_runs=4)
    expected = Curve()(values[:, None]).expand(2, 3, 2)
    assert (abs(walk.mean - expected) < 5.0 * walk.std_error + 1e-3).all()


def test_draws_of_the_sites_are_those_of_the_model() -> None:
    """x given z that is held, and pairs from the pool."""
    ebm = decoder(Curve(), 1, 2, 0.05)

    def model() -> Tensor:
        with pyro.plate("rows", 400):
            x, _ = lvebm("a", ebm)
        return x

    held = pyro.poutine.condition(model, {"a_z": torch.full((400, 1), 0.7).double()})
    with ebm.frozen(), global_seed(5):
        x = held().detach()
        pairs = pyro.poutine.trace(model).get_trace()
    score = (x - Curve()(torch.tensor([0.7]).double())) / 0.05
    p_values = [float(stats.kstest(s.numpy(), stats.norm.cdf).pvalue) for s in score.T]
    assert 2.0 * min(p_values) > ALPHA
    z, x = pairs.nodes["a_z"]["value"], pairs.nodes["a"]["value"].detach()
    score = (x - Curve()(z)) / 0.05
    assert 2.0 * min(float(stats.kstest(s.numpy(), stats.norm.cdf).pvalue) for s in score.T) > ALPHA


def test_guides_per_datum_fit_a_generator_model() -> None:
    """Their ELBO is below the evidence, and near it where the posterior is Gaussian."""
    pyro.clear_param_store()
    x = linear_rows(30)
    ebm = linear_ebm(x)
    model = plate_model(ebm)
    guide = AutoPerDatumMultivariateNormal(model)
    with ebm.frozen(), global_seed(1):
        svi = SVI(model, guide, Adam({"lr": 0.08}), Trace_ELBO(num_particles=4))
        for _ in range(100):
            svi.step(x)
        elbo = -np.mean([svi.evaluate_loss(x) for _ in range(20)]) / len(x)
    best = float(marginal(ebm, x).mean())
    assert best - 0.15 < elbo < best + 0.02
