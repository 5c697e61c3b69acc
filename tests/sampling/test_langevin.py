# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from referee import (
    ALPHA,
    CERTAIN,
    grid_cdf,
    isotropic,
    ks_p_value,
    mean_p_value,
    normal,
    plane_grid,
    seeded,
    variance_p_value,
)
from scipy import stats
from torch import Tensor

from pyro_lvebm.sampling import STANDARD_NORMAL, langevin
from pyro_lvebm.sampling.langevin import (
    MALA,
    ULA,
    Kernel,
    LangevinState,
    ValueAndGrad,
    init_state,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

BOTH_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def quadratic(matrix: Tensor) -> ValueAndGrad:
    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        grad = u @ matrix
        return 0.5 * (u * grad).sum(-1), grad

    return evaluate


def run(
    kernel: Kernel,
    f: ValueAndGrad,
    u: Tensor,
    step_size: float | Tensor,
    num_steps: int,
    seed: int,
    **target: float | Tensor,
) -> LangevinState:
    state, generator = init_state(f, u), seeded(seed)
    for _ in range(num_steps):
        state, _ = kernel.step(f, state, step_size, generator=generator, **target)
    return state


# --- deliberate faults, put in by monkeypatch -----------------------------------------------

_real_log_acceptance = langevin._log_acceptance


def halve_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise √η in place of √(2η)."""

    def scales(step_size: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        eta = step_size[..., None] if isinstance(step_size, Tensor) else step_size
        return eta, eta**0.5

    monkeypatch.setattr(langevin, "_step_scales", scales)


def accept_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        langevin, "_log_acceptance", lambda *args: torch.zeros_like(_real_log_acceptance(*args))
    )


def flip_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(langevin, "_log_acceptance", lambda *args: -_real_log_acceptance(*args))


# --- stationary laws on a quadratic ---------------------------------------------------------

EIGENVALUES = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def ula_variance(eta: float) -> Tensor:
    return 1.0 / (EIGENVALUES * (1.0 - 0.5 * eta * EIGENVALUES))


def quadratic_p_value(
    kernel: Kernel,
    variance: Tensor,
    eta: float,
    *,
    dtype: torch.dtype = torch.float32,
    kappa: float = 1.0,
    beta: float = 1.0,
    as_tensor: bool = False,
    num_chains: int = 8000,
) -> float:
    """Chi-square p-value of the chains' variances along the eigenvectors of the total precision."""
    axes = torch.linalg.qr(normal((3, 3), 1)).Q
    precision = axes @ EIGENVALUES.diag() @ axes.T
    residual = (precision - kappa * torch.eye(3, dtype=torch.float64)) / beta
    step_size = torch.full((num_chains,), eta, dtype=dtype) if as_tensor else eta
    inverse_temperature = torch.full((num_chains,), beta, dtype=dtype) if as_tensor else beta
    state = run(
        kernel,
        quadratic(residual.to(dtype)),
        2.0 * normal((num_chains, 3), 2, dtype),
        step_size,
        max(60, math.ceil(6.0 / (eta * 0.3))),  # the slowest start decays by e^-6 in the mean
        seed=3,
        inverse_temperature=inverse_temperature,
        base=isotropic(kappa),
    )
    assert state.u.dtype == dtype
    return variance_p_value(state.u.double() @ axes, variance)


SETTINGS = pytest.mark.parametrize(
    ("eta", "options"),
    [
        (0.3, {"kappa": 0.0, "dtype": torch.float32}),
        (0.2, {"kappa": 1.0, "dtype": torch.float64, "as_tensor": True}),
        (0.5, {"kappa": 0.5, "beta": 0.7, "dtype": torch.float32, "as_tensor": True}),
    ],
)


@SETTINGS
def test_ula_has_its_discretised_variance(eta: float, options: dict) -> None:
    """Variance 1/(λ(1 - ηλ/2)) for each λ. False alarms: 1e-3 a case."""
    assert quadratic_p_value(ULA(), ula_variance(eta), eta, **options) > ALPHA
    assert quadratic_p_value(ULA(0.9), ula_variance(eta), eta, **options) > ALPHA


@SETTINGS
def test_mala_has_the_exact_variance(eta: float, options: dict) -> None:
    """Variance 1/λ for each λ. False alarms: 1e-3 a case."""
    assert quadratic_p_value(MALA(), 1.0 / EIGENVALUES, eta, **options) > ALPHA


@SETTINGS
def test_quadratic_check_tells_ula_from_mala(eta: float, options: dict) -> None:
    assert quadratic_p_value(ULA(), 1.0 / EIGENVALUES, eta, **options) < CERTAIN
    assert quadratic_p_value(MALA(), ula_variance(eta), eta, **options) < CERTAIN


@SETTINGS
@pytest.mark.parametrize("fault", [accept_always, flip_ratio])
def test_quadratic_check_fails_for_a_broken_mala(
    monkeypatch: pytest.MonkeyPatch, eta: float, options: dict, fault
) -> None:
    fault(monkeypatch)
    assert quadratic_p_value(MALA(), 1.0 / EIGENVALUES, eta, **options) < CERTAIN


@SETTINGS
def test_quadratic_check_fails_for_half_the_noise(
    monkeypatch: pytest.MonkeyPatch, eta: float, options: dict
) -> None:
    halve_noise(monkeypatch)
    assert quadratic_p_value(ULA(), ula_variance(eta), eta, **options) < CERTAIN
    assert quadratic_p_value(MALA(), 1.0 / EIGENVALUES, eta, **options) < CERTAIN


# --- tempered targets -----------------------------------------------------------------------

BETAS = torch.tensor([0.0, 0.25, 0.6, 1.0], dtype=torch.float64)


def tempered_p_value(claimed: Tensor, dtype: torch.dtype) -> float:
    """Chi-square p-value for levels N(0, 1/(1 + β a)), run at the claimed temperatures."""
    a = torch.tensor([-0.5, 3.0], dtype=torch.float64)
    state = run(
        MALA(),
        quadratic(a.diag().to(dtype)),
        normal((4, 4000, 2), 5, dtype),
        torch.tensor([[0.5], [0.4], [0.3], [0.2]], dtype=dtype),
        80,
        seed=6,
        inverse_temperature=claimed[:, None].to(dtype),
    )
    variance = 1.0 / (1.0 + BETAS[:, None] * a)
    return variance_p_value(state.u.transpose(0, 1).reshape(4000, -1), variance.reshape(-1))


@BOTH_DTYPES
def test_mala_keeps_each_level_of_a_ladder(dtype: torch.dtype) -> None:
    """Tensors β and η, one for each level, with base precision 1. False alarms: 1e-3 a case."""
    assert tempered_p_value(BETAS, dtype) > ALPHA


@BOTH_DTYPES
def test_ladder_check_fails_for_other_temperatures(dtype: torch.dtype) -> None:
    assert tempered_p_value(BETAS.flip(0), dtype) < CERTAIN
    assert tempered_p_value(torch.ones(4), dtype) < CERTAIN


# --- a target that is not Gaussian ----------------------------------------------------------


def double_well(u: Tensor) -> Tensor:
    return (u * u - 1.0) ** 2 + 0.4 * u


def double_well_p_value(kappa: float, beta: float, dtype: torch.dtype) -> float:
    state = run(
        MALA(),
        value_and_grad(lambda u: double_well(u).squeeze(-1)),
        normal((10000, 1), 7, dtype),
        0.06,
        350,
        seed=8,
        inverse_temperature=beta,
        base=isotropic(kappa),
    )
    cdf = grid_cdf(lambda u: 0.5 * kappa * u * u + beta * double_well(u), 6.0)
    return ks_p_value(state.u, cdf)


WELLS = pytest.mark.parametrize(
    ("kappa", "beta", "dtype"), [(0.0, 1.0, torch.float32), (1.0, 0.8, torch.float64)]
)


@WELLS
def test_mala_on_a_double_well(kappa: float, beta: float, dtype: torch.dtype) -> None:
    """Kolmogorov's test against quadrature. False alarms: 1e-3 a case."""
    assert double_well_p_value(kappa, beta, dtype) > ALPHA


@WELLS
@pytest.mark.parametrize("fault", [accept_always, flip_ratio, halve_noise])
def test_double_well_check_fails_for_a_broken_mala(
    monkeypatch: pytest.MonkeyPatch, kappa: float, beta: float, dtype: torch.dtype, fault
) -> None:
    fault(monkeypatch)
    assert double_well_p_value(kappa, beta, dtype) < CERTAIN


# --- detailed balance -----------------------------------------------------------------------


def rough(u: Tensor) -> Tensor:
    return (u**4).sum(-1) / 4.0 + torch.sin(3.0 * u).sum(-1) + u[..., 0] * u[..., -1]


def acceptance_error(
    step_size: float | Tensor, beta: float | Tensor, kappa: float, shape: tuple[int, ...]
) -> float:
    """Largest difference of log α from the textbook ratio of proposal densities."""
    f = value_and_grad(rough)
    old = init_state(f, normal(shape, 11))
    xi = normal(shape, 12)
    eta = torch.as_tensor(step_size, dtype=torch.float64)[..., None]
    b = torch.as_tensor(beta, dtype=torch.float64)

    def energy(state: LangevinState) -> Tensor:
        return 0.5 * kappa * state.u.square().sum(-1) + b * state.f

    def proposal(state: LangevinState) -> torch.distributions.Distribution:
        mean = state.u - eta * (kappa * state.u + b[..., None] * state.grad)
        normal_law = torch.distributions.Normal(mean, (2.0 * eta).sqrt().expand_as(mean))
        return torch.distributions.Independent(normal_law, 1)

    v = proposal(old).base_dist.loc + (2.0 * eta).sqrt() * xi
    new = init_state(f, v)
    textbook = (
        energy(old) - energy(new) + proposal(new).log_prob(old.u) - proposal(old).log_prob(new.u)
    )
    assert textbook.abs().max() > 1.0  # the comparison is not between zeros
    totals = (langevin._total(state, beta, isotropic(kappa)) for state in (old, new))
    ours = langevin._log_acceptance(*totals, xi, step_size)
    return (ours - textbook).abs().max().item()


BALANCE = pytest.mark.parametrize(
    ("step_size", "beta", "kappa", "shape"),
    [
        (0.2, 1.0, 0.0, (50, 1)),
        (0.05, 1.0, 1.0, (50, 6)),
        (0.1, 0.4, 2.5, (3, 20, 4)),
        (
            torch.tensor([[0.05], [0.1], [0.3]], dtype=torch.float64),
            torch.tensor([[0.1], [0.6], [1.0]], dtype=torch.float64),
            1.0,
            (3, 20, 2),
        ),
    ],
)


@BALANCE
def test_detailed_balance(step_size, beta, kappa, shape) -> None:
    assert acceptance_error(step_size, beta, kappa, shape) < 1e-9


@BALANCE
def test_detailed_balance_check_fails_for_half_the_temperature(
    monkeypatch: pytest.MonkeyPatch, step_size, beta, kappa, shape
) -> None:
    real = langevin._total
    monkeypatch.setattr(langevin, "_total", lambda state, b, base: real(state, 0.5 * b, base))
    assert acceptance_error(step_size, beta, kappa, shape) > 1e-3


def test_steps_report_the_probability_of_the_ratio() -> None:
    f, u = value_and_grad(rough), 2.0 * normal((400, 2), 13)
    old = init_state(f, u)
    _, ours = MALA().step(f, old, 0.1, generator=seeded(14))
    xi = torch.empty_like(u).normal_(generator=seeded(14))
    new = init_state(f, u - 0.1 * (u + old.grad) + math.sqrt(0.2) * xi)
    totals = (langevin._total(state, 1.0, STANDARD_NORMAL) for state in (old, new))
    log_alpha = _real_log_acceptance(*totals, xi, 0.1)
    torch.testing.assert_close(ours, log_alpha.exp().clamp(max=1.0))
    assert ours.min() < 0.5 < ours.max() == 1.0
    moved, also = ULA(0.9).step(f, old, 0.1, generator=seeded(14))
    torch.testing.assert_close(also, ours)
    torch.testing.assert_close(moved.u, new.u)


def test_accepted_share_equals_the_reported_probability() -> None:
    """Accepted minus reported is a martingale: mean 0 over steps. False alarms: 1e-3."""
    f, generator = value_and_grad(rough), seeded(15)
    state, differences = init_state(f, normal((500, 3), 16)), []
    for _ in range(40):
        new, probability = MALA().step(f, state, 0.15, generator=generator)
        moved = (new.u != state.u).any(-1)
        differences.append((moved.double() - probability).mean())
        state = new
    assert mean_p_value(torch.stack(differences), 0.0) > ALPHA


# --- moves with a scale ---------------------------------------------------------------------


def wrong_scale_in_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """The acceptance test does not know the scale of the proposal."""
    monkeypatch.setattr(
        langevin, "_log_acceptance", lambda *args: _real_log_acceptance(*args[:4], None)
    )


def transposed_scale_in_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        langevin, "_log_acceptance", lambda *args: _real_log_acceptance(*args[:4], args[4].mT)
    )


