# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from bounded_models import to_support, twins
from linear_gaussian import assert_unchanged, make_neural, quadrature_log_partition
from referee import ALPHA, CERTAIN, gaussian_draws, mean_p_value, plane_grid
from scipy import stats
from small_models import exact_joint, warm
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_lvebm import LVEBM, ULA, QuadraticEnergy, TemperedPool, convergence_rate
from pyro_lvebm.diagnostics import flow as flow_samples
from pyro_lvebm.diagnostics.convergence import ConvergenceRate

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

ETA = 0.02
TRANSLATE = (torch.eye(2).double(), torch.tensor([3.0, 2.0]).double())
STRETCHED = (
    torch.tensor([[2.0, 0.5], [0.5, 0.8]]).double(),
    torch.tensor([0.4, -1.5]).double(),
)


def quadratic(precision: Tensor, linear: Tensor, pool: TemperedPool | None = None) -> LVEBM:
    energy = QuadraticEnergy(1, 1).double()
    energy.set_precision(precision, linear)
    base_x = dist.Normal(torch.tensor([3.0]).double(), 2.0).to_event(1)
    base_z = dist.Normal(torch.tensor([-1.0]).double(), 0.5).to_event(1)
    return LVEBM(energy, base_x, base_z, TemperedPool(2, 4) if pool is None else pool)


def exact(law: tuple[Tensor, Tensor], seed: int, **options: Any) -> ConvergenceRate:
    """The rate from exact draws of the model."""
    ebm = quadratic(*law)
    settings = {"num_chains": 60, "num_replicates": 5, "num_times": 6, "step_size": ETA}
    settings |= {"duration": 1.0, "estimator": "gaussian"} | options
    size = 2 * settings["num_replicates"] * settings["num_chains"]
    x, z = ebm.unwhiten(gaussian_draws(*law, (size,), seed + 100))
    return convergence_rate(ebm, draws=torch.cat([x, z], -1), seed=seed, **settings)


def closed_form(law: tuple[Tensor, Tensor], t: np.ndarray, eta: float = ETA) -> np.ndarray:
    """KL to the model (T,) of the Gaussians that unadjusted Langevin steps make of the base."""
    precision, linear = (part.numpy() for part in law)
    target, (m, s) = -np.linalg.solve(precision, linear), (np.zeros(2), np.eye(2))
    contraction, values = np.eye(2) - eta * precision, []
    for steps in np.diff(np.rint(t / eta).astype(int), prepend=0):
        for _ in range(steps):
            m = m - eta * (precision @ m + linear)
            s = contraction @ s @ contraction + 2.0 * eta * np.eye(2)
        log_det = np.linalg.slogdet(precision @ s)[1]
        values.append(
            0.5 * (np.trace(precision @ s) + (m - target) @ precision @ (m - target) - 2 - log_det)
        )
    return np.array(values)


def slope(frame: pd.DataFrame, kl: np.ndarray) -> float:
    """The fitted slope that these KL would have, with the weights of a frame."""
    used = frame["fitted"].to_numpy()
    weights = (frame["kl"] / frame["kl_se"])[used]
    return -np.polyfit(frame["t"][used], np.log(kl[used]), 1, w=weights)[0]


# --- quadratic energies: the flow is Gaussian -------------------------------------------------


@functools.cache
def replicates(name: str) -> list[ConvergenceRate]:
    law = {"translate": TRANSLATE, "stretched": STRETCHED}[name]
    return [exact(law, seed) for seed in range(16)]


def kl_p_value(results: list[ConvergenceRate], law: tuple[Tensor, Tensor]) -> float:
    """Student's test over seeds of KL at all times against the closed form."""
    kl = np.array([r.frame["kl"] for r in results])
    return mean_p_value(kl, closed_form(law, results[0].frame["t"].to_numpy()))


@pytest.mark.parametrize(("name", "law"), [("translate", TRANSLATE), ("stretched", STRETCHED)])
def test_kl_is_that_of_the_ornstein_uhlenbeck_process(
    name: str, law: tuple[Tensor, Tensor]
) -> None:
    """16 seeds and 6 times. False alarms: ALPHA a case."""
    assert kl_p_value(replicates(name), law) > ALPHA


def test_kl_check_fails_for_slow_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(ULA):
        def step(self, f: Any, state: Any, step_size: Any, **options: Any) -> Any:
            return super().step(f, state, 0.5 * step_size, **options)

    monkeypatch.setattr(flow_samples, "ULA", Slow)
    assert kl_p_value([exact(TRANSLATE, seed) for seed in range(10)], TRANSLATE) < CERTAIN


