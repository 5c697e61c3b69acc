# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings
from referee import assert_global_rng_untouched

from pyro_lvebm import log_partition

# Faults for `make mutants`, and the script that runs them.
collect_ignore = ["faults"]

# Fixed examples, and fixtures here guard a whole test rather than each of its examples.
settings.register_profile(
    "repository",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("repository")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def empty_param_store() -> None:
    pyro.clear_param_store()


@pytest.fixture
def coarse_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheap bracket of log Z, for tests that do not ask how near it is."""
    for name, value in (("num_particles", 64), ("num_runs", 4), ("num_refreshes", 3)):
        monkeypatch.setitem(log_partition.__kwdefaults__, name, value)


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    with assert_global_rng_untouched():
        yield
