# SPDX-License-Identifier: Apache-2.0
"""The whole path for one table of observations: fit, compare with guides, evaluate, write."""

from __future__ import annotations

import json
import math
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from pyro_lvebm.cli.baselines import evaluate_baselines, evaluate_incomplete
from pyro_lvebm.cli.choice import Candidate, choose_base, model_of, with_energy
from pyro_lvebm.cli.figures import Results, image_figure, informative_pairs, table_figure
from pyro_lvebm.cli.output import OutputFolder
from pyro_lvebm.cli.plane import SITE, has_plane, plane_figure
from pyro_lvebm.cli.progress import Progress
from pyro_lvebm.cli.resumed import load_fit
from pyro_lvebm.cli.rows import row_frame
from pyro_lvebm.cli.settings import JobSettings
from pyro_lvebm.comparison import ElboTable, compare_elbo
from pyro_lvebm.data import DigitsData, Split, logit_to_levels
from pyro_lvebm.evidence import LogEvidence, log_evidence
from pyro_lvebm.export import to_arviz
from pyro_lvebm.guides import AutoAmortisedNormal, AutoParticles, AutoPerDatumMultivariateNormal
from pyro_lvebm.model import LVEBM
from pyro_lvebm.plots import save_figure
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sites import Model
from pyro_lvebm.training import Saddle
from pyro_lvebm.validation import TrainingWarning

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_PATIENCE = 5
"""Evaluations of the validation rows without a better one before a fit stops."""

_EVERY = 50
"""Steps from one checkpoint to the next."""

PHASES = {
    "base": 20.0,
    "fit": 40.0,
    "held-out evidence": 6.0,
    "rows": 10.0,
    "guides": 22.0,
    "elbo table": 14.0,
    "export": 6.0,
}
"""Phases of a job, with their usual shares of its time in per cent."""


@dataclass(frozen=True)
class JobResult:
    """What a fit found."""

    saddle: Saddle
    table: ElboTable
    evidence: LogEvidence
    baselines: pd.DataFrame
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


