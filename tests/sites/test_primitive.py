# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.inspect import get_dependencies
from pyro.optim import SGD, Adam
from pyro.poutine import Trace
from referee import (
    ALPHA,
    CERTAIN,
    gaussian_log_partition,
    mean_p_value,
    normal,
    variance_p_value,
)
from small_models import (
    condition,
    data_of,
    exact_joint,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    rotations,
    same,
    snapshot,
    tiny_pool,
    warm,
    whitened,
)
from torch import Tensor

from pyro_lvebm import LVEBM, AutoAmortisedNormal, TemperedPool, lvebm


def trace_of(fn: Callable[..., Any], *args: Any) -> Trace:
    trace = poutine.trace(fn).get_trace(*args)
    trace.compute_log_prob()
    return trace


def pool_error(ebm: LVEBM) -> float:
    """The pool's log Z minus the exact one."""
    exact = gaussian_log_partition(ebm.f.precision, ebm.f.linear)
    return float(ebm.pool.log_partition) - exact


def given_z(ebm: LVEBM, size: int | None = None) -> Callable[[Tensor, Tensor], None]:
    """A model whose latents are all fixed, row by row."""

    def model(x: Tensor, z: Tensor) -> None:
        with (
            pyro.plate("data", len(x), subsample_size=size) as i,
            poutine.condition(data={"scene_z": z[i]}),
        ):
            lvebm("scene", ebm, obs=x[i])

    return model


# --- the density ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 4])
def test_the_sites_add_up_to_the_exact_joint_density(size: int | None) -> None:
    """With the pool's log Z in place of the exact one, to rounding."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 12)
    trace = trace_of(plate_model(ebm, size), x)
    i = trace.nodes["data"]["value"]
    z = trace.nodes["scene_z"]["value"]
    assert len(z) == (size or 12) and abs(pool_error(ebm)) > 1e-4
    total = trace.nodes["scene_z"]["unscaled_log_prob"] + trace.nodes["scene"]["unscaled_log_prob"]
    exact = exact_joint(ebm).log_prob(torch.cat([x[i], z], -1))
    torch.testing.assert_close(total.detach(), exact - pool_error(ebm))
    torch.testing.assert_close(
        trace.log_prob_sum().detach(), total.sum().detach() * 12 / (size or 12)
    )
    assert trace.nodes["scene"]["is_observed"] and not trace.nodes["scene_z"]["is_observed"]


def test_the_gradient_of_the_density_is_that_of_the_model() -> None:
    """d/dθ: -∇f + E_pool[∇f] for each datum; d/dz: that of the exact joint."""
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 5), normal((5, 2), 1).requires_grad_(True)
    params = list(ebm.f.parameters())
    total = trace_of(given_z(ebm), x, z).log_prob_sum()
    ours = torch.autograd.grad(total, [*params, z])
    (exact,) = torch.autograd.grad(exact_joint(ebm).log_prob(torch.cat([x, z], -1)).sum(), z)
    torch.testing.assert_close(ours[-1], exact)
    u, log_w = ebm.pool.negatives()
    negative = torch.autograd.grad((log_w.exp() * ebm.residual(u)).sum(), params)
    positive = torch.autograd.grad(ebm.f(x, z.detach()).sum(), params)
    for a, p, n in zip(ours[:-1], positive, negative, strict=True):
        torch.testing.assert_close(a, 5 * n - p)


def subsampling_p_value(model: Callable[..., Any], ebm: LVEBM, x: Tensor, z: Tensor) -> float:
    """p-value that the scaled log density of 300 random minibatches has the full one as mean."""
    full = trace_of(given_z(ebm), x, z).log_prob_sum().item()
    torch.manual_seed(0)
    sums = torch.stack([trace_of(model, x, z).log_prob_sum().detach() for _ in range(300)])
    assert sums.std() > 1.0
    return mean_p_value(sums, full)


def test_subsampling_leaves_the_log_density_unbiased() -> None:
    """Student's test over independent minibatches. False alarms: 1e-3."""
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 30), normal((30, 2), 1)
    assert subsampling_p_value(given_z(ebm, 7), ebm, x, z) > ALPHA


