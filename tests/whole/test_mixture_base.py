# SPDX-License-Identifier: Apache-2.0
"""A mixture as the base, through all of the package, against quadrature."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam, ClippedAdam
from referee import ALPHA, CERTAIN, global_seed, ks_p_value, normal, plane_grid, seeded
from scipy import stats
from small_models import tiny_pool, warm
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_lvebm import (
    LVEBM,
    MALA,
    AutoParticles,
    ContextPool,
    MLPEnergy,
    PersistentPool,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    conditional_log_partition,
    log_evidence,
    log_partition,
    lvebm,
)
from pyro_lvebm.bases import GaussianBase, MixtureBase
from pyro_lvebm.latents.program import Program
from pyro_lvebm.sampling import STANDARD_NORMAL

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

LOCAL_ENERGY = sys.modules["pyro_lvebm.latents.energy"]


class Coupled(nn.Module):
    """f(x, z) = a z sin(x_0) + b x_1 + c x_0 x_1, or with b + context in place of b."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.8, 0.4, 0.3]))

    def forward(self, x: Tensor, z: Tensor, *context: Tensor) -> Tensor:
        a, b, c = self.theta
        if context:
            b = b + context[0][..., 0]
        return a * z[..., 0] * torch.sin(x[..., 0]) + b * x[..., 1] + c * x[..., 0] * x[..., 1]


def base_x() -> MixtureBase:
    """Two modes, correlated within, on coordinates that are not the data's."""
    tril = torch.tensor([[1.5, 0.0], [-0.4, 0.8]])
    return MixtureBase(
        GaussianBase(torch.tensor([0.5, -0.3]), tril),
        torch.tensor([0.7, 0.3]).log(),
        torch.tensor([[-0.8, -0.6], [1.2, 1.6]]),
        torch.tensor([[[0.6, 0.0], [0.3, 0.5]], [[0.4, 0.0], [-0.2, 0.3]]]),
    )


def mixture_ebm(pool: Any = None, **options: Any) -> LVEBM:
    base_z = GaussianBase(torch.tensor([0.2]), torch.tensor([1.3]))
    return LVEBM(Coupled(), base_x(), base_z, tiny_pool() if pool is None else pool, **options)


def quadrature(ebm: LVEBM, x: Tensor, context: Tensor | None = None) -> Tensor:
    """log ∫ exp(−E(x, z)) dz (*b,)."""
    z = torch.linspace(-9.0, 9.0, 31)
    wide = x[..., None, :].expand(*x.shape[:-1], len(z), 2)
    c = None if context is None else context.expand(*wide.shape[:-1], 1)
    with torch.no_grad():
        energy = ebm.energy(wide, z[:, None].expand(*wide.shape[:-1], 1), c).double()
    return torch.logsumexp(-energy, -1) + math.log(18.0 / 30)


def exact_log_z(ebm: LVEBM, context: Tensor | None = None, half_width: float = 9.0) -> float:
    points, cell = plane_grid(half_width, 81)
    values = [quadrature(ebm, part.float(), context) for part in points.split(20000)]
    return float(torch.logsumexp(torch.cat(values), 0) + math.log(cell))


def line_cdf(log_density: Tensor, grid: Tensor) -> Any:
    """Distribution function on a grid of a log density, up to a constant."""
    cdf = torch.softmax(log_density.double(), 0).cumsum(0)

    def evaluate(x: Any) -> Any:
        return cdf[torch.searchsorted(grid, torch.as_tensor(x)).clamp(max=len(grid) - 1)].numpy()

    return evaluate


# --- log Z and draws ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pool", [TemperedPool(4, 400, seed=1), TemperedPool(2, 400, seed=2)], ids=["four", "two"]
)
def test_log_z_online_is_that_of_quadrature(pool: TemperedPool) -> None:
    """Within 4 stated standard errors (false alarms: 1e-4); that of f = 0 is not."""
    ebm = warm(mixture_ebm(pool))
    error = 4.0 * float(ebm.pool.log_partition_std_error)
    expected = exact_log_z(ebm)
    assert abs(float(ebm.log_partition) - expected) < error < 0.1 < abs(expected)