SCALE_FAULTS = pytest.mark.parametrize(
    "fault", [wrong_scale_in_the_test, transposed_scale_in_the_test, accept_always]
)

# Any invertible matrix will do; these are neither triangular nor symmetric nor fit their energy.
LOOSE = torch.tensor([[1.2, -0.9, 0.3], [0.5, 0.6, -0.2], [0.1, 0.8, 0.7]], dtype=torch.float64)
TIGHT = torch.tensor([[0.5, 0.4, 0.0], [-0.3, 0.9, 0.6], [0.7, 0.0, 0.4]], dtype=torch.float64)


def scaled_p_value(scale: Tensor, dtype: torch.dtype) -> float:
    """Chi-square p-value of levels N(0, (I + βA)⁻¹) with A correlated, in their eigenvectors.

    Chains start from exact draws and stay exact if each step leaves its target invariant.
    """
    root = normal((3, 3), 51)
    a = root @ root.T
    betas = torch.tensor([0.3, 1.0], dtype=torch.float64)
    eigenvalues, axes = torch.linalg.eigh(a)
    variance = 1.0 / (1.0 + betas[:, None] * eigenvalues)
    exact = (normal((2, 4000, 3), 52) * variance[:, None].sqrt()) @ axes.T
    f, generator = quadratic(a.to(dtype)), seeded(53)
    state = init_state(f, exact.to(dtype))
    eta = torch.tensor([[0.15], [0.1]], dtype=dtype)
    for _ in range(80):
        state, _ = MALA().step(
            f,
            state,
            eta,
            inverse_temperature=betas[:, None].to(dtype),
            scale=scale.to(dtype),
            generator=generator,
        )
    assert state.u.dtype == dtype
    assert (state.u != exact).any(-1).all()  # every chain has moved
    rotated = (state.u.double() @ axes).transpose(0, 1).reshape(4000, 6)
    return variance_p_value(rotated, variance.reshape(-1))


