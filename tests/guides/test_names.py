# SPDX-License-Identifier: Apache-2.0
"""Two guides or models of one class, or of one name in Pyro's store, are two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import SGD, Adam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoPerDatumMultivariateNormal,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    lvebm,
)

X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def pair(model: Any) -> Any:
    parts = AutoGuideList(model)
    parts.append(AutoNormal(model))
    return parts


def values(guide: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in guide.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def trained(guide: Any, x: Tensor, model: Any = model, seed: int = 0) -> Any:
    saddle = Saddle(model, guide, Adam({"lr": 3e-2}), seed=seed)
    saddle.fit(x, num_steps=3, progress=False)
    return guide


@pytest.mark.parametrize("shift_rows", [12, 7])
@pytest.mark.parametrize(
    "make", [AutoNormal, AutoDiagonalNormal, AutoPerDatumMultivariateNormal, pair]
)
def test_the_second_guide_of_a_class_leaves_the_first(make: Any, shift_rows: int) -> None:
    """And is what it would have been alone; both go on, in Pyro too."""
    other = X[:shift_rows] + 3.0
    alone = values(trained(make(model), other))
    pyro.clear_param_store()
    first = trained(make(model), X)
    before = values(first)
    second = trained(make(model), other)
    assert same(before, values(first)) and same(alone, values(second))
    first(X), second(other)
    assert same(before, values(first)) and same(alone, values(second))
    trained(first, X)  # a second Saddle goes on with the same guide
    assert not same(before, values(first)) and same(alone, values(second))


def test_encoders_of_two_models_are_two() -> None:
    pool = TemperedPool(num_levels=2, num_chains=8)
    ebm = LVEBM.from_data(QuadraticEnergy(2, 1), X, z_dim=1, pool=pool)

    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("s", ebm, obs=x)

    with ebm.frozen():
        first = trained(AutoAmortisedNormal(program, hidden=(4,)), X, program)
        before, start = values(first), AutoAmortisedNormal(program, hidden=(4,))
        second = trained(start, X + 3.0, program)
    assert same(before, values(first))
    assert all((v != 0.0).any() for v in values(second).values())  # biases have left zero


@pytest.mark.parametrize("fate", ["gone", "cleared", "copied", "svi"])
def test_a_guide_whose_name_is_taken_keeps_its_parameters(fate: str) -> None:
    alone = values(trained(AutoNormal(model), X + 3.0))
    pyro.clear_param_store()
    first = AutoNormal(model)
    if fate == "svi":
        SVI(model, first, Adam({"lr": 0.1}), Trace_ELBO()).step(X)
    else:
        trained(first, X)
    before = values(first)
    if fate == "gone":
        del first
    if fate == "cleared":
        pyro.clear_param_store()
    second = copy.deepcopy(first) if fate == "copied" else AutoNormal(model)
    trained(second, X + 3.0)
    if fate == "gone":
        assert same(alone, values(second))
        return
    assert same(before, values(first))
    end = values(second)
    trained(first, X)
    assert same(end, values(second)) and not same(before, values(first))


def test_a_loaded_store_is_gone_on_with(tmp_path: Any) -> None:
    """Its values belong to nobody, and Pyro's way to go on is to take them."""
    end = values(trained(AutoNormal(model), X))
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    pyro.clear_param_store()
    store.load(tmp_path / "store")
    guide = AutoNormal(model)
    Saddle(model, guide, SGD({"lr": 0.0})).step(X)
    assert same(end, values(guide))
    assert "AutoNormal.locs.z" in store


def make_function() -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    return guide


@pytest.mark.parametrize("rows", [12, 7])
def test_a_second_function_with_a_name_of_the_first_is_refused(rows: int) -> None:
    first = make_function()
    trained(first, X)
    before = pyro.param("loc").detach().clone()
    if rows == 12:
        with pytest.raises(ValueError, match=r"'loc' is that of another guide.*clear_param_store"):
            trained(make_function(), X[:rows] + 3.0)
    assert torch.equal(before, pyro.param("loc"))
    trained(poutine.block(first, hide=[]), X)  # the same function goes on
    assert not torch.equal(before, pyro.param("loc"))
    pyro.clear_param_store()
    trained(make_function(), X[:rows] + 3.0)


class Networks(nn.Module):
    """Model and guide as methods, as in Pyro's example of a variational autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 1)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x)[..., 0], 1.0))


def test_a_second_network_under_one_name_is_refused() -> None:
    """Pyro would train the first, and leave the second as it is."""
    first, second = Networks(), Networks()
    trained(first.guide, X)
    before = values(first)
    with pytest.raises(ValueError, match=r"encoder\$\$\$weight.*would stay untrained"):
        trained(second.guide, X + 3.0)
    assert same(before, values(first))
    trained(first.guide, X)
    assert not same(before, values(first))


class Shifted(PyroModule):
    """A model with parameters of both kinds, all named by attribute alone."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.scale = PyroParam(torch.tensor(1.0), constraints.positive)
        self.net = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> None:
        scale = self.scale
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.shift, 1.0))
            pyro.sample("x", dist.Normal(self.net(z[..., None]), scale).to_event(1), obs=x)


def test_two_modules_of_one_name_are_two_models() -> None:
    first, second = Shifted(), Shifted()
    start = values(second)
    trained(AutoNormal(first), X, first)
    before = values(first)
    trained(AutoNormal(second), X + 3.0, second)
    assert same(before, values(first))
    end = values(second)
    assert all(not torch.equal(start[name], end[name]) for name in end)
    first(X), second(X)
    assert same(before, values(first)) and same(end, values(second))


def test_guides_that_share_already_are_refused() -> None:
    """A guide that was called takes the first one's parameters before any Saddle sees it."""
    first = trained(AutoNormal(model), X)
    before = values(first)
    second = AutoNormal(model)
    second(X)
    with pytest.raises(ValueError, match=r"'AutoNormal\.locs\.z' is that of another"):
        trained(second, X + 3.0)
    assert same(before, values(first))


def test_models_may_share_a_parameter_by_its_name() -> None:
    def shared(x: Tensor) -> None:
        pyro.sample(
            "x",
            dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0).expand([12, 2]).to_event(2),
            obs=x,
        )

    def again(x: Tensor) -> None:
        shared(x)

    trained(lambda x: None, X, shared)
    before = float(pyro.param("w").detach())
    trained(lambda x: pyro.param("w", torch.tensor(0.0)), X, again)
    assert float(pyro.param("w").detach()) != before
