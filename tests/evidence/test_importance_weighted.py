# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted bound against closed forms, quadrature and finite differences.

Most models here are z ~ N(0, 1), x | z ~ N(z, 1), of evidence N(0, 2) and posterior N(x/2, 1/2).
With the noise of the guide held fixed, a loss is an exact function of parameters and data, and
needs no statistics. Statistical tests have the false-alarm rate ALPHA each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import get_plates
from referee import ALPHA, CERTAIN, mean_p_value, normal
from small_models import (
    data_of,
    exact_joint,
    exact_posterior,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
    warm,
)
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    ImportanceWeightedELBO,
    Saddle,
    lvebm,
)
from pyro_lvebm.sites.traces import PARTICLE_PLATE

Program = Callable[..., Any]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


class Noise(Messenger):
    """Gives Normal latents fixed noise eps (K, *batch): z = loc + scale · eps at the rows."""

    def __init__(self, eps: dict[str, Tensor], rows: Tensor | None) -> None:
        super().__init__()
        self.eps, self.rows = eps, rows

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.eps:
            return
        fn, eps = msg["fn"], self.eps[msg["name"]]
        if self.rows is not None:
            eps = eps[..., self.rows]
        if all(frame.name != PARTICLE_PLATE for frame in get_plates()):
            eps = eps[0]
        msg["value"] = fn.loc + fn.scale * eps


