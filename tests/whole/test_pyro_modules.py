# SPDX-License-Identifier: Apache-2.0
"""Models that are modules, loops and optimisers of others, the parameter store, and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import SGD, ClippedAdam, ExponentialLR, ReduceLROnPlateau
from referee import normal
from small_models import (
    classifier,
    data_of,
    plate_model,
    quadratic_ebm,
    same,
    snapshot,
    tiny_pool,
)
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    Saddle,
    lvebm,
)

pytestmark = pytest.mark.usefixtures("brief_settling")


def adam() -> ClippedAdam:
    return ClippedAdam({"lr": 1e-2})


def store_names(tensor: Tensor) -> list[str]:
    """The names under which Pyro's store holds a tensor."""
    return [n for n, p in pyro.get_param_store().named_parameters() if p is tensor]


# --- modules ----------------------------------------------------------------------------------


class Classifier(PyroModule):
    """The same as a module, with a random or a trained weight."""

    def __init__(self, ebm: LVEBM, *, random: bool = False) -> None:
        super().__init__()
        self.ebm = ebm
        self.linear = PyroModule[nn.Linear](2, 1, bias=False).double()
        if random:
            prior = dist.Normal(torch.zeros(1, 2).double(), 1.0).to_event(2)
            self.linear.weight = PyroSample(prior)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        w = self.linear.weight
        with pyro.plate("data", len(x)) as i:
            _, z = lvebm("scene", self.ebm, obs=x[i])
            logits = (z[..., None, :] @ w.mT)[..., 0, 0] if w.dim() > 2 else (z * w[0]).sum(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


class Plain(nn.Module):
    """The same as a plain module that announces itself."""

    def __init__(self, ebm: LVEBM) -> None:
        super().__init__()
        self.ebm = ebm
        self.linear = nn.Linear(2, 1, bias=False).double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("classifier", self)
        with pyro.plate("data", len(x)) as i:
            _, z = lvebm("scene", self.ebm, obs=x[i])
            pyro.sample("y", dist.Bernoulli(logits=self.linear(z).squeeze(-1)), obs=y)


def labelled_data(ebm: LVEBM, n: int = 8) -> tuple[Tensor, Tensor]:
    x = data_of(ebm, n)
    return x, (x[:, 0] > x[:, 0].median()).double()


@pytest.mark.parametrize("guide_class", [AutoParticles, AutoNormal])
@pytest.mark.parametrize("kind", [Classifier, Plain])
def test_modules_register_the_energy_once_and_train_as_functions_do(
    kind: Any, guide_class: Any
) -> None:
    ebms, losses = [quadratic_ebm(), quadratic_ebm()], []
    x, y = labelled_data(ebms[0])
    module = kind(ebms[1])
    nn.init.zeros_(module.linear.weight)
    for model in (classifier(ebms[0]), module):
        pyro.clear_param_store()
        torch.manual_seed(0)
        guide = guide_class(model)
        guide(x, y)
        saddle = Saddle(model, guide, SGD({"lr": 1e-3}))
        losses.append([saddle.step(x, y) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1])
    assert all(len(store_names(p)) == 1 for p in module.parameters())
    assert {id(p) for p in saddle.parameters()} >= {id(p) for p in module.parameters()}
    for a, b in zip(ebms[0].parameters(), ebms[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_module_with_a_random_weight_elsewhere() -> None:
    ebm = quadratic_ebm()
    x, y = labelled_data(ebm)
    model = Classifier(ebm, random=True)
    guide = AutoGuideList(model)
    guide.append(AutoParticles(poutine.block(model, hide=["linear.weight"])))
    guide.append(AutoNormal(poutine.block(model, expose=["linear.weight"])))
    saddle = Saddle(model, guide, adam())
    saddle.step(x, y)
    sites = ("y", "scene_z", "linear.weight")
    for parallel in (False, True):
        predictive = Predictive(model, guide=guide, num_samples=3, parallel=parallel)
        predictive.return_sites = sites
        out = predictive(x)
        assert out["y"].shape == (3, 8) and out["scene_z"].shape == (3, 8, 2)


@pytest.mark.parametrize(
    ("make", "local"),
    [
        (AutoNormal, False),
        (AutoNormal, True),
        (AutoParticles, False),
        (AutoAmortisedNormal, False),
        (AutoAmortisedNormal, True),
    ],
)
def test_a_loop_with_an_optimiser_of_torch(make: Any, local: bool) -> None:
    """One step is the gradient step of SVI, the pool follows, and nothing is left out."""
    with pyro.settings.context(module_local_params=local):
        ebm = quadratic_ebm()
        x, y = labelled_data(ebm)
        model = Classifier(ebm)
        guide = make(poutine.block(model, hide=["y"]))
        guide(x, y)
        elbo = Trace_ELBO()(model, guide)
        params = list(elbo.parameters())
        assert {id(p) for p in params} >= {id(p) for p in ebm.f.parameters()}
        optimiser = torch.optim.SGD(params, lr=1e-3)
        for count in (1, 2, 3):
            optimiser.zero_grad()
            elbo(x, y).backward()
            assert int(ebm.pool.refreshes) == count
            before = snapshot(ebm.f)
            optimiser.step()
            assert not same(before, snapshot(ebm.f))
        if local:
            with pytest.raises(ValueError, match="is not in Pyro's parameter store"):
                Saddle(model, guide, adam()).step(x, y)


@pytest.mark.parametrize(
    "make", [AutoParticles, AutoNormal, AutoPerDatumMultivariateNormal, AutoAmortisedNormal]
)
def test_module_local_params_change_nothing_for_a_model_that_is_a_function(
    make: Any, tmp_path: Any
) -> None:
    """Every parameter is found and moves as without the setting, and is averaged and saved."""
    ends = []
    for local in (False, True):
        with pyro.settings.context(module_local_params=local):
            pyro.clear_param_store()
            ebm = quadratic_ebm()
            model, x = plate_model(ebm, 4), data_of(ebm, 12)
            guide = make(model)
            saddle = Saddle(model, guide, adam())
            losses = saddle.fit(x, num_steps=4, progress=False)
            saddle.save(tmp_path / "run")
            end = snapshot(guide), snapshot(ebm)
            losses.append(saddle.step(x))
            pyro.clear_param_store()
            model = plate_model(quadratic_ebm(), 4)
            loaded = Saddle.load(tmp_path / "run", model, make(model), adam(), x)
            assert loaded.step(x) == losses[-1]
            ends.append((losses, *end))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1]) and same(ends[0][2], ends[1][2])


def test_module_local_params_are_refused_for_a_model_that_is_a_module() -> None:
    """Then the model's parameters are in no store; and Pyro refuses a guide on its own."""
    with pyro.settings.context(module_local_params=True):
        ebm = quadratic_ebm()
        x, y = labelled_data(ebm)
        before = snapshot(ebm)
        model = Classifier(ebm)
        saddle = Saddle(model, AutoParticles(model), adam())
        with pytest.raises(ValueError, match="is not in Pyro's parameter store"):
            saddle.step(x, y)
        assert same(before, snapshot(ebm))
        alone = AutoParticles(plate_model(ebm))
        with pytest.raises(NotImplementedError, match=r"global pyro\.param statements"):
            alone(x)


def test_optimisers_of_torch_are_refused_by_saddle() -> None:
    ebm = quadratic_ebm()
    model = plate_model(ebm)
    with pytest.raises(ValueError, match="PyroOptim"):
        Saddle(model, AutoParticles(model), torch.optim.SGD(ebm.parameters(), lr=0.1))


@pytest.mark.parametrize("kind", ["exponential", "plateau"])
def test_schedulers_scale_the_updates(kind: str) -> None:
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4}}
    optim = (
        ExponentialLR({**settings, "gamma": 0.5})
        if kind == "exponential"
        else ReduceLROnPlateau({**settings, "factor": 0.5, "patience": 0, "threshold": 1e9})
    )
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 8)
    saddle = Saddle(model, AutoParticles(model), optim, max_kl=1e9)
    rates = []
    for _ in range(4):
        loss = saddle.step(x)
        (rate,) = {o.optimizer.param_groups[0]["lr"] for o in optim.optim_objs.values()}
        rates.append(rate)
        optim.step(loss) if kind == "plateau" else optim.step()
    assert rates == pytest.approx([1e-4, 5e-5, 2.5e-5, 1.25e-5])


