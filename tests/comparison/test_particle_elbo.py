# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from referee import (
    ALPHA,
    CERTAIN,
    gaussian_draws,
    gaussian_log_partition,
    mean_p_value,
    normal,
    seeded,
)
from scipy import stats
from torch import Tensor
from torch.distributions.transforms import identity_transform

from pyro_lvebm.comparison import log_weights as LOG_WEIGHTS
from pyro_lvebm.comparison.log_weights import annealed_elbo
from pyro_lvebm.evidence.annealed import fit_gaussian, posterior_draws, relative_to
from pyro_lvebm.latents.blocks import LatentBlock, LatentColumns
from pyro_lvebm.sampling import annealing
from pyro_lvebm.sampling.langevin import (
    MALA,
    LangevinState,
    ValueAndGrad,
    init_state,
    value_and_grad,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# Posteriors of 30 data in two dimensions: ½ |v|² + f = ½ vᵀPv + bᵀv, with correlations.
N = 30
_ROOT = 0.8 * normal((N, 2, 2), 1)
PRECISIONS = _ROOT @ _ROOT.mT + 0.6 * torch.eye(2, dtype=torch.float64)
LINEARS = normal((N, 2), 2)
LOG_C = torch.tensor(
    [gaussian_log_partition(p, b) for p, b in zip(PRECISIONS, LINEARS, strict=True)],
    dtype=torch.float64,
)


def gaussian_energy(shape: tuple[int, ...] = (N,)) -> ValueAndGrad:
    a = (PRECISIONS - torch.eye(2, dtype=torch.float64)).reshape(*shape, 2, 2)
    b = LINEARS.reshape(*shape, 2)

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        av = (a @ v[..., None]).squeeze(-1)
        return (v * (0.5 * av + b)).sum(-1), av + b

    return evaluate


def exact_particles(count: int, shape: tuple[int, ...] = (N,)) -> Tensor:
    draws = [gaussian_draws(PRECISIONS[i], LINEARS[i], (count,), 50 + i) for i in range(N)]
    return torch.stack(draws, 1).reshape(count, *shape, 2)


def make_block(v: Tensor, f: ValueAndGrad) -> LatentBlock:
    """A block of one unconstrained site, without a model around it."""
    columns = [LatentColumns("z", identity_transform, v.shape[-1:], None)]
    return LatentBlock(columns, {}, v, f, v.new_zeros(()), False, None)  # type: ignore[arg-type]


def log_weights(
    v: Tensor | None = None, f: ValueAndGrad | None = None, *, draws: int = 64, seed: int = 0
) -> Tensor:
    v = exact_particles(4) if v is None else v
    block = make_block(v, gaussian_energy() if f is None else f)
    step = torch.tensor(0.3, dtype=v.dtype)
    generator = seeded(seed)
    chains = posterior_draws(block, step, generator)
    return annealed_elbo(block, chains, num_samples=draws, generator=generator)


def unbiased_p_value(log_w: Tensor, log_c: Tensor) -> float:
    """Student's tests of E[w / C] = 1: of every datum over its draws, and of the mean over data."""
    ratio = (log_w - log_c).exp().flatten(1)
    over_data = float(stats.ttest_1samp(ratio.mean(0).numpy(), 1.0).pvalue)
    return min(1.0, 2.0 * min(mean_p_value(ratio, 1.0), over_data))


def bound_p_value(log_w: Tensor, log_c: Tensor) -> float:
    """One-sided Student's test of mean_i (E[log w_i] − log C_i) ≤ 0 over data."""
    excess = (log_w - log_c).mean(0).flatten().numpy()
    return float(stats.ttest_1samp(excess, 0.0, alternative="greater").pvalue)


# --- closed forms ---------------------------------------------------------------------------


def test_weights_are_unbiased_for_the_evidence() -> None:
    """E[w] = C for every datum, whatever was fitted; false alarm ALPHA."""
    log_w = log_weights()
    assert log_w.shape == (64, N) and log_w.dtype == torch.float64
    assert LOG_C.std() > 0.5
    assert unbiased_p_value(log_w, LOG_C) > ALPHA
    assert unbiased_p_value(log_w + 0.02, LOG_C) < CERTAIN


def test_gap_of_converged_particles_is_near_zero() -> None:
    """The mean is below log C by less than 0.002 nats on average, with a spread of the order of
    the fit's error; false alarm ALPHA for a bound that is too high.
    """
    log_w = log_weights()
    gap = float((LOG_C - log_w.mean(0)).mean())
    assert abs(gap) < 2e-3
    assert bound_p_value(log_w, LOG_C) > ALPHA
    assert bound_p_value(log_w + 0.01, LOG_C) < CERTAIN


@pytest.mark.parametrize("fault", ["jacobian", "base"])
def test_checks_fail_for_a_wrong_change_of_variables(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(f: ValueAndGrad, mean: Tensor, tril: Tensor) -> ValueAndGrad:
        right = relative_to(f, mean, tril)
        log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

        def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
            g, grad = right(y)
            if fault == "jacobian":
                return g + log_det, grad
            return g + 0.5 * (y * y).sum(-1), grad + y

        return evaluate

    monkeypatch.setattr(LOG_WEIGHTS, "relative_to", broken)
    assert unbiased_p_value(log_weights(), LOG_C) < CERTAIN


def test_bound_holds_for_chains_that_do_not_move() -> None:
    """Far off, with every proposal rejected, a tiny Gaussian is fitted; it is a bound still.

    False alarm ALPHA.
    """
    stuck = exact_particles(3) + 4.0

    def only_at_the_start(u: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = gaussian_energy()(u)
        moved = u.shape == stuck.shape and not torch.equal(u, stuck)
        return (value.fill_(torch.nan) if moved else value), grad

    log_w = log_weights(stuck, only_at_the_start)
    assert bound_p_value(log_w, LOG_C) > ALPHA
    assert (LOG_C - log_w.mean(0)).mean() > 0.02


def test_bound_is_loose_for_a_poor_start_and_tightens_with_temperatures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sibling of the near-zero gap: a Gaussian of another datum is not repaired for free."""
    poor = exact_particles(400).roll(1, 1)
    monkeypatch.setattr(LOG_WEIGHTS, "fit_gaussian", lambda draws: fit_gaussian(poor))
    gaps = []
    for count in (1, 4, 32):
        monkeypatch.setattr(LOG_WEIGHTS, "NUM_TEMPERATURES", count)
        log_w = log_weights()
        gaps.append(LOG_C - log_w.mean(0))
        assert bound_p_value(log_w, LOG_C) > ALPHA
        error = log_w.std(0).square().sum().sqrt() / math.sqrt(64) / N
        assert gaps[-1].mean() > 5.0 * error
    assert gaps[0].mean() > 2.0 * gaps[1].mean() > 4.0 * gaps[2].mean()


def test_one_temperature_is_the_gaussian_fit_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the gap is KL(N(m, LLᵀ) ‖ posterior) in closed form; false alarm ALPHA a datum."""
    fit = 0.3 * normal((500, N, 2), 7) + 0.4
    monkeypatch.setattr(LOG_WEIGHTS, "fit_gaussian", lambda draws: fit_gaussian(fit))
    monkeypatch.setattr(LOG_WEIGHTS, "NUM_TEMPERATURES", 1)
    log_w = log_weights(draws=2000)
    mean, tril = fit_gaussian(fit)
    q = torch.distributions.MultivariateNormal(mean, scale_tril=tril)
    p_mean = -torch.linalg.solve(PRECISIONS, LINEARS)
    p = torch.distributions.MultivariateNormal(p_mean, precision_matrix=PRECISIONS)
    gap = torch.distributions.kl_divergence(q, p)
    z = (LOG_C - log_w.mean(0) - gap) / (log_w.std(0) / math.sqrt(2000))
    assert gap.min() > 0.05
    assert 2.0 * N * stats.norm.sf(z.abs().max()) > ALPHA
    z = (LOG_C - log_w.mean(0) - 0.9 * gap) / (log_w.std(0) / math.sqrt(2000))
    assert 2.0 * N * stats.norm.sf(z.abs().max()) < CERTAIN


# --- a target that is not Gaussian ----------------------------------------------------------


def double_well(u: Tensor) -> Tensor:
    """Two modes at ±1.5 of unequal weight; the fitted Gaussian covers both."""
    x = u[..., 0]
    return 1.2 * (x * x / 2.25 - 1.0) ** 2 - 0.5 * x * x + 0.3 * x


N_WELL = 40


def well_log_c() -> Tensor:
    grid = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    log_density = -double_well(grid[:, None]) - 0.5 * grid**2 - 0.5 * math.log(2 * math.pi)
    log_c = torch.logsumexp(log_density, 0) + math.log(float(grid[1] - grid[0]))
    return log_c.expand(N_WELL)


def well_particles() -> Tensor:
    centre = torch.where(normal((8, N_WELL, 1), 3) > 0, 1.4, -1.4)
    return centre + 0.3 * normal((8, N_WELL, 1), 4)


def test_double_well_against_quadrature() -> None:
    """False alarm ALPHA each, for E[w] = C and the bound; the path closes most of the gap."""
    log_w = log_weights(well_particles(), value_and_grad(double_well), draws=200)
    log_c = well_log_c()
    assert unbiased_p_value(log_w, log_c) > ALPHA
    assert bound_p_value(log_w, log_c) > ALPHA
    gap = (log_c - log_w.mean(0)).mean()
    assert 0.0 < gap < 0.3 * _gaussian_gap(log_c, well_particles())


class Diffusing(MALA):
    """Moves that do not know the energy."""

    def step(
        self, f: ValueAndGrad, state: LangevinState, step_size: float | Tensor, **options: Any
    ) -> tuple[LangevinState, Tensor]:
        noise = torch.empty_like(state.u).normal_(generator=options["generator"])
        return init_state(f, state.u + 0.3 * noise), torch.full_like(state.f, 0.6)


def test_checks_fail_for_a_kernel_with_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealing, "_KERNEL", Diffusing())
    log_w = log_weights(well_particles(), value_and_grad(double_well), draws=200)
    assert unbiased_p_value(log_w, well_log_c()) < CERTAIN


def _gaussian_gap(log_c: Tensor, v: Tensor) -> Tensor:
    """Gap of a Gaussian with the mean and variance of the two wells, without annealing."""
    mean, tril = fit_gaussian(v)
    z = mean + (tril @ normal((4000, v.shape[1], 1), 5)[..., None]).squeeze(-1)
    q = torch.distributions.MultivariateNormal(mean, scale_tril=tril)
    log_p = -double_well(z) - 0.5 * z[..., 0] ** 2 - 0.5 * math.log(2 * math.pi)
    return (log_c - (log_p - q.log_prob(z)).mean(0)).mean()


# --- parts ----------------------------------------------------------------------------------


def test_fitted_gaussian_has_the_moments_of_the_draws() -> None:
    draws = normal((50, 4, 3), 0) @ normal((3, 3), 1) + normal((4, 3), 2)
    mean, tril = fit_gaussian(draws)
    for i in range(4):
        covariance = np.cov(draws[:, i].numpy().T, bias=True)
        np.testing.assert_allclose(mean[i], draws[:, i].numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(tril[i] @ tril[i].T, covariance + 1e-6 * np.eye(3), rtol=1e-9)
        assert torch.equal(tril[i], tril[i].tril())


def test_chains_that_never_moved_have_a_small_covariance() -> None:
    mean, tril = fit_gaussian(torch.ones(10, 2, 3))
    torch.testing.assert_close(mean, torch.ones(2, 3))
    torch.testing.assert_close(tril, 1e-3 * torch.eye(3).expand(2, 3, 3))


def test_change_of_variables_keeps_the_density() -> None:
    """exp(−½|y|² − g(y)) / |det L| is exp(−½|v|² − f(v)), and the gradient is that of autograd."""
    mean, tril = normal((N, 2), 3), 0.4 * normal((N, 2, 2), 4).tril(-1) + 0.8 * torch.eye(2)
    f = gaussian_energy()
    g = relative_to(f, mean, tril)
    y = normal((6, N, 2), 5)
    v = mean + torch.einsum("nij,kni->knj", tril.mT, y)
    value, grad = g(y)
    log_det = torch.linalg.slogdet(tril).logabsdet
    left = -0.5 * (y**2).sum(-1) - value - log_det
    torch.testing.assert_close(left, -0.5 * (v**2).sum(-1) - f(v)[0])

    def again(y: Tensor) -> Tensor:
        v = mean + (tril @ y[..., None]).squeeze(-1)
        a = PRECISIONS - torch.eye(2, dtype=torch.float64)
        residual = (v * (0.5 * (a @ v[..., None]).squeeze(-1) + LINEARS)).sum(-1)
        return residual + 0.5 * (v * v).sum(-1) - 0.5 * (y * y).sum(-1)

    torch.testing.assert_close(grad, value_and_grad(again)(y)[1])


# --- shapes and randomness ------------------------------------------------------------------


def test_batches_of_two_axes_keep_their_order() -> None:
    """False alarm ALPHA; the data of a batch (5, 6) in another order fail."""
    block = make_block(exact_particles(4, (5, 6)), gaussian_energy((5, 6)))
    generator = seeded(2)
    draws = posterior_draws(block, torch.tensor(0.3).double(), generator)
    log_w = annealed_elbo(block, draws, num_samples=64, generator=generator)
    assert log_w.shape == (64, 5, 6)
    assert unbiased_p_value(log_w, LOG_C.reshape(5, 6)) > ALPHA
    error = (log_w.mean(0) - LOG_C.reshape(5, 6)).abs().max()
    assert error < 0.1 < (log_w.mean(0) - LOG_C.reshape(6, 5).T).abs().max()


def single_precision(f: ValueAndGrad) -> ValueAndGrad:
    return lambda v: tuple(part.float() for part in f(v.double()))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [1, 4])
def test_single_precision_and_any_number_of_particles(count: int) -> None:
    """False alarm ALPHA."""
    log_w = log_weights(exact_particles(count).float(), single_precision(gaussian_energy()))
    assert log_w.dtype == torch.float32
    assert unbiased_p_value(log_w.double(), LOG_C) > ALPHA


def test_draws_are_fixed_by_the_generator_and_leave_the_particles() -> None:
    v = exact_particles(4)
    kept = v.clone()
    first, again, other = (log_weights(v, draws=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and (first != other).all()
    assert torch.equal(v, kept)
