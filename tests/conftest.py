# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from hypothesis import HealthCheck, settings
from referee import assert_global_rng_untouched
from torch import Tensor

from pyro_lvebm import log_partition
from pyro_lvebm.bases import mixture
from pyro_lvebm.evidence import annealed
from pyro_lvebm.latents import ChainSettings
from pyro_lvebm.pools import base as pool_base

# Faults for `make mutants`, and the script that runs them.
collect_ignore = ["faults"]

SETTLING = (pool_base._SETTLING_REFRESHES, pool_base._MAX_REFRESHES)

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


@pytest.fixture(autouse=True, scope="session")
def mixtures_are_fitted_once() -> Iterator[None]:
    """The mixture of rows that `LVEBM.from_data` has met before is that of then."""
    known: dict[tuple[Any, ...], Any] = {}
    real = mixture.fit_mixture

    def fit(w: Tensor, choice: tuple[int, float] | None = None) -> Any:
        key = (tuple(w.shape), w.numpy().tobytes(), choice)
        if key not in known:
            known[key] = real(w, choice)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "fit_mixture", fit)
        yield


@pytest.fixture(autouse=True)
def empty_param_store() -> None:
    pyro.clear_param_store()


@pytest.fixture
def coarse_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cheap bracket of log Z, which may be wide, for tests that do not ask how near it is."""
    cheap = {"num_particles": 64, "num_runs": 4, "num_refreshes": 3, "max_width": 5.0}
    for name, value in cheap.items():
        monkeypatch.setitem(log_partition.__kwdefaults__, name, value)


@pytest.fixture
def brief_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bracket of log Z of the usual size from a pool that moves less, where that does not show.

    For models whose chains forget in a few refreshes where they were.
    """
    module = sys.modules["pyro_lvebm.evidence.log_partition"]  # the name is a function, too
    monkeypatch.setattr(module, "_REFRESHES_PER_RUN", 2)
    monkeypatch.setitem(log_partition.__kwdefaults__, "num_refreshes", 15)


@pytest.fixture
def short_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of each posterior from shorter chains, for rows of particles in tables and evidences.

    They are enough to fit a Gaussian in a few dimensions.
    """
    run_chains = annealed.run_chains

    def shorter(blocks: Any, steps: Any, kernel: Any, _: Any, generator: Any) -> Any:
        return run_chains(blocks, steps, kernel, ChainSettings(150, 100, 1), generator)

    monkeypatch.setattr(annealed, "run_chains", shorter)


@pytest.fixture
def brief_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools follow frozen or averaged θ for 4 refreshes, and for 8 at most, not for 20 and 80.

    For tests that do not ask how near their log Z comes. Others of the same file ask for
    `whole_settling` too.
    """
    monkeypatch.setattr(pool_base, "_SETTLING_REFRESHES", 4)
    monkeypatch.setattr(pool_base, "_MAX_REFRESHES", 8)


@pytest.fixture
def whole_settling(brief_settling: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of refreshes of the package, in a file of tests with `brief_settling`."""
    monkeypatch.setattr(pool_base, "_SETTLING_REFRESHES", SETTLING[0])
    monkeypatch.setattr(pool_base, "_MAX_REFRESHES", SETTLING[1])


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    with assert_global_rng_untouched():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Modules and tests stay to the end, so that the garbage collector need not look at them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
