# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from pyro_lvebm.cli import baselines
from pyro_lvebm.cli.baselines import (
    HeldOut,
    evaluate_baselines,
    factor_analysis,
    gaussian,
    gaussian_mixture,
)
from pyro_lvebm.data import load_digits_data

SCALES = np.array([0.01, 30.0, 4.0])


def one_factor(n: int, dim: int, seed: int) -> np.ndarray:
    """Correlated rows in columns of different units."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1)) + 0.7 * rng.normal(size=(n, dim))
    return 5.0 + x * np.resize(SCALES, dim)


def two_blobs(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice([-3.0, 3.0], size=(n, 1)) + rng.normal(size=(n, 2))


def test_gaussian_equals_the_closed_form() -> None:
    train, test = one_factor(300, 3, 0), one_factor(50, 3, 1)
    exact = multivariate_normal(train.mean(0), np.cov(train.T, bias=True)).logpdf(test)
    result = gaussian(train, test)
    assert result.converged
    np.testing.assert_allclose(result.log_evidence, exact, rtol=0, atol=1e-9)


def test_one_full_component_is_the_gaussian() -> None:
    train, test = one_factor(300, 3, 0), one_factor(50, 3, 1)
    mixture = gaussian_mixture(train, test, 1, "full", seed=0)
    # Scikit-learn adds 1e-6 to the variances.
    np.testing.assert_allclose(
        mixture.log_evidence, gaussian(train, test).log_evidence, rtol=0, atol=1e-3
    )


def test_one_diagonal_component_is_a_product() -> None:
    train, test = one_factor(300, 3, 0), one_factor(50, 3, 1)
    exact = norm(train.mean(0), train.std(0)).logpdf(test).sum(1)
    mixture = gaussian_mixture(train, test, 1, "diag", seed=0)
    np.testing.assert_allclose(mixture.log_evidence, exact, rtol=0, atol=1e-3)


def test_one_factor_of_three_columns_is_saturated() -> None:
    # It has 3 loadings and 3 variances, as many as a covariance has entries, so both fits agree.
    train, test = one_factor(2000, 3, 0), one_factor(50, 3, 1)
    result = factor_analysis(train, test, 1)
    assert result.converged
    exact = gaussian(train, test).log_evidence
    np.testing.assert_allclose(result.log_evidence, exact, rtol=0, atol=0.02)
    # Broken sibling: without its factor the same model is far away.
    without = gaussian_mixture(train, test, 1, "diag", seed=0).log_evidence
    assert np.abs(without - exact).max() > 0.2


@pytest.mark.parametrize(
    "fit",
    [
        gaussian,
        lambda train, test: factor_analysis(train, test, 1),
        lambda train, test: gaussian_mixture(train, test, 3, "diag", seed=0),
        lambda train, test: gaussian_mixture(train, test, 3, "full", seed=0),
    ],
)
def test_every_baseline_is_a_density_of_x(fit: Callable[[np.ndarray, np.ndarray], HeldOut]) -> None:
    train = two_blobs(400, 0) * SCALES[:2]
    axes = [np.linspace(-24.0, 24.0, 401) * s for s in SCALES[:2]]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    log_evidence = fit(train, grid).log_evidence
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert np.exp(log_evidence).sum() * cell == pytest.approx(1.0, abs=1e-6)
    # Broken sibling: the density of the scaled columns, which lacks the Jacobian.
    broken = log_evidence + np.log(train.std(0)).sum()
    assert abs(np.exp(broken).sum() * cell - 1.0) > 0.01


def test_units_shift_every_row_of_the_table_alike() -> None:
    train, test = two_blobs(200, 0), two_blobs(100, 1)
    table = evaluate_baselines(train, test, seed=0)
    scaled = evaluate_baselines(1e-3 * train + 7.0, 1e-3 * test + 7.0, seed=0)
    assert list(scaled["baseline"]) == list(table["baseline"])
    shift = -2 * np.log(1e-3)
    np.testing.assert_allclose(scaled["log_evidence"] - table["log_evidence"], shift, atol=1e-6)
    np.testing.assert_allclose(scaled["std_error"], table["std_error"], rtol=1e-6)


def test_table() -> None:
    train, test = two_blobs(650, 0), two_blobs(100, 1)
    table = evaluate_baselines(train, test, seed=0)
    assert list(table.columns) == ["baseline", "log_evidence", "std_error"]
    assert list(table.index) == list(range(len(table)))
    assert table["log_evidence"].is_monotonic_decreasing
    assert set(table["baseline"]) == {
        "full Gaussian",  # two columns: no factor analysis
        *(f"diagonal mixture, {k} components" for k in (5, 10, 30)),
        *(f"full mixture, {k} components" for k in (10, 20, 30)),
    }
    row = table.set_index("baseline").loc["full Gaussian"]
    values = gaussian(train, test).log_evidence
    assert row["log_evidence"] == pytest.approx(values.mean())
    assert row["std_error"] == pytest.approx(np.sqrt(values.var(ddof=1) / len(values)))


def test_table_keeps_to_the_rows_and_columns_there_are() -> None:
    names = set(evaluate_baselines(one_factor(120, 9, 0), one_factor(20, 9, 1), 0)["baseline"])
    assert names == {
        "full Gaussian",
        *(f"factor analysis, {k} factors" for k in (2, 4, 8)),
        *(f"diagonal mixture, {k} components" for k in (5, 10)),  # nine columns: no full mixtures
    }
    # Copies of rows count once, and a full covariance needs more rows than columns.
    copies = np.tile(one_factor(40, 3, 0), (3, 1))
    assert set(evaluate_baselines(copies, copies[:10], 0)["baseline"]) == {
        "full Gaussian",
        "factor analysis, 2 factors",
    }
    names = set(evaluate_baselines(one_factor(5, 5, 0), one_factor(5, 5, 1), 0)["baseline"])
    assert names == {"factor analysis, 2 factors", "factor analysis, 4 factors"}


def test_the_seed_fixes_the_table() -> None:
    train, test = one_factor(200, 4, 0), one_factor(50, 4, 1)
    state = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    table = evaluate_baselines(train, test, seed=2)
    assert table.equals(evaluate_baselines(train, test, seed=2))
    assert not table.equals(evaluate_baselines(train, test, seed=3))
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]  # noqa: NPY002


def test_a_fit_cut_short_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_ITER", 1)
    train, test = one_factor(120, 5, 0), one_factor(20, 5, 1)
    assert not factor_analysis(train, test, 2).converged
    assert not gaussian_mixture(train, test, 5, "diag", seed=0).converged
    names = set(evaluate_baselines(train, test, seed=0)["baseline"])
    assert names == {
        "full Gaussian",
        "factor analysis, 2 factors (not converged)",
        "factor analysis, 4 factors (not converged)",
        "diagonal mixture, 5 components (not converged)",
        "diagonal mixture, 10 components (not converged)",
        "full mixture, 10 components (not converged)",
    }


def test_digits_take_seconds() -> None:
    digits = load_digits_data(seed=0)
    table = evaluate_baselines(digits.train, digits.test, seed=0)
    assert len(table) == 7 and not table["baseline"].str.contains("not converged").any()
    assert table["std_error"].between(0.1, 2.0).all()
    # Every baseline contains independent Gaussian columns as a special case, and beats them.
    independent = norm(digits.train.mean(0), digits.train.std(0)).logpdf(digits.test).sum(1).mean()
    assert table["log_evidence"].min() > independent


GOOD = one_factor(40, 3, 0)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (GOOD[:, 0], GOOD, r"train has shape \(40,\); expected \(N, D\)"),
        (GOOD, GOOD[:0], r"test has shape \(0, 3\)"),
        (GOOD[:, :0], GOOD, r"train has shape \(40, 0\)"),
        (GOOD > 0, GOOD, "train has type bool"),
        (GOOD, np.full((2, 3), np.nan), "test has 6 NaN or infinite entries of 6"),
        (GOOD, GOOD[:, :2], "train has 3 columns and test 2"),
        (
            GOOD * [1, 0, 1] + 0.1,
            GOOD,
            "1 of 3 columns of train are constant, the first at index 1",
        ),
    ],
)
def test_bad_tables(train: np.ndarray, test: np.ndarray, message: str) -> None:
    for fit in (
        gaussian,
        lambda a, b: factor_analysis(a, b, 1),
        lambda a, b: gaussian_mixture(a, b, 1, "diag", seed=0),
        lambda a, b: evaluate_baselines(a, b, seed=0),
    ):
        with pytest.raises(ValueError, match=message):
            fit(train, test)


def test_gaussian_needs_rows_and_rank() -> None:
    with pytest.raises(ValueError, match="train has 3 rows for 3 columns"):
        gaussian(GOOD[:3], GOOD)
    dependent = np.column_stack([GOOD, GOOD.sum(1)])
    for fit in (gaussian, lambda a, b: evaluate_baselines(a, b, seed=0)):
        with pytest.raises(ValueError, match="4 columns of train are linearly dependent: rank 3"):
            fit(dependent, dependent)


@pytest.mark.parametrize("n_factors", [0, 3])
def test_factor_analysis_checks_the_number_of_factors(n_factors: int) -> None:
    with pytest.raises(ValueError, match=f"n_factors is {n_factors}; expected 1 to 2"):
        factor_analysis(GOOD, GOOD, n_factors)


def test_mixture_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match='covariance_type is \'tied\'; expected "diag" or "full"'):
        gaussian_mixture(GOOD, GOOD, 2, "tied", seed=0)
    with pytest.raises(ValueError, match="components is 0; expected at least 1"):
        gaussian_mixture(GOOD, GOOD, 0, "diag", seed=0)
    with pytest.raises(ValueError, match=r"40 distinct rows; 5 components \(diag\) need 50"):
        gaussian_mixture(GOOD, GOOD, 5, "diag", seed=0)
    with pytest.raises(ValueError, match=r"40 distinct rows; 4 components \(full\) need 48"):
        gaussian_mixture(one_factor(40, 5, 0), one_factor(40, 5, 1), 4, "full", seed=0)


def test_table_needs_rows() -> None:
    with pytest.raises(ValueError, match="test has 1 row; a standard error needs at least 2"):
        evaluate_baselines(GOOD, GOOD[:1], seed=0)
    with pytest.raises(ValueError, match=r"2 rows for 2 columns, too few .* at least 3"):
        evaluate_baselines(GOOD[:2, :2], GOOD[:, :2], seed=0)
