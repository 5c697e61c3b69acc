# SPDX-License-Identifier: Apache-2.0
"""The amortised guide with a full covariance, and what it shares with the mean-field one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_models import correlated_ebm, gamma_model, gaussian_gap, trace_of
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from referee import normal, plane_grid
from shaped_models import base_law, shaped_ebm
from small_models import data_of, exact_posterior, plate_model, quadratic_ebm, tiny_pool, warm
from torch import Tensor

from pyro_lvebm import LVEBM, AutoAmortisedMultivariateNormal, AutoAmortisedNormal, MLPEnergy

TRIL = torch.tensor([[0.8, 0.0], [0.5, 1.3]], dtype=torch.float64)


def with_full_base(ebm: LVEBM) -> LVEBM:
    """Another LVEBM with the same base_x, and a correlated base_z."""
    base_z = dist.MultivariateNormal(torch.tensor([1.0, -1.0]).double(), scale_tril=TRIL)
    return LVEBM(MLPEnergy(4, 2).double(), ebm.base_x, base_z, pool=tiny_pool())


BASES: dict[str, Callable[[], LVEBM]] = {
    "vector": lambda: quadratic_ebm(4, 2),
    "shape (2, 1)": shaped_ebm,
    "correlated": lambda: with_full_base(shaped_ebm()),
}


@pytest.mark.parametrize("base", BASES)
def test_the_first_guide_is_base_z_and_outputs_are_a_cholesky_factor(base: str) -> None:
    ebm = BASES[base]()
    guide = AutoAmortisedMultivariateNormal(plate_model(ebm), hidden=(5,))
    x = data_of(ebm, 4)
    guide(x)
    q = guide.encode(x)
    assert q.batch_shape == (4,) and q.event_shape == ebm.z_shape
    z = normal((4, *ebm.z_shape), 1)
    torch.testing.assert_close(q.log_prob(z), base_law(ebm.base_z).log_prob(z.flatten(1)))
    with torch.no_grad():
        guide.encoder[-1].bias.copy_(torch.tensor([0.5, -1.0, 0.2, -0.7, 0.9]))
    scale = ebm.base_z.scale.diag() if ebm.base_z.diagonal else ebm.base_z.scale
    tril = torch.tensor([[math.exp(0.2), 0.0], [0.9, math.exp(-0.7)]]).double()
    expected = torch.distributions.MultivariateNormal(
        ebm.base_z.loc.flatten() + scale @ torch.tensor([0.5, -1.0]).double(),
        scale @ tril @ tril.T @ scale.T,
    )
    q = guide.encode(x)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z.flatten(1)))
    u, cell = plane_grid(14.0, 281)
    mass = q.log_prob(u.reshape(-1, 1, *ebm.z_shape)).exp().sum(0) * cell
    torch.testing.assert_close(mass, torch.ones(4).double(), rtol=0, atol=1e-4)


def test_with_a_full_covariance_the_encoder_reaches_the_exact_posterior() -> None:
    """Its KL is 0 to 1e-2, where the mean-field encoder keeps a known gap."""
    ebm = warm(correlated_ebm(), 2)
    x = data_of(ebm, 8)
    precision = torch.linalg.inv(exact_posterior(ebm, x).covariance_matrix[0])
    known = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    gaps = {}
    for make in (AutoAmortisedMultivariateNormal, AutoAmortisedNormal):
        guide = make(plate_model(ebm), hidden=(16,))
        guide(x)

        def q(guide: Any = guide) -> dist.MultivariateNormal:
            law = guide.encode(x)
            full = hasattr(law, "covariance_matrix")
            covariance = law.covariance_matrix if full else law.variance.diag_embed()
            return dist.MultivariateNormal(law.mean, covariance)

        gaps[make] = gaussian_gap(guide, x, q, ebm, 200)
    assert 0 <= gaps[AutoAmortisedMultivariateNormal] < 1e-2
    assert known > 0.1 and gaps[AutoAmortisedNormal] == pytest.approx(known, abs=0.03)


@pytest.mark.parametrize("size", [None, 4])
def test_a_row_depends_on_its_own_observation(size: int | None) -> None:
    ebm = quadratic_ebm()
    guide = AutoAmortisedMultivariateNormal(plate_model(ebm, size), hidden=(6, 5), seed=3)
    x = data_of(ebm, 10)
    guide(x)
    with torch.no_grad():
        guide.encoder[-1].weight.copy_(normal((5, 5), 1))
    trace = trace_of(guide, x)
    i = trace.nodes["data"]["value"]
    fn = trace.nodes["scene_z"]["fn"]
    torch.testing.assert_close(fn.covariance_matrix, guide.encode(x[i]).covariance_matrix)
    assert len(fn.mean.unique(dim=0)) == len(i)
    correlation = fn.scale_tril[:, 1, 0] / fn.covariance_matrix[:, 1, 1].sqrt()
    assert len(correlation.unique()) == len(i)
    other = x.clone()
    other[0] += 5.0
    changed = (guide.encode(x).scale_tril != guide.encode(other).scale_tril).flatten(1).any(-1)
    assert changed.tolist() == [True] + [False] * 9


def test_the_encoder_trains_by_an_optimiser_of_pyro() -> None:
    """Every weight is announced under a name of the guide, and moves."""
    ebm = warm(quadratic_ebm(), 2)
    model, x = plate_model(ebm, 4), data_of(ebm, 10)
    guide = AutoAmortisedMultivariateNormal(model, hidden=(6,))
    guide(x)
    names = set(pyro.get_param_store().keys())
    assert {f"AutoAmortisedMultivariateNormal.encoder.{k}" for k in ("0.weight", "2.bias")} <= names
    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(model, guide, ClippedAdam({"lr": 0.1}), Trace_ELBO())
    with ebm.frozen():
        svi.step(x)
        svi.step(x)  # the first gradient of all but the last layer is zero
    assert not any(torch.equal(p, b) for p, b in zip(guide.parameters(), before, strict=True))


def test_models_with_other_latents_are_refused() -> None:
    ebm = quadratic_ebm()
    with pytest.raises(ValueError, match="hidden must name at least one positive width"):
        AutoAmortisedMultivariateNormal(plate_model(ebm), hidden=(4, 0))

    def two(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0))
        plate_model(ebm)(x)

    for model, x in ((two, data_of(ebm, 4)), (gamma_model, torch.zeros(3))):
        guide = AutoAmortisedMultivariateNormal(model)
        for _ in range(2):  # the same refusal again, and not a half-built guide
            with pytest.raises(ValueError, match="AutoAmortisedMultivariateNormal needs a model"):
                guide(x)


@pytest.mark.parametrize("guide", [AutoAmortisedNormal, AutoAmortisedMultivariateNormal])
@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_an_encoder_that_overshoots_has_a_law(guide: type[AutoAmortisedNormal], far: float) -> None:
    """Scales stay finite and above 0 with a gradient of 0 at worst; sensible ones are exp(a)."""
    base_z = quadratic_ebm(4, 2).base_z
    outputs = torch.zeros(3, guide._num_outputs(2), dtype=torch.float64)
    outputs[:, 2:4] = torch.tensor([far, -4.0])
    outputs.requires_grad_(True)
    law = guide._law(outputs, base_z)
    scale = law.variance.sqrt() / base_z.scale
    assert math.exp(-10.01) < scale[0, 0] < math.exp(2.01)
    torch.testing.assert_close(scale[:, 1], torch.full_like(scale[:, 1], math.exp(-4.0)))
    (grad,) = torch.autograd.grad(law.log_prob(torch.zeros(3, 2).double()).sum(), outputs)
    assert grad.isfinite().all()