def conjugate(size: int | None = None, rows: Tensor | None = None) -> Program:
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", zeros())
        with pyro.plate("data", len(x), subsample_size=size, subsample=rows) as i:
            z = pyro.sample("z", dist.Normal(shift, torch.ones_like(shift)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    return model


def local_guide(loc: Tensor, scale: Tensor, size: int | None = None, rows: Any = None) -> Program:
    """q(z_i) = N(loc_i, scale²)."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size, subsample=rows) as i:
            pyro.sample("z", dist.Normal(loc[i], scale))

    return guide


def with_noise(guide: Program, rows: Tensor | None = None, **eps: Tensor) -> Program:
    fixed: Program = Noise(eps, rows)(guide)
    return fixed


def evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, math.sqrt(2.0)).log_prob(x)


def hand_bound(x: Tensor, loc: Tensor, scale: Tensor, eps: Tensor) -> Tensor:
    """L_K of every datum (N,) of the conjugate model, for noise eps (K, N)."""
    z = loc + scale * eps
    log_w = (
        dist.Normal(0.0, 1.0).log_prob(z)
        + dist.Normal(z, 1.0).log_prob(x)
        - dist.Normal(loc, scale).log_prob(z)
    )
    return torch.logsumexp(log_w, 0) - math.log(len(eps))


# --- the value --------------------------------------------------------------------------------

X = 1.2
LOC, SCALE = torch.tensor(0.1, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)


def replicates(k: int, num: int, rows: int, seed: int) -> Tensor:
    """Independent estimates of L_K per datum, at x = X everywhere."""
    pyro.set_rng_seed(seed)
    x = torch.full((rows,), X, dtype=torch.float64)
    guide, elbo = local_guide(LOC.expand(rows), SCALE), ImportanceWeightedELBO(k)
    return torch.tensor([-elbo.loss(conjugate(), guide, x) / rows for _ in range(num)])


def quadrature_bound(k: int) -> float:
    """E[log (1/K) Σ_k w_k] for K = 1 or 2, by Gauss–Hermite quadrature over the noise."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    eps = torch.cartesian_prod(*[torch.from_numpy(nodes)] * k).reshape(-1, k).T
    w = torch.from_numpy(weights / weights.sum())
    mass = torch.cartesian_prod(*[w] * k).reshape(-1, k).prod(-1)
    x = torch.full((eps.shape[1],), X, dtype=torch.float64)
    return float((mass * hand_bound(x, LOC, SCALE, eps)).sum())


def test_the_bound_is_that_of_quadrature_for_one_and_two_particles() -> None:
    """Student's test of 40 independent means over 500 data, at ALPHA for each K."""
    for k in (1, 2):
        values = replicates(k, 40, 500, seed=k)
        assert mean_p_value(values, quadrature_bound(k)) > ALPHA
        assert mean_p_value(values, quadrature_bound(3 - k)) < CERTAIN  # the other K's bound
    gap = float(evidence(torch.tensor(X, dtype=torch.float64))) - quadrature_bound(1)
    q, posterior = dist.Normal(LOC, SCALE), dist.Normal(X / 2, math.sqrt(0.5))
    assert gap == pytest.approx(float(torch.distributions.kl_divergence(q, posterior)), abs=1e-6)


def test_the_bound_rises_with_the_particles_to_the_evidence() -> None:
    """Every step is wider than 6 standard errors of it, which has probability 1e-9 by chance."""
    exact = float(evidence(torch.tensor(X, dtype=torch.float64)))
    means, errors = [], []
    for k in (1, 4, 16):
        values = replicates(k, 20, 500, seed=10 + k)
        means.append(float(values.mean()))
        errors.append(float(values.std()) / math.sqrt(len(values)))
    means.append(exact)
    errors.append(0.0)
    for i in range(3):
        assert means[i + 1] - means[i] > 6 * math.hypot(errors[i], errors[i + 1])
    assert exact - means[2] < 0.1 * (exact - means[0])


def test_one_particle_is_the_elbo_of_pyro_draw_by_draw() -> None:
    x = normal((20,), 1)
    values, grads = [], []
    for elbo in (ImportanceWeightedELBO(1), Trace_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loc = (0.3 * x).requires_grad_()
        values.append(elbo.loss_and_grads(conjugate(5), local_guide(loc, SCALE, 5), x))
        grads.append((loc.grad, pyro.get_param_store().get_state()["params"]["shift"].grad))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert grads[0][0].count_nonzero() == 5


@pytest.mark.parametrize("k", [1, 6])
def test_the_three_methods_agree_and_are_the_hand_written_bound(k: int) -> None:
    x, eps = normal((7,), 1), normal((k, 7), 2)
    loc = 0.3 * x
    guide = with_noise(local_guide(loc, SCALE), z=eps)
    elbo = ImportanceWeightedELBO(k)
    expected = -float(hand_bound(x, loc, SCALE, eps).sum())
    assert elbo.loss(conjugate(), guide, x) == pytest.approx(expected)
    assert elbo.loss_and_grads(conjugate(), guide, x) == pytest.approx(expected)
    value = elbo.differentiable_loss(conjugate(), guide, x)
    assert value.shape == () and value.item() == pytest.approx(expected)


# --- subsampling ------------------------------------------------------------------------------


def subsampling_error(make: Callable[[], ELBO], size: int) -> float:
    """Mean loss over the minibatches of one epoch, minus that of all data, per datum.

    Each datum keeps its noise, so the two are equal for a loss that is unbiased under
    subsampling, whatever the noise.
    """
    n, k = 12, 5
    x, eps = normal((n,), 1), normal((k, n), 2)
    loc = zeros(n)
    whole = make().loss(conjugate(), with_noise(local_guide(loc, SCALE), z=eps), x)
    parts = []
    for rows in torch.arange(n).split(size):
        guide = with_noise(local_guide(loc, SCALE, size, rows), rows, z=eps)
        parts.append(make().loss(conjugate(size, rows), guide, x))
    return (float(np.mean(parts)) - whole) / n


def renyi() -> ELBO:
    return RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_minibatches_estimate_the_bound_of_all_data_without_bias(size: int) -> None:
    assert abs(subsampling_error(lambda: ImportanceWeightedELBO(5), size)) < 1e-12
    # The sibling, with a weight for the whole minibatch and the scale in its exponent.
    assert abs(subsampling_error(renyi, size)) > 0.02


def test_under_subsampling_ours_is_below_the_evidence_and_renyi_above_it() -> None:
    """Means of 100 losses, on the right side of the evidence by more than 6 standard errors."""
    pyro.set_rng_seed(0)
    x = math.sqrt(2.0) * normal((200,), 4)
    guide = local_guide(zeros(200), torch.tensor(1.0, dtype=torch.float64), 100)
    exact = evidence(x).sum()

    def gap_in_errors(elbo: ELBO) -> float:
        gaps = torch.stack([exact + elbo.loss(conjugate(100), guide, x) for _ in range(100)])
        return float(gaps.mean() / gaps.std() * 10)

    assert gap_in_errors(ImportanceWeightedELBO(8)) > 6
    renyi = RenyiELBO(0, 8, vectorize_particles=True, max_plate_nesting=1)
    assert gap_in_errors(renyi) < -6


# --- gradients --------------------------------------------------------------------------------


def finite_difference(value: Callable[[], float], p: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of a function of a parameter that is changed in place."""
    flat, result = p.detach().view(-1), []
    for i in range(len(flat)):
        old = float(flat[i])
        flat[i] = old + step
        up = value()
        flat[i] = old - step
        result.append((up - value()) / (2 * step))
        flat[i] = old
    return torch.tensor(result, dtype=p.dtype).reshape(p.shape)


def test_gradients_of_model_and_guide_are_those_of_the_bound() -> None:
    """With common noise, against finite differences; Trace_ELBO's differ."""
    x, eps, rows = normal((6,), 1), normal((4, 6), 2), torch.tensor([1, 4])
    loc, log_scale = (0.3 * x).requires_grad_(), zeros().requires_grad_()

    def guide(x: Tensor) -> None:
        local_guide(loc, log_scale.exp(), 2, rows)(x)

    model, fixed = conjugate(2, rows), with_noise(guide, rows, z=eps)
    elbo, plain = ImportanceWeightedELBO(4), Trace_ELBO(4, vectorize_particles=True)
    elbo.loss_and_grads(model, fixed, x)
    shift = pyro.param("shift").unconstrained()
    for p in (loc, log_scale, shift):
        numeric = finite_difference(lambda: elbo.loss(model, fixed, x), p)
        torch.testing.assert_close(p.grad, numeric, rtol=1e-6, atol=1e-7)
        other = finite_difference(lambda: plain.loss(model, fixed, x), p)
        assert not torch.allclose(p.grad, other, rtol=1e-2)


class Lifted(nn.Module):
    """An energy plus a constant, which log Z takes out again."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f, self.constant = f, nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        value: Tensor = self.f(x, z) + self.constant
        return value


def ebm_guide(ebm: LVEBM, x: Tensor, size: int | None = None, widen: float = 1.0) -> Program:
    """The present exact posterior of rows x, or one wider."""
    posterior = exact_posterior(ebm, x)
    loc = posterior.loc.detach()
    tril = widen * posterior.scale_tril.detach().expand(len(x), -1, -1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            fn = dist.MultivariateNormal(loc[i], scale_tril=tril[i])
            pyro.sample("scene_z", fn)

    return guide


@pytest.mark.parametrize(("k", "size"), [(1, None), (5, None), (5, 4)])
def test_an_exact_posterior_gives_the_exact_evidence_without_variance(
    k: int, size: int | None
) -> None:
    """Up to the pool's log Z, for every draw, number of particles and minibatch."""
    ebm = warm(quadratic_ebm(), 3)
    x = data_of(ebm, 12)
    error = (ebm.log_partition - ebm.f.log_partition()).item()
    assert abs(error) > 1e-4
    exact = ebm.f.log_evidence(x).detach() - error
    elbo = ImportanceWeightedELBO(k)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        guide = poutine.trace(ebm_guide(ebm, x, size))
        value = -elbo.loss(plate_model(ebm, size), guide, x)
        rows = guide.trace.nodes["data"]["value"]
        assert value == pytest.approx(float(exact[rows].sum()) * 12 / len(rows), rel=1e-9)
    wide = -elbo.loss(plate_model(ebm, size), ebm_guide(ebm, x, size, widen=1.5), x)
    assert wide != pytest.approx(exact.sum().item(), rel=1e-3)


@pytest.mark.parametrize("size", [None, 4])
def test_log_z_enters_the_gradient_once_for_each_datum(size: int | None) -> None:
    """A constant in the energy cancels: N from the data, −N from log Z. Other parts by hand."""
    inner = quadratic_ebm()
    ebm = LVEBM(Lifted(inner.f), inner.base_x, inner.base_z, pool=tiny_pool())
    ebm.pool.refresh(ebm)
    ebm.mark_pool(fresh=True)
    x = data_of(inner, 12)
    guide = ebm_guide(inner, x, size, widen=1.5)
    model, elbo = plate_model(ebm, size), ImportanceWeightedELBO(5, max_plate_nesting=1)

    def loss() -> float:
        pyro.set_rng_seed(0)
        return elbo.loss(model, guide, x)  # without a gradient, log Z stays where it is

    pyro.set_rng_seed(0)
    elbo.loss_and_grads(model, guide, x)
    assert abs(float(ebm.f.constant.grad)) < 1e-9
    data_part = float(finite_difference(loss, ebm.f.constant))
    assert data_part == pytest.approx(12.0)  # what would be left without log Z
    (log_z_part,) = torch.autograd.grad(12 * ebm.log_norm(), ebm.f.f.linear)
    numeric = finite_difference(loss, ebm.f.f.linear) + log_z_part
    torch.testing.assert_close(ebm.f.f.linear.grad, numeric, rtol=1e-6, atol=1e-6)


# --- masks, scales and plates -----------------------------------------------------------------


def mask_model(mask: Any, on: str) -> Program:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask if on == "datum" else True):
                z = pyro.sample("z", dist.Normal(zeros(), 1.0))
                with poutine.mask(mask=mask):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.deterministic("twice", 2 * z)

    return model


def test_a_masked_datum_contributes_zero_even_where_the_guide_is_not_masked() -> None:
    x, eps, loc = normal((6,), 1), normal((4, 6), 2), zeros(6).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True])
    guide, elbo = with_noise(local_guide(loc, SCALE), z=eps), ImportanceWeightedELBO(4)
    terms = hand_bound(x, loc, SCALE, eps)
    loss = elbo.differentiable_loss(mask_model(mask, "datum"), guide, x)
    assert loss.item() == pytest.approx(-terms[mask].sum().item())
    loss.backward()
    assert torch.equal(loc.grad != 0, mask)
    assert elbo.loss(mask_model(False, "datum"), guide, x) == 0.0


def test_a_masked_observation_leaves_the_weights_of_its_latent() -> None:
    x, eps, loc = normal((6,), 1), normal((4, 6), 2), zeros(6)
    mask = torch.tensor([True, False, True, True, False, True])
    guide, elbo = with_noise(local_guide(loc, SCALE), z=eps), ImportanceWeightedELBO(4)
    z = loc + SCALE * eps
    log_ratio = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(loc, SCALE).log_prob(z)
    terms = torch.where(mask, hand_bound(x, loc, SCALE, eps), log_ratio.exp().mean(0).log())
    value = elbo.loss(mask_model(mask, "observation"), guide, x)
    assert value == pytest.approx(-float(terms.sum()))


@pytest.mark.parametrize("scale", [0.25, torch.tensor([0.5, 2.0, 1.0])])
def test_a_scale_multiplies_the_logarithm(scale: Any) -> None:
    x, eps, loc = normal((9,), 1), normal((4, 9), 2), zeros(9)
    rows = torch.tensor([2, 3, 7])
    model = poutine.scale(conjugate(3, rows), scale=scale)
    guide = with_noise(local_guide(loc, SCALE, 3, rows), rows, z=eps)
    value = ImportanceWeightedELBO(4).loss(model, poutine.scale(guide, scale=scale), x)
    terms = 3 * scale * hand_bound(x, loc, SCALE, eps)[rows]
    assert value == pytest.approx(-float(terms.sum()))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("outer_is_left", [False, True])
def test_nested_plates_are_summed_into_their_datum(k: int, outer_is_left: bool) -> None:
    """Of a datum z, each of whose parts has a latent of its own; other sites are added once."""
    n, m = 3, 4
    y, eps, nested = normal((m, n), 1), normal((k, 1, n), 2), normal((k, m, n), 3)
    data_dim, part_dim = (-2, -1) if outer_is_left else (-1, -2)
    if outer_is_left:
        y, eps, nested = y.mT, eps.mT, nested.mT

    def latents(loc: float, scale: float) -> tuple[Any, Any, Any, Any]:
        data, parts = pyro.plate("data", n, dim=data_dim), pyro.plate("parts", m, dim=part_dim)
        with data:
            z = pyro.sample("z", dist.Normal(loc * torch.ones(()), scale))
            with parts:
                part = pyro.sample("part", dist.Normal(loc * torch.ones(()), 2 * scale))
        return data, parts, z, part

    def model() -> None:
        data, parts, z, part = latents(0.0, 1.0)
        with data, parts:
            pyro.sample("y", dist.Normal(z + part, 1.0), obs=y)
        with pyro.plate("elsewhere", 5, subsample_size=2, dim=-1):
            pyro.sample("prior", dist.Normal(0.0, 1.0), obs=torch.ones(2))
        pyro.factor("constant", torch.tensor(-7.0))

    def guide() -> None:
        latents(0.2, 0.8)

    fixed = with_noise(guide, z=eps, part=nested)
    value = ImportanceWeightedELBO(k).loss(model, fixed)
    z, part = 0.2 + 0.8 * eps, 0.2 + 1.6 * nested
    log_w = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.2, 0.8).log_prob(z)
    inner = dist.Normal(0.0, 2.0).log_prob(part) - dist.Normal(0.2, 1.6).log_prob(part)
    inner = inner + dist.Normal(z + part, 1.0).log_prob(y)
    log_w = log_w + inner.sum(part_dim, keepdim=True)
    once = 5 * float(dist.Normal(0.0, 1.0).log_prob(torch.ones(()))) - 7.0
    expected = float(log_w.exp().mean(0).log().sum()) + once
    assert value == pytest.approx(-expected, rel=1e-6)


