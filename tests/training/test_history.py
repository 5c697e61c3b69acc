# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import exact_joint, quadratic_ebm, tiny_pool, warm

from pyro_lvebm import MALA, PersistentPool, TemperedPool
from pyro_lvebm.pools.base import Pool
from pyro_lvebm.training.history import WINDOW, History, pool_statistics, symptoms

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# --- rows -----------------------------------------------------------------------------------


def test_values_of_one_step_share_a_row() -> None:
    history = History()
    history.record(0, log_evidence=-2.0)
    history.record(1, loss=5.0, kl=0.1)
    history.record(1, log_evidence=-1.0)
    history.record(4, loss=3.0)
    frame = history.frame()
    assert frame.index.name == "step" and frame.index.tolist() == [0, 1, 4]
    assert frame.index.dtype == np.int64
    assert list(frame.columns) == ["log_evidence", "loss", "kl"]
    expected = [[-2.0, math.nan, math.nan], [-1.0, 5.0, 0.1], [math.nan, 3.0, math.nan]]
    np.testing.assert_array_equal(frame.to_numpy(), expected)


def test_an_empty_history_is_an_empty_frame() -> None:
    frame = History().frame()
    assert len(frame) == 0 and list(frame.columns) == [] and frame.index.name == "step"
    columns, values = History().state()
    again = History()
    again.load(columns, values)
    pd.testing.assert_frame_equal(again.frame(), frame)


def test_a_frame_is_a_copy() -> None:
    history = History()
    history.record(1, loss=5.0)
    frame = history.frame()
    frame.loc[1, "loss"] = -1.0
    assert history.frame().loc[1, "loss"] == 5.0


ROWS = st.lists(
    st.dictionaries(
        st.sampled_from(["loss", "kl", "ess@b", "swap_rate_0"]), st.floats(allow_nan=False)
    ),
    max_size=6,
)


@given(ROWS)
def test_a_history_survives_a_file(rows: list[dict[str, float]]) -> None:
    """Values, gaps and the order of columns, bit for bit, also in rows that follow."""
    history, again = History(), History()
    for step, row in enumerate(rows):
        history.record(step + 1, **row)
    columns, values = history.state()
    assert values.dtype == torch.float64 and values.shape == (len(rows), len(columns))
    again.load(columns, values)
    pd.testing.assert_frame_equal(history.frame(), again.frame(), check_exact=True)
    for h in (history, again):
        h.record(len(rows) + 1, loss=1.0, new=2.0)
    pd.testing.assert_frame_equal(history.frame(), again.frame(), check_exact=True)


def test_loading_replaces_what_was_there() -> None:
    history, other = History(), History()
    history.record(3, loss=1.0)
    other.record(1, kl=7.0)
    other.load(*history.state())
    assert other.rows == [{"step": 3.0, "loss": 1.0}]


# --- statistics of a pool -------------------------------------------------------------------

POOLS = {
    "tempered": lambda: TemperedPool(4, 30, num_moves=2, seed=3),
    "persistent": lambda: PersistentPool(70, num_moves=2, seed=4),
    "mala": lambda: PersistentPool(50, kernel=MALA(0.7), num_moves=1),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_those_of_the_weighted_negatives(name: str, dtype: torch.dtype) -> None:
    """The energy by the LVEBM itself in data coordinates; ESS = 1 / Σ w²."""
    ebm = warm(quadratic_ebm(3, 2, pool=POOLS[name](), dtype=dtype), 4)
    found = pool_statistics(ebm)
    assert all(type(v) is float for v in found.values())
    u, log_w = ebm.pool.negatives()
    w = log_w.double().exp()
    with torch.no_grad():
        energy = ebm.energy(*ebm.unwhiten(u)).double()
    tight = 1e-9 if dtype == torch.float64 else 1e-4
    assert found["negative_energy"] == pytest.approx(float((w * energy).sum()), rel=tight)
    assert found["ess"] == pytest.approx(float(1.0 / (w**2).sum()), rel=tight)
    assert found["log_partition"] == float(ebm.log_partition)
    levels = range(ebm.pool.num_levels)
    assert [found[f"acceptance_{k}"] for k in levels] == ebm.pool.acceptance.tolist()
    expected = {"negative_energy", "log_partition", "ess", *(f"acceptance_{k}" for k in levels)}
    if name == "tempered":
        pairs = range(ebm.pool.num_levels - 1)
        assert [found[f"swap_rate_{k}"] for k in pairs] == ebm.pool.swap_rate.tolist()
        assert found["log_partition_se"] == float(ebm.pool.log_partition_std_error)
        expected |= {"log_partition_se", *(f"swap_rate_{k}" for k in pairs)}
    assert set(found) == expected


def settled_energy(weighted: bool) -> tuple[float, float]:
    """The mean over 60 refreshes of 360 chains, and its exact value H(p) − log Z."""
    ebm = warm(quadratic_ebm(3, 2, pool=TemperedPool(4, 90, num_moves=4, seed=1)), 20)
    energies = []
    for _ in range(60):
        warm(ebm, 1)
        if not weighted:
            ebm.pool.log_weights = torch.full_like(ebm.pool.log_weights, -math.log(360))
        energies.append(pool_statistics(ebm)["negative_energy"])
    exact = float(exact_joint(ebm).entropy()) - float(ebm.f.log_partition().detach())
    return float(np.mean(energies)), exact


def test_the_energy_of_negatives_is_that_of_the_exact_law() -> None:
    mean, exact = settled_energy(weighted=True)
    assert mean == pytest.approx(exact, abs=0.05)


def test_the_check_fails_without_the_weights() -> None:
    mean, exact = settled_energy(weighted=False)
    assert abs(mean - exact) > 0.2


# --- symptoms -------------------------------------------------------------------------------


def healthy(**values: float) -> list[dict[str, float]]:
    row = {"step": 1.0, "loss": 3.0, "kl": 0.01, "halvings": 1.0, "ess": 60.0}
    row |= {"swap_rate_0": 0.5, "swap_rate_1": 0.4, "latent_acceptance_scene_z": 0.6}
    return [{**row, **values} for _ in range(WINDOW)]


def test_good_numbers_are_no_symptom() -> None:
    assert symptoms(healthy(), {"": 100}) == {}
    assert symptoms([{"step": 1.0, "loss": 2.0, "kl": 0.0, "halvings": 0.0}], {}) == {}


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        ({"ess": 4.9}, "ess", ["4.9% of its 100 chains", "more chains", "max_kl"]),
        ({"swap_rate_0": 0.09}, "swap_rate", ["levels 0 and 1 of the pool ", "9.0%", "num_levels"]),
        ({"swap_rate_1": 0.001}, "swap_rate", ["levels 1 and 2", "0.1%"]),
        (
            {"latent_acceptance_scene_z": 0.199},
            "latent_acceptance_scene_z",
            ["only 19.9% of the Langevin moves", "(latent_acceptance_scene_z)", "num_moves"],
        ),
        ({"halvings": 15.6}, "halvings", ["halved 16 times", "max_kl", "learning rate"]),
    ],
)
def test_each_symptom_is_named_with_its_number_and_a_cure(
    values: dict[str, float], key: str, words: list[str]
) -> None:
    found = symptoms(healthy(**values), {"": 100})
    assert list(found) == [key]
    assert all(word in found[key] for word in words), found[key]


