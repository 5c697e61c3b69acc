# SPDX-License-Identifier: Apache-2.0
"""Missing entries of x on bounded supports."""

from __future__ import annotations

import math

import pytest
import torch
from bounded_models import CONSTRAINTS, log_jacobian, to_support, twins
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.optim import Adam
from referee import (
    ALPHA,
    CERTAIN,
    bracket,
    global_seed,
    mean_p_value,
    normal,
    seeded,
    variance_p_value,
)
from small_models import condition, exact_joint, plate_model
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm import LVEBM, AutoParticles, QuadraticEnergy, Saddle, log_evidence
from pyro_lvebm.bases.fitting import fit_incomplete
from pyro_lvebm.model import imputation

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

ELEMENTWISE = pytest.mark.parametrize("constraint", CONSTRAINTS[:3], ids=str)


def with_holes(x: Tensor, share: float = 0.4, seed: int = 0) -> Tensor:
    return x.masked_fill(torch.rand(x.shape, generator=seeded(seed)) < share, math.nan)


def draws_of_y(ebm: LVEBM, n: int, seed: int) -> Tensor:
    law = exact_joint(ebm)
    draws = law.mean + normal((n, ebm.dim), seed) @ torch.linalg.cholesky(law.covariance_matrix).T
    return draws[:, : ebm.base_x.dim].detach()


def marginal(law: MultivariateNormal, row: Tensor, observed: list[int]) -> Tensor:
    if not observed:
        return row.new_zeros(())
    cov = law.covariance_matrix[observed][:, observed]
    return MultivariateNormal(law.mean[observed], cov).log_prob(row[observed])


def entry_jacobian(ebm: LVEBM, y: Tensor) -> Tensor:
    """log |dx_i/dy_i| of every entry of rows y (n, d), one entry at a time by autograd."""
    y = y.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(to_support(ebm, y).sum(), y)
    return slope.abs().log()


@ELEMENTWISE
def test_three_sites_add_up_to_the_joint_density(constraint: Constraint) -> None:
    plain, ebm = twins(constraint)
    y = draws_of_y(plain, 12, 1)
    x = with_holes(to_support(ebm, y))
    z, other = normal((12, 2), 2), normal((12, 3), 3)
    entries = to_support(ebm, other)
    model = poutine.condition(plate_model(ebm), {"scene_z": z, "scene_missing": entries})
    with ebm.frozen():
        trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    seen = ~x.isnan()
    whole = torch.where(seen, y, other)
    expected = -plain.energy(whole, z) - log_jacobian(ebm, whole) - ebm.log_partition
    completion = trace.nodes["scene_missing"]["fn"].completion
    idle = completion.log_prob(entries) - completion.log_prob_missing(entries)
    found = sum(trace.nodes[name]["log_prob"] for name in ("scene", "scene_z", "scene_missing"))
    torch.testing.assert_close(found, (expected + idle).detach())
    assert torch.equal(trace.nodes["_RETURN"]["value"][0][seen], x[seen])
    support = trace.nodes["scene_missing"]["fn"].support
    assert support.check(entries).all() and str(support) == str(ebm.base_x.support.constraint)
    with global_seed(0):
        assert support.check(trace.nodes["scene_missing"]["fn"].sample((9,))).all()


@ELEMENTWISE
def test_evidence_of_observed_entries_is_exact(constraint: Constraint) -> None:
    """In data coordinates: the Jacobian is that of the observed entries. False alarm ALPHA."""
    plain, ebm = twins(constraint)
    y = draws_of_y(plain, 60, 1)
    x = with_holes(to_support(ebm, y))
    exact_z = bracket(float(ebm.f.log_partition().detach()))
    result = log_evidence(ebm, x, num_particles=64, log_z=exact_z)
    law, slopes, seen = exact_joint(plain), entry_jacobian(ebm, y), ~x.isnan()
    exact = torch.stack(
        [marginal(law, r, torch.nonzero(s)[:, 0].tolist()) for r, s in zip(y, seen, strict=True)]
    )
    exact = exact.detach() - torch.where(seen, slopes, 0.0).sum(-1)
    z = (result.value - exact) / result.std_error
    # Student's t with 7 degrees of freedom has variance 7/5.
    assert abs(z.mean()) < 4 * math.sqrt(1.4 / 60) and z.abs().max() < 12.0
    all_slopes = result.value - (exact + torch.where(seen, slopes, 0.0).sum(-1) - slopes.sum(-1))
    assert (all_slopes / result.std_error).abs().mean() > 4.0


