# SPDX-License-Identifier: Apache-2.0
"""Training mode, put on after an LVEBM is built, is refused where its energy is next used."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_lvebm import LVEBM, AutoParticles, Saddle, TemperedPool, log_partition, lvebm
from pyro_lvebm.energies import check_at_rest

PARTS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "Dropout": nn.Dropout,
    "AlphaDropout": nn.AlphaDropout,
    "RReLU": nn.RReLU,
}


class Network(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(part, nn.Tanh()), nn.Linear(4, 1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        u = torch.cat([x, z], -1)
        out: Tensor = self.net(u.reshape(-1, 3)).reshape(u.shape[:-1])
        return out


@pytest.mark.parametrize("particles", [True, False])
@pytest.mark.parametrize("name", PARTS)
def test_training_mode_is_seen_in_the_next_step(name: str, particles: bool) -> None:
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    energy, pool = Network(PARTS[name]()).eval(), TemperedPool(num_levels=2, num_chains=8)
    ebm = LVEBM.from_data(energy, x, z_dim=1, pool=pool, base="gaussian")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("m", ebm, obs=x)

    guide = AutoParticles(model, 1) if particles else AutoNormal(model)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}))
    saddle.step(x)
    ebm.train()
    before = {key: value.clone() for key, value in ebm.state_dict().items()}
    message = rf"{name} 'net\.1\.0' of the energy .*\.eval\(\)"
    with pytest.raises(ValueError, match=message):
        saddle.step(x)
    with pytest.raises(ValueError, match=message):
        log_partition(ebm, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in ebm.state_dict().items())
    with pytest.raises(ValueError, match=message):
        SVI(model, AutoNormal(model), Adam({"lr": 1e-3}), Trace_ELBO()).step(x)
    ebm.eval()
    saddle.step(x)


@pytest.mark.parametrize("part", [nn.LayerNorm(4), nn.Dropout(0.0), nn.GroupNorm(2, 4)])
def test_training_mode_of_other_parts_is_none_of_our_business(part: nn.Module) -> None:
    check_at_rest(Network(part).train())
