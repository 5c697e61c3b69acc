# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import make_neural
from pool_models import LINEAR, PRECISION, frozen_ebm
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, Adam
from referee import ALPHA, CERTAIN, gaussian_draws, gaussian_moments, mean_p_value, normal
from scipy.optimize import brentq
from small_models import data_of, plate_model, quadratic_ebm, tiny_pool, warm
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    ContextPool,
    GeneratorBase,
    MLPEnergy,
    PersistentPool,
    Saddle,
    TemperedPool,
    ZeroEnergy,
    lvebm,
)
from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.training.penalties import (
    Penalty,
    add_penalties,
    energy_l2,
    kl_to_base,
)

PENALTIES: dict[str, Callable[[float], Penalty]] = {
    "energy_l2": energy_l2,
    "kl_to_base": kl_to_base,
}


def weight_decay(strength: float) -> Penalty:
    """A penalty of a user's own: ½ strength Σ |W|²."""

    def penalty(ebm: LVEBM) -> Tensor:
        matrices = [p for p in ebm.f.parameters() if p.dim() == 2]
        return 0.5 * strength * torch.stack([(w**2).sum() for w in matrices]).sum()

    return penalty


@pytest.fixture
def ebm() -> LVEBM:
    """A network far from its base, with a pool that has followed it."""
    return warm(make_neural(2, 1, pool=TemperedPool(3, 30, num_moves=2, seed=1)), 5)


def weights_of(ebm: LVEBM) -> list[np.ndarray]:
    layers = [*ebm.f.hidden, ebm.f.out]
    return [layer.weight.detach().numpy() for layer in layers]


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.7, 30.0])
def test_energy_l2_is_the_weighted_mean_square_of_f(ebm: LVEBM, strength: float) -> None:
    """With f written out in data coordinates, and weights that are not equal."""
    u, log_w = ebm.pool.negatives()
    x, z = ebm.unwhiten(u)
    f = (ebm.energy(x, z) + ebm.base_x.log_prob(x) + ebm.base_z.log_prob(z)).detach().numpy()
    weights = log_w.exp().numpy()
    assert weights.max() > 2.0 / len(weights)
    value = energy_l2(strength)(ebm)
    assert value.item() == pytest.approx(strength * (weights * f**2).sum(), rel=1e-9)


def on_grid(ebm: LVEBM, half_width: float = 7.0, points: int = 61) -> LVEBM:
    """Give an LVEBM with one x and one z a pool that is a quadrature of p_θ."""
    axis = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    u = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        f = ebm.residual(u)
    ebm.pool.u, ebm.pool.f = u[None], f[None]
    ebm.pool.log_weights = torch.log_softmax(-f - 0.5 * (u * u).sum(-1), 0)
    return ebm


def small_network(scale: float = 1.0) -> LVEBM:
    """A network with one x and one z on standard normal bases."""
    base = dist.Normal(torch.zeros(1).double(), torch.ones(1).double()).to_event(1)
    energy = MLPEnergy(1, 1, hidden=(4,), fourier_features=2, seed=3).double()
    with torch.no_grad():
        energy.out.weight += scale * normal((1, 4), 9)
    return on_grid(LVEBM(energy, base, base, pool=PersistentPool(61**2)))


def exact_penalty(ebm: LVEBM) -> float:
    """log(1 + 2 KL(p_θ ‖ base)) by quadrature."""
    u = ebm.pool.u[0]
    with torch.no_grad():
        f = ebm.residual(u)
    log_base = torch.log_softmax(-0.5 * (u * u).sum(-1), 0)
    log_p = torch.log_softmax(log_base - f, 0)
    return math.log1p(2.0 * float((log_p.exp() * (log_p - log_base)).sum()))


