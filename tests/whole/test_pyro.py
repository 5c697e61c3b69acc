# SPDX-License-Identifier: Apache-2.0
"""What Pyro lets users do around a distribution works around an LVEBM, or is refused."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.inspect import get_dependencies
from pyro.nn import PyroSample
from pyro.optim import ClippedAdam
from referee import ALPHA, CERTAIN, mean_p_value, normal
from small_models import (
    condition,
    data_of,
    exact_joint,
    plate_model,
    quadratic_ebm,
    tiny_pool,
    warm,
    whitened,
)
from torch import Tensor, nn

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, Saddle, TemperedPool, lvebm


def adam() -> ClippedAdam:
    return ClippedAdam({"lr": 1e-2})


# --- handlers ---------------------------------------------------------------------------------


def do_p_value(shift: float) -> float:
    """p-value of x under do(z), in its exact Gaussian law, over 600 independent runs."""
    ebm = warm(quadratic_ebm(2, 1, seed=7), 3)
    z = torch.full((600, 1), 0.7, dtype=torch.float64)

    def model() -> tuple[Tensor, Tensor]:
        with pyro.plate("data", 600):
            return lvebm("scene", ebm)

    torch.manual_seed(0)
    trace = poutine.trace(poutine.do(model, data={"scene_z": z})).get_trace()
    x, used = trace.nodes["_RETURN"]["value"]
    assert torch.equal(used, z) and not torch.equal(trace.nodes["scene_z"]["value"], z)
    return mean_p_value(whitened(x[None], condition(exact_joint(ebm), [2], z + shift)), 0.0)


def test_do_draws_x_from_its_law_given_z() -> None:
    """Student's test. False alarms: 1e-3."""
    assert do_p_value(0.0) > ALPHA


def test_do_check_fails_for_another_z() -> None:
    assert do_p_value(2.0) < CERTAIN


def test_do_on_z_is_refused_where_x_is_observed() -> None:
    ebm = quadratic_ebm()
    x = data_of(ebm, 4)
    intervened = poutine.do(plate_model(ebm), data={"scene_z": torch.zeros(4, 2).double()})
    with pytest.raises(ValueError, match=r"do sets 'scene_z' where 'scene' is observed"):
        intervened(x)
    elsewhere = poutine.do(plate_model(ebm), data={"other": torch.zeros(())})
    assert torch.equal(elsewhere(x)[0], x)


def test_lifted_parameters_are_refused_and_replayed_ones_are_not() -> None:
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 4)
    lifted = poutine.lift(model, prior=dist.Normal(torch.zeros(()).double(), 1.0))
    with pytest.raises(ValueError, match=r"parameter 'raw_tril' of the energy of 'scene'.*doubly"):
        lifted(x)
    name = "scene_lvebm$$$linear"
    trace = poutine.trace(model).get_trace(x)
    params = {name: trace.nodes[name]["value"]}
    poutine.replay(model, params=params)(x)


def test_a_random_weight_inside_the_energy_is_refused() -> None:
    x = normal((30, 3), 0, torch.float32)
    ebm = LVEBM.from_data(
        MLPEnergy(3, 2, hidden=(4,)), x, z_dim=2, base="gaussian", pool=tiny_pool()
    )
    pyro.nn.module.to_pyro_module_(ebm.f)
    plate_model(ebm)(x)
    ebm.f.out.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 4]).to_event(2))
    with pytest.raises(ValueError, match=r"parameter 'out.weight' of the energy of 'scene'"):
        plate_model(ebm)(x)