SCALES = pytest.mark.parametrize(
    ("scale", "dtype"),
    [(LOOSE, torch.float32), (torch.stack([TIGHT, LOOSE]), torch.float64)],
    ids=["one", "one of each level"],
)


@SCALES
def test_scaled_mala_keeps_a_correlated_gaussian(scale: Tensor, dtype: torch.dtype) -> None:
    """Two temperatures with one scale or their own. False alarms: 1e-3 a case."""
    assert scaled_p_value(scale, dtype) > ALPHA


@SCALES
@SCALE_FAULTS
def test_scaled_gaussian_check_fails_for_a_broken_test(
    monkeypatch: pytest.MonkeyPatch, scale: Tensor, dtype: torch.dtype, fault
) -> None:
    fault(monkeypatch)
    assert scaled_p_value(scale, dtype) < CERTAIN


def bent(u: Tensor) -> Tensor:
    """A bent and asymmetric density in the plane."""
    return 0.5 * u[..., 0] ** 2 + 2.0 * (u[..., 1] - 0.5 * u[..., 0] ** 2) ** 2 + 0.3 * u[..., 1]


@cache
def bent_law(kappa: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Points of a grid with their probabilities, and 20,000 exact draws."""
    points, area = plane_grid(9.0, 1201)
    mass = torch.softmax(-0.5 * kappa * points.square().sum(-1) - beta * bent(points), 0)
    exact = points[torch.multinomial(mass, 20000, replacement=True, generator=seeded(55))]
    jitter = torch.rand(exact.shape, generator=seeded(56), dtype=torch.float64) - 0.5
    return points, mass, exact + math.sqrt(area) * jitter


def bent_p_value(kappa: float, beta: float, dtype: torch.dtype) -> float:
    """Chi-square p-value of counts in cells of the plane against quadrature.

    Chains start from exact draws, by quadrature too.
    """
    scale = torch.tensor([[0.9, 0.2], [0.5, 0.7]], dtype=dtype)
    points, mass, exact = bent_law(kappa, beta)
    f, generator = value_and_grad(bent), seeded(54)
    state = init_state(f, exact.to(dtype))
    for _ in range(40):
        state, _ = MALA().step(
            f,
            state,
            0.2,
            inverse_temperature=beta,
            base=isotropic(kappa),
            scale=scale,
            generator=generator,
        )
    edges = torch.tensor([-0.8025, -0.0075, 0.8025], dtype=torch.float64)  # between grid points

    def cell(u: Tensor) -> Tensor:
        index = torch.bucketize(u.double().contiguous(), edges)
        return 4 * index[:, 0] + index[:, 1]

    expected = torch.zeros(16, dtype=torch.float64).index_add_(0, cell(points), mass).numpy()
    counts = torch.bincount(cell(state.u), minlength=16).numpy()
    likely = expected > 1e-3  # the other cells count as one
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = 20000 * np.append(expected[likely], expected[~likely].sum())
    observed, wanted = observed[wanted > 0.0], wanted[wanted > 0.0]
    return float(stats.chi2.sf(((observed - wanted) ** 2 / wanted).sum(), len(wanted) - 1))


BENT = pytest.mark.parametrize(
    ("kappa", "beta", "dtype"), [(0.0, 1.0, torch.float32), (1.0, 0.7, torch.float64)]
)


@BENT
def test_scaled_mala_keeps_a_bent_density(kappa: float, beta: float, dtype: torch.dtype) -> None:
    """Counts in 16 cells against quadrature. False alarms: 1e-3 a case."""
    assert bent_p_value(kappa, beta, dtype) > ALPHA


@BENT
@SCALE_FAULTS
def test_bent_check_fails_for_a_broken_test(
    monkeypatch: pytest.MonkeyPatch, kappa: float, beta: float, dtype: torch.dtype, fault
) -> None:
    fault(monkeypatch)
    assert bent_p_value(kappa, beta, dtype) < CERTAIN


def scaled_difference(scale: Tensor, shape: tuple[int, ...]) -> float:
    """Largest difference from plain steps in coordinates w = L⁻¹ u, with the same noise."""
    inverse = torch.linalg.inv(scale)
    beta, eta = 0.6, torch.full((*shape[:-1],), 0.15, dtype=torch.float64)

    def in_w(w: Tensor) -> Tensor:
        u = w @ scale.mT
        return 0.5 * u.square().sum(-1) + beta * rough(u)

    f, g = value_and_grad(rough), value_and_grad(in_w)
    state = init_state(f, normal(shape, 56))
    plain = init_state(g, state.u @ inverse.mT)
    scaled_draws, plain_draws = seeded(57), seeded(57)
    largest, moved = 0.0, 0
    for _ in range(6):
        before = state.u
        state, p = MALA().step(
            f, state, eta, inverse_temperature=beta, scale=scale, generator=scaled_draws
        )
        plain, q = MALA().step(g, plain, eta, base=None, generator=plain_draws)
        moved += int((state.u != before).any(-1).sum())
        difference = torch.cat([(state.u - plain.u @ scale.mT).flatten(), (p - q).flatten()])
        largest = max(largest, difference.abs().max().item())
    value, grad = f(state.u)
    assert torch.equal(state.f, value) and torch.equal(state.grad, grad)
    assert 0 < moved < 6 * math.prod(shape[:-1])  # some are accepted, and some are not
    return largest


BATCHES = pytest.mark.parametrize(
    ("scale", "shape"),
    [
        (LOOSE, (60, 3)),
        (torch.stack([LOOSE, TIGHT, 0.4 * LOOSE]), (3, 20, 3)),
        (torch.stack([LOOSE, TIGHT]), (4, 2, 20, 3)),
        (torch.full((1, 1), 0.7, dtype=torch.float64), (60, 1)),
    ],
)


@BATCHES
def test_a_scaled_step_is_a_plain_one_in_other_coordinates(
    scale: Tensor, shape: tuple[int, ...]
) -> None:
    """Draw for draw, and with the same acceptance probabilities."""
    assert scaled_difference(scale, shape) < 1e-9


def smaller_scale_in_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def log_acceptance(*args) -> Tensor:
        *others, scale = args
        return _real_log_acceptance(*others, None if scale is None else 0.8 * scale)

    monkeypatch.setattr(langevin, "_log_acceptance", log_acceptance)


@BATCHES
@pytest.mark.parametrize("fault", [wrong_scale_in_the_test, smaller_scale_in_the_test])
def test_coordinate_check_fails_for_a_broken_test(
    monkeypatch: pytest.MonkeyPatch, scale: Tensor, shape: tuple[int, ...], fault
) -> None:
    fault(monkeypatch)
    assert scaled_difference(scale, shape) > 1e-3


@pytest.mark.parametrize("step_size", [0.1, torch.full((6,), 0.1, dtype=torch.float64)])
def test_the_identity_is_no_scale(step_size: float | Tensor) -> None:
    f = value_and_grad(rough)
    state = init_state(f, normal((6, 3), 58))
    eye = torch.eye(3, dtype=torch.float64)
    plain, p = MALA().step(f, state, step_size, generator=seeded(59))
    scaled, q = MALA().step(f, state, step_size, scale=eye, generator=seeded(59))
    for a, b in zip((*plain, p), (*scaled, q), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# --- adaptation -----------------------------------------------------------------------------


def adapted_acceptance(
    kernel: Kernel, precision: Tensor, start: float, num_steps: int | None = None
) -> tuple[float, float]:
    """Adapt on exact draws of a Gaussian; return the step size and the acceptance after it."""
    dim, dtype = len(precision), precision.dtype
    if num_steps is None:  # at the default rate a factor 100 upwards takes half of this
        num_steps = math.ceil(2.0 * math.log(100.0) / (0.1 * (1.0 - kernel.target_acceptance)))
    f, generator = quadratic(precision.diag()), seeded(20)
    state = init_state(f, normal((1000, dim), 21, dtype) / precision.sqrt())
    eta = torch.full((1,), start, dtype=dtype)
    for _ in range(num_steps):
        state, accepted = kernel.step(f, state, eta, base=None, generator=generator)
        eta = kernel.adapt(eta, accepted.mean(-1, keepdim=True))
    rates = []
    for _ in range(20):
        state, accepted = kernel.step(f, state, eta, base=None, generator=generator)
        rates.append(accepted.mean().item())
    return eta.item(), float(np.mean(rates))


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize(
    ("kernel", "precision"),
    [
        (MALA(), torch.full((10,), 30.0)),
        (MALA(0.8), torch.linspace(20.0, 60.0, 3, dtype=torch.float64)),
    ],
)
def test_adaptation_reaches_the_target(kernel: MALA, precision: Tensor, factor: float) -> None:
    """Twenty thousand correlated tests leave a standard error below 0.005; the margin is 0.03."""
    good, _ = adapted_acceptance(kernel, precision, 0.02)
    eta, rate = adapted_acceptance(kernel, precision, factor * good)
    assert abs(rate - kernel.target_acceptance) < 0.03
    assert eta == pytest.approx(good, rel=0.15)


@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_acceptance_is_off_target_without_adaptation(factor: float) -> None:
    good, _ = adapted_acceptance(MALA(), torch.full((10,), 30.0), 0.02)
    _, rate = adapted_acceptance(MALA(), torch.full((10,), 30.0), factor * good, num_steps=0)
    assert abs(rate - 0.574) > 0.3


def test_ula_adapts_only_if_asked() -> None:
    eta = torch.tensor([[0.1], [0.2]])
    assert ULA().adapt(eta, torch.zeros(2, 1)) is eta
    precision = torch.full((4,), 30.0)
    _, rate = adapted_acceptance(ULA(0.9), precision, 0.0002)
    assert abs(rate - 0.9) < 0.03


@pytest.mark.parametrize("kernel", [MALA(), ULA(0.9)])
def test_adapted_steps_follow_the_formula_within_limits(kernel: Kernel) -> None:
    eta = torch.tensor([[0.1], [3.9], [1.01e-10]])
    accepted = torch.tensor([[0.3], [1.0], [0.0]])
    result = kernel.adapt(eta, accepted, rate=0.5)
    target = kernel.target_acceptance
    assert result[0].item() == pytest.approx(0.1 * math.exp(0.5 * (0.3 - target)))
    assert result[1].item() == pytest.approx(min(4.0, 3.9 * math.exp(0.5 * (1.0 - target))))
    assert result[2].item() == pytest.approx(1e-10)
    assert kernel.adapt(torch.tensor(4.0), torch.tensor(1.0)).item() == 4.0


# --- NaN and infinity -----------------------------------------------------------------------


def walled(value: float) -> ValueAndGrad:
    """½ u² for u ≤ 1 and `value`, with a NaN gradient, beyond."""

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        outside = u.squeeze(-1) > 1.0
        f = torch.where(outside, value, 0.5 * u.squeeze(-1).square())
        return f, torch.where(outside[..., None], math.nan, u)

    return evaluate


def wall_p_value(kernel: Kernel, wall: float, dtype: torch.dtype) -> float:
    start = -normal((5000, 1), 31, dtype).abs()
    state = run(kernel, walled(wall), start, 0.3, 100, seed=30, base=None)
    return ks_p_value(state.u, stats.truncnorm(-np.inf, 1.0).cdf)


@BOTH_DTYPES
@pytest.mark.parametrize("wall", [math.nan, math.inf])
def test_mala_rejects_proposals_without_an_energy(dtype: torch.dtype, wall: float) -> None:
    """What is left is exactly the truncated normal law. False alarms: 1e-3 a case."""
    assert wall_p_value(MALA(), wall, dtype) > ALPHA


def test_wall_check_fails_without_rejection() -> None:
    assert wall_p_value(ULA(), math.nan, torch.float64) < CERTAIN


def test_a_proposal_without_an_energy_has_probability_zero() -> None:
    f = walled(math.nan)
    old = init_state(f, torch.full((2000, 1), 0.9))
    for kernel in (MALA(), ULA(0.9)):
        _, probability = kernel.step(f, old, 0.5, base=None, generator=seeded(32))
        assert torch.isfinite(probability).all()
        assert (probability == 0.0).sum() > 100
    new, probability = MALA().step(f, old, 0.5, base=None, generator=seeded(32))
    stayed = probability == 0.0
    assert torch.equal(new.u[stayed], old.u[stayed])
    assert torch.equal(new.f[stayed], old.f[stayed])
    assert torch.equal(new.grad[stayed], old.grad[stayed])


# --- the state and the evaluations ----------------------------------------------------------


@BOTH_DTYPES
def test_value_and_grad_is_that_of_the_formula(dtype: torch.dtype) -> None:
    u = normal((4, 5, 3), 40, dtype).requires_grad_(True)
    with torch.no_grad():
        value, grad = value_and_grad(lambda v: (v**3).sum(-1))(u)
    torch.testing.assert_close(value, (u**3).sum(-1).detach())
    torch.testing.assert_close(grad, 3.0 * u.detach() ** 2)
    assert not value.requires_grad and not grad.requires_grad
    assert u.grad is None


@pytest.mark.parametrize("kernel", [ULA(), MALA()])
def test_numbers_and_tensors_give_the_same_step(kernel: Kernel) -> None:
    f = value_and_grad(rough)
    state = init_state(f, normal((6, 3), 44))
    by_number, _ = kernel.step(f, state, 0.1, inverse_temperature=0.3, generator=seeded(45))
    by_tensor, _ = kernel.step(
        f,
        state,
        torch.full((6,), 0.1, dtype=torch.float64),
        inverse_temperature=torch.full((6,), 0.3, dtype=torch.float64),
        generator=seeded(45),
    )
    for a, b in zip(by_number, by_tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