@pytest.mark.parametrize("strength", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("scale", [2.0, 8.0])
def test_kl_to_base_is_that_of_quadrature(strength: float, scale: float) -> None:
    """Near the base and far from it; a constant in f costs nothing."""
    ebm = small_network(scale)
    expected = strength * exact_penalty(ebm)
    assert exact_penalty(ebm) > 0.05
    assert kl_to_base(strength)(ebm).item() == pytest.approx(expected, rel=1e-9)
    with torch.no_grad():
        ebm.f.out.bias += 5.0
    ebm.pool.f = ebm.pool.f + 5.0
    assert kl_to_base(strength)(ebm).item() == pytest.approx(expected, rel=1e-9)


def slopes_of_kl_to_base(penalty: Penalty) -> tuple[Tensor, Tensor]:
    """Its gradient along six directions, and finite differences of the exact value."""
    ebm = small_network(8.0)
    params = [p for p in ebm.f.parameters() if p.requires_grad]
    penalty(ebm).backward()
    grad = torch.cat([p.grad.flatten() for p in params])
    start, eps, ours, exact = flat(params), 1e-5, [], []
    for k in range(6):
        direction = normal((len(start),), 40 + k)
        ends = []
        for sign in (1.0, -1.0):
            nn.utils.vector_to_parameters(start + sign * eps * direction, params)
            ends.append(exact_penalty(ebm))
        ours.append(float(grad @ direction))
        exact.append((ends[0] - ends[1]) / (2 * eps))
    return torch.tensor(ours, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64)


def test_the_gradient_of_kl_to_base_is_that_of_the_exact_prior() -> None:
    """Of log(1 + 2 KL), whose weights move with θ, so that a fit maximises a posterior."""
    ours, exact = slopes_of_kl_to_base(kl_to_base(1.0))
    assert exact.norm() > 0.1
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_the_check_fails_for_the_variance_with_weights_held() -> None:
    """Its gradient is that of KL times another factor, which no prior has."""

    def variance(ebm: LVEBM) -> Tensor:
        return torch.log1p(ebm.pool.variance(ebm.negative_residuals()[0]))

    ours, exact = slopes_of_kl_to_base(variance)
    assert (ours - exact).norm() > 0.03 * exact.norm()


def test_kl_to_base_leaves_functions_of_the_context_free() -> None:
    """f = 3 c changes no p(x, z | c); f = 3 c + ½ u² does."""
    context = normal((40, 1), 1).float()
    x = context + normal((40, 1), 2).float()

    class Offset(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
            return 3.0 * c.squeeze(-1) + self.slope * z.square().sum(-1)

    values = []
    for slope in (0.0, 0.5):
        pool = ContextPool(4, 32, num_moves=2)
        ebm = LVEBM.from_data(Offset(slope), x, z_dim=2, context=context, pool=pool)
        pool.refresh(ebm, context)
        values.append(kl_to_base(1.0)(ebm).item())
    assert values[0] == pytest.approx(0.0, abs=1e-5)
    assert values[1] > 0.1


class Narrower(nn.Module):
    """f = 1.5 |z|² + 3 c: both entries of z have precision 4 where their base has 1."""

    def forward(self, x: Tensor, z: Tensor, c: Tensor | None = None) -> Tensor:
        return 1.5 * z.square().sum(-1) + (0.0 if c is None else 3.0 * c.squeeze(-1))


KL_NARROWER = math.log(4.0) + 1.0 / 4.0 - 1.0


def kls_from_base(conditional: bool) -> tuple[list[float], list[float]]:
    """KL(p_θ ‖ base) of `Narrower`, as 8 pools see it; and by `kl_to`, to second order."""
    x, context, exact, rough = normal((40, 1), 2), normal((40, 1), 1), [], []
    for seed in range(8):
        if conditional:
            pool = ContextPool(4, 64, num_moves=4, seed=seed)
            ebm = LVEBM.from_data(Narrower(), x, z_dim=2, context=context, pool=pool)
            for _ in range(16):
                pool.refresh(ebm, context)
        else:
            pool = TemperedPool(4, 64, num_moves=4, seed=seed)
            ebm = warm(LVEBM.from_data(Narrower(), x, z_dim=2, pool=pool), 16)
        exact.append(pool.kl_from_base().item())
        rough.append(pool.kl_to(torch.zeros_like(pool.negative_residuals())).item())
    return exact, rough


@pytest.mark.parametrize("conditional", [False, True])
def test_kl_from_the_base_is_exact(conditional: bool) -> None:
    """Eight pools, Student's test; false alarm ALPHA for each.

    KL to second order, as `ContextPool.kl_to` has it, which is for short updates, fails.
    """
    exact, second_order = kls_from_base(conditional)
    assert mean_p_value(exact, KL_NARROWER) > ALPHA
    if conditional:
        assert mean_p_value(second_order, KL_NARROWER) < CERTAIN


def exact_mean_square() -> float:
    """E[f²] of f = ½ uᵀAu + bᵀu under the model: the moments of a quadratic form."""
    a, b = PRECISION.numpy() - np.eye(3), LINEAR.numpy()
    mean, covariance = gaussian_moments(PRECISION, LINEAR)
    slope = a @ mean + b
    first = 0.5 * np.trace(a @ covariance) + 0.5 * mean @ a @ mean + b @ mean
    return float(
        first**2 + 0.5 * np.trace(a @ covariance @ a @ covariance) + slope @ covariance @ slope
    )


def mean_squares(weighted: bool) -> list[float]:
    """The penalty of 60 pools whose last level, alone, has exact draws of the model."""
    values = []
    for seed in range(60):
        ebm = frozen_ebm(TemperedPool(2, 200), dtype=torch.float64)
        u = torch.stack([normal((200, 3), 500 + seed), normal((200, 3), 0)])
        u[1] = gaussian_draws(PRECISION, LINEAR, (200,), seed)
        ebm.pool.u = u
        log_w = torch.full((2, 200), -math.inf).double()
        log_w[1] = -math.log(200)
        if weighted:
            ebm.pool.log_weights = log_w.flatten()
        values.append(energy_l2(1.0)(ebm).item())
    return values


def test_energy_l2_is_the_mean_square_under_the_model() -> None:
    """Student's test against the moments of a quadratic form; false alarm 1e-3."""
    assert mean_p_value(mean_squares(weighted=True), exact_mean_square()) > ALPHA


def test_the_check_fails_without_the_weights() -> None:
    assert mean_p_value(mean_squares(weighted=False), exact_mean_square()) < CERTAIN


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(PENALTIES) - {"kl_to_base"}))
def test_gradients_are_finite_differences(name: str, ebm: LVEBM) -> None:
    """Along six directions; pool and weights are held, as in a step."""
    params = [p for p in ebm.f.parameters() if p.requires_grad]
    penalty = PENALTIES[name](0.8)
    penalty(ebm).backward()
    grad = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params]
    )
    assert grad.norm() > 0.1
    start, eps = flat(params), 1e-5
    for k in range(6):
        direction = normal((len(start),), 40 + k)
        direction /= direction.norm()
        ends = []
        for sign in (1.0, -1.0):
            nn.utils.vector_to_parameters(start + sign * eps * direction, params)
            ends.append(penalty(ebm).item())
        slope = (ends[0] - ends[1]) / (2 * eps)
        assert slope == pytest.approx(float(grad @ direction), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", PENALTIES)
def test_an_untrained_network_has_finite_gradients(name: str) -> None:
    """Its last layer is zero, where the largest singular value has a kink."""
    x = data_of(quadratic_ebm(2, 1), 30)
    ebm = LVEBM.from_data(
        MLPEnergy(2, 1, hidden=(5,)), x, z_dim=1, base="gaussian", pool=tiny_pool()
    )
    PENALTIES[name](2.0)(ebm).backward()
    for p in ebm.f.parameters():
        assert p.grad is None or torch.isfinite(p.grad).all()
    assert ebm.f.out.weight.grad is None or not ebm.f.out.weight.grad.any()


def test_negatives_get_no_gradient(ebm: LVEBM) -> None:
    energy_l2(1.0)(ebm).backward()
    assert not any(part.requires_grad for part in ebm.pool.negatives())


# --- in training ----------------------------------------------------------------------------


def trained(penalties: list[Penalty], steps: int = 40, lr: float = 0.02) -> tuple[Saddle, Tensor]:
    pyro.clear_param_store()
    x = normal((60, 2), 8) ** 3
    energy = MLPEnergy(2, 1, hidden=(12,), fourier_features=0, seed=1)
    ebm = LVEBM.from_data(
        energy, x, z_dim=1, base="gaussian", pool=TemperedPool(4, 40, num_moves=3)
    )
    model = plate_model(ebm, 20)
    saddle = Saddle(
        model, AutoParticles(model, 2), Adam({"lr": lr}), num_moves=3, penalties=penalties
    )
    for _ in range(steps):
        saddle.step(x)
    return saddle, x


@pytest.fixture(scope="module")
def free() -> Saddle:
    return trained([])[0]


def size(saddle: Saddle) -> float:
    return sum(float((w**2).sum()) for w in weights_of(saddle.ebms[0]))


def test_a_strong_weight_decay_shrinks_the_weights(free: Saddle) -> None:
    decayed, _ = trained([weight_decay(2000.0)])
    assert size(decayed) < 0.2 * size(free)


def test_a_strong_energy_l2_keeps_the_model_at_its_base(free: Saddle) -> None:
    held, _ = trained([energy_l2(2000.0)])
    mean_squares = [energy_l2(1.0)(s.ebms[0]).item() for s in (held, free)]
    assert mean_squares[0] < 0.02 * mean_squares[1]


def test_without_strength_training_is_what_it_was(free: Saddle) -> None:
    """Bit for bit, and any number of penalties is allowed."""
    same, _ = trained([energy_l2(0.0), weight_decay(0.0)])
    for a, b in zip(free.ebms[0].f.parameters(), same.ebms[0].f.parameters(), strict=True):
        assert torch.equal(a, b)
    assert free.history.equals(same.history)


@pytest.mark.parametrize(("x_dim", "z_dim", "strength"), [(2, 1, 24.0), (5, 3, 64.0)])
def test_a_network_brings_eight_nats_for_each_dimension(
    x_dim: int, z_dim: int, strength: float
) -> None:
    assert MLPEnergy(x_dim, z_dim).kl_penalty == strength
    assert MLPEnergy(x_dim, z_dim, kl_penalty=0.25).kl_penalty == 0.25


@pytest.mark.parametrize("strength", [-1e-9, math.nan, math.inf])
def test_a_negative_kl_penalty_is_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="kl_penalty must be finite and not negative"):
        MLPEnergy(2, 1, kl_penalty=strength)


