# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from referee import ALPHA, CERTAIN, mean_p_value
from scipy import stats

from pyro_lvebm import Disentanglement, disentanglement


@pytest.fixture(autouse=True, scope="module")
def small_forests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # The function hides the module of its name in the package.
        patch.setattr(sys.modules["pyro_lvebm.diagnostics.disentanglement"], "_TREES", 10)
        yield


ROTATION = np.array([[1.0, 1.0], [-1.0, 1.0]]) / np.sqrt(2.0)


def factors(seed: int, n: int = 400) -> np.ndarray:
    """One continuous factor and one of eight values, independent, of equal variance."""
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 8, n) / np.sqrt(63.0 / 12.0)
    return np.column_stack([rng.normal(size=n), levels])


def noise(seed: int, columns: int, n: int = 400) -> np.ndarray:
    return np.random.default_rng(1000 + seed).normal(size=(n, columns))


@functools.cache
def scores(kind: str, seed: int) -> Disentanglement:
    y = factors(seed)
    gaussian = noise(seed, 2)
    latents, known = {
        "aligned": (np.column_stack([noise(seed, 1), -2.0 * y[:, 1] + 1.0, 5.0 * y[:, 0]]), y),
        "rotated": (gaussian @ ROTATION, gaussian),
        "noise": (noise(seed + 500, 2), y),
        "noisy": (y + 0.5 * noise(seed, 2), y),
    }[kind]
    return disentanglement(latents, known, seed=seed)


def values(kind: str, name: str, seeds: int = 10) -> np.ndarray:
    """A score (seeds, 1) of independent data."""
    return np.array([[scores(kind, seed).scores.loc[name, "value"]] for seed in range(seeds)])


# --- known answers ----------------------------------------------------------------------------


def test_latents_that_are_the_factors_have_full_scores() -> None:
    """In any order, sign and scale, with a latent that serves nothing."""
    for seed in range(3):
        result = scores("aligned", seed).scores["value"]
        assert (result > 0.95).all()
        assert result["r2"] == pytest.approx(1.0) and result["informativeness"] < 1.0
        information = scores("aligned", seed).information.to_numpy()
        assert information[[1, 2], [1, 0]] == pytest.approx(1.0)


def test_rotated_latents_keep_the_probe_and_lose_the_rest() -> None:
    for seed in range(3):
        result = scores("rotated", seed).scores["value"]
        assert result["r2"] == pytest.approx(1.0) and result["informativeness"] > 0.9
        assert (result[["mig", "sap", "disentanglement", "completeness"]] < 0.1).all()


def test_noise_predicts_nothing() -> None:
    """R² on 80 rows of fits to 320 has the mean 1 − (1 + 3 / 320) 80 / 79; information has mean 0.

    Student's test over 10 seeds. False alarms: 2e-3.
    """
    r2 = values("noise", "r2")
    assert mean_p_value(r2, 1.0 - (1.0 + 3.0 / 320.0) * 80.0 / 79.0) > ALPHA
    assert mean_p_value(r2, 0.05) < CERTAIN
    information = np.array(
        [scores("noise", seed).information.to_numpy().ravel() for seed in range(10)]
    )
    assert mean_p_value(information, 0.0) > ALPHA
    assert values("noise", "informativeness").max() < 0.0
    for name in ("mig", "sap"):
        assert 0.0 < values("noise", name).mean() < 0.02
    for name in ("disentanglement", "completeness"):
        assert values("noise", name).max() < 0.05


def test_information_without_correction_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    import sklearn.metrics.cluster

    monkeypatch.setattr(sklearn.metrics.cluster, "expected_mutual_information", lambda *_: 0.0)
    tables = [disentanglement(noise(seed + 500, 2), factors(seed)) for seed in range(4)]
    information = np.array([t.information.to_numpy().ravel() for t in tables])
    assert (information > 0.03).all()
    assert mean_p_value(information, 0.0) < CERTAIN**0.5


