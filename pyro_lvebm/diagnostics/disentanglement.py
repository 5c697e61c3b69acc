# SPDX-License-Identifier: Apache-2.0
"""How latents relate to known factors: linear probe, MIG, SAP and DCI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_BINS = 20
"""Equally filled bins of a latent, or of a factor that takes more values."""

_TREES = 50


@dataclass(frozen=True)
class Disentanglement:
    """Scores of latents against known factors, with standard errors."""

    scores: pd.DataFrame  # by score: value, std_error; means over factors (or over latents)
    by_factor: pd.DataFrame  # by factor: each score, and its standard error as `*_se`
    information: pd.DataFrame  # latents × factors: mutual information, as a share of the most
    importance: pd.DataFrame  # latents × factors: importance in the forests behind DCI

    def __str__(self) -> str:
        rows = self.scores.itertuples()
        return ", ".join(f"{row.Index} {row.value:.3f} ± {row.std_error:.3f}" for row in rows)


def disentanglement(
    latents: Any, factors: Any, *, num_folds: int = 5, seed: int = 0
) -> Disentanglement:
    """Score how latents of data represent factors of variation that are known.

    - `r2`: R² of a linear probe, a least-squares regression of the factor on all latents, on rows
      that it was not fitted to. It does not mind rotations of the latents.
    - `mig`, the mutual information gap: by how much the latent that says most of a factor beats
      the next one. Mutual information of binned values, less its mean under permuted rows, as a
      share of the most that is possible: without that correction finite data make it too large.
    - `sap`: the same gap of the squared correlation of one latent with the factor.
    - `disentanglement`: whether each latent serves one factor, 1 − entropy of its importances,
      weighted by their sum; `completeness`: whether each factor is served by one latent, 1 −
      entropy of the importances for it; `informativeness`: R² of the random forests that the
      importances come from, on rows that they were not fitted to. Importances of a forest add
      up to one even if it predicts nothing: read the first two only if the third is high.

    All are 1 at best, and 0 for independent latents but for noise: gaps and entropies of noise lie
    a little above 0, as the largest of equals does. Standard errors are by folds: of R² those of
    the mean over folds, of all else the jackknife that leaves out a fold at a time.
    R² on folds of noise lies a little below 0.

    Args:
        latents: Latents of data (N, D), such as posterior means
            `saddle.sample_posterior(...)[name].mean((0, 1))`; an array, tensor or frame.
        factors: Real or integer factors (N, K); unordered categories as one column of 0 and 1 for
            each.
        num_folds: Folds, at least 3.
        seed: Fixes the folds and the forests.

    Returns:
        The scores. Gaps and completeness are NaN with one latent, disentanglement with one factor.

    Raises:
        ValueError: If the tables do not fit, are not finite, or have a constant column, or folds
            are too many.

    Source:
        Chen, Li, Grosse and Duvenaud (2018), Isolating sources of disentanglement, equation 6
        (MIG); Vinh, Epps and Bailey (2010), equation 24a (the correction); Kumar, Sattigeri and
        Balakrishnan (2018), section 3 (SAP); Eastwood and Williams (2018), section 2 (DCI).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> factors = rng.normal(size=(400, 2))
        >>> aligned = disentanglement(factors[:, ::-1], factors)
        >>> turned = disentanglement(factors @ [[1, 1], [-1, 1]], factors)
        >>> aligned.scores["value"].round(1).to_dict()
        {'r2': 1.0, 'mig': 1.0, 'sap': 1.0, 'disentanglement': 1.0, 'completeness': 1.0,
         'informativeness': 1.0}
        >>> turned.scores["value"][["r2", "mig"]].round(1).to_dict()
        {'r2': 1.0, 'mig': 0.0}
    """
    import pandas as pd

    # Imported here, for scikit-learn is slow to import.
    from sklearn.model_selection import KFold

    z, latent_names = _table("latents", latents, "z")
    y, factor_names = _table("factors", factors, "factor")
    if len(z) != len(y):
        raise ValueError(f"latents have {len(z)} rows and factors {len(y)}; expected equal numbers")
    if not 3 <= num_folds <= len(z) // 10:
        raise ValueError(
            f"num_folds must lie between 3 and a tenth of the {len(z)} rows; got {num_folds}"
        )
    folds = list(KFold(num_folds, shuffle=True, random_state=seed).split(z))
    forests = [_forest(z, y, fit, left_out, seed) for fit, left_out in folds]
    importances = [importance for importance, _ in forests]
    scored = {
        "r2": _held_out([_linear_r2(z, y, *fold) for fold in folds]),
        "mig": _jackknife(lambda rows: _gap(_information(z[rows], y[rows])), folds),
        "sap": _jackknife(lambda rows: _gap(_squared_correlations(z[rows], y[rows])), folds),
        "disentanglement": _over_folds([_disentanglement(i) for i in importances]),
        "completeness": _over_folds([_completeness(i) for i in importances]),
        "informativeness": _held_out([r2 for _, r2 in forests]),
    }
    scores = pd.DataFrame(
        [[float(value[-1]), float(error[-1])] for value, error in scored.values()],
        index=pd.Index(scored, name="score"),
        columns=["value", "std_error"],
    )
    by_factor = pd.DataFrame(
        {
            key: values[:-1]
            for name, parts in scored.items()
            if name != "disentanglement"  # it belongs to latents
            for key, values in zip((name, f"{name}_se"), parts, strict=True)
        },
        index=pd.Index(factor_names, name="factor"),
    )
    tables = (
        pd.DataFrame(values, index=pd.Index(latent_names, name="latent"), columns=factor_names)
        for values in (_information(z, y), np.mean(importances, axis=0))
    )
    return Disentanglement(scores, by_factor, *tables)


Scored = tuple[np.ndarray, np.ndarray]
"""Values by factor (K,) with their mean in the end, and standard errors of all of them."""

Fold = tuple[np.ndarray, np.ndarray]
"""Rows to fit to, and rows left out."""


def _table(role: str, values: Any, stem: str) -> tuple[np.ndarray, list[str]]:
    """A table of finite numbers (N, D), and names of its columns."""
    import pandas as pd

    names = [str(c) for c in values.columns] if isinstance(values, pd.DataFrame) else None
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    table = np.asarray(values)
    if table.ndim != 2 or table.size == 0 or table.dtype.kind not in "fiub":
        raise ValueError(
            f"{role} must be a table (N, columns) of real numbers; got {table.dtype} of shape "
            f"{table.shape}. Give unordered categories a column of 0 and 1 each"
        )
    table = table.astype(np.float64)
    if not np.isfinite(table).all():
        raise ValueError(f"{role} must be finite; {(~np.isfinite(table)).sum()} entries are not")
    constant = np.flatnonzero(np.ptp(table, axis=0) == 0.0).tolist()
    if constant:
        raise ValueError(f"columns {constant} of {role} are constant; remove them")
    # The forests have absolute thresholds, and squares of tiny or huge numbers are 0 or infinite.
    _, power = np.frexp(np.abs(table).max(0))
    table = np.ldexp(table, -power)
    table = table - table.mean(0)
    table /= table.std(0)
    return table, names or [f"{stem}[{i}]" for i in range(table.shape[1])]


def _jackknife(score: Callable[[np.ndarray], np.ndarray], folds: list[Fold]) -> Scored:
    """A score (K,) of all rows, and its standard error by leaving out folds."""
    everything = np.concatenate([left_out for _, left_out in folds])
    _, error = _over_folds([score(kept) for kept, _ in folds])
    return _and_mean([score(everything)])[0], error


def _over_folds(without: Sequence[np.ndarray]) -> Scored:
    """Mean of scores (K,), each without a fold, and the jackknife's standard error of it."""
    values = _and_mean(without)
    return values.mean(0), np.sqrt((len(values) - 1) * values.var(0))