def noise_fitted(**options: float) -> LVEBM:
    """A network fitted to 40 rows of six independent normal columns: the base is the truth."""
    pyro.clear_param_store()
    x = normal((40, 6), 3)
    energy = MLPEnergy(6, 1, hidden=(32, 32), seed=1, **options).double()
    pool = TemperedPool(3, 64, num_moves=2)
    ebm = LVEBM.from_data(energy, x, z_dim=1, base="gaussian", pool=pool)
    model = plate_model(ebm)
    Saddle(model, AutoParticles(model, 2), Adam({"lr": 0.006}), num_moves=2).fit(
        x, num_steps=45, progress=False
    )
    return ebm


def kl_of(ebm: LVEBM) -> float:
    return 0.5 * math.expm1(kl_to_base(1.0)(ebm).item())


def test_few_rows_of_noise_are_fitted_less_with_the_penalty_of_the_network() -> None:
    """KL from the base; the sibling without it shows that there was something to fit."""
    free, default = kl_of(noise_fitted(kl_penalty=0.0)), kl_of(noise_fitted())
    assert free > 0.5
    assert default < 0.5 * free


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_step_has_the_penalty_of_each_energy(strength: float) -> None:
    """In the loss, with θ held still, beside penalties of the Saddle; frozen energies have none."""
    x = data_of(quadratic_ebm(2, 1), 20)
    losses = []
    for own in (0.0, strength):
        pyro.clear_param_store()
        ebm = warm(make_neural(2, 1, pool=tiny_pool()), 3)
        ebm.f.kl_penalty = own
        model = plate_model(ebm)
        optim = SGD({"lr": 0.0})
        saddle = Saddle(model, AutoParticles(model, 2), optim, penalties=[weight_decay(0.1)])
        losses.append(saddle.step(x))
        expected = kl_to_base(own)(ebm).item()
        with ebm.frozen():
            losses.append(saddle.step(x))
    assert (expected > 0.1) == (strength > 0)
    assert losses[2] - losses[0] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert losses[3] == losses[1]


