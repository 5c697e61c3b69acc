# SPDX-License-Identifier: Apache-2.0
"""The whole path for one table of observations: fit, compare with guides, evaluate, write."""

from __future__ import annotations

import json
import platform
import time
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_lvebm.cli.baselines import evaluate_baselines
from pyro_lvebm.cli.data import DigitsData, logit_to_levels
from pyro_lvebm.cli.figures import image_figure, table_figure
from pyro_lvebm.comparison import ElboTable, compare_elbo
from pyro_lvebm.energies import MLPEnergy
from pyro_lvebm.evidence import LogEvidence, log_evidence
from pyro_lvebm.export import to_arviz
from pyro_lvebm.guides import AutoAmortisedNormal, AutoParticles, AutoPerDatumMultivariateNormal
from pyro_lvebm.model import LVEBM
from pyro_lvebm.plots import save_figure
from pyro_lvebm.pools import TemperedPool
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sites import Model, lvebm
from pyro_lvebm.training import Saddle
from pyro_lvebm.validation import TrainingWarning, check_at_least

_PATIENCE = 5
"""Evaluations of the validation rows without a better one before a fit stops."""


@dataclass(frozen=True)
class JobSettings:
    """What a user may choose about a fit."""

    z_dim: int = 2
    num_steps: int = 1500
    guide_steps: int = 6000  # at most, for each guide
    batch_size: int = 512
    num_particles: int = 2
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        names = ("z_dim", "num_steps", "guide_steps", "batch_size", "num_particles")
        check_at_least(1, **{name: getattr(self, name) for name in names})
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")


@dataclass(frozen=True)
class JobResult:
    """What a fit found."""

    saddle: Saddle
    table: ElboTable
    evidence: LogEvidence
    baselines: pd.DataFrame
    seconds: dict[str, float]


def run_job(
    train: np.ndarray,
    test: np.ndarray,
    out: Path,
    settings: JobSettings,
    *,
    validation: np.ndarray | None = None,
    digits: DigitsData | None = None,
    progress: bool = True,
) -> JobResult:
    """Fit an LVEBM, compare particles with guides at the same θ, evaluate, and write all of it.

    Writes `figure.png`, `elbo_table.csv`, `summary.json`, `posterior.nc` and
    `model.safetensors` into `out`.

    Args:
        train: Observations to fit (N, D), more rows than columns.
        test: Held-out observations (M, D).
        out: Folder to write to; made if it does not exist.
        settings: What to fit.
        validation: Observations (V, D) that decide when the fit stops and which step was best;
            without them it takes all steps.
        digits: The data set, if the rows are its images; chooses the figure.
        progress: Show progress bars.

    Returns:
        The fitted Saddle, the ELBO table, the held-out evidence and the baselines.

    Raises:
        ValueError: If the data or settings cannot be used.
    """
    if len(test) < 2:
        raise ValueError(
            f"{len(test)} rows are held out; the standard error of the evaluation needs at least 2"
        )
    _check_single_precision(train)
    seed = settings.seed
    x, x_test = (torch.as_tensor(a, dtype=torch.float32) for a in (train, test))
    stopping: dict[str, Any] = {}
    if validation is not None:
        held_out = torch.as_tensor(validation, dtype=torch.float32)
        stopping = {"held_out": (held_out,), "patience": _PATIENCE}
    energy = MLPEnergy(x.shape[1], settings.z_dim, seed=seed)
    ebm = LVEBM.from_data(energy, x, z_dim=settings.z_dim, pool=TemperedPool(seed=seed))
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=min(settings.batch_size, len(x))) as i:
            lvebm("observations", ebm, obs=x[i])

    pyro.clear_param_store()
    clock = time.perf_counter()
    guide = AutoParticles(model, settings.num_particles)
    saddle = Saddle(model, guide, Adam({"lr": settings.learning_rate}), seed=seed)
    saddle.fit(x, num_steps=settings.num_steps, progress=progress, **stopping)
    seconds["fit"], clock = time.perf_counter() - clock, time.perf_counter()

    guides = _fit_guides(model, saddle, x, settings, progress)
    table = compare_elbo(model, {"Langevin particles": saddle, **guides}, x, seed=seed)
    seconds["elbo table"], clock = time.perf_counter() - clock, time.perf_counter()

    evidence = log_evidence(ebm, x_test, seed=seed)
    baselines = evaluate_baselines(train, test, seed)
    seconds["held-out evidence"], clock = time.perf_counter() - clock, time.perf_counter()

    to_arviz(saddle, x, num_samples=50, table=table, seed=seed).to_netcdf(str(out / "posterior.nc"))
    saddle.save(out / "model.safetensors")
    save_figure(_figure(ebm, table, x, x_test, seed, digits), out / "figure.png")
    seconds["export"] = time.perf_counter() - clock

    result = JobResult(saddle, table, evidence, baselines, seconds)
    table.to_dataframe().to_csv(out / "elbo_table.csv")
    rows = {"train": train.shape, "held_out": test.shape}
    if validation is not None:
        rows["validation"] = validation.shape
    text = json.dumps(_summary(result, settings, rows), indent=2)
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    return result


