# SPDX-License-Identifier: Apache-2.0
"""`Saddle` for models without an LVEBM: particle maximum marginal likelihood.

The toy model of Kuntz, Lim and Johansen (2023), section 2.3: z_i ~ N(θ, 1), y_i ~ N(z_i, 1), so
that θ* = mean(y). With `ULA` every step is linear and Gaussian, so the law of θ after many steps
solves a Lyapunov equation, and many copies of the model in a second plate are independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD, PyroOptim
from referee import ALPHA, CERTAIN, mean_p_value, normal, variance_p_value
from scipy.linalg import solve_discrete_lyapunov
from scipy.special import expit, logsumexp
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pyro_lvebm import MALA, ULA, AutoParticles, Saddle, ipla, log_evidence_of, to_arviz
from pyro_lvebm.latents import positive_phase as positive

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

COPIES, ROWS, PARTICLES = 600, 8, 5
LR, STEP_SIZE, MOVES, MOMENTUM = 0.05, 0.1, 2, 0.6

OPTIMISERS: dict[str, Callable[[], PyroOptim]] = {
    "descent": lambda: SGD({"lr": LR}),
    "momentum": lambda: SGD({"lr": LR, "momentum": MOMENTUM}),
    "noise": lambda: ipla(LR, PARTICLES),
}


def toy(y: Tensor) -> None:
    theta = pyro.param("theta", torch.zeros(COPIES, dtype=torch.float64))
    with pyro.plate("copies", COPIES, dim=-1), pyro.plate("data", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def toy_data() -> Tensor:
    return 2.0 + math.sqrt(2.0) * normal((ROWS, COPIES), 0)


def theta_variance(
    optim: str, lr: float = LR, step_size: float = STEP_SIZE, moves: int = MOVES
) -> float:
    """Exact variance of θ − mean(y) in the long run, from s ← A s + N(0, Q) of s = (θ, b, mean z).

    A move takes mean z to (1 − 2η) mean z + η (θ + ȳ) + √(2η/(NM)) ξ; a step takes the buffer b of
    the momentum to μ b + M (θ − mean z), and θ to θ − γ b + √(2γ/N) ξ.
    """
    mu = MOMENTUM if optim == "momentum" else 0.0
    noise = 2.0 * lr / PARTICLES if optim == "noise" else 0.0
    a, q = np.eye(3), np.zeros((3, 3))
    move = np.array([[1, 0, 0], [0, 1, 0], [step_size, 0, 1 - 2 * step_size]])
    spread = np.diag([0, 0, 2 * step_size / (PARTICLES * ROWS)])
    gradient = np.array([0.0, mu, 0.0]) + ROWS * np.array([1.0, 0.0, -1.0])
    update = np.stack([[1, 0, 0] - lr * gradient, gradient, [0, 0, 1]])
    for step, covariance in [(move, spread)] * moves + [(update, np.diag([noise, 0, 0]))]:
        a, q = step @ a, step @ q @ step.T + covariance
    return float(solve_discrete_lyapunov(a, q)[0, 0])


def draws_of_theta(optim: str) -> tuple[Tensor, Tensor]:
    """θ − mean(y) of every copy after 40 steps, and the particles' mean."""
    y = toy_data()
    guide = AutoParticles(toy, PARTICLES)
    saddle = Saddle(toy, guide, OPTIMISERS[optim](), kernel=ULA(), num_moves=MOVES, seed=1)
    for _ in range(40):  # θ forgets its start by a factor of 0.8 a step at least
        saddle.step(y)
    assert float(guide.step_size("z")) == pytest.approx(STEP_SIZE)
    return pyro.param("theta").detach() - y.mean(0), guide.particles("z")


@pytest.mark.parametrize("optim", OPTIMISERS)
def test_theta_has_its_exact_law_around_the_maximum_of_the_likelihood(optim: str) -> None:
    """Chi-square test of 600 copies, which a wrong mean fails too; false-alarm rate ALPHA each."""
    draws, _ = draws_of_theta(optim)
    p = {law: variance_p_value(draws[:, None], theta_variance(law)) for law in OPTIMISERS}
    assert p.pop(optim) > ALPHA
    # One optimiser taken for another is found.
    assert all(value < CERTAIN for value in p.values())