def test_latents_on_a_grid_of_two_plates_have_a_weight_for_each_cell() -> None:
    x, eps = normal((2, 3), 1), normal((4, 2, 3), 2)

    def model() -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Normal(zeros(), SCALE))

    value = ImportanceWeightedELBO(4).loss(model, with_noise(guide, z=eps))
    assert value == pytest.approx(-float(hand_bound(x, zeros(), SCALE, eps).sum()))


# --- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "lr"),
    [(AutoNormal, 0.1), (AutoPerDatumMultivariateNormal, 0.1), (AutoAmortisedNormal, 0.01)],
)
def test_guides_train_through_saddle(make: Callable[..., Any], lr: float) -> None:
    """The bound of K = 16 comes within 0.1 nats a datum of the evidence, and halves its gap."""
    ebm = warm(quadratic_ebm(dtype=torch.float32), 3)
    pyro.set_rng_seed(0)
    x = exact_joint(ebm).sample((40,))[:, :3].float()
    model = plate_model(ebm, 20)
    guide, elbo = make(model), ImportanceWeightedELBO(16)
    whole = plate_model(ebm)
    with torch.no_grad():
        error = ebm.log_partition - ebm.f.log_partition()
        exact = float(ebm.f.log_evidence(x).mean() - error)

    def gap() -> float:
        return exact + float(np.mean([elbo.loss(whole, guide, x) for _ in range(40)])) / 40

    with ebm.frozen():
        saddle = Saddle(model, guide, Adam({"lr": lr}), elbo)
        saddle.fit(x, num_steps=1, progress=False)
        first = gap()
        saddle.fit(x, num_steps=100, progress=False)
    assert gap() < min(0.1, first / 2)