def test_rate_of_a_translate_is_twice_lambda() -> None:
    """Student's test over 16 seeds: λ = 1, and 2 (1 + η/2 + …) for unadjusted steps."""
    rates = np.array([[r.rate] for r in replicates("translate")])
    assert all(r.frame["fitted"].all() for r in replicates("translate"))
    assert mean_p_value(rates, -2.0 * math.log(1.0 - ETA) / ETA) > ALPHA
    assert mean_p_value(rates, 2.4) < CERTAIN


def error_p_value(factor: float) -> float:
    """Two-sided F test that claimed squared errors are the variance of the rate over seeds."""
    rates = np.array([r.rate for r in replicates("translate")])
    claimed = np.array([factor * r.std_error for r in replicates("translate")])
    ratio = rates.var(ddof=1) / (claimed**2).mean()
    law = stats.f(15, 16 * 4)
    return 2.0 * min(law.cdf(ratio), law.sf(ratio))


def test_standard_error_of_the_rate_is_calibrated() -> None:
    """False alarms: ALPHA, for jackknife errors with four degrees of freedom each."""
    assert error_p_value(1.0) > ALPHA
    assert error_p_value(0.3) < CERTAIN


def test_late_times_show_the_slowest_direction() -> None:
    """λ is the smallest eigenvalue; the mean lies along its direction."""
    values, vectors = torch.linalg.eigh(STRETCHED[0])
    law = (STRETCHED[0], 4.0 * vectors[:, 0])
    options = {"duration": 2.4, "num_times": 7, "fit_from": 0.8, "num_chains": 120}
    results = [exact(law, seed, **options) for seed in range(6)]
    frame = results[0].frame
    assert frame["t"][frame["fitted"]].min() == pytest.approx(0.8)
    assert slope(frame, closed_form(law, frame["t"].to_numpy())) == pytest.approx(
        2.0 * float(values[0]), rel=0.02
    )
    expected = [slope(r.frame, closed_form(law, r.frame["t"].to_numpy())) for r in results]
    difference = np.array([r.rate for r in results]) - expected
    assert mean_p_value(difference[:, None], 0.0) > ALPHA
    assert max(r.std_error for r in results) < 0.1


def test_talagrand_and_decay_hold_along_the_flow() -> None:
    """W2² ≤ (2/λ) KL, within 4 standard errors at 4 times; twice the distance would break it.

    For a translate, λ = 1, it is an equality.
    """
    result = exact(TRANSLATE, 0, num_chains=300, num_times=4)
    frame = result.frame
    excess = frame["w2"] ** 2 - 2.0 * frame["kl"]
    error = np.hypot(2.0 * frame["w2"] * frame["w2_se"], 2.0 * frame["kl_se"])
    assert (excess.abs() < 4.0 * error).all()
    assert (4.0 * frame["w2"] ** 2 - 2.0 * frame["kl"] > 4.0 * error).all()
    assert result.w2_floor > 0.1  # what has been taken off


# --- any energy -------------------------------------------------------------------------------


def start_error(estimator: str, num_replicates: int) -> float:
    """Largest possible error of KL(base ‖ p) = E_base[f] + log Z for a network, by quadrature."""
    ebm = make_neural(1, 1, pool=TemperedPool(6, 100, seed=1), seed=3)
    result = convergence_rate(
        ebm,
        estimator=estimator,  # type: ignore[arg-type]
        num_chains=400,
        num_times=3,
        num_replicates=num_replicates,
        duration=0.04,
        step_size=0.02,
    )
    grid, cell = plane_grid(9.0, 181)
    log_base = -0.5 * grid.square().sum(1) - math.log(2.0 * math.pi)
    with torch.no_grad():
        mean_f = float((log_base.exp() * ebm.residual(grid)).sum() * cell)
    expected = mean_f + quadrature_log_partition(ebm, count=181)
    kl, error = result.frame.loc[0, ["kl", "kl_se"]]
    return abs(kl - expected) + 3.0 * error


def test_neighbours_find_the_divergence_of_a_network() -> None:
    """Within 0.15 nats with 400 draws; moments, which see Gaussians only, are not."""
    assert start_error("neighbours", 7) < 0.15
    assert start_error("gaussian", 3) > 0.2


def test_the_pool_provides_draws() -> None:
    """As exact draws would, within 5 standard errors, and nothing else moves."""
    ebm = quadratic(*TRANSLATE, pool=TemperedPool(4, 100, num_moves=4, seed=3))
    settings = {"num_chains": 100, "num_replicates": 4, "num_times": 6, "step_size": 0.05}
    with assert_unchanged(ebm):
        a = convergence_rate(ebm, seed=1, duration=1.0, estimator="gaussian", **settings)
        b = convergence_rate(ebm, seed=1, duration=1.0, estimator="gaussian", **settings)
    pd.testing.assert_frame_equal(a.frame, b.frame)
    assert abs(a.rate + 2.0 * math.log(1.0 - 0.05) / 0.05) < 5.0 * a.std_error
    assert f"{0.5 * a.rate:.2f}" in str(a)