# --- the store, copies and files --------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [AutoParticles, AutoNormal, AutoPerDatumMultivariateNormal, AutoAmortisedNormal]
)
def test_the_store_may_be_cleared_between_any_two_calls(make: Any, tmp_path: Any) -> None:
    def run(clear: Callable[[], None]) -> list[Any]:
        pyro.clear_param_store()
        torch.manual_seed(0)
        ebm = quadratic_ebm()
        model, x = plate_model(ebm, 4), data_of(ebm, 12)
        guide = make(model)
        saddle = Saddle(model, guide, adam())
        seen: list[Any] = [saddle.step(x)]
        clear()
        seen += saddle.fit(x, num_steps=3, progress=False)
        clear()
        seen.append(saddle.log_evidence(x)[0])
        clear()
        saddle.save(tmp_path / "run")
        clear()
        pyro.clear_param_store()  # a second guide of one class would share parameters
        other = quadratic_ebm()
        model = plate_model(other, 4)
        loaded = Saddle.load(tmp_path / "run", model, make(model), adam(), x)
        clear()
        seen += [loaded.step(x), [p.sum().item() for p in other.f.parameters()]]
        return seen

    assert run(lambda: None) == run(pyro.clear_param_store)


def test_a_loaded_store_reaches_the_energy_where_pyro_is_told_so(tmp_path: Any) -> None:
    """`load` alone leaves modules as they are, and the module's values win; see docs/pyro.md."""
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 8)
    saddle = Saddle(model, AutoNormal(model), adam())
    saddle.step(x)
    saved = snapshot(ebm.f)
    store = pyro.get_param_store()
    store.save(tmp_path / "store")
    saddle.step(x)
    moved = snapshot(ebm.f)
    store.load(tmp_path / "store")
    model(x)
    assert same(moved, snapshot(ebm.f))
    store.load(tmp_path / "store")
    pyro.module("scene_lvebm", ebm.f, update_module_params=True)
    assert same(saved, snapshot(ebm.f))
    model(x)
    assert all(len(store_names(p)) == 1 for p in ebm.f.parameters())
    saddle.step(x)
    assert not same(saved, snapshot(ebm.f))