def test_each_energy_has_its_own_penalty_once() -> None:
    """Two networks of different strengths, and then one network in two LVEBMs."""
    ebms = [warm(make_neural(2, 1, pool=tiny_pool()), 3) for _ in range(2)]
    expected = 0.0
    for ebm, strength in zip(ebms, (2.0, 5.0), strict=True):
        ebm.f.kl_penalty = strength
        expected += kl_to_base(strength)(ebm).item()
    assert add_penalties([], ebms) == pytest.approx(expected)
    twin = warm(LVEBM(ebms[0].f, ebms[0].base_x, ebms[0].base_z, pool=tiny_pool()), 3)
    assert kl_to_base(2.0)(twin).item() > 0.1
    alone = add_penalties([], ebms[:1])
    assert alone > 0.0
    assert add_penalties([], [ebms[0], twin]) == alone


def test_penalties_add_up_in_the_loss() -> None:
    """With θ held still the loss of a step grows by the sum over penalties."""
    x, penalties = data_of(quadratic_ebm(), 20), [energy_l2(3.0), weight_decay(5.0)]
    losses = []
    for chosen in ([], penalties):
        pyro.clear_param_store()
        ebm = warm(quadratic_ebm(), 3)
        model = plate_model(ebm)
        saddle = Saddle(model, AutoParticles(model, 2), SGD({"lr": 0.0}), penalties=chosen)
        losses.append(saddle.step(x))
        expected = sum(p(ebm).item() for p in penalties)
    assert expected > 1.0
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-9)
    assert saddle.history["loss"].tolist() == losses[1:]


