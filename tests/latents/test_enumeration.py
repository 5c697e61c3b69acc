# SPDX-License-Identifier: Apache-2.0
"""A label of each datum, enumerated beside an LVEBM: three Gaussians, so everything is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import draw_x, make_quadratic
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoNormal
from pyro.optim import SGD, ClippedAdam
from referee import ALPHA, CERTAIN, gaussian_log_partition, global_seed, mean_p_value, normal
from scipy import stats
from small_models import exact_posterior, warm
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, Saddle, TemperedPool, lvebm
from pyro_lvebm.comparison.rows import row_terms
from pyro_lvebm.evidence.programs import model_log_evidence
from pyro_lvebm.latents.energy import latent_blocks
from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import Sweep
from pyro_lvebm.sites.traces import vectorise

LOCS = torch.tensor([-2.0, 0.0, 2.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
SIGMA = 0.7


def labelled(ebm: LVEBM, size: int | None = None, scale: float = 1.0) -> Callable[..., None]:
    """y is z_0 plus the offset of a label, with noise."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            with poutine.scale(scale=scale):
                c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(z[..., 0] + LOCS[c], SIGMA), obs=y[i])

    return model


@cache
def setting(n: int = 12) -> tuple[LVEBM, Tensor, Tensor]:
    ebm = warm(make_quadratic(pool=TemperedPool(6, 256, num_moves=4)))
    return ebm, draw_x(ebm, n, 1), 2.0 * normal((n,), 2)


def label_log_probs(ebm: LVEBM, x: Tensor, y: Tensor) -> Tensor:
    """log p(c, y | x) (3, N): y given x and c is Gaussian."""
    posterior = exact_posterior(ebm, x)
    var = posterior.covariance_matrix[..., 0, 0] + SIGMA**2
    law = dist.Normal(posterior.mean[:, 0] + LOCS[:, None], var.sqrt())
    return WEIGHTS.log()[:, None] + law.log_prob(y)


def pool_error(ebm: LVEBM) -> float:
    """The pool's log Z minus the exact one."""
    return float(ebm.log_partition) - gaussian_log_partition(ebm.f.precision, ebm.f.linear)


def posterior_mean(ebm: LVEBM, x: Tensor, y: Tensor) -> Tensor:
    """E[z | x, y] (N, 2), over labels."""
    posterior = exact_posterior(ebm, x)
    cov = posterior.covariance_matrix
    gain = cov[..., :, 0] / (cov[..., 0, 0] + SIGMA**2)[..., None]
    given_c = posterior.mean + gain * (y - posterior.mean[:, 0] - LOCS[:, None])[..., None]
    return (label_log_probs(ebm, x, y).softmax(0)[..., None] * given_c).sum(0)


@pytest.mark.parametrize(("size", "scale"), [(None, 1.0), (5, 1.0), (5, 0.5)])
def test_the_energy_of_particles_has_the_label_summed_out(size: int | None, scale: float) -> None:
    """Against a sum over labels written out, also where sites are scaled."""
    ebm, x, y = setting()
    model = labelled(ebm, size, scale)
    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    guide(x, y)
    with ebm.frozen():
        trace = poutine.trace(vectorise(guide, 4, 1)).get_trace(x, y)
        (block,), _ = latent_blocks(Program(model, (x, y), {}, 1), guide, trace)
        i = block.indices["data"]
        v = normal((4, len(i), 2), 3)
        z = block.constrain(v)["scene_z"]
        ours = block.offset - block.f(v)[0] + dist.Normal(0.0, 1.0).log_prob(v).sum(-1)
        given_c = dist.Normal(z[..., 0] + LOCS[:, None, None], SIGMA).log_prob(y[i])
        exact = ebm.base_z.log_det - ebm.energy(x[i].expand(4, -1, -1), z) - ebm.log_partition
        exact = exact + scale * (WEIGHTS.log()[:, None, None] + given_c).logsumexp(0)
    torch.testing.assert_close(ours, exact.detach())


def particle_p_value(stretch: float) -> float:
    """p-value of E[z | x, y], with 60 data as replicates and chains of 4 × 40 draws each.

    The error, and the error towards y, have mean 0.
    """
    ebm, x, y = setting(60)
    model = labelled(ebm)
    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    saddle = Saddle(model, guide, SGD({"lr": 0.0}), TraceEnum_ELBO(max_plate_nesting=1))
    draws = saddle.sample_posterior(x, y, num_samples=40, num_warmup=80)["scene_z"]
    error = draws.mean((0, 1)) - posterior_mean(ebm, x, y * stretch)
    return mean_p_value(torch.cat([error, error * y.sign()[:, None]], -1), 0.0)


def test_particles_follow_the_posterior_over_all_labels() -> None:
    """Student's test. False alarms: 1e-3."""
    assert particle_p_value(1.0) > ALPHA


def test_particle_check_fails_for_the_posterior_of_other_observations() -> None:
    assert particle_p_value(1.5) < CERTAIN


