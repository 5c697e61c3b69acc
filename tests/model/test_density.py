# SPDX-License-Identifier: Apache-2.0
"""A density at contexts, and what is refused at its door."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conditional_models import linear_ebm
from referee import normal
from small_models import quadratic_ebm

from pyro_lvebm import JointEnergy
from pyro_lvebm.model import Density


def test_a_density_at_contexts_is_that_of_every_call_with_them() -> None:
    ebm, x, c = linear_ebm()
    z, at = normal((len(x), ebm.base_z.dim), 3), ebm.given(c)
    assert isinstance(at, Density) and at.context_shape is None and not hasattr(at, "pool")
    for same in (at, copy.deepcopy(at), pickle.loads(pickle.dumps(at))):
        torch.testing.assert_close(same.energy(x, z), ebm.energy(x, z, c))
        u = ebm.whiten(x, z)
        for ours, theirs in zip(
            same.residual_and_grad(u), ebm.residual_and_grad(u, c), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert at.given(None) is at


def test_a_density_without_contexts_is_its_own() -> None:
    ebm = quadratic_ebm()
    assert ebm.given(None) is ebm


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (None, "this LVEBM is conditional"),
        (torch.zeros(5, 7).double(), "expected trailing shape"),
        (torch.zeros(5, 2), "context is torch.float32 where the LVEBM is torch.float64"),
        (torch.zeros(5, 2, dtype=torch.long), "must be a floating-point tensor"),
        (torch.full((5, 2), torch.nan).double(), "NaN or infinite"),
    ],
)
def test_contexts_that_do_not_fit(context: Any, message: str) -> None:
    ebm, _, c = linear_ebm()
    assert c.shape[1:] == (2,)
    with pytest.raises(ValueError, match=message):
        ebm.given(context)


def test_contexts_of_what_has_some_already() -> None:
    ebm, _, c = linear_ebm()
    with pytest.raises(ValueError, match="at contexts already"):
        ebm.given(c).given(c)
    with pytest.raises(ValueError, match="a joint draws from a pool: give an LVEBM; got Density"):
        JointEnergy(ebm.given(c))
    with pytest.raises(ValueError, match="must be a floating-point tensor"):
        ebm.at([0.0, 1.0])  # type: ignore[arg-type]


def test_contexts_at_the_door_of_a_pool() -> None:
    ebm, _, c = linear_ebm()
    for wrong in (c[:0], c[:, :1], torch.zeros(3, 4).double()):
        with pytest.raises(ValueError, match="with at least one row"):
            ebm.pool.refresh(ebm, wrong)
    plain = quadratic_ebm()
    with pytest.raises(ValueError, match="a TemperedPool takes no contexts"):
        plain.pool.refresh(plain, c)