@pytest.mark.parametrize("wrong", [1, 4 * PARTICLES])
def test_the_check_fails_for_noise_of_another_size(
    wrong: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """√(2γ) instead of √(2γ/N), and half of it."""
    monkeypatch.setitem(OPTIMISERS, "noise", lambda: ipla(LR, wrong))
    draws, _ = draws_of_theta("noise")
    assert variance_p_value(draws[:, None], theta_variance("noise")) < CERTAIN


def test_the_law_of_noisy_theta_is_a_power_of_the_likelihood_as_steps_become_small() -> None:
    """p(y | θ)^N is Gaussian with variance 2/(NM); without noise θ would not move at all."""
    small = {optim: theta_variance(optim, 1e-5, 1e-3) for optim in ("noise", "descent")}
    assert small["noise"] == pytest.approx(2.0 / (PARTICLES * ROWS), rel=1e-3)
    assert small["descent"] < 1e-3


# --- Bayesian logistic regression, with weights outside the plate of the data -----------------

REPEATS = 16


def breast_cancer() -> tuple[Tensor, Tensor]:
    """Five features of a third of scikit-learn's data, standardised (190, 5), and labels.

    Mean radius, texture, smoothness, symmetry and fractal dimension: perimeter and area, which go
    with the radius, would make a posterior in which short chains do not mix.
    """
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x[:, [0, 1, 4, 8, 9]])
    return torch.from_numpy(x)[::3], torch.from_numpy(y)[::3].double()


def log_joint(w: np.ndarray, theta: float, x: np.ndarray, sign: np.ndarray) -> np.ndarray:
    """log p(y, w | θ) of weights (n, 5), without constants."""
    return -np.logaddexp(0.0, -sign * (w @ x.T)).sum(-1) - 0.1 * ((w - theta) ** 2).sum(-1)


def best_theta(num_draws: int = 20_000) -> tuple[float, float]:
    """Root of d log p(y | θ)/dθ = E[Σ_d (w_d − θ) | y] / 5, and its Monte Carlo standard error.

    By Newton's method with importance sampling from a multivariate t distribution with eight
    degrees of freedom around the mode of p(w | y, θ), with the same random numbers at every θ.
    """
    x, y = (value.numpy() for value in breast_cancer())
    d, nu, rng = x.shape[1], 8, np.random.default_rng(0)
    t = rng.standard_normal((num_draws, d))
    t /= np.sqrt(rng.chisquare(nu, num_draws) / nu)[:, None]
    log_q = -0.5 * (nu + d) * np.log1p((t**2).sum(1) / nu)
    theta, mode = 0.0, np.zeros(d)
    for _ in range(12):
        for _ in range(20):
            p = expit(x @ mode)
            hessian = (x.T * (p * (1 - p))) @ x + np.eye(d) / 5
            mode = mode + np.linalg.solve(hessian, x.T @ (y - p) - (mode - theta) / 5)
        w = mode + t @ np.linalg.cholesky(np.linalg.inv(hessian)).T
        log_weight = log_joint(w, theta, x, 2 * y - 1) - log_q
        weight = np.exp(log_weight - logsumexp(log_weight))
        assert 1 / (weight**2).sum() > num_draws / 3
        total = (w - theta).sum(1)
        mean = weight @ total
        information = d / 5 - weight @ (total - mean) ** 2 / 25
        theta += mean / 5 / information
    assert abs(mean) < 1e-8
    return theta, float(np.sqrt((weight**2) @ (total - mean) ** 2)) / 5 / information


def logistic(x: Tensor, y: Tensor) -> None:
    theta = pyro.param("theta", torch.zeros(REPEATS, 1, 1, dtype=torch.float64))
    with pyro.plate("repeats", REPEATS, dim=-2):
        w = pyro.sample("w", dist.Normal(theta, 5**0.5).expand([REPEATS, 1, 5]).to_event(1))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=(w * x).sum(-1)), obs=y)


class Descent(ULA):
    """Langevin without its noise, which ends at the mode of w."""

    def step(self, f: Any, state: Any, step_size: Any, **options: Any) -> Any:
        options.pop("generator")
        u = state.u - 0.005 * (state.grad + state.u)
        return type(state)(u, *f(u)), state.f.new_ones(())


def fitted_thetas(kernel: Any, num_steps: int = 110) -> Tensor:
    x, y = breast_cancer()
    guide = AutoParticles(logistic, 4)
    saddle = Saddle(logistic, guide, SGD({"lr": 0.2}), kernel=kernel, num_moves=6, seed=2)
    saddle.fit(x, y, num_steps=num_steps, progress=False)
    return pyro.param("theta").detach().flatten()


def test_logistic_regression_reaches_the_maximum_of_the_marginal_likelihood() -> None:
    """Student's test of 16 independent fits; false-alarm rate ALPHA."""
    theta, error = best_theta()
    fits = fitted_thetas(MALA())
    assert mean_p_value(fits, theta) > ALPHA
    std_error = float(fits.std()) / REPEATS**0.5
    assert error < 0.3 * std_error < 0.01


def unmoved_particles() -> int:
    """Particles that are where they started after 30 steps of eight moves."""
    x, y = breast_cancer()
    guide = AutoParticles(logistic, 4)
    saddle = Saddle(logistic, guide, SGD({"lr": 0.2}), num_moves=1, seed=2)
    saddle.step(x, y)
    start = guide.particles("w").clone()
    saddle.num_moves = 8
    for _ in range(30):
        saddle.step(x, y)
    return int((guide.particles("w") == start).all(-1).sum())