def test_the_energy_trains_and_a_run_can_be_continued(tmp_path: Any) -> None:
    """The guess of the nesting at a first step changes nothing, so both runs are one."""

    def start() -> tuple[LVEBM, Tensor, Any, Any]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        ebm = quadratic_ebm(seed=1)
        model = plate_model(ebm, 5)
        return ebm, data_of(ebm, 15), model, AutoPerDatumMultivariateNormal(model)

    ebm, x, model, guide = start()
    before = ebm.f.linear.detach().clone()
    saddle = Saddle(model, guide, Adam({"lr": 1e-2}), ImportanceWeightedELBO(3))
    saddle.step(x)
    saddle.save(tmp_path / "state")
    assert not torch.equal(ebm.f.linear, before)
    onwards = [saddle.step(x) for _ in range(2)]
    ebm, x, model, guide = start()
    again = Saddle.load(
        tmp_path / "state", model, guide, Adam({"lr": 1e-2}), x, loss=ImportanceWeightedELBO(3)
    )
    assert [again.step(x) for _ in range(2)] == onwards


def test_it_is_a_loss_of_svi_and_of_pyros_module_interface() -> None:
    pyro.set_rng_seed(0)
    x = normal((30,), 1)
    loc = zeros(30)

    def guide(x: Tensor) -> None:
        local_guide(pyro.param("loc", loc), SCALE, 10)(x)

    svi = SVI(conjugate(10), guide, Adam({"lr": 0.05}), ImportanceWeightedELBO(4))
    before = np.mean([svi.evaluate_loss(x) for _ in range(20)])
    for _ in range(60):
        svi.step(x)
    assert np.mean([svi.evaluate_loss(x) for _ in range(20)]) < before - 1
    auto = AutoNormal(conjugate(10))
    module = ImportanceWeightedELBO(4)(conjugate(10), auto)  # type: ignore[arg-type]
    module(x).backward()
    assert auto.locs.z.grad.count_nonzero() == 10