def test_subsampling_check_fails_for_a_wrong_scale() -> None:
    """A scale of 30/8 for 30/7, or log Z left unscaled, is found."""
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 30), normal((30, 2), 1)
    off_by_one = poutine.scale(given_z(ebm, 7), scale=7 / 8)
    assert subsampling_p_value(off_by_one, ebm, x, z) < CERTAIN

    def unscaled_log_z(x: Tensor, z: Tensor) -> None:
        given_z(ebm, 7)(x, z)
        pyro.factor("extra", (30 - 7) * ebm.log_partition)

    ebm.pool.log_partition = ebm.pool.log_partition + 3.0
    assert subsampling_p_value(unscaled_log_z, ebm, x, z) < CERTAIN


# --- effect handlers ------------------------------------------------------------------------


def open_model(ebm: LVEBM, count: int = 6) -> Callable[[], tuple[Tensor, Tensor]]:
    def model() -> tuple[Tensor, Tensor]:
        with pyro.plate("data", count):
            return lvebm("scene", ebm)

    return model


def test_condition_observes_x_or_z_or_both() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 6), normal((6, 2), 1)
    for data in ({"scene": x}, {"scene_z": z}, {"scene": x, "scene_z": z}):
        trace = trace_of(poutine.condition(open_model(ebm), data=data))
        for name in ("scene", "scene_z"):
            assert trace.nodes[name]["is_observed"] == (name in data)
            if name in data:
                assert torch.equal(trace.nodes[name]["value"], data[name])
        values = [trace.nodes[n]["value"] for n in ("scene", "scene_z")]
        expected = exact_joint(ebm).log_prob(torch.cat(values, -1)).sum() - 6 * pool_error(ebm)
        torch.testing.assert_close(trace.log_prob_sum().detach(), expected)


def test_replay_repeats_x_and_z() -> None:
    ebm = warm(quadratic_ebm(), 3)
    first = trace_of(open_model(ebm))
    second = trace_of(poutine.replay(open_model(ebm), trace=first))
    for name in ("scene", "scene_z"):
        assert torch.equal(first.nodes[name]["value"], second.nodes[name]["value"])
    torch.testing.assert_close(first.log_prob_sum(), second.log_prob_sum())
    assert not torch.equal(
        first.nodes["scene"]["value"], trace_of(open_model(ebm)).nodes["scene"]["value"]
    )


def test_block_hides_the_sites_it_names() -> None:
    ebm = warm(quadratic_ebm(), 3)
    hidden = poutine.trace(poutine.block(open_model(ebm), hide=["scene_z"])).get_trace()
    assert "scene" in hidden.nodes and "scene_z" not in hidden.nodes
    assert hidden.nodes["_RETURN"]["value"][1].shape == (6, 2)


def test_scale_and_mask_reach_both_sites() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 6), normal((6, 2), 1)
    plain = trace_of(given_z(ebm), x, z)
    scaled = trace_of(poutine.scale(given_z(ebm), scale=0.3), x, z)
    torch.testing.assert_close(scaled.log_prob_sum(), 0.3 * plain.log_prob_sum())
    keep = torch.tensor([True, False, True, True, False, False])
    masked = trace_of(poutine.mask(given_z(ebm), mask=keep), x, z)
    expected = sum(plain.nodes[n]["unscaled_log_prob"][keep].sum() for n in ("scene", "scene_z"))
    torch.testing.assert_close(masked.log_prob_sum(), expected)
    assert trace_of(poutine.mask(given_z(ebm), mask=False), x, z).log_prob_sum() == 0


def test_vectorised_particles_and_nested_plates_keep_their_shapes() -> None:
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 12).reshape(4, 3, 3)

    def model() -> None:
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            lvebm("scene", ebm, obs=x)

    trace = trace_of(pyro.plate("particles", 5, dim=-3)(model))
    z = trace.nodes["scene_z"]["value"]
    assert z.shape == (5, 4, 3, 2) and z.unique().numel() == z.numel()
    total = trace.nodes["scene_z"]["log_prob"] + trace.nodes["scene"]["log_prob"]
    exact = exact_joint(ebm).log_prob(torch.cat([x.expand(5, 4, 3, 3), z], -1))
    torch.testing.assert_close(total.detach(), exact - pool_error(ebm))