def test_a_base_that_is_the_model_has_no_rate() -> None:
    """Unadjusted steps leave it by less than the noise."""
    law = (torch.eye(2).double(), torch.zeros(2).double())
    result = exact(law, 0)
    assert math.isnan(result.rate) and not result.frame["fitted"].any()
    assert "KL is above its noise at 0 times" in result.verdict


class TwoWells(nn.Module):
    """Two modes in x of unequal weight, which chains do not leave for a long time."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * (x[..., 0] ** 2 - 4.0) ** 2 + 0.5 * x[..., 0]


def test_chains_held_in_modes_are_told_from_fast_ones() -> None:
    """Modes keep the chains that start on their sides of the barrier: a fast rate, then none.

    The plateau is KL between the shares of modes, 0.31 nats here, and known to 0.02; flows of a
    Gaussian, of which late times are fitted or lie in the noise, have none.
    """
    base = dist.Normal(torch.zeros(1).double(), 1.0).to_event(1)
    ebm = LVEBM(TwoWells(), base, base, TemperedPool(6, 100, seed=1))
    options = {"duration": 1.2, "num_times": 25, "fit_from": 0.0}
    result = convergence_rate(ebm, num_chains=300, num_replicates=4, **options)
    axis = torch.linspace(-6.0, 6.0, 4001, dtype=torch.float64)
    log_p = -0.5 * axis**2 - TwoWells()(axis[:, None], axis)
    middle = axis.abs() < 1.0
    barrier = float(axis[middle][log_p[middle].argmin()])
    share = float(torch.softmax(log_p, 0)[axis < barrier].sum())
    start = float(stats.norm.cdf(barrier))
    between = start * math.log(start / share) + (1 - start) * math.log((1 - start) / (1 - share))
    assert result.rate > 4.0 and between > 0.3
    assert abs(result.plateau - between) < 0.08
    assert "then stays at" in result.verdict
    assert all(
        math.isnan(r.plateau) for name in ("translate", "stretched") for r in replicates(name)
    )
    assert math.isnan(exact(TRANSLATE, 1, duration=6.0, num_times=13).plateau)


def test_fit_ends_where_kl_meets_the_noise() -> None:
    """And does not resume after that."""
    result = exact(TRANSLATE, 1, duration=6.0, num_times=13)
    fitted = result.frame["fitted"]
    assert 3 <= fitted.sum() < 13 and not fitted.diff().eq(True).iloc[1:].iloc[fitted.sum() :].any()
    assert (result.frame["kl"][fitted] > result.kl_floor).all()


def test_draws_on_a_simplex_have_more_entries_than_whitened_ones() -> None:
    """The same figures as those of the unconstrained coordinates of x, up to rounding."""
    plain, ebm = twins(constraints.simplex)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = exact_joint(plain).sample((2 * 3 * 20,))
        own = warm(ebm, 2).joint().sample((2 * 3 * 20,))
    x = to_support(ebm, draws[:, :3])
    settings: dict[str, Any] = {"num_chains": 20, "num_replicates": 3, "num_times": 4}
    found = convergence_rate(ebm, draws=torch.cat([x, draws[:, 3:]], -1), **settings)
    expected = convergence_rate(plain, draws=draws, **settings)
    pd.testing.assert_frame_equal(found.frame, expected.frame, rtol=1e-6)
    assert convergence_rate(ebm, draws=own, **settings).frame["kl"].notna().all()
    with pytest.raises(ValueError, match=r"expected \(m, 6\)"):
        convergence_rate(ebm, draws=draws, **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "best"}, "must be 'neighbours' or 'gaussian'; got 'best'"),
        ({"num_times": 2}, "num_times must be at least 3; got 2"),
        ({"num_chains": 7}, "num_chains must be at least 8"),
        ({"num_replicates": 2}, "num_replicates must be at least 3"),
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"duration": 0.01}, r"duration must be at least .* 0.1; got 0.01"),
        ({"fit_from": 2.0}, "fit_from must lie between 0 and duration 2"),
        ({"draws": torch.zeros(5, 2)}, r"draws has shape \(5, 2\); expected \(m, 2\)"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convergence_rate(quadratic(*TRANSLATE), **options)


def test_chains_that_diverge_are_named() -> None:
    law = (200.0 * torch.eye(2).double(), torch.zeros(2).double())
    with pytest.raises(ValueError, match=r"chains diverged by t = .*; lower step_size"):
        exact(law, 0, step_size=0.5, duration=500.0, num_times=3)