def _held_out(on_folds: Sequence[np.ndarray]) -> Scored:
    """Mean of scores (K,) on folds, and its standard error."""
    values = _and_mean(on_folds)
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def _and_mean(values: Sequence[np.ndarray]) -> np.ndarray:
    table = np.array(values)
    return np.column_stack([table, table.mean(1)])


def _linear_r2(z: np.ndarray, y: np.ndarray, fit: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LinearRegression
    from sklearn.metrics import r2_score

    predicted = LinearRegression().fit(z[fit], y[fit]).predict(z[left_out])
    r2: np.ndarray = r2_score(y[left_out], predicted, multioutput="raw_values")
    return r2


def _forest(
    z: np.ndarray, y: np.ndarray, fit: np.ndarray, left_out: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Importances (D, K) of latents in forests for each factor, and R² (K,) on rows left out."""
    from sklearn.ensemble import RandomForestRegressor

    importances, r2 = [], []
    for target in y.T:
        forest = RandomForestRegressor(_TREES, min_samples_leaf=5, random_state=seed)
        forest.fit(z[fit], target[fit])
        importances.append(forest.feature_importances_)
        r2.append(forest.score(z[left_out], target[left_out]))
    return np.array(importances).T, np.array(r2)


def _information(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mutual information (D, K) above that of permuted rows, as a share of the factor's entropy."""
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    binned = [np.array([_binned(column) for column in part.T]) for part in (z, y)]
    result = np.empty((z.shape[1], y.shape[1]))
    for k, factor in enumerate(binned[1]):
        entropy = mutual_info_score(factor, factor)
        for j, latent in enumerate(binned[0]):
            table = contingency_matrix(latent, factor, sparse=True)
            chance = expected_mutual_information(table, len(factor))
            result[j, k] = (mutual_info_score(latent, factor) - chance) / (entropy - chance)
    return result


def _binned(column: np.ndarray) -> np.ndarray:
    """Labels of a column: its values, or equally filled bins where there are many."""
    values, labels = np.unique(column, return_inverse=True)
    if len(values) <= _BINS:
        return labels
    edges = np.quantile(column, np.arange(1, _BINS) / _BINS)
    return np.searchsorted(edges, column, side="right")


def _squared_correlations(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared correlation (D, K) of each latent with each factor."""
    d = z.shape[1]
    correlation: np.ndarray = np.corrcoef(z.T, y.T)[:d, d:]
    return correlation**2


def _gap(values: np.ndarray) -> np.ndarray:
    """Largest less second largest entry of each column (D, K)."""
    if len(values) < 2:
        return np.full(values.shape[1], np.nan)
    ranked = np.sort(values, axis=0)
    gap: np.ndarray = ranked[-1] - ranked[-2]
    return gap


def _completeness(importance: np.ndarray) -> np.ndarray:
    """1 − entropy of each factor's importances (D, K) to the base D."""
    from scipy import stats

    d, k = importance.shape
    return np.full(k, np.nan) if d < 2 else 1.0 - stats.entropy(importance, base=d, axis=0)


def _disentanglement(importance: np.ndarray) -> np.ndarray:
    """Weighted mean (1,) of 1 − entropy of each latent's importances (D, K) to the base K."""
    from scipy import stats

    k = importance.shape[1]
    if k < 2:
        return np.array([np.nan])
    used = importance[importance.sum(1) > 0.0]
    weights = used.sum(1) / used.sum()
    return np.array([weights @ (1.0 - stats.entropy(used, base=k, axis=1))])