def test_two_models_in_one() -> None:
    """Each has its own log Z, and SVI trains both."""
    a, b = warm(quadratic_ebm(3, 2, seed=1), 3), warm(quadratic_ebm(2, 1, seed=2), 3)
    x, y = data_of(a, 8), data_of(b, 8)

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 8):
            lvebm("first", a, obs=x)
            lvebm("second", b, obs=y)

    trace = trace_of(model, x, y)
    expected = 0.0
    for ebm, name in ((a, "first"), (b, "second")):
        pair = torch.cat([trace.nodes[n]["value"] for n in (name, f"{name}_z")], -1)
        expected = expected + exact_joint(ebm).log_prob(pair).sum() - 8 * pool_error(ebm)
    torch.testing.assert_close(trace.log_prob_sum().detach(), expected)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", 8):
            pyro.sample("first_z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("second_z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))

    before = [snapshot(e.f) for e in (a, b)]
    counts = [int(e.pool.refreshes) for e in (a, b)]
    svi = SVI(model, guide, SGD({"lr": 1e-3}), Trace_ELBO())
    svi.step(x, y)
    svi.step(x, y)
    for ebm, old, count in zip((a, b), before, counts, strict=True):
        assert not same(old, snapshot(ebm.f)) and int(ebm.pool.refreshes) == count + 1


def test_one_model_at_two_sites_moves_its_pool_once() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 8)

    def model() -> None:
        with pyro.plate("data", 8):
            lvebm("first", ebm, obs=x)
            lvebm("second", ebm, obs=x)

    trace_of(model)
    assert int(ebm.pool.refreshes) == 1
    names = [n for n in pyro.get_param_store() if "lvebm" in n]
    assert len(names) == len(list(ebm.f.parameters()))


# --- Predictive and render_model ------------------------------------------------------------


@functools.cache
def prior_pairs(parallel: bool) -> list[tuple[LVEBM, Tensor, Tensor]]:
    """Draws of x and z from `Predictive`, of 10 pools with their own seeds."""
    pairs = []
    for seed in range(10):
        ebm = warm(quadratic_ebm(2, 1, pool=TemperedPool(4, 300, num_moves=2, seed=seed)), 20)
        torch.manual_seed(seed)
        sites = ["scene", "scene_z"]
        num_samples, count = (300, 4) if parallel else (12, 100)
        predictive = Predictive(
            open_model(ebm, count), num_samples=num_samples, parallel=parallel, return_sites=sites
        )
        out = predictive()
        x, z = out["scene"], out["scene_z"]
        assert x.shape == (num_samples, count, 2) and z.shape == (num_samples, count, 1)
        pairs.append((ebm, x, z))
    return pairs


def prior_p_value(parallel: bool, shuffle: bool = False) -> float:
    """p-value of the moments of (x, z) over pools; those of others' x where they are shuffled."""
    rows = []
    for ebm, x, z in prior_pairs(parallel):
        both = torch.cat([x.roll(1, 1) if shuffle else x, z], -1)
        white = whitened(both.flatten(0, 1), exact_joint(ebm))
        rows.append(torch.cat([white.mean(0), (rotations(white) ** 2).mean(0)]))
    return mean_p_value(torch.stack(rows), [0.0] * 3 + [1.0] * (len(rows[0]) - 3))


@pytest.mark.parametrize("parallel", [False, True])
def test_prior_predictive_pairs_follow_the_joint(parallel: bool) -> None:
    """Student's test over pools. False alarms: 1e-3 a case."""
    assert prior_p_value(parallel) > ALPHA


def test_prior_check_fails_for_pairs_that_do_not_belong_together() -> None:
    assert prior_p_value(True, shuffle=True) < CERTAIN