def test_a_penalised_step_is_free_of_warnings_of_torch() -> None:
    """Warnings are errors here; torch gives some of them once, unless told otherwise."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        trained([energy_l2(0.1), weight_decay(0.1)], steps=2)
    finally:
        torch.set_warn_always(always)


def test_a_step_along_a_penalty_is_its_gradient() -> None:
    """Two plain steps of SGD differ by lr times the gradients of all LVEBMs' penalties."""
    results = []
    for strength in (0.0, 0.4):
        pyro.clear_param_store()
        a, b = warm(quadratic_ebm(3, 2, seed=1), 2), warm(quadratic_ebm(2, 1, seed=2), 2)
        x, y = data_of(a, 20), data_of(b, 20)

        def model(x: Tensor, y: Tensor, a: LVEBM = a, b: LVEBM = b) -> None:
            with pyro.plate("data", 20):
                lvebm("first", a, obs=x)
                lvebm("second", b, obs=y)

        guide, optim = AutoParticles(model, 2), SGD({"lr": 1e-4})
        penalties = [weight_decay(strength)]
        saddle = Saddle(model, guide, optim, penalties=penalties, max_kl=math.inf)
        before = [e.f.raw_tril.detach().clone() for e in (a, b)]
        saddle.step(x, y)
        results.append([e.f.raw_tril.detach().clone() for e in (a, b)])
    for old, free, decayed in zip(before, *results, strict=True):
        torch.testing.assert_close(free - decayed, 1e-4 * 0.4 * old, rtol=1e-6, atol=1e-12)


def test_a_frozen_energy_is_not_penalised() -> None:
    ebm = warm(quadratic_ebm(), 3)
    model, x = plate_model(ebm), data_of(ebm, 20)
    losses = []
    for penalties in ([], [weight_decay(1e6)]):
        pyro.clear_param_store()
        saddle = Saddle(model, AutoNormal(model), Adam({"lr": 0.01}), penalties=penalties)
        with ebm.frozen():
            losses.append([saddle.step(x) for _ in range(2)])
    assert losses[0] == losses[1]


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("strength", [-1e-9, -2.0, math.nan, math.inf])
def test_negative_strengths_are_refused(name: str, strength: Any) -> None:
    with pytest.raises(
        ValueError, match=f"strength must be finite and not negative; got {strength}"
    ):
        PENALTIES[name](strength)


