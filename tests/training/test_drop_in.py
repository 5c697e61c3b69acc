# SPDX-License-Identifier: Apache-2.0
"""What `SVI` runs, `Saddle` runs, with the same losses, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    EnergyDistance,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.infer.autoguide.initialization import init_to_value
from pyro.optim import Adam, PyroOptim, SparseAdam
from referee import normal
from small_models import data_of, plate_model, quadratic_ebm
from torch import Tensor, nn

from pyro_lvebm import (
    AutoParticles,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
    Saddle,
)
from pyro_lvebm.rng import Stream, isolated_rng

Y = normal((6,), 1, torch.float32)
ONE = torch.tensor(1.0)
Setting = tuple[Callable[..., Any], Callable[..., Any], Any]


@pytest.mark.parametrize("called", [False, True])
def test_a_fresh_guide_starts_elsewhere_unless_it_was_called(called: bool) -> None:
    """What docs/pyro.md says of first values, which SVI draws inside its first step."""

    def loss(algorithm: Callable[..., Any]) -> Any:
        pyro.clear_param_store()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            guide = AutoNormal(mean)
            if called:
                guide()
            algorithm = algorithm(mean, guide, Adam({"lr": 0.01}), Trace_ELBO())
            with isolated_rng(0, Stream.MINIBATCH, 0):
                return algorithm.step()

    assert (loss(SVI) == loss(Saddle)) == called


def mean() -> None:
    m = pyro.sample("m", dist.Normal(pyro.param("prior", torch.tensor(0.0)), 1.0))
    with pyro.plate("data", 6):
        pyro.sample("y", dist.Normal(m, 1.0), obs=Y)


def gaussian() -> dict[str, Tensor]:
    return {"m": pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))}


def improper() -> Setting:
    def model() -> None:
        m = pyro.sample("m", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(m, 1.0), obs=ONE)

    return model, gaussian, Trace_ELBO()


def refused_draws() -> Setting:
    """The likelihood takes no draw of the prior."""

    def model() -> None:
        scale = pyro.sample("s", dist.Normal(-50.0, 10.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=ONE)

    def guide() -> None:
        scale = pyro.param("s0", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("s", dist.Delta(scale))

    return model, guide, Trace_ELBO()


def enumerated() -> Setting:
    @config_enumerate
    def model() -> None:
        c = pyro.sample("c", dist.Bernoulli(pyro.param("p", torch.tensor(0.25))))
        assert c.shape == (2,)
        pyro.sample("y", dist.Normal(c, 1.0), obs=ONE)

    return model, lambda: None, TraceEnum_ELBO(max_plate_nesting=0)


def vectorised() -> Setting:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        assert m.shape == (3, 1)
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Normal(m, 1.0), obs=Y)

    loss = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    return model, gaussian, loss


def monte_carlo() -> Setting:
    model = config_enumerate(mean, default="parallel", num_samples=4)
    return model, lambda: None, TraceTMC_ELBO(max_plate_nesting=1)


def baseline() -> Setting:
    def guide() -> None:
        infer = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}}
        pyro.sample("c", dist.Bernoulli(pyro.param("p", torch.tensor(0.25))), infer=infer)

    def model() -> None:
        c = pyro.sample("c", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(c, 1.0), obs=ONE)

    return model, guide, TraceGraph_ELBO()


def differentiated() -> Setting:
    """A loss of one's own that takes a gradient itself."""

    def loss(model: Any, guide: Any) -> Tensor:
        drawn = poutine.trace(guide).get_trace()
        replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace()
        m = drawn.nodes["m"]["value"]
        (score,) = torch.autograd.grad(replayed.log_prob_sum(), m, create_graph=True)
        return (score + m) ** 2

    return mean, gaussian, loss


def data_as_rows() -> Setting:
    """The plate is given the data, for the length of the minibatch."""

    def model() -> None:
        with pyro.plate("data", 60, subsample=Y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y)

    def guide() -> None:
        with pyro.plate("data", 60, subsample=Y):
            pyro.sample("z", dist.Normal(pyro.param("slope", torch.tensor(0.2)) * Y, 1.0))

    return model, guide, Trace_ELBO()


def factor() -> Setting:
    def model() -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * m)
        pyro.factor("tilt", -((m - pyro.param("w", torch.tensor(0.5))) ** 2))

    return model, gaussian, Trace_ELBO()


SETTINGS: dict[str, Callable[[], Setting]] = {
    **{f.__name__: f for f in (improper, refused_draws, enumerated, vectorised, monte_carlo)},
    **{f.__name__: f for f in (baseline, differentiated, data_as_rows, factor)},
    "tensor": lambda: (mean, gaussian, EnergyDistance(prior_scale=0.5)),
    "tuple": lambda: (mean, gaussian, ReweightedWakeSleep(num_particles=3)),
    "renyi": lambda: (mean, gaussian, RenyiELBO(0.3, num_particles=3, vectorize_particles=True)),
    "compiled": lambda: (mean, gaussian, JitTrace_ELBO(ignore_jit_warnings=True)),
    "handler": lambda: (mean, AutoNormalMessenger(mean), Trace_ELBO()),
}


