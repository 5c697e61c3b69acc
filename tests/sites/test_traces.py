# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyro import poutine
from pyro.poutine import Trace
from referee import normal
from small_models import data_of, plate_model, quadratic_ebm, warm

from pyro_lvebm import lvebm
from pyro_lvebm.latents.minibatches import cover
from pyro_lvebm.latents.model_at import ModelAt
from pyro_lvebm.latents.program import Program
from pyro_lvebm.sites.traces import (
    at_minibatch,
    energy_modules,
    frozen,
    plate_nesting,
    sample_nodes,
    subsample_nodes,
    vectorise,
)


def trace_of(fn: Callable[..., Any], *args: Any) -> Trace:
    return poutine.trace(fn).get_trace(*args)


def two_plates(sizes: tuple[int, int] = (4, 3), batches: tuple[int | None, ...] = (None, 2)):
    def model() -> None:
        pyro.sample("g", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("outer", sizes[0], dim=-2, subsample_size=batches[0]):
            pyro.sample("a", dist.Normal(0.0, 1.0))
            with pyro.plate("inner", sizes[1], dim=-1, subsample_size=batches[1]):
                pyro.sample("b", dist.Normal(0.0, 1.0))

    return model


# --- nodes ----------------------------------------------------------------------------------


def test_sample_sites_and_choices_of_minibatches_are_told_apart() -> None:
    trace = trace_of(two_plates())
    assert set(sample_nodes(trace)) == {"g", "a", "b"}
    assert set(subsample_nodes(trace)) == {"outer", "inner"}
    assert subsample_nodes(trace)["inner"]["value"].shape == (2,)


def test_energy_modules_are_distinct_and_in_order() -> None:
    """Also under replay, which drops `infer` tags and keeps the functions."""
    a, b = quadratic_ebm(seed=1), quadratic_ebm(seed=2)

    def model() -> None:
        lvebm("first", b)
        lvebm("second", a)
        lvebm("third", b)
        pyro.sample("other", dist.Normal(0.0, 1.0))

    trace = trace_of(model)
    for again in (trace, trace_of(poutine.replay(model, trace=trace))):
        found = energy_modules(again)
        assert len(found) == 2 and found[0] is b and found[1] is a
    assert energy_modules(trace_of(two_plates())) == []


def test_frozen_holds_all_and_gives_them_back() -> None:
    ebms = [quadratic_ebm(seed=s) for s in (1, 2)]
    params = [p for e in ebms for p in e.parameters()]
    with pytest.raises(KeyError), frozen(ebms):
        assert not any(p.requires_grad for p in params)
        raise KeyError
    assert all(p.requires_grad for p in params)
    with frozen([]):
        pass


# --- vectorisation --------------------------------------------------------------------------


def no_plate() -> None:
    pyro.sample("g", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def batch_without_plate() -> None:
    pyro.sample("g", dist.Normal(torch.zeros(3, 2), 1.0))


@pytest.mark.parametrize(
    ("model", "depth"),
    [(no_plate, 0), (batch_without_plate, 2), (two_plates(), 2)],
)
def test_nesting_counts_batch_dimensions(model: Callable[[], None], depth: int) -> None:
    assert plate_nesting(trace_of(model)) == depth


def test_nesting_sees_a_plate_beyond_the_last_dimension() -> None:
    def model() -> None:
        with pyro.plate("far", 3, dim=-3):
            pyro.sample("a", dist.Normal(0.0, 1.0))

    assert plate_nesting(trace_of(model)) == 3


def test_vectorise_adds_a_dimension_left_of_the_plates() -> None:
    trace = trace_of(vectorise(two_plates(), 5, 2))
    shapes = {name: tuple(node["value"].shape) for name, node in sample_nodes(trace).items()}
    assert shapes == {"g": (5, 1, 1, 2), "a": (5, 4, 1), "b": (5, 4, 2)}
    assert trace.nodes["b"]["value"].unique().numel() == 40  # own draws for each particle
    # One particle scales nothing.
    trace.compute_log_prob()
    assert trace.nodes["b"]["scale"] == pytest.approx(3 / 2)


# --- minibatches ----------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 40))
def test_cover_visits_every_datum_once(size: int, batch: int) -> None:
    batch = min(size, batch)
    data = torch.arange(size)

    def model() -> torch.Tensor:
        with pyro.plate("data", size, subsample_size=batch) as i:
            pyro.sample("z", dist.Normal(0.0, 1.0))
            return data[i]

    seen = []
    count = 0
    for minibatch in cover(trace_of(model)):
        count += 1
        values = at_minibatch(model, minibatch.nodes)()
        assert len(values) == batch and len(values.unique()) == batch
        assert torch.equal(values, minibatch.take_rows(data, 0))
        assert minibatch.plate == ("data" if batch < size else None)
        seen += minibatch.drop_repeats(values, 0).tolist()
    assert seen == list(range(size))  # once each, and in the order of the data
    assert count == -(-size // batch)


@pytest.mark.parametrize("which", [0, 1])
def test_cover_keeps_full_plates_and_takes_one_that_subsamples(which: int) -> None:
    """Wherever it lies, values of the model's shape are cut along its axis."""
    sizes, batches = [4, 4], [None, None]
    sizes[which], batches[which] = 5, 2
    model = two_plates((sizes[0], sizes[1]), tuple(batches))
    name, other = ("outer", "inner") if which == 0 else ("inner", "outer")
    full = torch.arange(7 * sizes[0] * sizes[1] * 3).reshape(7, *sizes, 3)
    minibatches = list(cover(trace_of(model)))
    parts = []
    for m, rows in zip(minibatches, ([0, 1], [2, 3], [4, 0]), strict=True):
        assert m.plate == name and m.rows.tolist() == rows
        again = trace_of(at_minibatch(model, m.nodes))
        assert torch.equal(subsample_nodes(again)[name]["value"], m.rows)
        assert torch.equal(subsample_nodes(again)[other]["value"], torch.arange(4))
        part = m.take_rows(full, 1)
        assert torch.equal(part, full.index_select(1 + which, m.rows))
        parts.append(m.drop_repeats(part, 1))
    assert torch.equal(torch.cat(parts, 1 + which), full)


def test_two_plates_that_subsample_are_refused() -> None:
    trace = trace_of(two_plates((4, 5), (2, 2)))
    with pytest.raises(ValueError, match=r"plates \['inner', 'outer'\] all subsample"):
        next(cover(trace))


def test_a_model_without_plates_has_one_minibatch() -> None:
    (only,) = cover(trace_of(no_plate))
    value = torch.arange(6.0).reshape(2, 3)
    assert only.nodes == {} and only.plate is None
    assert only.take_rows(value, 1) is value and only.drop_repeats(value, 1) is value


def test_at_minibatch_fixes_what_it_is_given_and_no_more() -> None:
    model = two_plates()
    torch.manual_seed(0)
    first = trace_of(model)
    nodes = {"inner": first.nodes["inner"], "a": first.nodes["a"]}
    second = trace_of(at_minibatch(model, nodes))
    assert torch.equal(second.nodes["inner"]["value"], first.nodes["inner"]["value"])
    assert torch.equal(second.nodes["a"]["value"], first.nodes["a"]["value"])
    assert not torch.equal(second.nodes["g"]["value"], first.nodes["g"]["value"])


def test_model_at_runs_for_any_number_of_particles() -> None:
    ebm = warm(quadratic_ebm(), 2)
    x = data_of(ebm, 10)
    model = plate_model(ebm, 4)
    first = trace_of(model, x)
    nodes = dict(subsample_nodes(first))
    at = ModelAt(Program(model, (x,), {}, 1), nodes, 3)
    at.nodes["scene_z"] = first.nodes["scene_z"]
    z = normal((6, 4, 2), 1)
    trace = at.trace(6, scene_z=z)
    assert torch.equal(trace.nodes["scene_z"]["value"], z)
    assert at.nodes["scene_z"] is first.nodes["scene_z"]  # replaced for this trace alone
    rows = x[nodes["data"]["value"]]
    trace.compute_log_prob()
    expected = ebm.base_x.log_prob(rows) - ebm.f(rows.expand(6, 4, 3), z) - ebm.log_partition
    torch.testing.assert_close(trace.nodes["scene"]["unscaled_log_prob"], expected)
    assert trace.nodes["scene"]["scale"] == pytest.approx(10 / 4)