def test_a_penalty_that_raises_leaves_no_gradient() -> None:
    """Else the first update of the next Saddle on the same LVEBM would be twice as long."""
    ebm, x = warm(quadratic_ebm(), 3), data_of(quadratic_ebm(), 20)
    model = plate_model(ebm)

    def broken(ebm: LVEBM) -> Tensor:
        raise RuntimeError("broken penalty")

    saddle = Saddle(model, AutoParticles(model, 2), SGD({"lr": 0.1}), penalties=[broken])
    with pytest.raises(RuntimeError, match="broken penalty"):
        saddle.step(x)
    assert not any(p.grad is not None and p.grad.any() for p in ebm.f.parameters())


# --- the noise of a generator ---------------------------------------------------------------


def pairs(num_rows: int, r: float) -> Tensor:
    """Rows of two columns with means 0, variances 1 and correlation r, exactly."""
    x = normal((num_rows, 2), 8)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(x.T @ x / num_rows), x.T, upper=False
    ).T
    return white @ torch.tensor([[1.0, r], [0.0, (1 - r**2) ** 0.5]]).double()


def noise_model(x: Tensor, noise: Any, strength: float | None) -> LVEBM:
    base = GeneratorBase.from_factor_analysis(
        x, torch.Size([1]), noise=noise, noise_penalty=strength
    )
    with torch.no_grad():
        base.linear.zero_()
    base.linear.requires_grad_(False)
    base_z = GaussianBase(torch.zeros(1).double(), torch.ones(1).double())
    return LVEBM(ZeroEnergy(2, 1).double(), base, base_z, tiny_pool())


@pytest.mark.parametrize("strength", [0.0, 20.0, 300.0])
@pytest.mark.parametrize("noise", ["full", "low-rank"])
def test_correlations_of_the_noise_are_shrunk_as_calculus_says(noise: Any, strength: float) -> None:
    """Two columns of equal variance, whose estimate is the root of an equation in one unknown."""
    n, r = 50, 0.7
    x = pairs(n, r)
    ebm = noise_model(x, noise, strength)
    base = ebm.base_x
    free = [p for p in base.parameters() if p.requires_grad]
    optimiser = torch.optim.LBFGS(free, max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -base.log_prob_given(x, torch.zeros(n, 1).double()).sum()
        value.backward()
        return value.detach() + add_penalties([], [ebm])

    optimiser.step(loss)

    def slope(rho: float) -> float:
        fit = n * (rho - r) / ((1 - rho * r) * (1 - rho**2))
        return fit + strength * rho * (1 + rho**2) / (1 - rho**2) ** 2

    expected = brentq(slope, 0.0, 0.999)
    tril = base._tril().detach()
    cov = tril @ tril.T
    assert float(cov[0, 1] / (cov[0, 0] * cov[1, 1]).sqrt()) == pytest.approx(expected, abs=2e-3)
    assert (expected < 0.6) is (strength > 0)


@pytest.mark.parametrize("noise", ["full", "diagonal"])
def test_a_saddle_adds_the_prior_of_the_noise_once(noise: Any) -> None:
    x = pairs(20, 0.5)
    found = []
    for strength in (0.0, 3.0):
        ebm = noise_model(x, noise, strength)
        if noise == "full":
            with torch.no_grad():
                ebm.base_x.noise_below.fill_(0.4)
        divergence = ebm.base_x.noise_divergence().item()
        pyro.clear_param_store()
        model = plate_model(ebm)
        saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}), num_moves=1)
        found.append(saddle.step(x))
    assert found[1] - found[0] == pytest.approx(3.0 * divergence, abs=1e-6)
    assert (divergence > 0.01) is (noise == "full")
    assert add_penalties([], [ebm, ebm]) == pytest.approx(
        3.0 * ebm.base_x.noise_divergence().item()
    )


def test_frozen_noise_has_no_prior() -> None:
    ebm = noise_model(pairs(20, 0.5), "full", None)
    assert ebm.base_x.noise_penalty == 8.0
    for p in ebm.base_x.parameters():
        p.requires_grad_(False)
    assert add_penalties([], [ebm]) == 0.0
    with pytest.raises(ValueError, match="noise_penalty must be finite and not negative; got -1"):
        noise_model(pairs(20, 0.5), "full", -1.0)