def test_linear_probe_and_sap_have_their_closed_forms() -> None:
    """z = y + ½ ε with equal variances: R² = r² = 1 / (1 + ¼).

    Student's test over 10 seeds. False alarms: 2e-3; sap may lack what noise explains, about 1 / n.
    """
    assert mean_p_value(values("noisy", "r2"), 0.8 - 0.003) > ALPHA
    assert mean_p_value(values("noisy", "sap"), 0.8 - 0.003) > ALPHA
    assert mean_p_value(values("noisy", "sap"), 0.9) < CERTAIN


# --- standard errors --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mig", "sap", "r2"])
def test_standard_errors_are_the_spread_over_data(name: str) -> None:
    """F test with 4 degrees of freedom for each claimed error. False alarms: ALPHA a case.

    Errors a sixth as large would be found.
    """
    claimed = np.array([scores("noisy", seed).scores.loc[name, "std_error"] for seed in range(10)])
    ratio = values("noisy", name).var(ddof=1) / (claimed**2).mean()
    law = stats.f(9, 40)
    assert 2.0 * min(law.cdf(ratio), law.sf(ratio)) > ALPHA
    assert 2.0 * law.sf(36.0 * ratio) < CERTAIN


def test_means_over_factors_are_the_scores() -> None:
    result = scores("noisy", 0)
    for name in ("r2", "mig", "sap", "completeness", "informativeness"):
        assert result.scores.loc[name, "value"] == pytest.approx(result.by_factor[name].mean())
        assert (result.by_factor[f"{name}_se"] > 0.0).all()
    assert "disentanglement" not in result.by_factor
    assert result.importance.sum().to_numpy() == pytest.approx(1.0)
    assert f"r2 {result.scores.loc['r2', 'value']:.3f} ± " in str(result)


# --- what is accepted -------------------------------------------------------------------------


def test_tensors_frames_and_names() -> None:
    y = pd.DataFrame(factors(0), columns=["size", "kind"])
    z = noise(0, 2)
    a = disentanglement(torch.from_numpy(z), y)
    b = disentanglement(z, y.to_numpy())
    assert a.by_factor.index.tolist() == ["size", "kind"] == a.importance.columns.tolist()
    assert a.importance.index.tolist() == ["z[0]", "z[1]"]
    assert b.by_factor.index.tolist() == ["factor[0]", "factor[1]"]
    pd.testing.assert_frame_equal(a.scores, b.scores)


def test_one_latent_has_no_gaps_and_one_factor_no_disentanglement() -> None:
    y = factors(0)
    one = disentanglement(y[:, :1], y)
    assert one.scores["value"].isna().to_dict() == {
        "r2": False,
        "mig": True,
        "sap": True,
        "disentanglement": False,
        "completeness": True,
        "informativeness": False,
    }
    single = disentanglement(y, y[:, :1]).scores["value"]
    assert single.isna().sum() == 1 and np.isnan(single["disentanglement"])


@pytest.mark.parametrize(
    ("latents", "known", "options", "message"),
    [
        (noise(0, 2), factors(0, 300), {}, "latents have 400 rows and factors 300"),
        (noise(0, 2)[:, 0], factors(0), {}, r"latents must be a table .* shape \(400,\)"),
        (noise(0, 2), np.full((400, 1), "red"), {}, "factors must be a table .* real numbers"),
        (np.full((400, 2), np.nan), factors(0), {}, "latents must be finite; 800 entries"),
        (noise(0, 2), np.ones((400, 2)), {}, r"columns \[0, 1\] of factors are constant"),
        (noise(0, 2), factors(0), {"num_folds": 2}, "num_folds must lie between 3 and a tenth"),
        (noise(0, 2), factors(0), {"num_folds": 41}, "a tenth of the 400 rows; got 41"),
    ],
)
def test_wrong_tables_are_refused(
    latents: Any, known: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        disentanglement(latents, known, **options)