def test_brackets_hold_the_exact_value() -> None:
    ebm = warm(mixture_ebm(TemperedPool(4, 200, seed=1)), 15)
    found = log_partition(ebm, num_particles=200, num_runs=6, num_refreshes=10)
    assert found.is_reliable and found.lower < exact_log_z(ebm) < found.upper


def test_draws_of_the_pool_have_the_shares_of_the_modes() -> None:
    """Normal test of the share of draws beyond x_0 + x_1 = 1, against quadrature.

    False alarms: 1e-3. A share that is 1.5 times as large fails.
    """
    ebm = warm(mixture_ebm(TemperedPool(3, 1500, num_moves=4, seed=3)), 15)
    points, _ = plane_grid(9.0, 121)
    log_c = torch.cat([quadrature(ebm, part.float()) for part in points.split(20000)])
    exact = float(torch.softmax(log_c, 0)[points.sum(1) > 1.0].sum())
    u = ebm.pool.draw(ebm, 1200, generator=seeded(0))
    beyond = (ebm.unwhiten(u)[0].sum(1) > 1.0).double().mean()

    def p_value(share: float) -> float:
        z = abs(float(beyond) - share) / math.sqrt(share * (1.0 - share) / len(u))
        return math.erfc(z / math.sqrt(2.0))

    assert p_value(exact) > ALPHA
    assert p_value(1.5 * exact) < CERTAIN


def kept_p_value(pool: Any) -> float:
    """Kolmogorov's test of chains of f = 0 after three refreshes, along x_0 − x_1."""
    ebm = mixture_ebm(pool)
    with torch.no_grad():
        ebm.f.theta.zero_()
    warm(ebm, 3)
    chains = ebm.unwhiten(ebm.pool.u.flatten(0, 1))[0]
    fresh = ebm.unwhiten(ebm.base.draw((4000, 3), chains, seeded(9)))[0]
    pair = [(x[:, 0] - x[:, 1]).numpy() for x in (chains, fresh)]
    return float(stats.ks_2samp(*pair).pvalue)


POOLS = {
    "tempered": lambda: TemperedPool(2, 1500, num_moves=8, seed=1),
    "persistent": lambda: PersistentPool(3000, kernel=MALA(), step_size=0.1, seed=1),
}