def test_the_guess_of_the_nesting_leaves_the_generator_and_the_pool_alone() -> None:
    ebm = quadratic_ebm()
    x, pool, state = data_of(ebm, 6), snapshot(ebm.pool), torch.get_rng_state()
    guide, elbo = ebm_guide(ebm, x, 3), ImportanceWeightedELBO(2)
    elbo._guess_max_plate_nesting(plate_model(ebm, 3), guide, (x,), {})
    assert elbo.max_plate_nesting == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert same(snapshot(ebm.pool), pool)


# --- refusals ---------------------------------------------------------------------------------


def refuses(model: Program, guide: Program, match: str, k: int = 3) -> None:
    for call in ("loss", "loss_and_grads"):
        with pytest.raises(ValueError, match=match):
            getattr(ImportanceWeightedELBO(k), call)(model, guide, normal((6,), 1))


def test_it_refuses_latents_that_tie_the_weights_together() -> None:
    def both(x: Tensor, obs: bool = True) -> None:
        mean = pyro.sample("mean", dist.Normal(zeros(), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            if obs:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    refuses(both, lambda x: both(x, obs=False), r"share no vectorised plate \('mean' in \[\]")

    def apart(x: Tensor) -> None:
        for name in ("a", "b"):
            with pyro.plate(f"plate_{name}", 2):
                pyro.sample(name, dist.Normal(0.0, 1.0))

    refuses(apart, apart, "'b' in \\['plate_b'\\]")

    def sequential(x: Tensor) -> None:
        for i in pyro.plate("data", 2):
            pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))

    refuses(sequential, sequential, "share no vectorised plate")


