# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_models import data_of, plate_model, quadratic_ebm
from torch import Tensor

from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import FullData
from pyro_lvebm.rng import Stream

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def hierarchy(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as i:
        z = pyro.sample("z", dist.Normal(w, 1e-3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])


def test_at_rest_no_energy_is_trained_and_the_same_is_drawn_again() -> None:
    ebm = quadratic_ebm()
    program = Program(plate_model(ebm), (data_of(ebm, 10),), {})
    draws = []
    for counter in (2, 0, 0, 1):
        with program.at_rest(5, Stream.PROBE, counter):
            assert not ebm.is_trained and not torch.is_grad_enabled()
            draws.append(torch.rand(()).item())  # the first after the run that finds the sites
    assert ebm.is_trained and program.ebms == [ebm]
    assert draws[1] == draws[2] and len(set(draws)) == 3


def test_what_all_data_share_is_the_same_in_all_minibatches_of_a_draw() -> None:
    program = Program(hierarchy, (torch.zeros(10),), {})
    found = FullData()
    with program.quiet(0, Stream.PROBE):
        for batch, trace in program.traces(pyro.poutine.uncondition(hierarchy), 3):
            found.add_sites(program, program.latents, batch, trace, 3)
    w, z = (found.joined()[name] for name in ("w", "z"))
    assert w.shape == (3,) and z.shape == (3, 10)
    assert w.std() > 0.1 and (z - w[:, None]).abs().max() < 0.01


def test_the_number_of_batch_dimensions_may_be_known_without_a_run() -> None:
    def fails() -> None:
        raise AssertionError

    assert Program(fails, (), {}, 3).nesting == 3
    program = Program(hierarchy, (torch.zeros(10),), {})
    with program.quiet(0, Stream.PROBE):
        assert program.nesting == 1