@pytest.mark.parametrize("name", POOLS)
def test_chains_keep_the_law_of_the_base(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """False alarms: 1e-3. Chains that move on a standard normal leave it."""
    assert kept_p_value(POOLS[name]()) > ALPHA
    pool = POOLS[name]()
    real = type(pool)._advance

    def advance(self: Any, ebm: Any, *args: Any) -> None:
        seen = SimpleNamespace(base=STANDARD_NORMAL, residual_and_grad=ebm.residual_and_grad)
        real(self, seen, *args)

    monkeypatch.setattr(type(pool), "_advance", advance)
    assert kept_p_value(pool) < CERTAIN


def test_log_z_of_contexts_is_that_of_quadrature() -> None:
    ebm = mixture_ebm(ContextPool(4, 16, num_moves=2), context_shape=(1,))
    contexts = torch.tensor([[-0.3], [0.5]])
    found = conditional_log_partition(ebm, contexts, num_particles=256, num_runs=6)
    for k, context in enumerate(contexts):
        assert found.lower[k] < exact_log_z(ebm, context) < found.upper[k]
    ebm.pool.refresh(ebm, contexts)
    assert math.isfinite(ebm.log_partition)


# --- conditionals ---------------------------------------------------------------------------


def test_imputed_entries_have_both_modes() -> None:
    """Kolmogorov's test of imputed x_0 given x_1 = 0.9, against quadrature.

    False alarms: 1e-3. Those given another entry fail.
    """
    ebm = mixture_ebm()
    row = torch.tensor([[torch.nan, 0.9]])
    draws = ebm.impute(row, num_samples=400)[:, 0, 0]
    grid = torch.linspace(-8.0, 9.0, 3401)

    def p_value(seen: float) -> float:
        at = torch.stack([grid, torch.full_like(grid, seen)], -1)
        return ks_p_value(draws, line_cdf(quadrature(ebm, at), grid))

    assert p_value(0.9) > ALPHA
    assert p_value(-0.6) < CERTAIN


def test_draws_of_x_given_z_have_both_modes() -> None:
    """Kolmogorov's test of x_0 given z = 2, drawn by the site, against quadrature.

    False alarms: 1e-3. Those given another z fail.
    """
    ebm = mixture_ebm()

    def model() -> Tensor:
        with pyro.plate("rows", 500):
            x, _ = lvebm("a", ebm)
        return x

    held = poutine.condition(model, {"a_z": torch.full((500, 1), 2.0)})
    with ebm.frozen(), global_seed(5):
        x = held().detach()
    points, _ = plane_grid(9.0, 401)
    axis = torch.linspace(-9.0, 9.0, 401)

    def p_value(at: float) -> float:
        with torch.no_grad():
            energy = ebm.energy(points.float(), torch.full((len(points), 1), at))
        density = torch.logsumexp(-energy.double().reshape(401, 401), 1)
        return ks_p_value(x[:, 0], line_cdf(density, axis))

    assert p_value(2.0) > ALPHA
    assert p_value(-2.0) < CERTAIN


# --- evidence, and missing entries in the model ---------------------------------------------

HOLED = torch.tensor([[0.3, 0.8], [torch.nan, 0.9], [-1.0, torch.nan], [1.8, torch.nan]])


def observed_log_c(ebm: LVEBM) -> Tensor:
    """log ∫∫ exp(−E) dx_m dz of every row, by quadrature."""
    values, grid = [], torch.linspace(-9.0, 10.0, 1901)
    for row in HOLED:
        if not row.isnan().any():
            values.append(quadrature(ebm, row))
            continue
        x = torch.where(row.isnan(), grid[:, None], row)
        values.append(torch.logsumexp(quadrature(ebm, x), 0) + math.log(0.01))
    return torch.stack(values)


def test_evidence_of_observed_entries_is_that_of_quadrature() -> None:
    """Within four standard errors and a hundredth; that with the Gaussian's marginal is not."""
    ebm = warm(mixture_ebm(TemperedPool(4, 200, seed=1)))
    log_z = log_partition(ebm, num_particles=100, num_runs=4, num_refreshes=5)
    found = log_evidence(ebm, HOLED, log_z=log_z, num_particles=128, num_runs=6)
    expected = observed_log_c(ebm) - log_z.estimate
    error = 4.0 * (found.std_error**2 + log_z.std_error**2) ** 0.5 + 0.01
    assert (abs(found.value - expected) < error).all()


def plate_model(ebm: LVEBM) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x)

    return model


def test_three_sites_add_up_to_the_joint_density() -> None:
    ebm = mixture_ebm()
    z, entries = normal((4, 1), 1, torch.float32), normal((4, 2), 2, torch.float32)
    model = poutine.condition(plate_model(ebm), {"scene_z": z, "scene_missing": entries})
    with ebm.frozen():
        trace = poutine.trace(model).get_trace(HOLED)
    trace.compute_log_prob()
    found = sum(trace.nodes[name]["log_prob"] for name in ("scene", "scene_z", "scene_missing"))
    dummy = trace.nodes["scene_missing"]["fn"].completion
    whole = torch.where(HOLED.isnan(), entries, HOLED)
    expected = -ebm.energy(whole, z).detach() - ebm.log_partition
    expected = expected + dummy.log_prob(entries) - dummy.log_prob_missing(entries)
    torch.testing.assert_close(found, expected)