class Weighted(nn.Module):
    """An energy with a weight that a model may set."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()).double())
        self.weight = torch.zeros(()).double()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.scale * (self.weight * x.sum(-1) * z.sum(-1)).tanh()


def test_an_energy_that_depends_on_another_latent_is_refused_by_name() -> None:
    def normal_base(d: int) -> Any:
        return dist.Normal(torch.zeros(d).double(), 1.0).to_event(1)

    ebm = LVEBM(Weighted(), normal_base(3), normal_base(2), pool=tiny_pool())

    def model(x: Tensor, harmless: bool) -> None:
        pyro.sample("v", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
        if not harmless:
            ebm.f.weight = w
        with pyro.plate("data", len(x)):
            # A latent may move x: that is a change of variables, with log Z as it was.
            lvebm("scene", ebm, obs=x - w if harmless else x)

    x = normal((10, 3), 0)
    Saddle(model, AutoNormal(model), adam()).step(x, True)
    pyro.clear_param_store()
    message = r"energy of 'scene' depends on the latent 'w'.*doubly intractable"
    with pytest.raises(ValueError, match=message):
        Saddle(model, AutoNormal(model), adam()).step(x, False)


# --- plates and shapes ------------------------------------------------------------------------


def test_a_sequential_plate_is_the_vectorised_one() -> None:
    """Log density, NUTS at frozen θ and a handwritten guide; autoguides are refused by Pyro."""
    ebm = warm(quadratic_ebm(), 3)
    x, z = data_of(ebm, 4), normal((4, 2), 1)

    def model() -> None:
        for i in pyro.plate("data", 4):
            lvebm(f"scene_{i}", ebm, obs=x[i])

    fixed = poutine.condition(model, data={f"scene_{i}_z": z[i] for i in range(4)})
    refreshes = int(ebm.pool.refreshes)
    trace = poutine.trace(fixed).get_trace()
    whole = poutine.condition(plate_model(ebm), data={"scene_z": z})
    expected = poutine.trace(whole).get_trace(x).log_prob_sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)
    assert int(ebm.pool.refreshes) == refreshes
    with ebm.frozen():
        mcmc = MCMC(NUTS(model), num_samples=2, warmup_steps=2, disable_progbar=True)
        mcmc.run()
    assert mcmc.get_samples()["scene_3_z"].shape == (2, 2)

    def guide() -> None:
        for i in pyro.plate("data", 4):
            loc = pyro.param(f"loc_{i}", torch.zeros(2).double())
            pyro.sample(f"scene_{i}_z", dist.Normal(loc, 1.0).to_event(1))

    saddle = Saddle(model, guide, adam())
    saddle.step()
    assert len(saddle.parameters()) == 4 + 2
    with pytest.raises(NotImplementedError, match="does not support sequential"):
        AutoParticles(model)()


class ImageEnergy(nn.Module):
    """A smooth energy of a 4 × 4 image and a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal((4, 4, 2), 0, torch.float32))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.einsum("...ij,ijk,...k->...", x, self.weight, z).tanh()


def test_images_in_nested_plates_of_two_lvebms() -> None:
    """A group latent above images, a hierarchical prior above both, a classifier below."""
    x = normal((6, 5, 4, 4), 1, torch.float32)
    base_z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    images = LVEBM(ImageEnergy(), dist.Normal(torch.zeros(4, 4), 1.0).to_event(2), base_z)
    images.pool = tiny_pool()
    images.pool.initialise(images.dim)
    groups = quadratic_ebm(3, 2, dtype=torch.float32)
    g = data_of(groups, 5)

    def model(x: Tensor | None, g: Tensor | None) -> Tensor:
        tau = pyro.sample("tau", dist.Gamma(2.0, 2.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), tau[..., None]).to_event(1))
        with pyro.plate("groups", 5, dim=-1):
            _, v = lvebm("group", groups, obs=g)
            with pyro.plate("rows", 6, dim=-2):
                image, z = lvebm("image", images, obs=x)
                logits = (w * (z + v)).sum(-1)
                pyro.sample(
                    "label", dist.Bernoulli(logits=logits), obs=(image.mean((-2, -1)) > 0).float()
                )
        return image

    trace = poutine.trace(model).get_trace(x, g)
    assert trace.nodes["image_z"]["value"].shape == (6, 5, 2)
    for parallel in (False, True):
        sites = ("image", "group")
        prior = Predictive(model, num_samples=3, parallel=parallel, return_sites=sites)(None, None)
        assert prior["image"].shape == (3, 6, 5, 4, 4)
        # Under a plate of samples Pyro keeps the missing plates as axes of size 1.
        assert prior["group"].reshape(3, 5, 3).isfinite().all()
    local, shared = ["group_z", "image_z"], ["tau", "w"]
    guide = AutoGuideList(model)
    guide.append(AutoParticles(poutine.block(model, hide=shared), 4))
    guide.append(AutoNormal(poutine.block(model, expose=shared)))
    saddle = Saddle(model, guide, adam())
    guide(x, g)
    before = [guide[0].particles(name).clone() for name in local]
    for _ in range(2):
        saddle.step(x, g)
    for name, old in zip(local, before, strict=True):
        assert not torch.equal(guide[0].particles(name), old)
    found = get_dependencies(model, (x, g))["prior_dependencies"]
    assert set(found["label"]) == {"label", "w", "group_z", "image_z"}
    source = pyro.render_model(
        model, model_args=(x, g), render_distributions=True, render_params=True
    ).source
    assert "image_z -> label" in source and "cluster_groups" in source


# --- NUTS -------------------------------------------------------------------------------------


def test_nuts_at_frozen_theta_never_looks_at_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at a leapfrog step, nor between; unfrozen it pays at every one."""
    ebm = quadratic_ebm(2, 1)
    x, calls = data_of(ebm, 4), []
    negatives = type(ebm.pool).negatives
    monkeypatch.setattr(TemperedPool, "negatives", lambda s: calls.append(1) or negatives(s))

    def run() -> int:
        calls.clear()
        kernel = NUTS(plate_model(ebm))
        MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True).run(x)
        return len(calls)

    with ebm.frozen():
        assert run() == 0
    assert int(ebm.pool.refreshes) == 0
    assert run() > 6 and int(ebm.pool.refreshes) == 1
