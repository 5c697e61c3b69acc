# SPDX-License-Identifier: Apache-2.0
"""Data at every public door: the wrong dtype is named, and arrays count as tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.optim import Adam
from referee import normal

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    compare_elbo,
    conditional_log_partition,
    log_evidence,
    log_evidence_of,
    log_partition,
    lvebm,
    to_arviz,
    traverse,
)

X, C = (normal((30, 2), seed, torch.float32) for seed in (1, 2))


def plain() -> LVEBM:
    return LVEBM.from_data(QuadraticEnergy(2, 1), X, z_dim=1, pool=TemperedPool(3, 16))


def conditional() -> LVEBM:
    energy = MLPEnergy(2, 1, hidden=(4,), context_dim=2)
    return LVEBM.from_data(energy, X, z_dim=1, context=C, base="gaussian")


def of_model(ebm: LVEBM) -> Callable[[Any], None]:
    def model(x: Any) -> None:
        with pyro.plate("data", len(x)):
            lvebm("x", ebm, obs=x)

    return model


def fitted(ebm: LVEBM, x: Any) -> Any:
    model = of_model(ebm)
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}))
    return saddle.fit(x, num_steps=2, progress=False, held_out=(x[:5],))


def exported(ebm: LVEBM, x: Any) -> Any:
    model = of_model(ebm)
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 1e-3}))
    saddle.step(x)
    return to_arviz(saddle, x, num_samples=4)


pytestmark = pytest.mark.usefixtures("coarse_brackets", "brief_settling")

NO_BRACKET = {"num_particles": 16, "num_runs": 2}

DOORS: dict[str, Callable[[LVEBM, Any], Any]] = {
    "energy": lambda ebm, x: ebm.energy(x, torch.zeros(len(x), 1)),
    "residual_of": lambda ebm, x: ebm.residual_of(x, torch.zeros(len(x), 1)),
    "posterior": lambda ebm, x: ebm.posterior(x).log_prob(torch.zeros(len(x), 1)),
    "impute": lambda ebm, x: ebm.impute(x, torch.tensor([True, False])),
    "log_evidence": lambda ebm, x: (
        log_evidence(ebm, x, log_z=log_partition(ebm, **NO_BRACKET), **NO_BRACKET).value
    ),
    "log_evidence_of": lambda ebm, x: log_evidence_of(of_model(ebm), x, **NO_BRACKET).value,
    "traverse": lambda ebm, x: traverse(ebm, x, 0, torch.zeros(1), num_runs=2).mean,
    "fit": lambda ebm, x: torch.tensor(fitted(ebm, x)),
}


@pytest.mark.parametrize("door", DOORS)
def test_rows_of_another_dtype_are_named(door: str) -> None:
    message = r"x is torch\.float64 where the LVEBM is torch\.float32; convert x by \.to"
    with pytest.raises(ValueError, match=message):
        DOORS[door](plain(), X[:5].double())


@pytest.mark.parametrize("door", DOORS)
def test_an_array_is_taken_as_the_tensor_it_is_meant_to_be(door: str) -> None:
    wanted = DOORS[door](plain(), X[:5])
    for dtype in (np.float32, np.float64):
        found = DOORS[door](plain(), X[:5].numpy().astype(dtype))
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted)


def test_tables_and_exports_name_it_too() -> None:
    ebm = plain()
    model = of_model(ebm)
    for call in (
        lambda: compare_elbo(model, {"none": model}, X.double()),
        lambda: exported(ebm, X.double()),
    ):
        with pytest.raises(ValueError, match=r"x is torch\.float64 where"):
            call()


def test_latents_of_another_dtype() -> None:
    ebm = plain()
    with pytest.raises(ValueError, match=r"z is torch\.float64 where the LVEBM is torch\.float32"):
        ebm.energy(X, torch.zeros(30, 1).double())


def test_contexts() -> None:
    ebm = conditional()
    for call in (
        lambda c: log_evidence(ebm, X, context=c),
        lambda c: conditional_log_partition(ebm, c),
        lambda c: ebm.posterior(X, c),
        lambda c: ebm.given(c),
        lambda c: ebm.impute(X, torch.tensor([True, False]), c),
    ):
        with pytest.raises(ValueError, match=r"context is torch\.float64 where the LVEBM is"):
            call(C.double())
    found, wanted = (
        conditional_log_partition(ebm, c, num_particles=16, num_runs=2).estimate
        for c in (C.double().numpy(), C)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_lvebm_takes_the_dtype_of_its_data(dtype: type) -> None:
    x = X.numpy().astype(dtype)
    ebm = LVEBM.from_data(MLPEnergy(2, 1, hidden=(4,)), x, z_dim=1, base="gaussian")
    like = torch.as_tensor(x)
    assert ebm.base_x.loc.dtype == like.dtype
    torch.testing.assert_close(ebm.base_x.loc, like.mean(0))
    assert ebm.energy(like, like[:, :1]).dtype == like.dtype


@pytest.mark.parametrize("x", [np.zeros((3, 2), int), np.full((3, 2), "a"), [[1.0, 2.0]]])
def test_what_is_no_floating_point(x: Any) -> None:
    with pytest.raises(ValueError, match=r"must be (floating point|a torch\.Tensor or an array)"):
        log_evidence(plain(), x)