def test_posterior_predictive_draws_z_from_the_guide_and_x_given_it() -> None:
    """(z, x) from a guide q(z | x_i) and p(x | z), 4 data, in its exact Gaussian law.

    Each draw of x is a run of its own, and each of z is exact, so rows are independent. Chi-square
    and Student's test; false alarms: 1e-3. Laws of a guide 0.4 away, and
    of x given another z, fail.
    """
    ebm = warm(quadratic_ebm(2, 1, seed=7), 3)
    x = data_of(ebm, 4)
    q = exact_posterior(ebm, x)

    def model() -> None:
        with pyro.plate("data", 4):
            lvebm("scene", ebm)

    def guide() -> None:
        with pyro.plate("data", 4):
            pyro.sample("scene_z", dist.MultivariateNormal(q.mean, q.covariance_matrix))

    torch.manual_seed(3)
    out = Predictive(model, guide=guide, num_samples=220, return_sites=("scene", "scene_z"))()
    z, new = out["scene_z"], out["scene"]
    assert z.shape == (220, 4, 1) and new.shape == (220, 4, 2)

    def p_value(guide_shift: float, z_shift: float) -> float:
        of_guide = dist.MultivariateNormal(q.mean + guide_shift, q.covariance_matrix)
        of_x = condition(exact_joint(ebm), [2], z + z_shift)
        white = torch.cat([whitened(z, of_guide), whitened(new, of_x)], -1)
        moments = variance_p_value(rotations(white), 1.0), mean_p_value(white, 0.0)
        return min(1.0, 2.0 * min(moments))

    assert p_value(0.0, 0.0) > ALPHA
    assert p_value(0.4, 0.0) < CERTAIN
    assert p_value(0.0, 1.0) < CERTAIN


def test_predictive_takes_posterior_samples() -> None:
    ebm = warm(quadratic_ebm(), 3)
    z = normal((7, 6, 2), 1)
    out = Predictive(open_model(ebm), posterior_samples={"scene_z": z})()
    assert set(out) == {"scene"} and out["scene"].shape == (7, 6, 3)
    out = Predictive(open_model(ebm), posterior_samples={"scene_z": z}, parallel=True)()
    assert out["scene"].shape == (7, 6, 3)


@pytest.mark.usefixtures("global_rng_untouched")
def test_render_model_names_both_sites() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 8)
    before = snapshot(ebm)
    graph = pyro.render_model(
        plate_model(ebm, 3), model_args=(x,), render_distributions=True, render_params=True
    )
    source = graph.source
    assert "scene_z -> scene" in source and "cluster_data" in source
    assert "scene_z ~ LatentSite" in source and "scene ~ ObservedSite" in source
    observed, latent = (
        next(line for line in source.splitlines() if f"{name} [" in line)
        for name in ("scene", "scene_z")
    )
    assert "gray" in observed and "white" in latent
    found = get_dependencies(plate_model(ebm, 3), (x,))["prior_dependencies"]
    assert set(found["scene"]) == {"scene", "scene_z"} and set(found["scene_z"]) == {"scene_z"}
    assert same(before, snapshot(ebm))


# --- NUTS at frozen θ -----------------------------------------------------------------------


def test_nuts_finds_the_exact_posterior() -> None:
    """Student's test of means and variances, with 24 data as replicates. False alarms: 1e-3.

    Each datum's own chain average is one replicate; whitened by the exact posterior they have
    mean 0 and second moment 1. Chains of different data share only step sizes and trajectories.
    A posterior that is 1.2 times as wide fails.
    """
    ebm = warm(quadratic_ebm(2, 1, seed=2), 5)
    x = data_of(ebm, 24)
    pyro.set_rng_seed(0)
    with ebm.frozen():
        kernel = NUTS(plate_model(ebm))
        mcmc = MCMC(kernel, num_samples=120, warmup_steps=40, disable_progbar=True)
        mcmc.run(x)
    z = mcmc.get_samples()["scene_z"]
    assert z.shape == (120, 24, 1)
    white = whitened(z, exact_posterior(ebm, x)).reshape(120, 24)

    def p_value(stretch: float) -> float:
        wide = stretch * white
        return mean_p_value(torch.stack([wide.mean(0), (wide**2).mean(0)], -1), [0.0, 1.0])

    assert p_value(1.0) > ALPHA
    assert p_value(1.2) < CERTAIN


def test_nuts_leaves_theta_and_pool_alone() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 3)
    before = snapshot(ebm)
    with ebm.frozen():
        kernel = NUTS(plate_model(ebm))
        MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True).run(x)
    assert same(before, snapshot(ebm)) and ebm.f.linear.requires_grad


# --- the parameter store --------------------------------------------------------------------


