# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from referee import normal

from pyro_lvebm.validation import TrainingWarning, as_data, warn_of_training

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


@pytest.mark.parametrize(
    ("shape", "event_shape"),
    [
        ((5, 3), None),
        ((1, 1), None),
        ((4, 2, 3), None),
        ((5, 3), (3,)),
        ((3,), (3,)),
        ((2, 4, 2, 3), (2, 3)),
        ((2, 4), ()),
        ((), ()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_proper_data_pass_unchanged(
    shape: tuple[int, ...], event_shape: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    x = normal(shape, 0).to(dtype)
    copy = x.clone()
    as_data(x, None if event_shape is None else torch.Size(event_shape))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("x", [[[1.0, 2.0]], None, 3.0])
def test_only_tensors_and_arrays_pass(x: object) -> None:
    with pytest.raises(
        ValueError, match=rf"must be a torch\.Tensor or an array; got {type(x).__name__}$"
    ):
        as_data(x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.cfloat])
def test_only_floating_point_passes(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"floating point; got {dtype}\. Dequantise"):
        as_data(torch.ones(3, 2, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "event_shape"),
    [((5, 2), (3,)), ((3, 5), (3,)), ((3,), (2, 3)), ((), (3,)), ((2, 6), (2, 3)), ((5, 1), (3,))],
)
def test_another_trailing_shape_is_named(
    shape: tuple[int, ...], event_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="expected trailing shape") as caught:
        as_data(torch.zeros(shape), torch.Size(event_shape))
    assert str(shape) in str(caught.value) and str(event_shape) in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_rows_are_needed_where_no_event_shape_is_known(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one row an observation") as caught:
        as_data(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "event_shape"), [((0, 3), None), ((4, 0), None), ((0, 3), (3,)), ((2, 0, 3), (3,))]
)
def test_empty_data_are_refused(
    shape: tuple[int, ...], event_shape: tuple[int, ...] | None
) -> None:
    with pytest.raises(ValueError, match="x is empty") as caught:
        as_data(torch.zeros(shape), None if event_shape is None else torch.Size(event_shape))
    assert str(shape) in str(caught.value)


@given(
    st.sets(st.integers(0, 23), min_size=1),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([None, (3,), (2, 3)]),
)
def test_each_entry_must_be_finite(
    places: set[int], value: float, event_shape: tuple[int, ...] | None
) -> None:
    x = torch.zeros(24)
    x[list(places)] = value
    message = rf"{len(places)} NaN or infinite entries of 24.*entries that are missing to NaN"
    with pytest.raises(ValueError, match=message):
        as_data(x.reshape(4, 2, 3), None if event_shape is None else torch.Size(event_shape))


def test_missing_entries_are_nan_where_they_are_welcome() -> None:
    x = torch.zeros(4, 3)
    x[1] = math.nan
    as_data(x, torch.Size((3,)), missing=True)
    x[2, 0] = math.inf
    with pytest.raises(ValueError, match="1 infinite entries of 12"):
        as_data(x, torch.Size((3,)), missing=True)


def test_a_warning_finds_its_line_in_code_without_a_module() -> None:
    """As in `exec` with names of one's own."""
    with pytest.warns(TrainingWarning, match="not to be trusted"):
        exec("warn('these are not to be trusted')", {"warn": warn_of_training})