def test_it_refuses_a_guide_that_draws_all_data_at_once() -> None:
    refuses(conjugate(), AutoMultivariateNormal(conjugate()), "of the guide lies outside")


@pytest.mark.parametrize("make", [AutoParticles, AutoDelta])
def test_it_refuses_point_masses(make: Callable[..., Any]) -> None:
    refuses(conjugate(3), make(conjugate(3)), r"point masses at \['z'\]")


def test_it_refuses_point_masses_beside_densities() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Dirichlet(torch.ones(3)))
            pyro.sample("b", dist.Gamma(1.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    mixed = AutoGuideList(model)
    mixed.append(AutoNormal(poutine.block(model, hide=["b"])))
    mixed.append(AutoDelta(poutine.block(model, hide=["a"])))
    refuses(model, mixed, "point masses")
    ImportanceWeightedELBO(2).loss(model, AutoNormal(model), normal((6,), 1))


def test_particles_in_a_saddle_are_refused_and_unchanged() -> None:
    ebm = quadratic_ebm()
    x, model = data_of(ebm, 6), plate_model(ebm, 3)
    guide = AutoParticles(model, 2)
    saddle = Saddle(model, guide, Adam({"lr": 1e-2}), ImportanceWeightedELBO(2))
    saddle.prepare((x,), {})
    before = guide.particles("scene_z").clone()
    with pytest.raises(ValueError, match="point masses"):
        saddle.step(x)
    assert torch.equal(guide.particles("scene_z"), before)


def test_it_refuses_a_guide_without_reparametrisation() -> None:
    class Opaque(dist.Normal):
        has_rsample = False

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Opaque(torch.zeros(len(x)), 1.0))

    refuses(conjugate(), guide, "'z' of the guide, Opaque, is not reparametrised")


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_it_refuses_a_guide_without_a_latent_and_a_model_without_latents() -> None:
    refuses(conjugate(), lambda x: None, r"no site for the latents \['z'\]")

    def observed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(zeros(), 1.0), obs=x)

    refuses(observed, lambda x: None, "no latents")


