# SPDX-License-Identifier: Apache-2.0
"""Losses that replay a graph: refused where a pool or particles would have to move in it."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from small_models import data_of, plate_model, quadratic_ebm, same, snapshot
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, Saddle

pytestmark = [
    pytest.mark.usefixtures("brief_settling"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

LOSSES = [JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO, JitTraceEnum_ELBO]


def parts() -> tuple[LVEBM, Any, Any, Tensor]:
    ebm = quadratic_ebm(dtype=torch.float32)
    model = plate_model(ebm)
    return ebm, model, AutoNormal(model), data_of(ebm, 10)


def jitted(loss: type[Any]) -> Any:
    return loss(max_plate_nesting=1, ignore_jit_warnings=True, strict_enumeration_warning=False)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("algorithm", [SVI, Saddle])
def test_a_traced_loss_is_refused_while_theta_can_change(loss: type[Any], algorithm: Any) -> None:
    ebm, model, guide, x = parts()
    run = algorithm(model, guide, Adam({"lr": 0.01}), jitted(loss))
    theta = snapshot(ebm.f)
    with pytest.raises(ValueError, match=r"(?s)JitTrace.*freeze θ|replays.*Use Trace.*frozen θ"):
        run.step(x)
    assert same(theta, snapshot(ebm.f))
    if algorithm is Saddle:
        assert run.step_count == 0 and not ebm.pool.refreshes


def own_loss(ebm: LVEBM, x: Tensor) -> Tensor:
    return ebm.log_norm() + ebm.energy(x, torch.zeros(len(x), 2)).mean()


def test_a_trace_of_ones_own_loss_is_refused_too() -> None:
    ebm, _, _, x = parts()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, pytest.raises(ValueError, match="log Z is read in a loss that is traced"):
            torch.jit.trace(lambda x: own_loss(ebm, x), x, check_trace=False)
    assert not ebm.pool.refreshes
    ebm.requires_grad_(False)
    traced = torch.jit.trace(lambda x: own_loss(ebm, x), x, check_trace=False)
    assert torch.allclose(traced(x + 1.0), own_loss(ebm, x + 1.0))


def test_a_trace_of_a_differentiable_loss_is_refused_by_name() -> None:
    """Not by torch, which cannot hold a parameter as a constant and says no more."""
    ebm, model, _, x = parts()
    guide = AutoParticles(model, 1)
    guide(x)

    def loss(x: Tensor) -> Tensor:
        return Trace_ELBO().differentiable_loss(model, guide, x)

    with pytest.raises(ValueError, match=r"traced or compiled.*freeze θ first"):
        torch.jit.trace(loss, x, check_trace=False)
    ebm.requires_grad_(False)
    assert torch.allclose(torch.jit.trace(loss, x, check_trace=False)(x + 1.0), loss(x + 1.0))


def test_a_loss_that_is_being_compiled_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ebm, _, _, x = parts()
    with monkeypatch.context() as patch:
        patch.setattr("torch.compiler.is_compiling", lambda: True)
        with pytest.raises(ValueError, match="log Z is read in a loss that is traced or compiled"):
            own_loss(ebm, x)
    assert not ebm.pool.refreshes and torch.isfinite(own_loss(ebm, x)) and ebm.pool.refreshes == 1


@pytest.mark.slow
def test_torch_compile_is_heard() -> None:
    """Compiled code that raises is run again, without being compiled, and must raise there.

    Slow: loading torch's compiler takes longer than the rest.
    """
    ebm, _, _, x = parts()
    compiled = torch.compile(lambda x: own_loss(ebm, x), backend="eager")
    with pytest.raises(ValueError, match="log Z is read in a loss that is traced or compiled"):
        compiled(x)
    assert not ebm.pool.refreshes


@pytest.mark.parametrize("algorithm", [SVI, Saddle])
def test_at_frozen_theta_a_traced_loss_trains_the_guide(algorithm: Any) -> None:
    """As the loss that is not traced does: it ends near the same place."""
    ends = []
    for loss in (Trace_ELBO(), jitted(JitTrace_ELBO)):
        pyro.clear_param_store()
        torch.manual_seed(0)
        ebm, model, guide, x = parts()
        ebm.requires_grad_(False)
        run = algorithm(model, guide, Adam({"lr": 0.05}), loss)
        for _ in range(30):
            run.step(x)
        ends.append(guide.median(x)["scene_z"])
    assert ends[1].abs().max() > 0.2 and torch.allclose(ends[0], ends[1], atol=0.1)


def test_particles_cannot_move_in_a_graph_that_is_replayed() -> None:
    ebm, model, _, x = parts()
    ebm.requires_grad_(False)
    guide = AutoParticles(model, 1)
    saddle = Saddle(model, guide, Adam({"lr": 0.01}), jitted(JitTrace_ELBO))
    with pytest.raises(ValueError, match="in which particles would never move"):
        saddle.step(x)