def test_the_direct_energy_is_that_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    ebm = mixture_ebm()
    model = plate_model(ebm)
    guide = AutoParticles(model, 3)
    with torch.no_grad(), global_seed(0):
        guide(HOLED)
        vectorised = pyro.plate("num_particles_vectorized", 3, dim=-2)(guide)
        trace = poutine.trace(vectorised).get_trace(HOLED)
    arguments = (Program(model, (HOLED,), {}, 1), guide, trace)
    with ebm.frozen():
        (direct,), _ = LOCAL_ENERGY.latent_blocks(*arguments)
        monkeypatch.setattr(LOCAL_ENERGY, "_own_part", lambda *_: None)
        (traced,), _ = LOCAL_ENERGY.latent_blocks(*arguments)
        v = normal((5, 4, 3), 5, torch.float32)
        (f, grad), (g, slow) = direct.f(v), traced.f(v)
    torch.testing.assert_close(f - direct.offset, g - traced.offset, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, slow, rtol=1e-4, atol=1e-4)


# --- from_data ------------------------------------------------------------------------------


def rare_rows(count: int, seed: int) -> Tensor:
    """A standard normal, and a mode of 5 % nine away, of a third of its width."""
    x = normal((count, 2), seed, torch.float32)
    rare = torch.rand(count, generator=seeded(seed + 1)) < 0.05
    return torch.where(rare[:, None], 0.3 * x + torch.tensor([7.0, 6.0]), x)


def test_from_data_takes_what_cross_validation_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    def base(x: Tensor, energy: nn.Module, **options: Any) -> GaussianBase:
        return LVEBM.from_data(energy, x, z_dim=1, **options).base_x

    x, plain = rare_rows(600, 1), normal((300, 2), 3, torch.float32)
    assert isinstance(base(x, MLPEnergy(2, 1)), MixtureBase)
    assert type(base(x, MLPEnergy(2, 1), base="gaussian")) is GaussianBase
    assert type(base(plain, MLPEnergy(2, 1))) is GaussianBase
    one = base(plain, MLPEnergy(2, 1), base="mixture")
    assert isinstance(one, MixtureBase) and one.num_components == 1
    torch.testing.assert_close(one.log_prob(plain), GaussianBase.fit(plain).log_prob(plain))
    assert type(base(x, QuadraticEnergy(2, 1))) is GaussianBase
    monkeypatch.setattr("pyro_lvebm.model.lvebm._MAX_MIXTURE_DIM", 1)
    assert type(base(x, MLPEnergy(2, 1))) is GaussianBase


def test_bases_that_do_not_fit_are_refused() -> None:
    x = rare_rows(300, 1)
    with pytest.raises(ValueError, match='base must be "auto", "gaussian" or "mixture"; got'):
        LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1, base="flow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a QuadraticEnergy needs a Gaussian base"):
        LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, base="mixture")
    with pytest.raises(ValueError, match="base_z must be a Gaussian"):
        LVEBM(MLPEnergy(1, 2), GaussianBase(torch.zeros(1), torch.ones(1)), base_x())
    gaussian, tril = GaussianBase(torch.zeros(2), torch.ones(2)), torch.eye(2)[None]
    zero, one = torch.zeros(1, 2), torch.zeros(1)
    with pytest.raises(ValueError, match="have shapes"):
        MixtureBase(gaussian, one, torch.zeros(1, 3), tril)
    with pytest.raises(ValueError, match="have shapes"):
        MixtureBase(gaussian, torch.tensor(0.0), zero, tril)
    for weight in (-0.1, math.nan):
        with pytest.raises(ValueError, match="weights add up to 1"):
            MixtureBase(gaussian, one + weight, zero, tril)
    for rows in (torch.ones(50, 2, dtype=torch.long), torch.full((50, 2), math.inf)):
        with pytest.raises(ValueError, match=r"floating|finite"):
            MixtureBase.fit(rows)
    with pytest.raises(ValueError, match="shape"):
        MixtureBase.fit(torch.randn(50, 3, generator=seeded(1)), gaussian=gaussian)
    with pytest.raises(ValueError, match="lower triangular"):
        MixtureBase(gaussian, one, zero, -tril)