def run_job(
    data: Split,
    out: OutputFolder,
    settings: JobSettings,
    *,
    transforms: Sequence[Mapping[str, Any]] = (),
    digits: DigitsData | None = None,
    resume: bool = False,
    progress: bool = True,
) -> JobResult:
    """Fit an LVEBM, compare particles with guides at the same θ, evaluate, and write all of it.

    Each result is written as soon as it exists: `model.safetensors` and `model/`, then
    `summary.json`, `rows.csv`, `elbo_table.csv`, `figure.png` and `posterior.nc`.

    Args:
        data: Observations, NaN where missing, and which of them are held out; with validation
            rows these decide when the fit stops and which step was best, and without them it
            takes all steps.
        out: Where to write.
        settings: What to fit.
        transforms: What was done to the data before, for the model file.
        digits: The data set, if the rows are its images; chooses the figure.
        resume: Go on with the fit in `model.safetensors`, if there is one.
        progress: Say how far it is.

    Returns:
        The fitted Saddle, the ELBO table, the held-out evidence and the baselines.

    Raises:
        ValueError: If the data or settings cannot be used, or are not those of the fit to resume.
    """
    train, test = data.train.values, data.held_out.values
    if len(test) < 2:
        raise ValueError(
            f"{len(test)} rows are held out; the standard error of the evaluation needs at least 2"
        )
    said = Progress(PHASES, quiet=not progress)
    seed, names = settings.seed, data.table.names
    dtype, notes = choose_dtype(data.table.values, names)
    x, x_test = (torch.as_tensor(a, dtype=dtype) for a in (train, test))
    stopping: dict[str, Any] = {}
    if data.validation is not None:
        held_out = torch.as_tensor(data.validation.values, dtype=dtype)
        stopping = {"held_out": (held_out,), "patience": _PATIENCE}
    with said.phase("base", bars=True):
        _check_varying(train, names)
        validation = stopping["held_out"][0] if stopping else None
        chosen, compared = choose_base(x, validation, settings, ready=out.make, progress=progress)
        ebm = with_energy(chosen, settings)
    out.make()
    model = model_of(ebm, settings.batch_size)
    pyro.clear_param_store()
    with said.phase("fit", bars=True):
        guide = AutoParticles(model, settings.num_particles)
        optim = Adam({"lr": settings.learning_rate})
        saved = out.file("model.safetensors", keep=resume)
        if resume and saved.exists():
            saddle = load_fit(saved, model, guide, optim, ebm, x, settings, bool(stopping))
        else:
            saddle = Saddle(model, guide, optim, seed=seed)
        try:
            saddle.fit(
                x,
                num_steps=settings.num_steps,
                checkpoint=saved,
                every=_EVERY,
                resume=resume,
                progress=progress,
                **stopping,
            )
        finally:  # a fit that is interrupted leaves a model to use, too
            if saddle.step_count:
                folder = out.folder("model")
                ebm.save(folder, columns=names, transforms=transforms, overwrite=True)

    summary = _head(data, saddle, settings, transforms, compared)
    with said.phase("held-out evidence"):
        evidence = log_evidence(ebm, x_test, seed=seed)
        if np.isnan(train).any() or np.isnan(test).any():
            baselines = evaluate_incomplete(train, test)
            notes = (
                *notes,
                "baselines that need complete rows, factor analysis and mixtures, are left out",
            )
        else:
            baselines = evaluate_baselines(train, test, seed)
    summary |= _of_evidence(evidence, baselines, notes)
    _write_summary(out, summary, said)
    with said.phase("rows"):
        frame = row_frame(ebm, data, evidence, dtype, seed)
    with out.writing("rows.csv") as path:
        frame.to_csv(path, index=False)

    with said.phase("guides", bars=True):
        guides = _fit_guides(model, saddle, x, settings, progress)
    with said.phase("elbo table"):
        table = compare_elbo(model, {"Langevin particles": saddle, **guides}, x, seed=seed)
    with out.writing("elbo_table.csv") as path:
        table.to_dataframe().to_csv(path)
    if table.carried is not None:
        summary["mutual_information"] = asdict(table.carried) | {
            "interval": list(table.carried.interval),
            "units": "nats; low and high are so in expectation, value is their middle",
        }
    summary["elbo_table"] = table.to_dataframe().reset_index().to_dict("records")
    _write_summary(out, summary, said)

    with said.phase("export"):
        results = Results(saddle.history, table, evidence, baselines)
        with out.writing("figure.png") as path:
            save_figure(_figure(ebm, results, x, x_test, seed, digits, names), path)
        labels: dict[str, Any] = {"data": data.train.row_labels(), "column": list(names)}
        dims = {"observations": ["column"]}
        if np.isnan(train).any():
            dims["observations_missing"] = ["column"]
        posterior = to_arviz(
            saddle, x, num_samples=50, table=table, seed=seed, coords=labels, dims=dims
        )
        if has_plane(ebm):
            latents = posterior["posterior"][SITE].to_numpy()
            latents = latents.reshape(-1, *latents.shape[2:])
            marked = table.labels()
            named = {marked.get(name, name): guide for name, guide in guides.items()}
            rows = data.train.row_labels()
            plane = plane_figure(ebm, model, x, latents, named, seed, digits, rows)
            with out.writing("latents.png") as path:
                save_figure(plane, path)
        with out.writing("posterior.nc") as path:
            posterior.to_netcdf(str(path))
    _write_summary(out, summary, said)
    return JobResult(saddle, table, evidence, baselines, said.seconds, notes)


