# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal
from small_models import data_of, plate_model, quadratic_ebm
from torch import Tensor, nn

from pyro_lvebm import AutoAmortisedNormal, AutoParticles, lvebm
from pyro_lvebm.latents.program import Program
from pyro_lvebm.training.anatomy import Anatomy, inspect

A, B = quadratic_ebm(3, 2, seed=1), quadratic_ebm(2, 1, seed=2)
X, Y = data_of(A, 12), data_of(B, 12)


def look(program: Program, guide: Any) -> Anatomy:
    return inspect(program, guide, Trace_ELBO())


def two(x: Tensor, y: Tensor) -> None:
    """Parameters with and without a constraint, and two LVEBMs, the later name first."""
    scale = pyro.param("scale", torch.tensor(2.0).double(), constraint=dist.constraints.positive)
    pyro.param("shift", torch.zeros(()).double())
    with pyro.plate("data", 12, subsample_size=5) as i:
        _, z = lvebm("second", B, obs=y[i])
        lvebm("first", A, obs=x[i])
        pyro.sample("t", dist.Normal(z.sum(-1), scale), obs=x[i].sum(-1))


def test_lvebms_are_named_by_their_sites_in_order() -> None:
    anatomy = look(Program(two, (X, Y), {}), AutoParticles(two, 2))
    assert list(anatomy.ebms) == ["second", "first"]
    assert anatomy.ebms["second"] is B and anatomy.ebms["first"] is A


def test_an_lvebm_at_several_sites_has_the_name_of_the_first() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 12):
            lvebm("left", A, obs=x)
            lvebm("right", A, obs=x + 1.0)

    anatomy = look(Program(model, (X,), {}), AutoParticles(model, 2))
    assert anatomy.ebms == {"left": A}


def test_loose_parameters_are_those_of_no_module() -> None:
    anatomy = look(Program(two, (X, Y), {}), AutoNormal(two))
    assert set(anatomy.loose_params) == {"scale", "shift"}
    for name, value in anatomy.loose_params.items():
        assert value is pyro.param(name).unconstrained() and value.requires_grad
    assert anatomy.loose_params["scale"].item() == pytest.approx(torch.tensor(2.0).log().item())


def test_parameters_of_a_handwritten_guide_are_loose() -> None:
    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", 0.1 * torch.ones(3, 2).double())
        with pyro.plate("data", 12, subsample_size=4) as i:
            pyro.sample("scene_z", dist.Normal(x[i] @ gain, 0.7).to_event(1))

    anatomy = look(Program(plate_model(A, 4), (X,), {}), guide)
    assert list(anatomy.loose_params) == ["gain"] and list(anatomy.ebms) == ["scene"]


@pytest.mark.parametrize(
    "make", [AutoNormal, AutoParticles, lambda m: AutoAmortisedNormal(m, hidden=(4,))]
)
def test_parameters_of_a_guide_that_is_a_module_are_not(make: Callable[..., Any]) -> None:
    model = plate_model(A, 4)
    anatomy = look(Program(model, (X,), {}), make(model))
    assert anatomy.loose_params == {} and list(anatomy.ebms) == ["scene"]


def test_a_network_that_pyro_registers_is_loose() -> None:
    """It belongs neither to an LVEBM nor to the guide, so only its names can save it."""
    net = nn.Linear(2, 1).double()

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", 12):
            _, z = lvebm("scene", A, obs=x)
            pyro.sample("t", dist.Normal(net(z).squeeze(-1), 1.0), obs=x.sum(-1))

    anatomy = look(Program(model, (X,), {}), AutoParticles(model))
    assert set(anatomy.loose_params) == {"net$$$weight", "net$$$bias"}
    assert anatomy.loose_params["net$$$weight"] is net.weight


def test_a_model_without_lvebm_has_none() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    anatomy = look(Program(model, (torch.tensor(1.0),), {}), AutoParticles(model))
    assert anatomy.ebms == {} and anatomy.loose_params == {} and anatomy.nesting == 0


@pytest.mark.parametrize(("depth", "expected"), [(0, 0), (1, 1), (3, 3)])
def test_nesting_counts_batch_dimensions(depth: int, expected: int) -> None:
    def model(x: Tensor) -> None:
        with poutine.mask(mask=True):
            plates = [pyro.plate(f"p{k}", 2, dim=-k - 1) for k in range(depth)]
            for plate in plates:
                plate.__enter__()
            pyro.sample("z", dist.Normal(0.0, 1.0))
            for plate in reversed(plates):
                plate.__exit__(None, None, None)

    assert look(Program(model, (X,), {}), AutoParticles(model, 3)).nesting == expected


def test_nesting_is_that_of_the_deeper_of_model_and_guide() -> None:
    def model(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide(x: Tensor) -> None:
        with pyro.plate("extra", 3):
            pyro.sample("aux", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    assert look(Program(model, (X,), {}), guide).nesting == 1


def test_a_guide_that_cannot_work_is_refused() -> None:
    model = plate_model(A, 4)
    with pytest.raises(ValueError, match="AutoMultivariateNormal allocates parameters for the 4"):
        look(Program(model, (X,), {}), AutoMultivariateNormal(model))


def test_arguments_by_name_reach_model_and_guide() -> None:
    model = plate_model(A, 4)
    anatomy = look(Program(model, (), {"x": X}), AutoParticles(model))
    assert list(anatomy.ebms) == ["scene"]


def test_a_guide_list_is_looked_through() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", 12):
            _, z = lvebm("scene", A, obs=x)
            pyro.sample("t", dist.Normal((z * w).sum(-1), 1.0), obs=x.sum(-1))

    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, expose=["w"])))
    guide.append(AutoParticles(poutine.block(model, hide=["w"]), 2))
    anatomy = look(Program(model, (X,), {}), guide)
    assert anatomy.loose_params == {} and anatomy.nesting == 1


def test_looking_leaves_no_trace() -> None:
    """Neither in an enclosing trace, nor as a gradient or a refresh of the pool."""
    before = int(A.pool.refreshes)
    with poutine.trace() as outer:
        look(Program(two, (X, Y), {}), AutoNormal(two))
    assert len(outer.trace.nodes) == 0
    assert int(A.pool.refreshes) == before and all(p.grad is None for p in A.parameters())
