# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from referee import (
    ALPHA,
    CERTAIN,
    gaussian_log_partition,
    mean_p_value,
    normal,
    plane_grid,
    variance_p_value,
)
from small_models import (
    data_of,
    exact_joint,
    exact_posterior,
    quadratic_ebm,
    rotations,
    same,
    snapshot,
    tiny_pool,
    warm,
    whitened,
)
from torch import Tensor, nn

from pyro_lvebm import LVEBM, MLPEnergy, PersistentPool, TemperedPool
from pyro_lvebm.bases.fitting import cross_validated_shrinkage
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.sampling import problems
from pyro_lvebm.sampling.langevin import value_and_grad


class ImageEnergy(nn.Module):
    """A user's energy on x (2, 3) and z of any shape, in the coordinates of the data."""

    def __init__(self, z_dims: int = 1) -> None:
        super().__init__()
        self.z_dims = z_dims
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))
        self.register_buffer("shift", torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        features = (x * self.weight).tanh().sum((-1, -2)) + self.shift
        return features + z.flatten(-self.z_dims).cos().sum(-1) * features.sin()


def image_base_x(full: bool) -> dist.TorchDistribution | GaussianBase:
    loc, std = normal((2, 3), 1), 0.5 + normal((2, 3), 2).abs()
    if not full:
        return dist.Normal(loc, std).to_event(2)
    return GaussianBase(loc, 0.3 * normal((6, 6), 3).tril(-1) + std.flatten().diag())


def image_ebm(full: bool = False, z_shape: tuple[int, ...] = (4,)) -> LVEBM:
    base_z = dist.Normal(normal(z_shape, 4), 0.7 * torch.ones(z_shape).double())
    return LVEBM(
        ImageEnergy(len(z_shape)),
        image_base_x(full),
        base_z.to_event(len(z_shape)),
        pool=PersistentPool(64, num_moves=2, seed=3),
    )


# --- from_data ------------------------------------------------------------------------------


@pytest.mark.usefixtures("global_rng_untouched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_data_starts_at_the_gaussian_fit(dtype: torch.dtype) -> None:
    """Maximum likelihood, but for the share a of shrinkage in the correlations."""
    x = (normal((40, 3), 0) @ normal((3, 3), 1) + 5.0).to(dtype)
    ebm = LVEBM.from_data(MLPEnergy(3, 2, hidden=(7,)), x, z_dim=2)
    rows = x.double()
    std = rows.std(0, correction=0)
    a = cross_validated_shrinkage((rows - rows.mean(0)) / std)
    cov = (1.0 - a) * torch.cov(rows.T, correction=0) + a * std.square().diag()
    fit = torch.distributions.MultivariateNormal(rows.mean(0), cov)
    z = normal((40, 2), 2, dtype)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(-1)
    expected = -fit.log_prob(rows) - standard
    torch.testing.assert_close(ebm.energy(x, z).double(), expected, rtol=1e-4, atol=1e-4)
    assert ebm.log_partition.item() == 0.0 and ebm.log_norm().item() == pytest.approx(0, abs=1e-6)
    assert ebm.energy(x, z).dtype is dtype and ebm.pool.u.dtype is dtype
    assert ebm.dim == 5 and ebm.x_shape == (3,) and ebm.z_shape == (2,)
    assert isinstance(ebm.pool, TemperedPool)


def test_from_data_keeps_the_shape_of_events() -> None:
    x = normal((30, 2, 3), 0)
    ebm = LVEBM.from_data(ImageEnergy(), x, z_dim=4, pool=PersistentPool(16))
    assert ebm.x_shape == (2, 3) and ebm.z_shape == (4,) and ebm.dim == 10
    assert isinstance(ebm.pool, PersistentPool) and ebm.pool.u.shape == (1, 16, 10)
    assert ebm.energy(x, normal((30, 4), 1)).shape == (30,)


# --- energy and coordinates -----------------------------------------------------------------


@pytest.mark.parametrize("z_shape", [(4,), (2, 2)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
def test_energy_is_f_minus_the_log_bases(
    full: bool, z_shape: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    ebm = image_ebm(full, z_shape)
    x, z = normal((*batch, 2, 3), 5), normal((*batch, *z_shape), 6)
    base = image_base_x(full)
    if isinstance(base, GaussianBase):
        law = torch.distributions.MultivariateNormal(base.loc, scale_tril=base.scale)
        log_x = law.log_prob(x.flatten(-2))
    else:
        log_x = base.log_prob(x)
    log_z = dist.Normal(normal(z_shape, 4), 0.7).to_event(len(z_shape)).log_prob(z)
    energy = ebm.energy(x, z)
    assert energy.shape == batch
    torch.testing.assert_close(energy, ebm.f(x, z) - log_x - log_z, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("full", [False, True])
def test_whitening_makes_the_bases_standard(full: bool) -> None:
    """E = ½ |u|² + f + const in whitened coordinates, and residuals are f there."""
    ebm = image_ebm(full)
    x, z = normal((7, 2, 3), 5), normal((7, 4), 6)
    u = ebm.whiten(x, z)
    assert u.shape == (7, 10)
    for ours, theirs in zip(ebm.unwhiten(u), (x, z), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ebm.residual(u), ebm.f(x, z))
    constant = ebm.energy(x, z) - 0.5 * (u**2).sum(-1) - ebm.residual(u)
    torch.testing.assert_close(constant, constant[:1].expand(7))
    value, grad = ebm.residual_and_grad(u)
    expected_value, expected_grad = value_and_grad(lambda v: ebm.f(*ebm.unwhiten(v)))(u)
    torch.testing.assert_close(value, expected_value)
    torch.testing.assert_close(grad, expected_grad)
    assert grad.abs().max() > 0.01 and not value.requires_grad


# --- joint ----------------------------------------------------------------------------------


def test_joint_density_is_the_exact_one_up_to_log_z() -> None:
    ebm = quadratic_ebm()
    value = 2.0 * normal((4, 6, 5), 1)
    log_prob = ebm.joint().log_prob(value)
    torch.testing.assert_close(log_prob, -ebm.energy(value[..., :3], value[..., 3:]))
    log_z = gaussian_log_partition(ebm.f.precision, ebm.f.linear)
    assert abs(log_z) > 0.05
    torch.testing.assert_close(log_prob - log_z, exact_joint(ebm).log_prob(value))


def test_joint_density_integrates_to_z() -> None:
    """∫ exp(-E) dx dz on a grid is E_base[exp(-f)] by Gauss-Hermite, for a bent energy."""

    class Bent(nn.Module):
        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return (2.0 * x[..., 0]).sin() * z[..., 0].tanh() + 0.3

    loc, std = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.5, 1.5]).double()
    base_x, base_z = (dist.Normal(loc[[k]], std[[k]]).to_event(1) for k in (0, 1))
    ebm = LVEBM(Bent(), base_x, base_z, pool=tiny_pool())
    u, cell = plane_grid(9.0, 401)
    log_prob = ebm.joint().log_prob(loc + std * u)
    integral = torch.logsumexp(log_prob, 0) + math.log(cell) + std.log().sum()
    nodes, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(120))
    grid = loc + std * torch.cartesian_prod(nodes, nodes)
    mass = torch.outer(weights, weights).flatten() / (2 * math.pi)
    exact = (mass * torch.exp(-Bent()(grid[:, :1], grid[:, 1:]))).sum().log()
    assert abs(exact + 0.3) > 0.05
    torch.testing.assert_close(integral, exact, rtol=0, atol=1e-5)


def joint_p_value(prepare: Callable[[LVEBM], object]) -> float:
    """p-value that means and second moments over 8 independent pools are those of the joint."""
    rows = []
    for seed in range(8):
        ebm = quadratic_ebm(2, 1, pool=TemperedPool(4, 400, num_moves=2, seed=seed))
        prepare(ebm)
        torch.manual_seed(100 + seed)
        draws = ebm.joint().sample((1500,))
        assert draws.shape == (1500, 3)
        white = whitened(draws, exact_joint(ebm))
        rows.append(torch.cat([white.mean(0), (rotations(white) ** 2).mean(0)]))
    expected = [0.0] * 3 + [1.0] * (len(rows[0]) - 3)
    return mean_p_value(torch.stack(rows), expected)


def test_joint_draws_have_the_exact_moments() -> None:
    """Student's test over 8 pools. False alarms: 1e-3."""
    assert joint_p_value(lambda ebm: warm(ebm, 20)) > ALPHA


def test_joint_check_fails_without_the_weights() -> None:
    def prepare(ebm: LVEBM) -> None:
        warm(ebm, 20)
        ebm.pool.log_weights = torch.full_like(ebm.pool.log_weights, -math.log(1600))
        ebm.pool.step_size = 1e-4 * ebm.pool.step_size  # moves would repair the draws

    assert joint_p_value(prepare) < CERTAIN


# --- posterior ------------------------------------------------------------------------------


def posterior_p_value() -> float:
    """p-value that 600 draws for each of 6 data have the exact posterior moments.

    Every draw comes from a run of its own, so that whitened draws are independent N(0, I).
    """
    ebm = quadratic_ebm(3, 2, seed=2)
    x = data_of(ebm, 6)
    torch.manual_seed(0)
    draws = ebm.posterior(x).sample((600,))
    assert draws.shape == (600, 6, 2)
    white = whitened(draws, exact_posterior(ebm, x))
    variance = variance_p_value(rotations(white), 1.0)
    return min(1.0, 2.0 * min(variance, mean_p_value(white, 0.0)))


def test_posterior_draws_have_the_exact_moments() -> None:
    """Chi-square and Student's test. False alarms: 1e-3."""
    assert posterior_p_value() > ALPHA


def test_posterior_check_fails_for_a_run_that_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = problems.anneal

    def early(f: object, v: Tensor, schedule: tuple, **kwargs: object) -> object:
        cut = type(schedule)(0.7 * schedule.betas, schedule.step_sizes)
        return real(f, v, cut, **kwargs)

    monkeypatch.setattr(problems, "anneal", early)
    assert posterior_p_value() < CERTAIN


def test_posterior_density_is_the_exact_one_up_to_the_evidence() -> None:
    ebm = quadratic_ebm(3, 2, seed=4)
    x, z = data_of(ebm, 6), normal((5, 6, 2), 1)
    log_prob = ebm.posterior(x).log_prob(z)
    assert log_prob.shape == (5, 6)
    log_c = log_prob - exact_posterior(ebm, x).log_prob(z)
    torch.testing.assert_close(log_c, log_c[:1].expand(5, 6))  # one constant for each datum
    log_z = gaussian_log_partition(ebm.f.precision, ebm.f.linear)
    joint = exact_joint(ebm)
    marginal = torch.distributions.MultivariateNormal(
        joint.mean[:3], joint.covariance_matrix[:3, :3]
    )
    expected = marginal.log_prob(x) + log_z - ebm.base_x.log_prob(x)
    torch.testing.assert_close(log_c[0], expected)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5, 2).double(), r"shape \(5, 2\); expected trailing shape \(3,\)"),
        (torch.full((5, 3), math.nan).double(), "15 NaN or infinite"),
        (torch.zeros(5, 3).long(), "floating point"),
    ],
)
def test_posterior_refuses_bad_data(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quadratic_ebm().posterior(x)


# --- log Z: value and gradient --------------------------------------------------------------


def test_log_norm_has_the_gradient_of_the_weighted_pool() -> None:
    """∇ log_norm = -Σ w ∇f, against a sum written out over the negatives, one by one."""
    for ebm in (quadratic_ebm(seed=1), image_ebm(full=True)):
        params = list(ebm.f.parameters())
        log_norm = ebm.log_norm()
        assert log_norm.shape == ()
        torch.testing.assert_close(log_norm, ebm.pool.log_partition, rtol=0, atol=1e-12)
        ours = torch.autograd.grad(log_norm, params)
        u, log_w = ebm.pool.negatives()
        manual = [torch.zeros_like(p) for p in params]
        for row, weight in zip(u, log_w.exp(), strict=True):
            for total, part in zip(
                manual, torch.autograd.grad(ebm.residual(row), params), strict=True
            ):
                total -= weight * part
        assert max(float(g.abs().max()) for g in ours) > 0.05
        for a, b in zip(ours, manual, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_log_norm_gradient_is_that_of_the_closed_form() -> None:
    """Student's test over 8 pools with their own seeds. False alarms: 1e-3.

    Each replicate averages refreshes 15 to 31. Its bias is far below the standard error. Gradients
    of nine tenths of the size fail.
    """
    rows = []
    for seed in range(8):
        ebm = quadratic_ebm(2, 1, seed=3, pool=TemperedPool(4, 512, num_moves=2, seed=seed))
        params = list(ebm.f.parameters())
        exact = torch.autograd.grad(ebm.f.log_partition(), params)
        warm(ebm, 15)
        total = torch.zeros(12, dtype=torch.float64)
        for _ in range(16):
            ebm.mark_pool(fresh=False)
            grads = torch.autograd.grad(ebm.log_norm(), params)
            total += torch.cat([g.flatten() for g in grads]) / 16
        rows.append(total)
    flat = torch.cat([g.flatten() for g in exact])
    used = flat != 0.0  # the upper triangle of R is not a parameter
    assert used.sum() == 9
    found = torch.stack(rows)[:, used]
    assert mean_p_value(found, flat[used]) > ALPHA
    assert mean_p_value(0.9 * found, flat[used]) < CERTAIN


@pytest.mark.usefixtures("global_rng_untouched")
def test_log_norm_has_no_gradient_where_theta_cannot_change() -> None:
    ebm = warm(quadratic_ebm(), 3)
    ebm.mark_pool(fresh=False)
    before = snapshot(ebm)
    with torch.no_grad():
        assert not ebm.log_norm().requires_grad
    with ebm.frozen():
        assert not ebm.log_norm().requires_grad
        assert ebm.log_norm() == ebm.log_partition
    for p in ebm.f.parameters():
        p.requires_grad_(False)
    assert not ebm.log_norm().requires_grad
    assert same(before, snapshot(ebm))  # and the pool stayed where it was
    ebm.f.linear.requires_grad_(True)
    assert ebm.log_norm().requires_grad
    assert not same(before, snapshot(ebm))


@pytest.mark.parametrize("change", ["in place", "data", "optimiser", "load", "dtype"])
def test_the_pool_is_refreshed_exactly_when_theta_has_changed(change: str) -> None:
    ebm = quadratic_ebm()
    refreshes = ebm.pool.refreshes

    def count() -> int:
        return int(ebm.pool.refreshes)

    assert not ebm.pool_is_fresh() and int(refreshes) == 0
    ebm.log_norm()
    assert count() == 1 and ebm.pool_is_fresh()
    for _ in range(3):
        ebm.log_norm().backward()
    assert count() == 1
    if change == "in place":
        with torch.no_grad():
            ebm.f.linear[0] += 1e-12
    elif change == "data":
        ebm.f.linear.data[1] = 0.3
    elif change == "optimiser":
        torch.optim.SGD(ebm.f.parameters(), lr=1e-3).step()
    elif change == "load":
        ebm.load_state_dict(quadratic_ebm(seed=9).state_dict())
    else:
        ebm.float()
    before = count()
    assert not ebm.pool_is_fresh()
    with torch.no_grad():
        ebm.log_norm()
    assert count() == before
    ebm.log_norm()
    ebm.log_norm()
    assert count() == before + 1 and ebm.pool_is_fresh()


def test_mark_pool_keeps_its_own_copy_of_theta() -> None:
    ebm = quadratic_ebm()
    ebm.mark_pool(fresh=True)
    assert ebm.pool_is_fresh()
    ebm.f.linear.data.add_(1.0)
    assert not ebm.pool_is_fresh()
    ebm.f.linear.data.sub_(1.0)
    ebm.mark_pool(fresh=False)
    assert not ebm.pool_is_fresh()


def test_kl_of_update_is_that_of_the_pool() -> None:
    """KL = Σ w log(w / w_new) with w_new ∝ w exp(-(f_new - f_old)), written out."""
    ebm = warm(quadratic_ebm(seed=5), 5)
    assert ebm.kl_of_update().item() == pytest.approx(0.0, abs=1e-12)
    f_old = ebm.residual(ebm.pool.negatives()[0])
    with torch.no_grad():
        ebm.f.linear += 0.3
    u, log_w = ebm.pool.negatives()
    new = log_w.exp() * torch.exp(f_old - ebm.residual(u))
    kl = (log_w.exp() * (log_w - (new / new.sum()).log())).sum()
    assert kl > 0.01
    torch.testing.assert_close(ebm.kl_of_update(), kl.detach(), rtol=1e-6, atol=1e-9)
    assert not ebm.kl_of_update().requires_grad


# --- frozen ---------------------------------------------------------------------------------


def test_frozen_gives_back_what_it_took() -> None:
    ebm = quadratic_ebm()
    ebm.f.linear.requires_grad_(False)
    with pytest.raises(KeyError), ebm.frozen():
        assert not any(p.requires_grad for p in ebm.parameters())
        raise KeyError
    assert ebm.f.raw_tril.requires_grad and not ebm.f.linear.requires_grad
    with ebm.frozen(), ebm.frozen():
        assert not ebm.f.raw_tril.requires_grad
    assert ebm.f.raw_tril.requires_grad


# --- a module like any other ----------------------------------------------------------------


def test_only_the_energy_has_parameters() -> None:
    ebm = quadratic_ebm()
    assert {n for n, _ in ebm.named_parameters()} == {"f.raw_tril", "f.linear"}
    assert {"pool.u", "pool.log_weights", "base_x.loc", "base_z.scale"} <= ebm.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dtype_reaches_everything(dtype: torch.dtype) -> None:
    ebm = LVEBM.from_data(
        MLPEnergy(3, 2, hidden=(4,)), normal((20, 3), 0).float(), z_dim=2, base="gaussian"
    )
    ebm.to(dtype)
    floating = [t for t in ebm.state_dict().values() if t.is_floating_point()]
    assert len(floating) > 20 and all(t.dtype is dtype for t in floating)
    log_norm = ebm.log_norm()
    log_norm.backward()
    assert log_norm.dtype is dtype and ebm.f.out.weight.grad.dtype is dtype
    assert ebm.joint().sample((4,)).dtype is dtype
    x = normal((5, 3), 1, dtype)
    assert ebm.posterior(x).sample().dtype is dtype
    assert ebm.double().energy(x.double(), torch.zeros(5, 2).double()).dtype is torch.float64


@pytest.mark.parametrize("make", [tiny_pool, lambda seed: PersistentPool(32, seed=seed)])
def test_state_dict_carries_the_pool(make: Callable[[int], TemperedPool | PersistentPool]) -> None:
    ebm = warm(quadratic_ebm(pool=make(7)), 5)
    other = quadratic_ebm(seed=8, pool=make(7))
    assert not same(snapshot(ebm), snapshot(other))
    other.load_state_dict(ebm.state_dict())
    assert same(snapshot(ebm), snapshot(other))
    draws = []
    for module in (ebm, other):
        torch.manual_seed(0)
        draws.append(module.joint().sample((6,)))
        module.pool.refresh(module)
        draws.append(module.pool.u)
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    x, z = data_of(ebm, 4), normal((4, 2), 1)
    assert torch.equal(ebm.energy(x, z), other.energy(x, z))


def test_a_deep_copy_is_independent() -> None:
    ebm = warm(quadratic_ebm(), 3)
    before = snapshot(ebm)
    twin = copy.deepcopy(ebm)
    assert same(before, snapshot(twin)) and twin.pool_is_fresh()
    with torch.no_grad():
        twin.f.linear += 1.0
    twin.log_norm().backward()
    assert int(twin.pool.refreshes) == int(ebm.pool.refreshes) + 1
    assert same(before, snapshot(ebm)) and ebm.pool_is_fresh() and ebm.f.linear.grad is None
    twin.base_x.loc.add_(1.0)
    x, z = data_of(ebm, 4), normal((4, 2), 1)
    assert not torch.equal(ebm.energy(x, z), twin.energy(x, z))
    assert twin.f.base_x is twin.base_x and ebm.f.base_x is ebm.base_x


@pytest.mark.parametrize("z_shape", [(4,), (2, 2)])
def test_a_users_energy_on_events_of_any_shape_trains(z_shape: tuple[int, ...]) -> None:
    """The loss falls by far more than it wobbles when θ ascends on data away from the base."""
    ebm = image_ebm(full=True, z_shape=z_shape)
    x = data_of(ebm, 50) + 0.8
    optim = torch.optim.Adam(ebm.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optim.zero_grad()
        z = ebm.posterior(x).sample()
        loss = (ebm.energy(x, z) + ebm.log_norm()).mean()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3
    assert ebm.joint().sample((3, 2)).shape == (3, 2, 6 + math.prod(z_shape))
    assert z.shape == (50, *z_shape)


# --- bad input ------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, value: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor, z: Tensor) -> object:
        return self.value(x)


STANDARD = dist.Normal(torch.zeros(3), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x[..., :1], r"expected shape \(4,\); got \(4, 1\)"),
        (lambda x: x.sum(), r"expected shape \(4,\); got \(\)"),
        (lambda x: x, r"for x \(4, 3\) and z \(4, 3\).*got \(4, 3\)"),
        (lambda x: 1.0, "got float"),
        (lambda x: None, "got NoneType"),
        (lambda x: x.sum(-1) * math.nan, "NaN at the mean of the bases"),
        (lambda x: x.sum(-1) - x.sum(), "depends on the others in its batch"),
        (lambda x: x.sum(-1).roll(1), "depends on the others in its batch"),
        (lambda x: x.sum(-1) + x[:1].sum(), "depends on the others in its batch"),
        (lambda x: x.sum(-1) + 0.1 * torch.arange(len(x)), "or on its place there"),
        (lambda x: x.sum(-1) + torch.rand(len(x)), "is random: two calls differ"),
    ],
)
def test_energies_that_do_not_fit_are_refused(
    value: Callable[[Tensor], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LVEBM(Returns(value), STANDARD, STANDARD)
    with pytest.raises(ValueError, match=message):
        LVEBM.from_data(Returns(value), normal((9, 3), 0).float(), z_dim=3)


class Coupled(nn.Module):
    """A network that normalises over the batch; its output starts at zero, and hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 1))
        for part in self.net[3].parameters():
            nn.init.zeros_(part)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([x, z], -1)).squeeze(-1)


def test_batch_normalisation_is_refused_unless_it_is_at_rest() -> None:
    base_z, energy = dist.Normal(torch.zeros(1), 1.0).to_event(1), Coupled()
    mean = energy.net[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"BatchNorm1d 'net\.1' of the energy"):
        LVEBM(energy, STANDARD, base_z)
    assert torch.equal(energy.net[1].running_mean, mean)
    assert LVEBM(energy.eval(), STANDARD, base_z).dim == 4


def test_dropout_is_refused_unless_it_is_at_rest() -> None:
    base_z = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    energy = Coupled()
    energy.net[1] = nn.Dropout()
    nn.init.ones_(energy.net[3].weight)
    with pytest.raises(ValueError, match=r"Dropout 'net\.1' of the energy is random: two calls"):
        LVEBM(energy, STANDARD, base_z)
    assert LVEBM(energy.eval(), STANDARD, base_z).dim == 4


def test_an_energy_must_be_a_module() -> None:
    with pytest.raises(ValueError, match=r"energy must be an nn\.Module; got function"):
        LVEBM(lambda x, z: x.sum(-1), STANDARD, STANDARD)


def test_dimensions_must_fit_those_of_the_energy() -> None:
    with pytest.raises(ValueError, match=r"x_dim=2 and z_dim=3, but the bases have 3 and 3"):
        LVEBM(MLPEnergy(2, 3), STANDARD, STANDARD)
    with pytest.raises(ValueError, match=r"z_dim=3, but the bases have 3 and 2"):
        LVEBM.from_data(MLPEnergy(3, 3), normal((9, 3), 0).float(), z_dim=2)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (dist.Poisson(torch.ones(3)).to_event(1), "Poisson with a discrete support"),
        (dist.Bernoulli(0.5 * torch.ones(3)).to_event(1), "Bernoulli with a discrete support"),
        (dist.Categorical(torch.ones(3)), "Categorical with a discrete support"),
        (dist.OneHotCategorical(torch.ones(3)), "OneHotCategorical with a discrete support"),
        (dist.Gamma(torch.ones(3), 1.0).to_event(1), "must be a Gaussian.*got Gamma"),
        (dist.Normal(torch.zeros(3), 1.0), r"batch shape \(3,\)"),
        (dist.Normal(0.0, 1.0), r"event shape \(\)"),
        (None, "got NoneType"),
    ],
)
@pytest.mark.parametrize("role", ["base_x", "base_z"])
def test_bases_that_are_no_gaussians_are_refused(base: object, message: str, role: str) -> None:
    bases = {"base_x": STANDARD, "base_z": STANDARD} | {role: base}
    with pytest.raises(ValueError, match=f"{role}.*{message}"):
        LVEBM(Returns(lambda x: x.sum(-1)), **bases)


X = normal((9, 3), 0)


@pytest.mark.parametrize(
    ("x", "z_dim", "message"),
    [
        (X, -1, "z_dim must be at least 0; got -1"),
        (X, -2, "z_dim must be at least 0; got -2"),
        (X.long(), 2, r"floating point; got torch\.int64"),
        (X > 0, 2, r"floating point; got torch\.bool"),
        (X * torch.tensor([1.0, math.nan, 1.0]), 2, r"columns \[1\] of x are .* never seen"),
        (torch.where(X == X[4, 1], math.inf, X), 2, "1 infinite entries of 27"),
        (torch.where(X == X[4, 1], -math.inf, X), 2, "1 infinite"),
        (X[:0], 2, r"empty: shape \(0, 3\)"),
        (X[:, :0], 2, r"empty: shape \(9, 0\)"),
        (X[0], 2, r"\(N, \.\.\.\).*got \(3,\)"),
        (X[:3], 2, "needs more than 3 rows; got 3"),
        (X[:1], 2, "needs more than 3 rows; got 1"),
        (X * torch.tensor([1.0, 0.0, 1.0]), 2, r"columns \[1\] of x are constant"),
        (X[:, [0, 1, 1]], 2, "singular"),
        (X.tolist(), 2, r"must be a torch\.Tensor or an array; got list"),
    ],
)
def test_bad_data_are_refused(x: object, z_dim: int, message: str) -> None:
    energy = MLPEnergy(3, 2, hidden=(4,))
    before = snapshot(energy)
    with pytest.raises(ValueError, match=message):
        LVEBM.from_data(energy, x, z_dim=z_dim)
    assert all(torch.equal(energy.state_dict()[k].float(), v) for k, v in before.items())
    # And the energy is still free for proper data.
    LVEBM.from_data(energy, X.float(), z_dim=2, pool=tiny_pool())


def test_refused_data_leave_the_dtype_of_the_energy() -> None:
    energy = MLPEnergy(3, 2, hidden=(4,))
    with pytest.raises(ValueError, match="needs more than 3 rows"):
        LVEBM.from_data(energy, X[:3], z_dim=2)
    assert energy.out.weight.dtype is torch.float32
