# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD
from referee import normal
from torch import Tensor, nn

from pyro_lvebm import LVEBM, AutoParticles, Saddle, TemperedPool, log_partition, lvebm
from pyro_lvebm.model.rays import falling_rays
from pyro_lvebm.validation import TrainingWarning

BASE_X, BASE_Z = (dist.Normal(torch.zeros(d), 1.0).to_event(1) for d in (2, 1))


class Energy(nn.Module):
    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.of(x, z)


FALLING = {
    "a quartic of one entry": lambda x, z: -0.01 * x[..., 1] ** 4,
    "a cubic": lambda x, z: 0.1 * z[..., 0] ** 3,
    "along a diagonal": lambda x, z: -(x.sum(-1) ** 2) + 0.1 * (x[..., 0] - x[..., 1]) ** 2,
    "more than the base holds": lambda x, z: -0.6 * (x * x).sum(-1),
}

RISING = {
    "a positive quartic": lambda x, z: x[..., 0] ** 4 - 5.0 * x[..., 0] ** 2,
    "linear": lambda x, z: 20.0 * x[..., 0] - 9.0 * z[..., 0],
    "less than the base holds": lambda x, z: -0.4 * (x * x).sum(-1),
    "infinite outside": lambda x, z: torch.where(x.norm(dim=-1) < 9.0, 0.0 * x[..., 0], torch.inf),
}


@pytest.mark.parametrize("name", FALLING)
def test_an_energy_that_falls_is_heard(name: str) -> None:
    with pytest.warns(TrainingWarning, match="the energy falls from x = .* outwards, so Z may be"):
        ebm = LVEBM(Energy(FALLING[name]), BASE_X, BASE_Z, TemperedPool(3, 8))
    points = falling_rays(ebm)
    near, far = (ebm.energy(*ebm.unwhiten(scale * points)) for scale in (1.0, 2.0))
    assert len(points) and (far < near).all()


@pytest.mark.parametrize("name", RISING)
def test_one_that_rises_is_not(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ebm = LVEBM(Energy(RISING[name]), BASE_X, BASE_Z, TemperedPool(3, 8))
    assert not len(falling_rays(ebm))


class Quartic(nn.Module):
    """It rises until it is trained to fall."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1e-4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.slope * x[..., 0] ** 4


def test_one_that_falls_after_training_is_heard_of_fit_and_log_partition() -> None:
    x = normal((20, 2), 0, torch.float32)
    ebm = LVEBM.from_data(Quartic(), x, z_dim=1, pool=TemperedPool(3, 8), base="gaussian")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("x", ebm, obs=x)

    def downhill(ebm: LVEBM) -> Tensor:
        return 1e3 * ebm.f.slope

    saddle = Saddle(model, AutoParticles(model), SGD({"lr": 1e-6}), penalties=(downhill,))
    with pytest.warns(TrainingWarning, match="the energy falls from"):
        saddle.fit(x, num_steps=2, progress=False)
    assert ebm.f.slope < 0
    with pytest.warns(TrainingWarning, match="the energy falls from"):
        log_partition(ebm, num_particles=16, num_runs=2, num_refreshes=1)