def test_no_particle_stays_where_every_long_move_is_refused() -> None:
    assert unmoved_particles() == 0


def test_with_moves_of_one_length_some_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positive, "step_factors", lambda block, kernel, n, generator: [1.0] * n)
    assert unmoved_particles() > 0


def test_the_check_fails_for_particles_at_the_mode() -> None:
    assert mean_p_value(fitted_thetas(Descent(), 50), best_theta(2_000)[0]) < CERTAIN


# --- what is told of such a model -------------------------------------------------------------


def one_mean(y: Tensor, size: int | None = None) -> None:
    """A latent of all data, with the posterior N((θ + Σy) / (n + 1), 1 / (n + 1))."""
    theta = pyro.param("theta", torch.zeros((), dtype=torch.float64))
    w = pyro.sample("w", dist.Normal(theta, 1.0))
    with pyro.plate("data", len(y), subsample_size=size) as i:
        pyro.sample("y", dist.Normal(w, 1.0), obs=y[i])


def fitted_mean(size: int | None = None) -> tuple[Saddle, Tensor]:
    y = 1.0 + normal((20,), 3)
    guide = AutoParticles(partial(one_mean, size=size), 40)
    saddle = Saddle(partial(one_mean, size=size), guide, SGD({"lr": 0.1}))
    saddle.fit(y, num_steps=40, schedule=lambda progress: 1.0, progress=False)
    return saddle, y


def test_the_loss_is_the_mean_energy_of_the_particles_over_all_data() -> None:
    """Before the update, and with a history of the same numbers and finite averages."""
    saddle, y = fitted_mean()
    theta = pyro.param("theta").detach().clone()
    loss = saddle.step(y)
    w = saddle.particles.particles("w").reshape(-1, 1)
    energy = -dist.Normal(theta, 1.0).log_prob(w)[:, 0] - dist.Normal(w, 1.0).log_prob(y).sum(1)
    assert loss == pytest.approx(float(energy.mean()), rel=1e-12)
    assert saddle.history.loss.iloc[-1] == loss
    assert list(saddle.history) == ["loss", "kl", "halvings", "lengthening", "latent_acceptance_w"]
    with saddle.averaged():
        assert abs(float(pyro.param("theta").detach()) - float(y.mean())) < 0.2


def test_posterior_draws_of_a_latent_of_all_data_follow_the_closed_form() -> None:
    """Chi-square test of 40 chains; false-alarm rate ALPHA; at the prior's mean it fails."""
    saddle, y = fitted_mean()
    w = saddle.sample_posterior(y, num_samples=1, num_warmup=100)["w"]
    assert w.shape == (40, 1)
    precision = len(y) + 1.0
    mean = float((pyro.param("theta").detach() + y.sum()) / precision)
    assert variance_p_value(w, 1.0 / precision, mean) > ALPHA
    assert variance_p_value(w, 1.0 / precision, 0.0) < CERTAIN


def test_all_data_are_one_datum_with_its_log_evidence() -> None:
    """Against the multivariate normal, within five standard errors, which are small."""
    saddle, y = fitted_mean()
    n, theta = len(y), pyro.param("theta").detach()
    law = dist.MultivariateNormal(theta.expand(n), torch.eye(n).double() + 1.0)
    found = log_evidence_of(saddle.model, y, saddle=saddle)
    assert found.value.shape == (1,) and float(found.std_error) < 0.02
    assert abs(float(found.value) - float(law.log_prob(y))) < 5.0 * float(found.std_error)
    with saddle.averaged():
        law = dist.MultivariateNormal(
            pyro.param("theta").detach().expand(n), torch.eye(n).double() + 1.0
        )
    value, error = saddle.log_evidence(y)
    assert abs(value - float(law.log_prob(y))) < 1.0 and math.isnan(error)


def test_many_particles_and_few_draws_go_to_arviz_without_a_warning() -> None:
    saddle, y = fitted_mean()
    idata = to_arviz(saddle, y, num_samples=3, num_warmup=1)
    assert dict(idata.posterior.sizes) == {"chain": 40, "draw": 3}
    assert dict(idata.posterior_predictive.sizes)["data"] == 20


def test_what_minibatches_cannot_tell_of_a_latent_of_all_data_is_refused() -> None:
    """Training goes on, by noisy moves; for draws and evidence the plate must be whole."""
    saddle, y = fitted_mean(size=5)
    with pytest.raises(ValueError, match=r"\['w'\] lie outside a plate that subsamples"):
        saddle.sample_posterior(y, num_samples=1)
    with pytest.raises(ValueError, match=r"\['w'\] lie outside a plate that subsamples"):
        to_arviz(saddle, y)
    with pytest.raises(ValueError, match="outside the subsampled plate"):
        saddle.log_evidence(y)
