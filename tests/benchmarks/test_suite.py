# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

from benchmarks import mixtures, suite
from benchmarks.mixtures import Candidate, best_mixture, choose, cross_validate, fit
from benchmarks.suite import NAMES, DataSet, load
from pyro_lvebm.cli.baselines import MAX_ITER, gaussian

SHAPES = {
    "two moons": (5000, 2, 1),
    "pinwheel": (5000, 2, 1),
    "8 Gaussians": (5000, 2, 1),
    "Swiss roll": (5000, 3, 1),
    "Lorenz-63": (5000, 3, 1),
    "digits": (1797, 64, 4),
    "breast cancer": (556, 30, 2),
    "wine": (178, 13, 2),
}


@pytest.fixture(scope="module")
def sets() -> dict[str, DataSet]:
    return {name: load(name) for name in NAMES}


def rows(data: DataSet) -> np.ndarray:
    return np.concatenate([data.train, data.test])


def line(n: int, centres: list[float], seed: int) -> np.ndarray:
    """Rows of a mixture of unit normals along the first of two columns."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    x[:, 0] += rng.choice(centres, size=n)
    return x


def test_every_set_has_a_shape_here() -> None:
    assert tuple(SHAPES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_shapes(sets: dict[str, DataSet], name: str) -> None:
    data = sets[name]
    n, dim, z_dim = SHAPES[name]
    held_out = math.ceil(0.2 * n)
    assert data.name == name
    assert data.train.shape == (n - held_out, dim)
    assert data.test.shape == (held_out, dim)
    assert data.z_dim == z_dim
    assert data.generated == (n == 5000)
    assert data.train.dtype == data.test.dtype == np.float64
    assert np.isfinite(rows(data)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_density_exists(sets: dict[str, DataSet], name: str) -> None:
    x = rows(sets[name])
    # It raises where a column is constant or depends on others.
    gaussian(sets[name].train, sets[name].test)
    assert len(np.unique(x, axis=0)) == len(x)
    # No value is so frequent that a model could earn much by a spike on it.
    assert max(np.unique(column, return_counts=True)[1].max() for column in x.T) < 0.1 * len(x)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_repeats(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "NUM_ROWS", 300)
    first = load(name)
    np.random.seed(3)  # noqa: NPY002
    again = load(name, seed=0)
    np.testing.assert_array_equal(again.train, first.train)
    np.testing.assert_array_equal(again.test, first.test)


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_differs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "NUM_ROWS", 300)
    first, other = load(name), load(name, seed=1)
    assert other.train.shape == first.train.shape
    assert not np.isin(other.train, first.train).all(1).all()
    new_rows = ~np.isin(rows(other), rows(first)).any(1)
    # Noise makes every digit new; the other tables stay as they are.
    assert new_rows.mean() == (0.0 if name in ("breast cancer", "wine") else 1.0)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no data set is called 'moon'; expected one of two moons"):
        load("moon")


@pytest.mark.usefixtures("few_components")
def test_global_random_state_is_left_alone() -> None:
    np.random.seed(3)  # noqa: NPY002
    expected = np.random.random(2)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    for name in ("two moons", "Swiss roll", "wine"):
        load(name)
    best_mixture(line(100, [0.0], 0), line(10, [0.0], 1), seed=0, quick=True)
    np.testing.assert_array_equal(np.random.random(2), expected)  # noqa: NPY002


def test_moons_are_two_half_circles(sets: dict[str, DataSet]) -> None:
    x = rows(sets["two moons"])
    upper, lower = x, x - [1.0, 0.5]
    distance = np.minimum(
        np.abs(np.linalg.norm(upper, axis=1) - 1.0), np.abs(np.linalg.norm(lower, axis=1) - 1.0)
    )
    # |N(0, 0.1²)| has mean 0.08; the other circle is sometimes nearer.
    assert 0.06 < distance.mean() < 0.085
    assert np.mean(distance < 0.3) > 0.99


def test_pinwheel_has_five_equal_arms(sets: dict[str, DataSet]) -> None:
    x = rows(sets["pinwheel"]) / 2.0
    radius = np.linalg.norm(x, axis=1)
    # Untwisted, the arms are normal blobs at distance 1.
    angle = np.arctan2(x[:, 1], x[:, 0]) + 0.25 * np.exp(radius)
    arm = angle / (2.0 * math.pi / 5.0)
    share = np.bincount(np.round(arm).astype(int) % 5, minlength=5) / len(x)
    np.testing.assert_allclose(share, 0.2, atol=0.025)
    assert abs(radius.mean() - 1.0) < 0.03
    assert abs(radius.std() - 0.3) < 0.02
    off_axis = radius * np.sin((arm - np.round(arm)) * 2.0 * math.pi / 5.0)
    assert np.median(np.abs(off_axis)) == pytest.approx(0.6745 * 0.1, rel=0.1)
    # Equal arms: a turn by a fifth of a circle leaves the density, hence the mean, in place.
    np.testing.assert_allclose(x.mean(0), 0.0, atol=0.05)


def test_eight_gaussians(sets: dict[str, DataSet]) -> None:
    x = rows(sets["8 Gaussians"])
    angle = 2.0 * math.pi * np.arange(8) / 8
    centres = 2.0 * np.stack([np.cos(angle), np.sin(angle)], -1)
    blob = np.linalg.norm(x[:, None] - centres, axis=2).argmin(1)
    for k in range(8):
        mine = x[blob == k]
        assert abs(len(mine) / len(x) - 1 / 8) < 0.02
        np.testing.assert_allclose(mine.mean(0), centres[k], atol=0.03)
        np.testing.assert_allclose(np.cov(mine.T), 0.04 * np.eye(2), atol=0.006)
    log_p = np.mean([multivariate_normal(c, 0.04 * np.eye(2)).pdf(x) for c in centres], 0)
    assert np.log(log_p).mean() == pytest.approx(-1.698, abs=0.05)


def test_swiss_roll_is_a_spiral_of_some_height(sets: dict[str, DataSet]) -> None:
    x = rows(sets["Swiss roll"])
    assert np.quantile(x[:, 1], 0.001) > -2.0
    assert np.quantile(x[:, 1], 0.999) < 23.0
    assert x[:, 1].mean() == pytest.approx(10.5, abs=0.3)
    # On the roll the radius equals the angle, up to whole turns.
    radius, angle = np.hypot(x[:, 0], x[:, 2]), np.arctan2(x[:, 2], x[:, 0])
    gap = np.abs((radius - angle + math.pi) % (2.0 * math.pi) - math.pi)
    assert np.mean(gap < 1.5) > 0.97
    assert radius.mean() == pytest.approx(3.0 * math.pi, abs=0.2)


def test_lorenz_statistics(sets: dict[str, DataSet]) -> None:
    x, y, z = rows(sets["Lorenz-63"]).T
    # Known averages along the attractor; noise adds 0.25 to second moments.
    assert z.mean() == pytest.approx(23.55, abs=0.4)
    assert z.std() == pytest.approx(8.6, abs=0.3)
    assert np.mean(x**2) - 0.25 == pytest.approx(62.8, abs=2.0)
    # d(x²)/dt and dz/dt average to zero: ⟨xy⟩ = ⟨x²⟩ and ⟨xy⟩ = β ⟨z⟩.
    assert np.mean(x * y) == pytest.approx(np.mean(x**2) - 0.25, rel=0.02)
    assert np.mean(x * y) == pytest.approx(8.0 / 3.0 * z.mean(), rel=0.02)
    # Two lobes, visited about equally, that are apart at the top,
    assert 0.4 < np.mean(x > 0) < 0.6
    top = x[z > 33.0]
    assert 0.3 < np.mean(top > 2.0) < 0.7
    assert np.mean(np.abs(top) < 2.0) < 0.01
    # and each has a hole around its unstable fixed point (±√72, ±√72, 27).
    for c in (-math.sqrt(72.0), math.sqrt(72.0)):
        assert np.sum(np.linalg.norm(np.stack([x - c, y - c, z - 27.0]), axis=0) < 2.0) < 10


def test_lorenz_noise_is_that_of_the_recipe(
    sets: dict[str, DataSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "NUM_ROWS", 100)
    noisy = suite.lorenz_63(np.random.default_rng(0))
    monkeypatch.setattr(suite, "LORENZ_NOISE", 0.0)
    clean = suite.lorenz_63(np.random.default_rng(0))
    assert (noisy - clean).std() == pytest.approx(0.5, abs=0.06)
    # A short step of the flow, from the equations: rows are 0.1 apart, so only the sign of dz/dt
    # far from its zeros is compared.
    rate = clean[:-1, 0] * clean[:-1, 1] - 8.0 / 3.0 * clean[:-1, 2]
    steep = np.abs(rate) > 60.0
    assert steep.sum() > 10
    assert np.mean(np.sign(np.diff(clean[:, 2]))[steep] == np.sign(rate[steep])) > 0.9


def test_breast_cancer_keeps_rows_without_zeros(sets: dict[str, DataSet]) -> None:
    x = np.exp(rows(sets["breast cancer"]))
    # Radius, perimeter and area of a nucleus belong together.
    assert (x > 0).all()
    assert np.corrcoef(np.log(x[:, 0]), np.log(x[:, 3]))[0, 1] > 0.99
    np.testing.assert_allclose(np.median(x[:, 3] / (math.pi * x[:, 0] ** 2)), 1.0, atol=0.05)


def test_grids_nest() -> None:
    assert set(mixtures.SCREEN_COMPONENTS) <= set(mixtures.COMPONENTS)
    assert set(mixtures.SCREEN_REG_COVAR) <= set(mixtures.REG_COVAR)
    assert (mixtures.COMPONENTS[0], mixtures.COMPONENTS[-1]) == (1, 100)


def test_names() -> None:
    assert Candidate("scaled", "full", 40, 0.003).name == "full, 40 components, +0.003"
    assert Candidate("whitened", "diag", 1, 1e-6).name == "diag, 1 component, +1e-06, whitened"


@pytest.mark.parametrize("covariance_type", ["full", "diag"])
def test_fit_is_the_textbook_mixture(covariance_type: str) -> None:
    train, test = line(400, [-3.0, 3.0], 0), line(50, [-3.0, 3.0], 1)
    ours = fit(train, test, Candidate("scaled", covariance_type, 4, 1e-6), starts=3, seed=5)
    scale = train.std(0)
    textbook = GaussianMixture(
        4,
        covariance_type=covariance_type,
        max_iter=MAX_ITER,
        n_init=3,
        random_state=int(np.random.SeedSequence([5, 4]).generate_state(1)[0]),
    ).fit((train - train.mean(0)) / scale)
    expected = textbook.score_samples((test - train.mean(0)) / scale) - np.log(scale).sum()
    np.testing.assert_allclose(ours.log_evidence, expected, rtol=0, atol=1e-8)
    assert ours.converged == textbook.converged_


def test_fit_in_whitened_coordinates() -> None:
    rng = np.random.default_rng(0)
    mix = np.array([[1.0, 0.0, 0.0], [5.0, 0.1, 0.0], [0.0, 2.0, 40.0]])
    train, test = rng.normal(size=(300, 3)) @ mix, rng.normal(size=(40, 3)) @ mix
    # One component fits the covariance of all rows, whatever the axes, and the added variance
    # multiplies that covariance by 1 + 0.1.
    ours = fit(train, test, Candidate("whitened", "diag", 1, 0.1), starts=1, seed=0).log_evidence
    cov = 1.1 * np.cov(train.T, bias=True)
    exact = multivariate_normal(train.mean(0), cov).logpdf(test)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-8)


def test_cross_validation_is_a_mean_over_left_out_rows() -> None:
    x = line(90, [0.0], 0)
    score = cross_validate(x, Candidate("scaled", "full", 1, 1e-6), folds=90, starts=1, seed=0)
    left_out = [
        multivariate_normal(
            np.delete(x, i, 0).mean(0), np.cov(np.delete(x, i, 0).T, bias=True)
        ).logpdf(x[i])
        for i in range(90)
    ]
    assert score == pytest.approx(np.mean(left_out), abs=1e-4)


def test_impossible_candidates_are_not_chosen() -> None:
    x = line(20, [0.0], 0)
    assert cross_validate(x, Candidate("scaled", "full", 12, 1e-3), 2, 1, 0) == -math.inf
    # Fitted folds in which a column is constant, or one column gives the other.
    constant = np.stack([np.arange(20.0), np.eye(20)[3]], -1)
    assert cross_validate(constant, Candidate("scaled", "full", 1, 1e-3), 2, 1, 0) == -math.inf
    dependent = np.stack([np.arange(20.0), np.arange(20.0) + np.eye(20)[3]], -1)
    assert cross_validate(dependent, Candidate("whitened", "full", 1, 1e-3), 2, 1, 0) == -math.inf


@pytest.fixture
def small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SCREEN_COMPONENTS", (1, 3, 5)),
        ("COMPONENTS", (1, 2, 3, 4, 5, 6)),
        ("SCREEN_REG_COVAR", (1e-3, 0.1)),
        ("REG_COVAR", (1e-3, 0.03, 0.1)),
        ("FINALISTS", 2),
    ):
        monkeypatch.setattr(mixtures, name, value)


@pytest.fixture
def few_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """For rows of one or two clusters."""
    monkeypatch.setattr(mixtures, "QUICK_COMPONENTS", (1, 2, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("small_grid")
def test_the_right_number_of_components_is_found() -> None:
    """Slow: a grid of candidates, each fitted to several folds; the quick grid is tested below."""
    centres = [-12.0, -4.0, 4.0, 12.0]
    train, test = line(600, centres, 0), line(400, centres, 1)
    best = best_mixture(train, test, seed=0)
    # Four is not on the coarse grid.
    assert best.choice.components == 4
    assert best.choice.coordinates == "scaled"
    assert best.name == best.choice.name
    truth = np.log(
        np.mean([multivariate_normal([c, 0.0], np.eye(2)).pdf(test) for c in centres], 0)
    )
    gap = best.held_out.log_evidence - truth
    assert abs(gap.mean()) < 0.05
    assert best.log_evidence == pytest.approx(best.held_out.log_evidence.mean())
    assert best.std_error == pytest.approx(best.held_out.log_evidence.std(ddof=1) / 20.0)
    assert best.held_out.converged
    assert best.seconds > 0.0
    table = best.table
    assert table["cross_validation"].max() == table["cross_validation"][0]
    assert tuple(table.loc[0, ["covariance_type", "components", "reg_covar"]]) == (
        best.choice.covariance_type,
        best.choice.components,
        best.choice.reg_covar,
    )
    # Each candidate once, the whole coarse grid, and some neighbours.
    assert not table.duplicated(["coordinates", "covariance_type", "components", "reg_covar"]).any()
    assert table["screening"].notna().sum() == 2 * 2 * 3
    assert table["cross_validation"].notna().sum() > mixtures.FINALISTS


@pytest.mark.usefixtures("few_components")
def test_the_evidence_is_that_of_scikit_learn() -> None:
    train, test = line(400, [-3.0, 3.0], 0), line(100, [-3.0, 3.0], 1)
    best = best_mixture(train, test, seed=0, quick=True)
    choice = best.choice
    scale = train.std(0)
    model = GaussianMixture(
        choice.components,
        covariance_type=choice.covariance_type,
        reg_covar=choice.reg_covar,
        n_init=3,
        random_state=0,
    ).fit((train - train.mean(0)) / scale)
    value = model.score((test - train.mean(0)) / scale) - np.log(scale).sum()
    assert choice.components == 2
    assert best.log_evidence == pytest.approx(value, abs=2e-3)


@pytest.mark.usefixtures("few_components")
def test_held_out_rows_do_not_move_the_choice() -> None:
    train = line(300, [-3.0, 3.0], 0)
    near, far = line(50, [-3.0, 3.0], 1), 100.0 * line(50, [0.0], 2)
    one, other = (best_mixture(train, test, seed=0, quick=True) for test in (near, far))
    assert one.choice == other.choice
    assert one.table.equals(other.table)
    assert one.log_evidence > other.log_evidence + 100.0
    # The fit is the same as well.
    both = fit(train, np.concatenate([near, far]), one.choice, starts=1, seed=0)
    np.testing.assert_allclose(
        both.log_evidence,
        np.concatenate([one.held_out.log_evidence, other.held_out.log_evidence]),
        rtol=1e-9,
    )


@pytest.mark.usefixtures("few_components")
def test_a_choice_repeats() -> None:
    train = line(200, [-2.0, 2.0], 0)
    first, second = (choose(train, seed=7, quick=True) for _ in range(2))
    assert first[0] == second[0]
    assert first[1].equals(second[1])


@pytest.mark.usefixtures("few_components")
def test_units_do_not_move_the_choice() -> None:
    train, test = line(300, [-3.0, 3.0], 0), line(50, [-3.0, 3.0], 1)
    units = np.array([1e-3, 1e4])
    one = best_mixture(train, test, seed=0, quick=True)
    other = best_mixture(train * units, test * units, seed=0, quick=True)
    assert one.choice == other.choice
    assert other.log_evidence == pytest.approx(one.log_evidence - np.log(units).sum(), abs=1e-6)


def test_added_variance_is_found_where_it_helps() -> None:
    # Few rows in many columns: with three clusters, a full covariance needs help.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(110, 12)) + 5.0 * np.eye(3, 12)[rng.integers(3, size=110)]
    choice, table = choose(x[:90], seed=0, quick=True)
    assert choice.components > 1
    assert choice.reg_covar == 0.1
    assert set(table["coordinates"]) == {"scaled", "whitened"}


def test_bad_rows_are_refused() -> None:
    train = line(50, [0.0], 0)
    with pytest.raises(ValueError, match="columns of train are constant"):
        best_mixture(np.ones((50, 2)), train, seed=0, quick=True)
    with pytest.raises(ValueError, match="test has 1 row; a standard error needs at least 2"):
        best_mixture(train, train[:1], seed=0, quick=True)