def losses(make: Callable[[], Setting], algorithm: type[SVI], optim: PyroOptim) -> list[Any]:
    pyro.clear_param_store()
    model, guide, loss = make()
    svi = algorithm(model, guide, optim, loss)
    found: list[Any] = []
    for t in range(3):
        with isolated_rng(0, Stream.MINIBATCH, t):  # what a step of Saddle draws from
            found.append(svi.step())
    if not isinstance(loss, EnergyDistance) and loss is not None and hasattr(loss, "loss"):
        with isolated_rng(1, Stream.MINIBATCH, 0):
            found.append(svi.evaluate_loss())
    return found


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_losses_are_those_of_svi(name: str) -> None:
    expected = losses(SETTINGS[name], SVI, Adam({"lr": 0.05}))
    assert losses(SETTINGS[name], Saddle, Adam({"lr": 0.05})) == expected


def test_optimisers_with_options_by_parameter_and_sparse_gradients() -> None:
    def sparse() -> Setting:
        torch.manual_seed(0)
        table, which = nn.Embedding(3, 1, sparse=True), torch.tensor([0, 1, 1, 2, 0, 1])

        def model() -> None:
            pyro.module("table", table)
            with pyro.plate("data", 6):
                pyro.sample("y", dist.Normal(table(which).squeeze(-1), 1.0), obs=Y)

        return model, lambda: None, Trace_ELBO()

    assert losses(sparse, Saddle, SparseAdam({"lr": 0.1})) == losses(
        sparse, SVI, SparseAdam({"lr": 0.1})
    )

    def by_name() -> PyroOptim:
        return Adam(lambda name: {"lr": 0.3 if name == "loc" else 0.01})

    def setting() -> Setting:
        return mean, gaussian, Trace_ELBO()

    assert losses(setting, Saddle, by_name()) == losses(setting, SVI, by_name())


def test_a_loss_that_is_a_tuple_has_its_penalty_in_the_first_part() -> None:
    values = []
    for penalty in ((), (lambda ebm: 7.0 + 0.0 * ebm.f.raw_tril.sum(),)):
        pyro.clear_param_store()
        ebm = quadratic_ebm(dtype=torch.float32)
        x, model = data_of(ebm, 4), plate_model(ebm)
        guide, loss = AutoNormal(model), ReweightedWakeSleep(num_particles=2)
        saddle = Saddle(model, guide, Adam({"lr": 0.0}), loss, penalties=penalty)
        values.append(saddle.fit(x, num_steps=2, progress=False))
        assert saddle.history["loss"].iloc[-1] == pytest.approx(sum(values[-1][-1]))
    (plain, _), (penalised, _) = values
    assert isinstance(plain, tuple) and len(plain) == 2
    assert penalised[0] - plain[0] == pytest.approx(7.0, abs=1e-3)


def test_losses_without_a_value_or_with_frozen_particles_are_refused_by_name() -> None:
    loss = TraceTailAdaptive_ELBO(num_particles=2, vectorize_particles=True)
    with pytest.raises(ValueError, match="TraceTailAdaptive_ELBO has a gradient but no value"):
        Saddle(mean, gaussian, Adam({"lr": 0.1}), loss)
    compiled = Saddle(mean, AutoParticles(mean), Adam({"lr": 0.1}), JitTrace_ELBO())
    with pytest.raises(
        ValueError, match=r"JitTrace_ELBO replays .* particles would never move.*Use Trace_ELBO"
    ):
        compiled.step()


@pytest.mark.parametrize("make", [AutoParticles, AutoPerDatumMultivariateNormal])
def test_particles_and_rows_of_an_improper_prior(make: Callable[..., Any]) -> None:
    def model() -> None:
        scale = pyro.sample("s", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", 6, subsample_size=3) as i:
            pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
            pyro.sample("y", dist.Normal(0.0, scale), obs=Y[i])

    pyro.clear_param_store()
    guide = make(model)
    saddle = Saddle(model, guide, Adam({"lr": 0.1}))
    assert torch.isfinite(torch.tensor([saddle.step(), saddle.step()])).all()
    assert guide()["s"] > 0.0


@pytest.mark.parametrize("make", [AutoParticles, AutoPerDatumMultivariateNormal, AutoNormal])
def test_a_guide_that_cannot_be_built_fails_in_the_same_way_again(make: Callable[..., Any]) -> None:
    """The first latent is built before the second, on a sphere, is found to have no bijection."""

    def model() -> None:
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("direction", dist.ProjectedNormal(m))

    pyro.clear_param_store()
    guide = make(model)
    saddle = Saddle(model, guide, Adam({"lr": 0.1}))
    for _ in range(2):
        with pytest.raises(ValueError, match="ProjectedNormalReparam"):
            saddle.step()
        assert not list(guide.parameters()) and not list(guide.buffers())
        assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    "make",
    [
        AutoPerDatumMultivariateNormal,
        AutoPerDatumLowRankMultivariateNormal,
        AutoPerDatumIAFNormal,
    ],
)
def test_per_datum_guides_take_scalars_and_first_locations(make: Callable[..., Any]) -> None:
    """As Pyro's autoguides: a scalar outside plates, and all rows of a subsampled plate."""

    def model() -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=4) as i:
            z = pyro.sample("z", dist.Normal(0.0, s))
            pyro.sample("y", dist.Normal(z, 1.0), obs=Y[i])

    pyro.clear_param_store()
    start = init_to_value(values={"s": torch.tensor(3.0), "z": torch.arange(4.0)})
    guide = make(model, init_loc_fn=start)
    drawn = guide()
    assert drawn["s"].shape == () and drawn["z"].shape == (4,)
    assert guide.locs.s.item() == pytest.approx(torch.tensor(3.0).log().item())
    assert guide.locs.z[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]