def trained(
    x: Tensor, base: str, seed: int = 0, pool: Any = None, num_steps: int = 80
) -> tuple[LVEBM, Saddle]:
    """A small network after quick steps."""
    pyro.clear_param_store()
    pool = TemperedPool(4, 96, num_moves=4, seed=seed) if pool is None else pool
    energy = MLPEnergy(2, 1, hidden=(32, 32), seed=seed)
    ebm = LVEBM.from_data(energy, x, z_dim=1, base=base, pool=pool)  # type: ignore[arg-type]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=128) as i:
            lvebm("a", ebm, obs=x[i])

    saddle = Saddle(model, AutoParticles(model, 2), ClippedAdam({"lr": 5e-3}), seed=seed)
    for _ in range(num_steps):
        saddle.step(x)
    ebm.follow()
    return ebm, saddle


def errors(x: Tensor, base: str) -> Iterator[float]:
    """Distances of log Z online from quadrature, after 60, 80 and 100 steps."""
    ebm, saddle = trained(x, base, num_steps=40)
    for _ in range(3):
        for _ in range(20):
            saddle.step(x)
        yield abs(float(ebm.log_partition) - exact_log_z(ebm, half_width=12.0))


def test_a_rare_mode_does_not_break_training() -> None:
    """log Z online stays within 0.05 of quadrature.

    `make bench-modes` fits many seeds, shares and distances.
    """
    assert max(errors(rare_rows(1500, 5), "auto")) < 0.05


@pytest.mark.slow
def test_from_a_gaussian_base_log_z_online_of_a_rare_mode_wanders() -> None:
    """Slow: it does so after a hundred steps, not before."""
    assert max(errors(rare_rows(1500, 5), "gaussian")) > 0.3


def test_persistent_chains_start_in_every_mode() -> None:
    ebm, _ = trained(rare_rows(1500, 5), "auto", pool=PersistentPool(400, num_moves=2))
    far = (ebm.unwhiten(ebm.pool.negatives()[0])[0].sum(1) > 7.0).double().mean()
    assert 0.01 < far < 0.15


def test_training_with_missing_entries_on_positive_data() -> None:
    x = rare_rows(400, 7).exp()
    x[torch.rand(x.shape, generator=seeded(8)) < 0.2] = torch.nan
    energy = MLPEnergy(2, 1, hidden=(16,))
    ebm = LVEBM.from_data(
        energy, x, z_dim=1, support=constraints.positive, base="mixture", pool=tiny_pool()
    )
    assert isinstance(ebm.base_x, MixtureBase) and ebm.base_x.num_components > 1
    model = plate_model(ebm)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}))
    assert all(math.isfinite(loss) for loss in saddle.fit(x, num_steps=5, progress=False))
    filled = ebm.impute(x[:20])
    assert (filled > 0.0).all()


def test_checkpoints_hold_the_mixture(tmp_path: Path) -> None:
    x, file = rare_rows(600, 1), tmp_path / "fit.safetensors"
    ebm, saddle = trained(x, "auto", pool=tiny_pool(), num_steps=3)
    saddle.save(file)

    def load_into(rows: Tensor, base: str) -> LVEBM:
        other, fresh = trained(rows, base, seed=1, pool=tiny_pool(), num_steps=1)
        Saddle.load(file, fresh.model, fresh.guide, ClippedAdam({"lr": 5e-3}), rows)
        return other

    other = load_into(x, "auto")
    assert torch.equal(other.base_x.log_prob(x), ebm.base_x.log_prob(x))
    assert torch.equal(other.energy(x, x[:, :1]), ebm.energy(x, x[:, :1]))
    message = r"written with a mixture base of x; build with LVEBM.from_data\(base='mixture'\)"
    with pytest.raises(ValueError, match=message):
        load_into(x, "gaussian")