def choose_dtype(values: np.ndarray, names: Sequence[str]) -> tuple[torch.dtype, tuple[str, ...]]:
    """Return single precision where it holds the spread of every column, else double, and why."""
    with np.errstate(over="ignore", under="ignore"):
        single = values.astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    bad = []
    for name, column, rounded in zip(names, values.T, single.T, strict=True):
        seen = ~np.isnan(column)
        width = np.ptp(column[seen]) if seen.any() else 0.0
        if not width > 0:
            continue  # a constant column is refused by the base
        error = np.abs(column[seen] - rounded[seen].astype(np.float64)).max()
        if not (np.isfinite(error) and error <= 1e-4 * width and width > 1e3 * tiny):
            bad.append(name)
    if not bad:
        return torch.float32, ()
    return torch.float64, (
        f"computed in float64: float32 does not hold how {', '.join(bad[:5])} varies",
    )


def _check_varying(train: np.ndarray, names: Sequence[str]) -> None:
    """Refuse columns that are constant in the training rows, by name."""
    with np.errstate(invalid="ignore"):
        high, low = (np.nan_to_num(f(train, 0)) for f in (np.fmax.reduce, np.fmin.reduce))
    constant = [name for name, flat in zip(names, high == low, strict=True) if flat]
    if constant:
        raise ValueError(
            f"columns {', '.join(constant)} are constant in the training rows; leave them out with "
            f"--drop '{','.join(constant)}'"
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
    ebm: LVEBM,
    results: Results,
    x: Tensor,
    x_test: Tensor,
    seed: int,
    digits: DigitsData | None,
    names: Sequence[str],
) -> Figure:
    generator = generator_for(seed, Stream.FIGURE)
    num_draws = 100 if digits is not None else min(len(x), 1000)
    with torch.no_grad():
        draws, _ = ebm.unwhiten(ebm.pool.draw(ebm, num_draws, num_moves=50, generator=generator))
    if digits is None:
        data = x[:1000].numpy()
        pairs = informative_pairs(data, seed)
        return table_figure(data, draws.numpy(), results.table, pairs, names, results)

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
    return image_figure(images(x[:100]), images(draws), masked, below, results.table, results)


def _head(
    data: Split,
    saddle: Saddle,
    settings: JobSettings,
    transforms: Sequence[Mapping[str, Any]],
    compared: Sequence[Candidate],
) -> dict[str, Any]:
    """What is known when the model is fitted."""
    rows = {"train": data.train.values.shape, "held_out": data.held_out.values.shape}
    if data.validation is not None:
        rows["validation"] = data.validation.values.shape
    return {
        "data": {name: list(shape) for name, shape in rows.items()},
        "columns": list(data.table.names),
        "read": list(data.table.notes),
        "transforms": [dict(transform) for transform in transforms],
        "steps": saddle.step_count,
        "settings": asdict(settings),
        "base": {
            "class": type(saddle.ebms[0].base_x).__name__,
            "components": saddle.ebms[0].base_x.num_components,
            "compared": [candidate.described() for candidate in compared],
        },
        "seed": settings.seed,
        "versions": {
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("pyro-lvebm", "torch", "pyro-ppl", "numpy", "arviz", "scikit-learn")
            },
        },
    }


def _of_evidence(
    evidence: LogEvidence, baselines: pd.DataFrame, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "held_out_log_evidence": {
            "lower": float(evidence.lower.double().mean()),
            "estimate": evidence.mean,
            "std_error": evidence.mean_std_error,
            "units": "nats per datum, density of the transformed observations",
            "note": "lower uses the upper end of log Z; the standard error is over held-out rows "
            "and log Z",
        },
        "log_partition": asdict(evidence.log_partition),
        "log_partition_verdict": evidence.log_partition.verdict,
        "baselines": baselines.to_dict("records"),
        "notes": list(notes),
    }


def _write_summary(out: OutputFolder, summary: dict[str, Any], said: Progress) -> None:
    """Write the numbers so far for programs; every one with its standard error."""
    summary["seconds"] = {name: round(value, 2) for name, value in said.seconds.items()}
    text = json.dumps(_finite(summary), indent=2, ensure_ascii=False, allow_nan=False)
    with out.writing("summary.json") as path:
        path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    """Put None where a number is NaN or infinite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
