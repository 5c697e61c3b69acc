# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from referee import ALPHA, CERTAIN, assert_global_rng_untouched, mean_p_value

from pyro_lvebm.rng import Stream, derive_seed, generator_for, isolated_rng

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


ONE = Stream.PROBE


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**31), max_size=4))
def test_seed_is_a_deterministic_63_bit_integer(seed: int, counters: list[int]) -> None:
    value = derive_seed(seed, ONE, *counters)
    assert value == derive_seed(seed, ONE, *counters)
    assert 0 <= value < 2**63
    torch.Generator().manual_seed(value)  # accepts it


def test_each_seed_stream_counter_and_name_matters() -> None:
    keys = list(itertools.product(range(8), list(Stream)[:8], range(8), ["", "a", "b"]))
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_trailing_zero_counters_matter() -> None:
    assert len({derive_seed(3, ONE, *[0] * n) for n in range(3)}) == 3


def test_high_bits_of_the_seed_are_not_counters() -> None:
    assert derive_seed(5, ONE, 7) != derive_seed(5 + (7 << 32), ONE)


def test_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError):
        derive_seed(-1, ONE)


def test_generators_repeat_by_counters() -> None:
    def draw(seed: int, *key: int) -> torch.Tensor:
        return torch.rand(20, generator=generator_for(seed, ONE, *key))

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    for other in [(1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 3, 2)]:
        assert not torch.equal(draw(1, 2, 3), draw(*other))


def correlation_p_value(streams: torch.Tensor) -> float:
    """p-value of zero mean of products of neighbouring streams (n, k) of N(0, 1) draws."""
    return mean_p_value(streams[:-1:2] * streams[1::2], 0.0)


def test_neighbouring_streams_are_uncorrelated() -> None:
    """False alarms: 1e-3."""
    streams = [torch.randn(8, generator=generator_for(0, ONE, k)) for k in range(4000)]
    assert correlation_p_value(torch.stack(streams)) > ALPHA


def test_correlation_check_fails_for_shared_streams() -> None:
    streams = [torch.randn(8, generator=generator_for(0, ONE, k // 2)) for k in range(4000)]
    assert correlation_p_value(torch.stack(streams)) < CERTAIN


@pytest.mark.parametrize("key", [(0, ONE), (7, ONE), (7, ONE, 5)])
def test_isolated_block_is_seeded_and_restores_the_generator(key: tuple[int, Stream]) -> None:
    with isolated_rng(*key):
        inside = torch.randn(5)
    before = torch.get_rng_state()
    with isolated_rng(*key):
        again = torch.randn(5)
    assert torch.equal(inside, again)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(inside, torch.randn(5, generator=generator_for(*key)))


def test_isolated_block_restores_the_generator_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), isolated_rng(1, ONE):
        torch.rand(3)
        raise KeyError
    assert torch.equal(before, torch.get_rng_state())


def test_the_guard_of_the_global_generator_can_fail() -> None:
    state = torch.get_rng_state()
    with pytest.raises(AssertionError, match="global generator"), assert_global_rng_untouched():
        torch.rand(1)
    torch.set_rng_state(state)