def _check_single_precision(train: np.ndarray) -> None:
    """Refuse columns whose spread single precision cannot hold beside their mean."""
    error = np.abs(train - train.astype(np.float32)).max(0)
    bad = np.flatnonzero(error > 1e-3 * train.std(0))
    bad = bad[train.std(0)[bad] > 0]
    if len(bad):
        raise ValueError(
            f"columns {bad.tolist()} vary too little beside their mean for single precision; "
            "subtract the mean of each first"
        )


def _fit_guides(
    model: Model, saddle: Saddle, x: Tensor, settings: JobSettings, progress: bool
) -> dict[str, Model]:
    """Train the restricted guides for the fitted model, until the ELBO of each rests."""
    guides: dict[str, Model] = {
        "mean-field guide": AutoNormal(model, init_scale=0.5),
        "full-covariance guide": AutoPerDatumMultivariateNormal(model),
        "amortised MLP encoder": AutoAmortisedNormal(model, seed=settings.seed),
    }
    options: dict[str, Any] = {
        "max_steps": settings.guide_steps,
        "seed": settings.seed,
        "progress": progress,
    }
    with warnings.catch_warnings():
        # The table and the figure mark a guide that has not converged.
        warnings.filterwarnings("ignore", "the ELBO of .* does not rest", TrainingWarning)
        for name, guide in guides.items():
            saddle.fit_guide(guide, x, description=name, **options)
    return guides


def _figure(
    ebm: LVEBM, table: ElboTable, x: Tensor, x_test: Tensor, seed: int, digits: DigitsData | None
) -> Figure:
    generator = generator_for(seed, Stream.FIGURE)
    num_draws = 100 if digits is not None else min(len(x), 1000)
    draws, _ = ebm.unwhiten(ebm.pool.draw(ebm, num_draws, num_moves=50, generator=generator))
    if digits is None:
        return table_figure(x[:1000].numpy(), draws.numpy(), table)

    def images(y: Tensor) -> np.ndarray:
        levels = logit_to_levels(y.numpy().astype(np.float64), digits.num_levels)
        return levels.reshape(-1, *digits.image_shape)

    height, _ = digits.image_shape
    observed = torch.ones(digits.image_shape, dtype=torch.bool)
    observed[height // 2 :] = False
    shown = x_test[:10]
    completed = ebm.impute(shown, observed.flatten(), num_samples=2, seed=seed)
    truth = images(shown)
    masked = np.where(observed.numpy(), truth, np.nan)
    below = np.concatenate([images(completed[0]), images(completed[1]), truth])
    return image_figure(images(x[:100]), images(draws), masked, below, table)


def _summary(
    result: JobResult, settings: JobSettings, rows: dict[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The numbers of the run for programs; every one with its standard error."""
    evidence, log_z = result.evidence, result.evidence.log_partition
    return {
        "data": {name: list(shape) for name, shape in rows.items()},
        "steps": result.saddle.step_count,
        "settings": asdict(settings),
        "base": {"components": result.saddle.ebms[0].base_x.num_components},
        "held_out_log_evidence": {
            "lower": float(evidence.lower.double().mean()),
            "estimate": evidence.mean,
            "std_error": evidence.mean_std_error,
            "units": "nats per datum, density of the transformed observations",
            "note": "lower uses the upper end of log Z; the standard error is over held-out rows "
            "and log Z",
        },
        "log_partition": asdict(log_z),
        "elbo_table": result.table.to_dataframe().reset_index().to_dict("records"),
        "baselines": result.baselines.to_dict("records"),
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "seed": settings.seed,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("pyro-lvebm", "torch", "pyro-ppl", "numpy", "arviz", "scikit-learn")
            },
        },
    }