def round_trip(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("make", [AutoParticles, AutoNormal])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, round_trip])
def test_copies_are_independent_and_go_on(duplicate: Any, make: Any) -> None:
    ebm = quadratic_ebm()
    x, y = labelled_data(ebm)
    model = Classifier(ebm)
    guide = make(model)
    saddle = Saddle(model, guide, SGD({"lr": 1e-3}))
    saddle.step(x, y)
    other, its_guide = duplicate((model, guide))
    assert same(snapshot(model), snapshot(other)) and same(snapshot(guide), snapshot(its_guide))
    before = snapshot(model)
    pyro.clear_param_store()
    Saddle(other, its_guide, SGD({"lr": 1e-3})).step(x, y)
    assert same(before, snapshot(model)) and not same(before, snapshot(other))


def test_an_lvebm_of_a_plain_function_can_be_pickled_after_training() -> None:
    """Pyro leaves weak references on parameters, which nothing can pickle."""
    ebm = quadratic_ebm()
    model, x = plate_model(ebm), data_of(ebm, 8)
    saddle = Saddle(model, AutoNormal(model), adam())
    saddle.step(x)
    assert same(snapshot(ebm), snapshot(round_trip(ebm)))
    before = snapshot(ebm.f)
    saddle.step(x)
    assert not same(before, snapshot(ebm.f))


@pytest.mark.parametrize("validation", [False, True])
def test_validation_changes_nothing(validation: bool) -> None:
    with pyro.validation_enabled(validation):
        torch.manual_seed(0)
        ebm = quadratic_ebm()
        model, x = plate_model(ebm), data_of(ebm, 8)
        losses = [Saddle(model, AutoParticles(model), SGD({"lr": 1e-3})).step(x) for _ in range(2)]
        svi = SVI(model, AutoNormal(model), SGD({"lr": 1e-3}), Trace_ELBO())
        assert len({*losses}) == 2 and torch.isfinite(torch.tensor(svi.step(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_energy_is_the_same_energy() -> None:
    """`torch.compile` renames parameters; the energy is compiled after the LVEBM is built.

    Slow: loading torch's compiler takes longer than the rest.
    """
    x = normal((30, 3), 0, torch.float32)
    ebm = LVEBM.from_data(
        MLPEnergy(3, 2, hidden=(4,)), x, z_dim=2, base="gaussian", pool=tiny_pool()
    )
    nn.init.ones_(ebm.f.out.weight)
    z = torch.ones(30, 2)
    expected = ebm.f(x, z)
    ebm.f = torch.compile(ebm.f, backend="eager")
    torch.testing.assert_close(ebm.f(x, z), expected)
    model = plate_model(ebm)
    saddle = Saddle(model, AutoParticles(model), adam())
    before = snapshot(ebm.f)
    saddle.step(x)
    assert not same(before, snapshot(ebm.f))