def whitened_entries(plain: LVEBM, x: Tensor, y: Tensor, draws: Tensor) -> Tensor:
    """Draws (s, n, d) of missing y, one entry a row, standardised by their exact conditional."""
    white = []
    for i, row in enumerate(x):
        m = torch.nonzero(row.isnan())[:, 0].tolist()
        o = [k for k in range(len(row)) if k not in m]
        law = exact_joint(plain)
        if o and m:
            both = condition(law, o, y[i, o])
            first = (draws[:, i, m[0]] - both.mean[0]) / both.stddev[0]
            white.append(first.detach())
    return torch.stack(white, 1)


@ELEMENTWISE
def test_imputed_entries_follow_their_exact_conditional(
    constraint: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 draws of each of 60 rows. False alarm 2 ALPHA."""
    monkeypatch.setattr(imputation, "_NUM_PARTICLES", 64)  # enough for Gaussians
    plain, ebm = twins(constraint)
    y = draws_of_y(plain, 60, 1)
    x = with_holes(to_support(ebm, y))
    draws = ebm.impute(x, num_samples=16)
    assert torch.equal(draws[:, ~x.isnan()], x[~x.isnan()].expand(16, -1))
    ebm.base_x.support.check(draws)
    white = whitened_entries(plain, x, y, ebm.base_x.support.unconstrain(draws)).reshape(-1, 1)
    assert mean_p_value(white, 0.0) > ALPHA and variance_p_value(white, 1.0) > ALPHA
    wrong = whitened_entries(plain, x, y, draws).reshape(-1, 1)  # data coordinates
    assert mean_p_value(wrong, 0.0) < CERTAIN or variance_p_value(wrong, 1.0) < CERTAIN


def test_nuts_and_particles_agree_with_the_exact_law_of_a_missing_positive_entry() -> None:
    """Averages over 24 data as replicates. False alarm 2 ALPHA."""
    plain, ebm = twins(constraints.positive, 2)
    y = draws_of_y(plain, 24, 1)
    x = to_support(ebm, y)
    x[:, 0] = math.nan
    law = condition(exact_joint(plain), [1], y[:, 1:])
    model = plate_model(ebm)

    def p_value(draws: Tensor, jacobian: bool) -> float:
        log_x = draws[..., 0].log()
        # Without the Jacobian a Gaussian of log x has its mean moved by the variance.
        mean = law.mean[:, 0] + (0.0 if jacobian else law.variance[:, 0])
        white = ((log_x - mean) / law.stddev[:, 0]).detach()
        return mean_p_value(torch.stack([white.mean(0), (white**2).mean(0)], -1), [0.0, 1.0])

    with global_seed(0), ebm.frozen():
        mcmc = MCMC(NUTS(model), num_samples=40, warmup_steps=25, disable_progbar=True)
        mcmc.run(x)
    nuts = mcmc.get_samples()["scene_missing"]
    with ebm.frozen():
        saddle = Saddle(model, AutoParticles(model, 8), Adam({"lr": 1e-3}), seed=0)
        saddle.fit(x, num_steps=30, progress=False)
        kept = saddle.sample_posterior(x, num_samples=50, num_warmup=50)["scene_missing"]
    for draws in (nuts, kept.flatten(0, 1)):
        assert (draws > 0).all()
        assert p_value(draws, True) > ALPHA
        assert p_value(draws, False) < CERTAIN


def test_the_base_of_incomplete_positive_data_is_fitted_to_their_logarithms() -> None:
    y = normal((200, 2), 1) @ torch.tensor([[1.0, 0.8], [0.0, 0.5]]).double()
    x = with_holes(y.exp(), 0.3)
    ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, support=constraints.positive)
    mean, cov = fit_incomplete(x.log())
    torch.testing.assert_close(ebm.base_x.loc, mean)
    torch.testing.assert_close(ebm.base_x.scale @ ebm.base_x.scale.T, cov)
    assert bool(ebm.expects_missing)
