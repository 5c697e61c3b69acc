# SPDX-License-Identifier: Apache-2.0
"""A step that would poison an optimiser is refused, and undone in the optimiser too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.optim import (
    SGD,
    Adagrad,
    AdagradRMSProp,
    Adam,
    ClippedAdam,
    ExponentialLR,
    PyroOptim,
    RMSprop,
)
from small_models import data_of, plate_model, quadratic_ebm
from torch import Tensor

from pyro_lvebm import AutoParticles, Saddle
from pyro_lvebm.training.optimiser import torch_optimiser

HUGE = 1e25  # its square is beyond the largest number of single precision
ABSURD = 1e15  # its square is finite, and would stop an Adam for tens of thousands of steps

OPTIMISERS: dict[str, Callable[[], PyroOptim]] = {
    "Adam": lambda: Adam({"lr": 0.01, "amsgrad": True}),
    "ClippedAdam": lambda: ClippedAdam({"lr": 0.01, "lrd": 0.9, "clip_norm": math.inf}),
    "RMSprop": lambda: RMSprop({"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Adagrad": lambda: Adagrad({"lr": 0.01}),
    "AdagradRMSProp": lambda: AdagradRMSProp({"eta": 0.1}),
    "Adam under a schedule": lambda: ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    ),
    "Adam for each parameter": lambda: Adam(lambda name: {"lr": 0.01 if name == "a" else 0.02}),
}


def slopes_model(slopes: list[float]) -> Callable[[], None]:
    """A loss whose gradients at both parameters are the present slope, and the parameter."""

    def model() -> None:
        for name in ("a", "b"):
            theta = pyro.param(name, torch.ones(2))
            loss = slopes[0] * (theta - theta.detach()) + 0.5 * theta**2
            pyro.factor(f"on_{name}", -loss.sum())

    return model


def state_of(optim: PyroOptim) -> Any:
    """Parameters and all state of their optimisers, sorted: Pyro's order is not fixed."""
    items = [(p, torch_optimiser(part)) for p, part in optim.optim_objs.items()]
    return sorted(([plain(p.detach()), plain(o.state_dict())] for p, o in items), key=str)


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