@pytest.mark.parametrize(
    "values",
    [
        {"ess": 5.1},
        {"swap_rate_0": 0.11, "swap_rate_1": 0.101},
        {"latent_acceptance_scene_z": 0.201},
        {"halvings": 15.0},
    ],
)
def test_numbers_just_good_enough_are_none(values: dict[str, float]) -> None:
    assert symptoms(healthy(**values), {"": 100}) == {}


def test_the_mean_over_rows_decides() -> None:
    """One bad step is no symptom, and steps without a number do not count."""
    rows = healthy()
    rows[7] |= {"ess": 1.0, "swap_rate_0": 0.0, "latent_acceptance_scene_z": 0.0, "halvings": 21.0}
    assert symptoms(rows, {"": 100}) == {}
    sparse = [{"step": 1.0, "loss": 1.0} for _ in range(WINDOW)]
    sparse[3] |= {"ess": 1.0, "log_evidence": -2.0}
    assert list(symptoms(sparse, {"": 100})) == ["ess"]


def test_a_pool_without_chains_of_its_own_levels_has_no_swaps() -> None:
    """Rates that are NaN, as before the first refresh, are no symptom."""
    assert symptoms(healthy(swap_rate_0=math.nan, swap_rate_1=math.nan), {"": 100}) == {}


def test_several_lvebms_are_told_apart() -> None:
    good = {"ess@other_1": 40.0, "swap_rate_0@other_1": 0.4}
    chains = {"": 100, "@other_1": 50}
    assert symptoms(healthy(**good), chains) == {}
    bad = symptoms(healthy(**{**good, "swap_rate_0@other_1": 0.01}), chains)
    assert list(bad) == ["swap_rate@other_1"] and "levels 0 and 1 of the pool@other_1" in str(bad)
    bad = symptoms(healthy(**{**good, "ess@other_1": 2.4}), chains)
    assert list(bad) == ["ess@other_1"] and "4.8% of its 50 chains" in bad["ess@other_1"]
    bad = symptoms(healthy(**good, swap_rate_2=0.05), chains)
    assert list(bad) == ["swap_rate"]


def test_every_symptom_at_once() -> None:
    values = {"ess": 1.0, "swap_rate_1": 0.0, "latent_acceptance_w": 0.1, "halvings": 21.0}
    assert list(symptoms(healthy(**values), {"": 100})) == [
        "ess",
        "swap_rate",
        "latent_acceptance_w",
        "halvings",
    ]


@pytest.mark.parametrize("pool", [tiny_pool(), TemperedPool(), PersistentPool(64)])
def test_a_pool_at_its_base_is_healthy(pool: Pool) -> None:
    ebm = quadratic_ebm(pool=pool)
    ebm.f.set_precision(torch.eye(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    warm(ebm, 2)
    rows = [{"step": 1.0, **pool_statistics(ebm)}]
    assert symptoms(rows, {"": len(ebm.pool.log_weights)}) == {}