def test_it_refuses_sites_outside_the_plates_that_depend_on_the_latents() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
        pyro.sample("total", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=zeros(1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(zeros(), 1.0))

    refuses(model, guide, "'total' depends on the latents but lies outside")


def test_it_refuses_scales_that_differ_and_parts_that_are_subsampled() -> None:
    guide = local_guide(zeros(6), SCALE)
    refuses(poutine.scale(conjugate(), scale=0.5), guide, "differ in scale")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(zeros(), 1.0))
            with pyro.plate("parts", 10, subsample_size=2, dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x.expand(2, -1))

    refuses(model, guide, "plate 'parts' of site 'x' lies inside a datum and is subsampled")


def test_it_refuses_fewer_than_one_particle() -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        ImportanceWeightedELBO(0)


def test_several_lvebms_share_one_weight() -> None:
    """Their sites add up in the exponent: an exact posterior of each gives both evidences."""
    first, second = warm(quadratic_ebm(seed=0), 2), warm(quadratic_ebm(seed=7), 2)
    x, y = data_of(first, 5), data_of(second, 5)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 5):
            lvebm("a", first, obs=x)
            lvebm("b", second, obs=y)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 5):
            for name, ebm, rows in (("a_z", first, x), ("b_z", second, y)):
                posterior = exact_posterior(ebm, rows)
                fn = dist.MultivariateNormal(posterior.loc, scale_tril=posterior.scale_tril)
                pyro.sample(name, fn)

    exact = sum(
        (e.f.log_evidence(rows) + e.f.log_partition() - e.log_partition).sum().item()
        for e, rows in ((first, x), (second, y))
    )
    value = ImportanceWeightedELBO(4).loss(model, guide, x)
    assert value == pytest.approx(-exact, rel=1e-9)