def run(name: str, slopes: list[float], bad: float | None) -> tuple[Any, Saddle]:
    """Five good steps, with a bad one after the second if there is one."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    saddle = Saddle(slopes_model(slopes), lambda: None, OPTIMISERS[name]())
    for k in range(5):
        if k == 2 and bad is not None:
            before = state_of(saddle.optim)
            slopes[0] = bad
            with pytest.raises(ValueError, match=r"step 2 .*undone, in the optimiser too"):
                saddle.step()
            slopes[0] = 1.0
            assert state_of(saddle.optim) == before and saddle.step_count == 2
        saddle.step()
    return state_of(saddle.optim), saddle


@pytest.mark.parametrize("bad", [HUGE, ABSURD, -ABSURD])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_that_poisons_the_optimiser_never_was(name: str, bad: float) -> None:
    """Parameters, moments, counts and learning rates are those of a run without it."""
    assert run(name, [1.0], bad)[0] == run(name, [1.0], None)[0]


def test_momentum_is_kept_from_an_absurd_gradient() -> None:
    slopes = [1.0]
    saddle = Saddle(slopes_model(slopes), lambda: None, SGD({"lr": 1e-9, "momentum": 0.9}))
    saddle.step()
    before, slopes[0] = state_of(saddle.optim), ABSURD
    with pytest.raises(ValueError, match=r"'momentum_buffer' of SGD 5e[+]14 times larger"):
        saddle.step()
    assert state_of(saddle.optim) == before and saddle.step_count == 1


@pytest.mark.parametrize("lr", [0.01, 1.0])
def test_a_parameter_that_jumps_away_is_put_back(lr: float) -> None:
    """Plain SGD remembers nothing; the parameter would start anew from 1e13."""
    slopes = [1.0]
    saddle = Saddle(slopes_model(slopes), lambda: None, SGD({"lr": lr}))
    saddle.step()
    before, slopes[0] = pyro.param("b").tolist(), ABSURD
    with pytest.raises(ValueError, match=r"the update of step 1 moved a parameter by 1e[+]1"):
        saddle.step()
    assert pyro.param("b").tolist() == before
    slopes[0] = 1.0
    assert math.isfinite(saddle.step())


@pytest.mark.parametrize("before", [0.0, 1e-8, 1.0, 1e5])
def test_gradients_may_grow_a_thousandfold_or_from_nothing(before: float) -> None:
    """Any size is taken where there were no gradients, and 1,000 σ where there were."""

    def model(slope: float) -> None:
        pyro.factor("on_a", -slope * pyro.param("a", torch.ones(2)).sum())

    saddle = Saddle(model, lambda slope: None, Adam({"lr": 0.01}))
    saddle.step(before)
    saddle.step(1e3 * before if before else ABSURD)
    assert saddle.step_count == 2 and pyro.param("a").tolist() != [1.0, 1.0]


def test_bounded_gradients_may_be_absurd() -> None:
    slopes = [1.0]
    saddle = Saddle(slopes_model(slopes), lambda: None, ClippedAdam({"lr": 0.01}))
    saddle.step()
    slopes[0] = ABSURD
    assert math.isfinite(saddle.step())


def test_momentum_is_undone_with_the_parameter_that_it_made_infinite() -> None:
    """The gradient is finite, and the buffer 0.9 b + g is not."""
    slopes = [3e38]
    saddle = Saddle(slopes_model(slopes), lambda: None, SGD({"lr": 1e-38, "momentum": 0.9}))
    saddle.step()
    before = state_of(saddle.optim)
    with pytest.raises(ValueError, match="'momentum_buffer' of SGD"):
        saddle.step()
    assert state_of(saddle.optim) == before
    slopes[0] = -3e38
    assert math.isfinite(saddle.step())


def test_a_first_step_that_fails_leaves_no_optimiser_behind() -> None:
    slopes = [HUGE]
    saddle = Saddle(slopes_model(slopes), lambda: None, Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match="exp_avg_sq"):
        saddle.step()
    assert not saddle.optim.optim_objs and not saddle.optim.grad_clip
    slopes[0] = 1.0
    saddle.step()
    assert pyro.param("a").tolist() == pytest.approx([0.99, 0.99])


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_learning_rate_that_is_not_finite_is_named(rate: float) -> None:
    saddle = Saddle(slopes_model([1.0]), lambda: None, Adam({"lr": 0.01}))
    saddle.step()
    before = pyro.param("a").tolist()
    for part in saddle.optim.optim_objs.values():
        part.param_groups[0]["lr"] = rate
    with pytest.raises(ValueError, match=f"the learning rate is {rate} at step 1"):
        saddle.step()
    assert pyro.param("a").tolist() == before and saddle.step_count == 1
    for part in saddle.optim.optim_objs.values():
        part.param_groups[0]["lr"] = 0.01
        assert part.state_dict()["state"][0]["step"] == 1.0
    assert math.isfinite(saddle.step())


@pytest.mark.parametrize("rate", [math.nan, math.inf])
@pytest.mark.parametrize("optim", [Adam, ClippedAdam])
def test_a_first_step_at_a_rate_that_is_not_finite_changes_nothing(optim: Any, rate: float) -> None:
    saddle = Saddle(slopes_model([1.0]), lambda: None, optim({"lr": rate}))
    with pytest.raises(ValueError, match=rf"(?i)learning rate(:| is) {rate}"):
        saddle.step()
    assert pyro.param("a").tolist() == [1.0, 1.0] and not saddle.optim.optim_objs


class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        raise AssertionError


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, NeedsClosure])
def test_optimisers_that_need_a_closure_are_refused_at_the_door(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} needs a closure"):
        Saddle(slopes_model([1.0]), lambda: None, PyroOptim(kind, {"lr": 0.1}))
    scheduled = {"optimizer": kind, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    with pytest.raises(ValueError, match=f"{kind.__name__} needs a closure"):
        Saddle(slopes_model([1.0]), lambda: None, ExponentialLR(scheduled))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_by_name(dtype: torch.dtype) -> None:
    def model() -> None:
        pyro.factor("on_a", -(pyro.param("a", torch.ones(2, dtype=dtype)) ** 2).sum())

    saddle = Saddle(model, lambda: None, Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match=f"parameter 'a' has type {dtype}.*Train in float32"):
        saddle.step()
    assert pyro.param("a").tolist() == [1.0, 1.0]
    ebm = quadratic_ebm()
    x = data_of(ebm, 8).to(dtype)
    ebm.to(dtype)
    model_of_rows = plate_model(ebm)
    saddle = Saddle(model_of_rows, AutoParticles(model_of_rows, 1), Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match=f"the energy of 'scene' has type {dtype}"):
        saddle.step(x)