def svi_for(ebm: LVEBM, lr: float = 1e-2) -> SVI:
    model = plate_model(ebm, 8)
    guide = AutoAmortisedNormal(model, hidden=(4,))
    return SVI(model, guide, Adam({"lr": lr}), Trace_ELBO())


def test_parameters_are_announced_once_and_as_they_are() -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 8)
    trace = poutine.trace(model).get_trace(x)
    store = pyro.get_param_store()
    names = {n for n, node in trace.nodes.items() if node["type"] == "param"}
    assert names == {"scene_lvebm$$$raw_tril", "scene_lvebm$$$linear"} == set(store)
    assert store["scene_lvebm$$$linear"].unconstrained() is ebm.f.linear
    ebm.f.linear.requires_grad_(False)
    pyro.clear_param_store()
    poutine.trace(model).get_trace(x)
    assert set(store) == {"scene_lvebm$$$raw_tril"}
    pyro.clear_param_store()
    with torch.no_grad():
        poutine.trace(model).get_trace(x)
    with ebm.frozen():
        poutine.trace(model).get_trace(x)
    assert set(store) == set()


def test_clearing_the_store_in_the_middle_of_training_does_no_harm() -> None:
    """The same run, bit for bit, with and without."""
    results = []
    for clear in (False, True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        ebm = quadratic_ebm()
        svi, x = svi_for(ebm), data_of(ebm, 20)
        losses = []
        for step in range(8):
            if clear and step == 4:
                pyro.clear_param_store()
            losses.append(svi.step(x))
        results.append((losses, snapshot(ebm)))
    assert results[0][0] == results[1][0] and same(results[0][1], results[1][1])


def test_a_second_model_with_the_same_site_is_trained() -> None:
    first, second = quadratic_ebm(seed=1), quadratic_ebm(seed=2)
    x = data_of(first, 20)
    svi_for(first).step(x)
    trained = snapshot(first)
    before = snapshot(second.f)
    svi = svi_for(second)
    for _ in range(3):
        svi.step(x)
    assert not same(before, snapshot(second.f))
    assert same(trained, snapshot(first))


def test_two_models_with_the_same_site_can_take_turns() -> None:
    ebms = [quadratic_ebm(seed=1), quadratic_ebm(seed=2)]
    x = data_of(ebms[0], 20)
    runs = [svi_for(ebm) for ebm in ebms]
    for _ in range(2):
        for ebm, svi in zip(ebms, runs, strict=True):
            before = snapshot(ebm.f)
            svi.step(x)
            assert not same(before, snapshot(ebm.f))


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.long(), r"floating point; got torch\.int64"),
        (lambda x: x[:, :2], r"shape \(8, 2\); expected trailing shape \(3,\)"),
        (lambda x: torch.full_like(x, math.inf), "24 infinite entries of 24"),
        (lambda x: -x.abs() / 0.0, "infinite entries"),
        (lambda x: x[:0], r"empty: shape \(0, 3\)"),
        (lambda x: x.tolist(), r"must be a torch\.Tensor or an array; got list"),
    ],
)
def test_bad_observations_are_refused_and_nothing_changes(
    spoil: Callable[[Tensor], object], message: str
) -> None:
    ebm = quadratic_ebm(pool=tiny_pool())
    before = snapshot(ebm)
    x = spoil(data_of(ebm, 8))

    def model() -> None:
        with pyro.plate("data", 8):
            lvebm("scene", ebm, obs=x)

    with pytest.raises(ValueError, match=message):
        model()
    assert same(before, snapshot(ebm)) and not set(pyro.get_param_store())


def test_the_second_argument_must_be_an_lvebm() -> None:
    with pytest.raises(ValueError, match="needs an LVEBM as its second argument; got Linear"):
        lvebm("scene", torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("rows", "plate"), [(5, None), (5, 4)])
def test_rows_must_be_those_of_the_plates(rows: int, plate: int | None) -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 20)
    with pytest.raises(ValueError, match="has 5 rows on batch axis -1, where the plates"):
        if plate is None:
            lvebm("scene", ebm, obs=x[:rows])
        else:
            with pyro.plate("data", plate):
                lvebm("scene", ebm, obs=x[:rows])
    with pyro.plate("data", rows):
        lvebm("scene", ebm, obs=x[:rows])