@pytest.mark.usefixtures("short_chains")
def test_evidence_and_rows_have_the_label_summed_out() -> None:
    """log p(x, y) of every datum, and the row of the particles reaches it."""
    ebm, x, y = setting()
    x, y = x[:5], y[:5]
    model = labelled(ebm)
    exact = ebm.f.log_evidence(x) + label_log_probs(ebm, x, y).logsumexp(0)
    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    saddle = Saddle(model, guide, SGD({"lr": 0.0}), TraceEnum_ELBO(max_plate_nesting=1))
    with global_seed(0), ebm.frozen(), torch.no_grad():
        sweep = Sweep(Program(model, (x, y), {}), 0)
        with pytest.raises(ValueError, match="has not taken a step"):
            row_terms(saddle, sweep, 16)
    for _ in range(10):
        saddle.step(x, y)
    mean_field = AutoNormal(poutine.block(model, hide=["c"]))
    mean_field(x, y)
    with global_seed(0), ebm.frozen(), torch.no_grad():
        evidence = model_log_evidence(sweep, num_particles=64, num_runs=8)
        draws = row_terms(saddle, sweep, 32).log_weights
        normal_guide = row_terms(mean_field, sweep, 32).log_weights.mean(0)
    exact = (exact - pool_error(ebm)).detach()
    # Student's tests with 7 and 31 degrees of freedom of five data each, false alarm ALPHA; the
    # particles' path may lose 0.02 nats.
    particles, error = draws.mean(0), draws.std(0) / math.sqrt(len(draws))
    largest = ((evidence.value - exact) / evidence.std_error).abs().max()
    assert largest < stats.t.isf(ALPHA / 10, 7)
    assert ((particles - exact).abs() < stats.t.isf(ALPHA / 10, 31) * error + 0.02).all()
    assert (exact - normal_guide).mean() > 0.3


def test_the_loss_of_a_guide_is_the_marginal_one() -> None:
    """At a point mass TraceEnum_ELBO is −log p(x, z, y) summed over labels, for any guide here."""
    ebm, x, y = setting()
    model = labelled(ebm)
    guide = AutoParticles(poutine.block(model, hide=["c"]), 1)
    guide(x, y)
    z = guide.particles("scene_z")[0]
    loss = SVI(model, guide, SGD({"lr": 0.0}), TraceEnum_ELBO(max_plate_nesting=1))
    given_c = dist.Normal(z[:, 0] + LOCS[:, None], SIGMA).log_prob(y)
    exact = -ebm.energy(x, z) - ebm.log_partition
    exact = exact + (WEIGHTS.log()[:, None] + given_c).logsumexp(0)
    assert loss.evaluate_loss(x, y) == pytest.approx(-exact.sum().item())
    labels = TraceEnum_ELBO(max_plate_nesting=1).compute_marginals(model, guide, x, y)["c"]
    posterior = (WEIGHTS.log()[:, None] + given_c).softmax(0)
    torch.testing.assert_close(labels.probs, posterior.T)
    fixed = poutine.condition(model, data={"scene_z": z})
    torch.manual_seed(0)
    drawn = infer_discrete(fixed, first_available_dim=-2, temperature=0)
    best = poutine.trace(drawn).get_trace(x, y).nodes["c"]["value"]
    assert torch.equal(best, posterior.argmax(0))


def test_nuts_enumerates_the_label() -> None:
    """Student's test of E[z | x, y], with 60 data as replicates. False alarms: 1e-3.

    The posterior of other observations fails.
    """
    ebm, x, y = setting(60)
    pyro.set_rng_seed(0)
    with ebm.frozen():
        kernel = NUTS(labelled(ebm), max_plate_nesting=1)
        mcmc = MCMC(kernel, num_samples=60, warmup_steps=30, disable_progbar=True)
        mcmc.run(x, y)
    mean = mcmc.get_samples()["scene_z"].mean(0)

    def p_value(stretch: float) -> float:
        error = mean - posterior_mean(ebm, x, y * stretch)
        return mean_p_value(torch.cat([error, error * y.sign()[:, None]], -1), 0.0)

    assert p_value(1.0) > ALPHA
    assert p_value(1.5) < CERTAIN


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("make", [AutoNormal, AutoParticles])
def test_saddle_trains_beside_a_label(make: Any, expand: bool) -> None:
    """With several vectorised particles; `config_enumerate` marks the label too."""
    ebm, x, y = setting()
    model = config_enumerate(labelled(ebm), expand=expand)
    guide = make(poutine.block(model, hide=["c"]))
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=4, vectorize_particles=True)
    saddle = Saddle(model, guide, ClippedAdam({"lr": 0.0}), elbo)
    assert all(torch.isfinite(torch.tensor(saddle.step(x, y))) for _ in range(3))


# --- what cannot be summed out ----------------------------------------------------------------


def test_a_label_that_is_not_enumerated_is_refused_and_nothing_moves() -> None:
    ebm, x, y = setting()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            _, z = lvebm("scene", ebm, obs=x)
            c = pyro.sample("c", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(z[..., 0] + LOCS[c], SIGMA), obs=y)

    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    guide(x, y)
    before = guide.particles("scene_z").clone()
    saddle = Saddle(model, guide, ClippedAdam({"lr": 1e-2}))
    with pytest.raises(ValueError, match=r"latent 'c' has no guide.*infer=\{\"enumerate\""):
        saddle.step(x, y)
    assert torch.equal(before, guide.particles("scene_z"))


def test_a_label_of_all_data_is_refused() -> None:
    ebm, x, y = setting()

    def model(x: Tensor, y: Tensor) -> None:
        c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            _, z = lvebm("scene", ebm, obs=x)
            pyro.sample("y", dist.Normal(z[..., 0] + LOCS[c], SIGMA), obs=y)

    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    saddle = Saddle(model, guide, SGD({"lr": 0.0}), TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match=r"enumerated site 'c' lies in the plates \[\]"):
        saddle.step(x, y)


def test_sites_of_one_label_must_share_their_scale() -> None:
    ebm, x, y = setting()

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            _, z = lvebm("scene", ebm, obs=x)
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Normal(z[..., 0] + LOCS[c], SIGMA), obs=y)

    guide = AutoParticles(poutine.block(model, hide=["c"]), 4)
    saddle = Saddle(model, guide, SGD({"lr": 0.0}), TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.raises(ValueError, match="differ in scale"):
        saddle.step(x, y)
