# SPDX-License-Identifier: Apache-2.0
"""`Saddle.fit_guide`: all of the model is held, and the ELBO of the guide comes to rest."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import SGD, Adam
from referee import assert_global_rng_untouched
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    TrainingWarning,
    compare_elbo,
    lvebm,
)
from pyro_lvebm.latents import Program
from pyro_lvebm.training import guide_fit
from pyro_lvebm.training.guide_fit import default_loss

X = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
Y = X[:, 0] + 0.3 * torch.randn(20, generator=torch.Generator().manual_seed(1))


def quadratic() -> LVEBM:
    pool = TemperedPool(num_levels=2, num_chains=16)
    energy = QuadraticEnergy(2, 2)
    ebm = LVEBM.from_data(energy, X, z_dim=2, pool=pool)
    precision = torch.eye(4)
    precision[2:, 2:] = torch.tensor([[1.4, 0.9], [0.9, 1.8]])
    precision[0, 3] = precision[3, 0] = 0.4
    energy.set_precision(precision)
    return ebm


class Decoder(PyroModule):
    """A model with parameters of every kind beside its energy."""

    def __init__(self, ebm: LVEBM, other: LVEBM) -> None:
        super().__init__()
        self.ebms = [ebm, other]
        self.bias = nn.Parameter(torch.tensor(0.1))
        self.net = nn.Linear(2, 1)

    def forward(self, x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.1), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x), subsample_size=10) as i:
            _, z = lvebm("s", self.ebms[0], obs=x[i])
            _, v = lvebm("t", self.ebms[1], obs=x[i])
            mean = w * z[..., 0] + self.net(v)[..., 0] + self.bias
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y[i])


def everything(model: Decoder) -> dict[str, Tensor]:
    ebms = {f"{i}.{n}": p for i, e in enumerate(model.ebms) for n, p in e.state_dict().items()}
    parts = {**model.state_dict(), **ebms, "w": pyro.param("w").unconstrained()}
    return {name: value.detach().clone() for name, value in parts.items()}


def hand_written(x: Tensor, y: Tensor) -> None:
    pyro.param("w", torch.tensor(0.1), constraint=dist.constraints.positive)  # the model's
    with pyro.plate("data", len(x), subsample_size=10) as i:
        for name in ("s_z", "t_z"):
            loc = pyro.param(f"loc_{name}", torch.zeros(len(x), 2))
            pyro.sample(name, dist.Normal(loc[i], 1.0).to_event(1))


def mixed(model: Any) -> AutoGuideList:
    guide = AutoGuideList(
        model, create_plates=lambda x, y: pyro.plate("data", len(x), subsample_size=10)
    )
    guide.append(AutoParticles(poutine.block(model, hide=["t_z"]), 2))
    guide.append(AutoNormal(poutine.block(model, expose=["t_z"])))
    return guide


@pytest.mark.filterwarnings("ignore::pyro_lvebm.TrainingWarning")
@pytest.mark.parametrize("make", [AutoNormal, lambda model: hand_written, mixed])
def test_everything_of_the_model_is_held(make: Any) -> None:
    """Two energies, pools, a positive pyro.param, a module and a parameter of it; no gradient."""
    ebms = [quadratic(), quadratic()]
    model = Decoder(*ebms)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}))
    saddle.step(X, Y)
    before, guide = everything(model), make(model)
    params = [*model.parameters(), *ebms[0].f.parameters(), *ebms[1].f.parameters()]
    fit = saddle.fit_guide(guide, X, Y, max_steps=4, progress=False)
    after = everything(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad and (p.grad is None or not p.grad.any()) for p in params)
    assert pyro.param("w").unconstrained().requires_grad
    assert fit.num_steps == len(fit.losses) == 4 and not fit.converged
    saddle.step(X, Y)  # and the model goes on
    now = everything(model)
    assert not torch.equal(now["w"], after["w"])
    assert not torch.equal(now["net.weight"], after["net.weight"])


def test_a_saddle_inside_frozen_says_what_trains() -> None:
    model = Decoder(quadratic(), quadratic())
    saddle = Saddle(model, AutoNormal(model), Adam({"lr": 1e-2}))
    with model.ebms[0].frozen():
        saddle.step(X, Y)  # the other energy is meant to train
        with model.ebms[1].frozen():
            with pytest.warns(TrainingWarning, match=r"'bias', 'net.*', 'w'\] train on.*fit_guide"):
                saddle.step(X, Y)
            saddle.step(X, Y)


def model_of(ebm: LVEBM, size: int | None = None) -> Any:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=size) as i:
            lvebm("s", ebm, obs=x[i])

    return model


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guide_fit, "_WINDOW", 25)


@pytest.mark.usefixtures("short_windows", "coarse_brackets", "short_chains")
def test_families_come_to_rest_where_they_must() -> None:
    """Mean field at its closed form, and a full covariance, which contains it, at zero.

    Within 0.02 nats and 4 standard errors; a guide that has hardly moved is marked.
    """
    ebm = quadratic()
    model = model_of(ebm)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}))
    guides = {"mean field": AutoNormal(model), "full": AutoPerDatumMultivariateNormal(model)}
    fits = {
        name: saddle.fit_guide(g, X, optim=Adam({"lr": 0.1}), tolerance=0.02, progress=False)
        for name, g in guides.items()
    }
    assert all(fit.converged and fit.num_steps < 900 for fit in fits.values())
    early = AutoNormal(model)
    with pytest.warns(TrainingWarning, match=r"'early' does not rest after 3 steps.*max_steps"):
        saddle.fit_guide(early, X, max_steps=3, progress=False, description="early")
    table = compare_elbo(
        model, {**guides, "early": early, "SVI": AutoNormal(model)}, X, num_samples=32
    )
    rows = table.rows
    gap = float(ebm.f.mean_field_gap().detach())
    for name, expected in (("mean field", gap), ("full", 0.0)):
        error = 0.02 + 4.0 * rows.kl_gap_se[name]
        assert abs(rows.kl_gap[name] - expected) < error, (name, rows.kl_gap[name])
        shift = rows.elbo[name] + table.log_partitions[0].upper - float(ebm.log_partition)
        assert abs(fits[name].elbo - shift) < 4.0 * (fits[name].std_error + rows.elbo_se[name])
    assert rows.kl_gap["early"] > gap + 0.1
    states = {"mean field": True, "full": True, "early": False, "SVI": None, "prior": True}
    assert dict(rows.converged) == states
    assert "early (not converged)" in str(table) and "mean field (not" not in str(table)
    assert "early (not converged)" in table.to_markdown() and "| yes |" in table.to_markdown()
    with torch.no_grad():
        guides["full"].locs.s_z_unconstrained.add_(0.1)
        next(ebm.f.parameters()).add_(0.01)
    with pytest.warns(TrainingWarning, match=r"\['mean field', 'early'\] were trained at other"):
        rows = compare_elbo(model, {**guides, "early": early}, X, num_samples=2).rows
    assert rows.converged["mean field"] is False and rows.converged["full"] is None


@pytest.mark.usefixtures("short_windows", "coarse_brackets")
def test_a_row_at_another_parameter_than_the_energy_is_marked() -> None:
    ebm = quadratic()

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            _, z = lvebm("s", ebm, obs=x)
            pyro.sample("y", dist.Normal(w * z[..., 0], 0.5), obs=y)

    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}))
    guide = AutoAmortisedNormal(model, hidden=(8,))
    assert saddle.fit_guide(guide, X, Y, progress=False, tolerance=0.1).converged
    posteriors = {"encoder": guide}
    assert compare_elbo(model, posteriors, X, Y, num_samples=2).rows.converged["encoder"] is True
    with torch.no_grad():
        pyro.param("w").unconstrained().add_(0.5)
    with pytest.warns(TrainingWarning, match="trained at other parameters"):
        rows = compare_elbo(model, posteriors, X, Y, num_samples=2).rows
    assert rows.converged["encoder"] is False


@pytest.mark.usefixtures("short_windows")
def test_minibatches_of_a_loader_and_contexts() -> None:
    context = X[:, :1].sign()
    energy = MLPEnergy(2, 1, hidden=(4,), context_dim=1)
    ebm = LVEBM.from_data(energy, X, z_dim=1, context=context)

    def model(x: Tensor, c: Tensor, ids: Tensor) -> None:
        with pyro.plate("data", 20, subsample=ids):
            lvebm("s", ebm, obs=x, context=c)

    data = TensorDataset(X, context, torch.arange(20))
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    guide = AutoPerDatumMultivariateNormal(model)
    saddle = Saddle(model, AutoParticles(model, 2), Adam({"lr": 1e-2}))
    fit = saddle.fit_guide(guide, batches=loader, progress=False, tolerance=0.3)
    assert fit.converged and guide.locs.s_z.shape == (20, 1)
    with pytest.raises(ValueError, match="give batches, or arguments"):
        saddle.fit_guide(guide, X, batches=loader)


@pytest.mark.parametrize(
    ("option", "match"),
    [({"max_steps": 0}, "max_steps must be at least 1"), ({"tolerance": 0.0}, "tolerance must be")],
)
def test_numbers_out_of_range_are_refused(option: dict[str, Any], match: str) -> None:
    model = model_of(quadratic())
    guide = AutoNormal(model)
    with pytest.raises(ValueError, match=match):
        Saddle(model, guide, SGD({"lr": 0.1})).fit_guide(guide, X, **option)
    assert guide.prototype_trace is None


def looped(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=x[i])


def looped_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.tensor(0.0)), 1.0))


def labelled(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(c, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def swapped(x: Tensor) -> None:
    a = pyro.sample("b", dist.Normal(0.0, 1.0))
    pyro.sample("a", dist.Normal(a, 1.0))


def ordered(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a, 1.0))


@pytest.mark.parametrize(
    ("model", "guide", "kind", "draws"),
    [
        (ordered, ordered, TraceMeanField_ELBO, 4),
        (ordered, swapped, Trace_ELBO, 4),
        (looped, looped_guide, TraceMeanField_ELBO, 1),
        (labelled, AutoNormal(poutine.block(labelled, hide=["c"])), TraceEnum_ELBO, 4),
        (ordered, AutoParticles(ordered), None, None),
    ],
)
def test_the_loss_follows_the_rule(model: Any, guide: Any, kind: Any, draws: int) -> None:
    loss = default_loss(Program(model, (X[:3],), {}), guide, 0)
    assert type(loss) is (kind or type(None))
    if loss is not None:
        assert loss.num_particles == draws and loss.vectorize_particles == (draws > 1)


def test_fits_are_fixed_by_the_seed() -> None:
    ebm = quadratic()
    model = model_of(ebm, 10)
    saddle, losses = Saddle(model, AutoNormal(model), Adam({"lr": 0.1})), []
    for seed in (0, 0, 1):
        with assert_global_rng_untouched(), pytest.warns(TrainingWarning, match="does not rest"):
            guide = AutoNormal(model)
            losses.append(saddle.fit_guide(guide, X, max_steps=2, seed=seed, progress=False).losses)
    assert losses[0] == losses[1] != losses[2]
