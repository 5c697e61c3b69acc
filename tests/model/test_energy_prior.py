# SPDX-License-Identifier: Apache-2.0
"""An LVEBM of one vector, as an energy prior and by itself."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.optim import Adam
from referee import ALPHA, normal, variance_p_value
from small_models import tiny_pool
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    ConjugateEnergy,
    EnergyPrior,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    energy_prior,
    log_evidence,
    log_evidence_of,
    log_partition,
    lvebm,
)

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.2], dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        return (self.weight * z.sin()).sum(-1)


def of_x(pool_seed: int = 0) -> LVEBM:
    x = normal((80, 2), 0) @ normal((2, 2), 1) + 3.0
    ebm = LVEBM.from_data(QuadraticEnergy(2), x, z_dim=0, pool=tiny_pool(pool_seed))
    precision = torch.tensor([[1.4, 0.5], [0.5, 2.0]], dtype=torch.float64)
    ebm.f.set_precision(precision, torch.tensor([0.3, -0.2], dtype=torch.float64))
    return ebm


def test_density_of_one_vector() -> None:
    """Any module of z alone; the dtype is that of its parameters."""
    prior = EnergyPrior(Sine(), 2, tiny_pool())
    z = normal((5, 2), 3)
    trace = poutine.trace(poutine.condition(energy_prior, {"z": z})).get_trace("z", prior)
    trace.compute_log_prob()
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) - Sine()(z)
    names = [n for n, node in trace.nodes.items() if node["type"] == "sample"]
    assert names == ["z"] and trace.nodes["_RETURN"]["value"] is z
    torch.testing.assert_close(trace.nodes["z"]["log_prob"] + prior.log_partition, expected)
    grad = torch.autograd.grad(-trace.nodes["z"]["log_prob"].mean(), prior.f.energy.weight)[0]
    u, log_w = prior.pool.negatives()
    pushed = (log_w.exp()[:, None] * u.sin()).sum(0)
    torch.testing.assert_close(grad, z.sin().mean(0) - pushed)


def test_an_energy_based_model_of_x_alone_has_exact_evidence() -> None:
    """Nothing is integrated over, so the one error is that of log Z."""
    ebm = of_x()
    x = ebm.base_x.unwhiten(normal((6, 2), 4))
    log_z = log_partition(ebm, num_particles=64, num_runs=8)
    exact = ebm.f.log_evidence(x).detach()
    found = log_evidence(ebm, x, log_z=log_z)
    shift = float(ebm.f.log_partition().detach()) - log_z.estimate
    torch.testing.assert_close(found.value, exact + shift)
    torch.testing.assert_close(found.std_error, torch.full_like(exact, log_z.std_error))
    assert abs(shift) < 4 * log_z.std_error


def test_its_primitive_opens_one_site_and_a_saddle_trains_it() -> None:
    ebm = of_x()
    data = ebm.base_x.unwhiten(normal((40, 2), 4))

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        with pyro.plate("data", len(x), subsample_size=20) as i:
            return lvebm("scene", ebm, obs=x[i])

    with torch.random.fork_rng():
        x, z = model(data)
        trace = poutine.trace(model).get_trace(data)
    assert x.shape == (20, 2) and z.shape == (20, 0)
    assert "scene" in trace.nodes and "scene_z" not in trace.nodes
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": 3e-2}), seed=0)
    start, _ = Saddle(model, lambda x: None, Adam({})).log_evidence(data)
    losses = saddle.fit(data, num_steps=30, held_out=(data,), progress=False)
    assert len(losses) == 30 and (saddle.history["kl"].dropna() > 0).all()
    assert saddle.history["log_evidence"].max() > start + 0.02
    of_model = log_evidence_of(model, data)
    exact = ebm.f.log_evidence(data) + ebm.f.log_partition() - of_model.log_partition.estimate
    torch.testing.assert_close(of_model.value, exact.detach())


def test_missing_entries_are_its_only_latents() -> None:
    """Their particles have the law of the entry given the other, in closed form."""
    ebm = of_x()
    x = ebm.base_x.unwhiten(normal((300, 2), 4))
    holes = x.clone()
    holes[:, 1] = torch.nan

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("scene", ebm, obs=x)

    guide = AutoParticles(model, 1)
    saddle = Saddle(model, guide, Adam({"lr": 1e-3}), num_moves=10, seed=0)
    with ebm.frozen():
        for _ in range(8):
            saddle.step(holes)
    scale = ebm.base_x.scale
    covariance = scale @ torch.linalg.inv(ebm.f.precision.detach()) @ scale.T
    w = -torch.linalg.solve(ebm.f.precision.detach(), ebm.f.linear.detach())
    mean = ebm.base_x.unwhiten(w)
    slope = covariance[0, 1] / covariance[0, 0]
    found = guide.particles("scene_missing")[0, :, 1]
    sd = (covariance[1, 1] - slope * covariance[0, 1]).sqrt()
    r = (found - mean[1] - slope * (x[:, 0] - mean[0])) / sd
    assert variance_p_value(r, 1.0) > ALPHA > variance_p_value(r + 1.0, 1.0)
    completed = ebm.impute(holes[:5])
    assert torch.equal(completed[0, :, 0], x[:5, 0]) and bool(completed.isfinite().all())


def test_what_is_no_energy_prior() -> None:
    x = normal((30, 2), 0, torch.float32)
    pair = LVEBM.from_data(ConjugateEnergy(2, 1, hidden=(4,)), x, z_dim=1, pool=tiny_pool())
    with pytest.raises(ValueError, match="energy-based density of one vector: an EnergyPrior"):
        energy_prior("z", pair)
    with pytest.raises(ValueError, match="needs an EnergyPrior; got Sine"):
        energy_prior("z", Sine())
    with pytest.raises(ValueError, match="z_dim must be at least 1; got 0"):
        EnergyPrior(Sine(), 0)
    with pytest.raises(ValueError, match=r"energy must be an nn\.Module; got function"):
        EnergyPrior(lambda z: z, 2)
    with pytest.raises(ValueError, match="x_dim=3 and z_dim=0, but the bases have 2 and 0"):
        EnergyPrior(MLPEnergy(3), 2)
    with pytest.raises(ValueError, match="z_dim must be at least 0; got -1"):
        LVEBM.from_data(MLPEnergy(2), x, z_dim=-1)
