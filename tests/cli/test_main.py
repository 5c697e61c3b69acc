# SPDX-License-Identifier: Apache-2.0
"""The command line, and the job behind it."""

from __future__ import annotations

import io
import json
import math
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import arviz as az
import matplotlib.image
import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    LogPartition,
    MLPEnergy,
    Saddle,
    TemperedPool,
    log_evidence,
    log_partition,
    lvebm,
)
from pyro_lvebm import data as observations
from pyro_lvebm.cli import choice, job
from pyro_lvebm.cli.job import JobSettings
from pyro_lvebm.cli.main import main
from pyro_lvebm.data import DigitsData, dequantise_logit, read_observations, split
from pyro_lvebm.evidence import annealed
from pyro_lvebm.evidence import programs as model_evidence
from pyro_lvebm.latents import ChainSettings
from pyro_lvebm.rng import Stream

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

# The function hides the module of its name in the package.
LOG_EVIDENCE = sys.modules["pyro_lvebm.evidence.log_evidence"]

OUTPUTS = {
    "model",
    "rows.csv",
    "figure.png",
    "elbo_table.csv",
    "summary.json",
    "posterior.nc",
    "model.safetensors",
}
POSTERIORS = {
    "Langevin particles",
    "mean-field guide",
    "full-covariance guide",
    "amortised MLP encoder",
    "prior",
}


@dataclass(frozen=True)
class Run:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str
    out: Path

    @property
    def summary(self) -> dict[str, Any]:
        text = (self.out / "summary.json").read_text(encoding="utf-8")

        def refuse(constant: str) -> float:
            raise AssertionError(f"summary.json holds {constant}, which is no JSON")

        result: dict[str, Any] = json.loads(text, parse_constant=refuse)
        return result

    @property
    def rows(self) -> pd.DataFrame:
        return pd.read_csv(self.out / "rows.csv")

    @property
    def table(self) -> pd.DataFrame:
        return pd.read_csv(self.out / "elbo_table.csv", index_col="posterior")


def run(*arguments: str | Path, out: Path) -> Run:
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            status = main([*map(str, arguments), "--out", str(out)])
        except SystemExit as error:  # argparse
            assert isinstance(error.code, int)
            status = error.code
    return Run(status, stdout.getvalue(), stderr.getvalue(), out)


run_chains = annealed.run_chains


def shorter(blocks: Any, steps: Any, kernel: Any, _: Any, generator: Any) -> Any:
    return run_chains(blocks, steps, kernel, ChainSettings(60, 40, 1), generator)


small_energy = partial(MLPEnergy, hidden=(16, 16), fourier_features=8)
small_pool = partial(TemperedPool, 4, 32, num_moves=2)
draw_figure = job.save_figure


def leave_blank(_: Any, path: Path) -> None:
    path.write_bytes(b"")


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Few runs for log Z, a small network and pool, no ink: the time of a short job is in these."""
    cheap = partial(log_partition, num_particles=64, num_runs=3, num_refreshes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_evidence, "log_partition", cheap)
        patch.setattr(LOG_EVIDENCE, "log_partition", cheap)
        patch.setattr(choice, "MLPEnergy", small_energy)
        patch.setattr(choice, "TemperedPool", small_pool)
        patch.setattr(annealed, "run_chains", shorter)
        patch.setattr(job, "save_figure", leave_blank)
        yield


def write_csv(path: Path, seed: int = 0) -> Path:
    """200 rows on a bent curve, with a header."""
    rng = np.random.default_rng(seed)
    t = rng.normal(size=200)
    rows = np.stack([t, 0.5 * t**2 + 0.3 * rng.normal(size=200)], 1)
    pd.DataFrame(rows, columns=["left", "right"]).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_csv(tmp_path_factory.mktemp("data") / "curve.csv")


@pytest.fixture(scope="module")
def fitted(quick: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("fit") / "new" / "folder"
    short = ("--z-dim", "1", "--steps", "30", "--guide-steps", "10", "--seed", "3", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "save_figure", draw_figure)
        return run("fit", data, *short, "--validation", "0", out=out)


@pytest.fixture
def until_the_guides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job ends as if interrupted after the rows: what follows does not know how θ came about."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_fit_guides", stop)


# --- fit ------------------------------------------------------------------------------------


def test_fit_writes_its_files_and_is_quiet(fitted: Run) -> None:
    assert fitted.status == 0
    assert {p.name for p in fitted.out.iterdir()} == OUTPUTS
    assert fitted.stderr == ""


def test_summary_holds_every_number_of_the_run(fitted: Run) -> None:
    summary = fitted.summary
    assert set(summary) == {
        "data",
        "columns",
        "read",
        "transforms",
        "notes",
        "settings",
        "base",
        "held_out_log_evidence",
        "log_partition",
        "log_partition_verdict",
        "elbo_table",
        "mutual_information",
        "baselines",
        "seconds",
        "seed",
        "steps",
        "versions",
    }
    assert summary["steps"] == 30
    assert summary["base"]["components"] >= 1
    assert summary["data"] == {"train": [160, 2], "held_out": [40, 2]}
    assert summary["seed"] == 3
    chosen = {"z_dim": 1, "num_steps": 30, "guide_steps": 10, "seed": 3}
    assert chosen.items() <= summary["settings"].items()
    evidence, log_z = summary["held_out_log_evidence"], summary["log_partition"]
    assert log_z["lower"] < log_z["estimate"] and log_z["lower"] < log_z["upper"]
    assert evidence["lower"] == pytest.approx(
        evidence["estimate"] + log_z["estimate"] - log_z["upper"], abs=1e-5
    )
    assert 0.0 < evidence["std_error"] < 1.0
    assert summary["columns"] == ["left", "right"] and "200 rows of 2 columns" in summary["read"][0]
    assert set(summary["seconds"]) == set(job.PHASES)
    assert all(s >= 0.0 for s in summary["seconds"].values())
    versions = summary["versions"]
    assert versions["torch"] == torch.__version__ or torch.__version__.startswith(versions["torch"])
    assert versions["pyro-ppl"] == pyro.__version__ and versions["arviz"] == az.__version__


def test_summary_and_table_agree(fitted: Run) -> None:
    table = fitted.table
    assert set(table.index) == POSTERIORS
    numbers = ["elbo", "elbo_se", "kl_gap", "kl_gap_se", "pareto_k", "parameters"]
    assert list(table.columns) == [*numbers, "converged", "seconds"]
    records = pd.DataFrame(fitted.summary["elbo_table"]).set_index("posterior")
    states = records.pop("converged").to_dict()
    pd.testing.assert_frame_equal(records, table.drop(columns="converged"), rtol=1e-12)
    assert states.pop("Langevin particles") is None and states.pop("prior") is True
    assert set(states.values()) == {False}  # after ten steps
    assert table["elbo"].is_monotonic_decreasing
    assert "Langevin particles" in table.index[:2]
    # After so short a fit the prior is as good as exact, and the Gaussian that particles are
    # annealed from nearly so.
    assert abs(table.loc["Langevin particles"].kl_gap) < 0.01
    assert np.ptp(table["elbo"] + table["kl_gap"]) < 1e-9


def test_standard_output_states_the_same_numbers(fitted: Run) -> None:
    lines = fitted.stdout.splitlines()
    assert "160 data" in fitted.stdout
    for name, row in fitted.table.iterrows():
        (line,) = [line for line in lines if line.startswith(str(name))]
        assert ("(not converged)" in line) == (str(row["converged"]) == "False")
        words = line.removeprefix(str(name)).replace("(not converged)", "").split()
        numbers = [float(w) for w in words if w not in ("yes", "no", "-")]
        expected = row.drop("converged").astype(float)
        assert numbers == [pytest.approx(v, abs=5.1e-5) for v in expected]
    (held_out,) = [line for line in lines if "LVEBM (upper end of log Z)" in line]
    value, sign, error = held_out.split()[-3:]
    evidence = fitted.summary["held_out_log_evidence"]
    assert sign == "±"
    assert float(value) == pytest.approx(evidence["lower"], abs=5.1e-4)
    assert float(error) == pytest.approx(evidence["std_error"], abs=5.1e-4)
    for baseline in fitted.summary["baselines"]:
        (line,) = [line for line in lines if line.strip().startswith(baseline["baseline"])]
        assert float(line.split()[-3]) == pytest.approx(baseline["log_evidence"], abs=5.1e-4)
        assert float(line.split()[-1]) == pytest.approx(baseline["std_error"], abs=5.1e-4)
    log_z = LogPartition(**fitted.summary["log_partition"])
    assert str(log_z) in fitted.stdout
    assert "Held-out log p(x), nats per datum, 40 rows" in fitted.stdout
    assert f"Wrote {fitted.out}/ in " in lines[-1]


def test_baselines_are_those_of_the_same_split(fitted: Run, data: Path) -> None:
    """The full Gaussian's held-out log density, from the file itself."""
    train, test = split(read_observations(data), 0.2, 3)
    mean, covariance = train.mean(0), np.cov(train.T, bias=True)
    centred = test - mean
    quadratic = (centred @ np.linalg.inv(covariance) * centred).sum(1)
    log_density = -0.5 * (quadratic + np.linalg.slogdet(2 * math.pi * covariance)[1])
    named = {b["baseline"]: b["log_evidence"] for b in fitted.summary["baselines"]}
    assert named["full Gaussian"] == pytest.approx(log_density.mean(), abs=1e-9)
    assert "full mixture, 10 components" in named and len(named) >= 4


def test_posterior_file_opens_in_arviz(fitted: Run, data: Path) -> None:
    idata = az.from_netcdf(str(fitted.out / "posterior.nc"))
    latent = idata["posterior"]["observations_z"]
    assert latent.shape == (2, 50, 160, 1)
    assert latent.dims == ("chain", "draw", "data", "observations_z_dim_0")
    train, _ = split(read_observations(data), 0.2, 3)
    observed = idata["observed_data"]["observations"].to_numpy()
    np.testing.assert_array_equal(observed, train.astype(np.float32))
    named = idata["observed_data"]["observations"]
    assert named.dims == ("data", "column") and list(named["column"].values) == ["left", "right"]
    rows = fitted.rows
    in_file = rows.loc[rows["part"] == "train", "row"].to_numpy()
    np.testing.assert_array_equal(np.sort(latent["data"].values), in_file)
    first = read_observations(data)[latent["data"].values - 1]
    np.testing.assert_array_equal(first, train)


def test_rows_join_the_input(fitted: Run, data: Path) -> None:
    """Every row has its part, log p(x) and z; the held-out mean is that of the summary."""
    rows = fitted.rows
    assert list(rows["row"]) == list(range(1, 201))
    _, test = split(np.arange(200), 0.2, 3)
    assert set(rows.loc[rows["part"] == "held-out", "row"] - 1) == set(test)
    stated = fitted.summary["held_out_log_evidence"]
    held_out = rows[rows["part"] == "held-out"]
    assert held_out["log_p"].mean() == pytest.approx(stated["estimate"], abs=1e-5)
    assert (rows["std_error"] >= 0).all() and rows.notna().all().all()
    # After so short a fit p(z | x) is near N(0, 1).
    assert rows["z[0]"].abs().max() < 1.0 and rows["z[0]_std"].between(0.5, 1.5).all()
    x = torch.as_tensor(read_observations(data), dtype=torch.float32)
    ebm = LVEBM.load(fitted.out / "model")
    base = ebm.base_x.log_prob(x).numpy()
    assert np.corrcoef(base, rows["log_p"])[0, 1] > 0.98


def test_the_model_works_without_its_data(fitted: Run, data: Path, tmp_path: Path) -> None:
    swapped = pd.read_csv(data)[["right", "left"]].iloc[:6]
    swapped.iloc[1, 0] = np.nan
    swapped.to_csv(tmp_path / "new.csv", index=False)
    score = tmp_path / "score.csv"
    done = run("score", fitted.out, tmp_path / "new.csv", "--quiet", out=score)
    assert done.status == 0 and done.stderr == ""
    found = pd.read_csv(score)
    known = fitted.rows.set_index("row")
    complete = found[found["row"] != 2]
    columns = ["log_p", "std_error"]
    here, there = complete[columns].to_numpy(), known.loc[complete["row"], columns].to_numpy()
    error = np.hypot(here[:, 1], there[:, 1])
    assert (np.abs(here[:, 0] - there[:, 0]) < 5.0 * error + 1e-4).all()  # 1e-4 of rounding
    drawn = run("sample", fitted.out, "--rows", "500", "--quiet", out=tmp_path / "draws.csv")
    assert drawn.status == 0
    draws = pd.read_csv(tmp_path / "draws.csv")
    assert list(draws) == ["left", "right"] and len(draws) == 500
    error = draws.std() / math.sqrt(500)
    # Five standard errors, and what 30 steps of training may have moved the mean by.
    assert ((draws.mean() - pd.read_csv(data).mean()).abs() < 5.0 * error + 0.1).all()
    filled = run("impute", fitted.out / "model", tmp_path / "new.csv", "--draws", "2", out=score)
    assert filled.status == 2 and "exists; --force" in filled.stderr
    options = ("--draws", "2", "--force", "--quiet")
    assert run("impute", fitted.out, tmp_path / "new.csv", *options, out=score).status == 0
    completed = pd.read_csv(score)
    assert len(completed) == 12 and completed.notna().all().all()
    one = completed[completed["draw"] == 1]
    kept = swapped["right"].notna().to_numpy()
    np.testing.assert_allclose(one["right"][kept], swapped["right"][kept], rtol=1e-12)
    wrong = tmp_path / "wrong.csv"
    swapped.rename(columns={"left": "other"}).to_csv(wrong, index=False)
    refused = run("score", fitted.out, wrong, out=tmp_path / "no.csv")
    assert refused.status == 2 and "model is about columns left, right" in refused.stderr
    nothing = run("sample", tmp_path, out=tmp_path / "no.csv")
    assert nothing.status == 2 and "no model in" in nothing.stderr


def test_figure_is_a_picture(fitted: Run) -> None:
    pixels = matplotlib.image.imread(fitted.out / "figure.png")
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    half = pixels.shape[1] // 2
    assert pixels[:, :half, :3].std() > 0.02 and pixels[:, half:, :3].std() > 0.02


def rebuild(train: np.ndarray, seed: int) -> tuple[LVEBM, Any, Tensor]:
    x = torch.as_tensor(train, dtype=torch.float32)
    ebm = LVEBM.from_data(small_energy(2, 1, seed=seed), x, z_dim=1, pool=small_pool(seed=seed))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=len(x)) as i:
            lvebm("observations", ebm, obs=x[i])

    return ebm, model, x


def test_saved_model_loads_and_gives_the_stated_evidence(fitted: Run, data: Path) -> None:
    """Rebuilt with the same sites but other weights; the held-out number follows to the bit."""
    train, test = split(read_observations(data), 0.2, 3)
    ebm, model, x = rebuild(train, seed=8)
    before = [p.detach().clone() for p in ebm.f.parameters()]
    saddle = Saddle.load(
        fitted.out / "model.safetensors", model, AutoParticles(model, 2), Adam({"lr": 3e-3}), x
    )
    assert saddle.step_count == 30
    assert any(not torch.equal(a, b) for a, b in zip(before, ebm.f.parameters(), strict=True))
    log_z = LogPartition(**fitted.summary["log_partition"])
    held_out = torch.as_tensor(test, dtype=torch.float32)
    evidence = log_evidence(ebm, held_out, seed=3, log_z=log_z)
    stated = fitted.summary["held_out_log_evidence"]
    assert evidence.mean == pytest.approx(stated["estimate"], abs=1e-6)
    untrained, _, _ = rebuild(train, seed=8)
    other = log_evidence(untrained, held_out, seed=3, log_z=log_z)
    assert abs(other.mean - stated["estimate"]) > 1e-3


def test_the_same_command_gives_the_same_numbers(
    fitted: Run, data: Path, tmp_path: Path, quick: None
) -> None:
    """Also with progress bars, and into a folder that holds the files of another run."""
    (tmp_path / "summary.json").write_text("old")
    (tmp_path / "notes.txt").write_text("kept")
    short = ("--z-dim", "1", "--steps", "30", "--guide-steps", "10", "--seed", "3")
    refused = run("fit", data, *short, out=tmp_path)
    assert (
        refused.status == 2
        and "holds summary.json already; --resume goes on, --force" in refused.stderr
    )
    (tmp_path / "rows.csv").symlink_to(tmp_path / "notes.txt")
    again = run("fit", data, *short, "--validation", "0", "--force", out=tmp_path)
    assert again.status == 0
    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert "200 rows of 2 columns: left, right" in again.stderr
    for phase in job.PHASES:
        assert f"/{len(job.PHASES)}] {phase}" in again.stderr
    for bar in ("Saddle", "mean-field guide", "full-covariance guide", "amortised MLP encoder"):
        assert bar in again.stderr
    assert "30/30" in again.stderr and "log Z" in again.stderr
    for key in ("held_out_log_evidence", "log_partition", "baselines"):
        assert again.summary[key] == fitted.summary[key]
    tables = [r.table.drop(columns="seconds") for r in (again, fitted)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert {p.name for p in tmp_path.iterdir()} == OUTPUTS | {"notes.txt"}


@pytest.mark.usefixtures("brief_settling", "until_the_guides")
def test_validation_rows_decide_when_to_stop(
    data: Path, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a tenth of the rows that are not held out, which the fit never sees."""
    seen = {}
    fit = job.Saddle.fit

    def record(self: Saddle, *args: Any, **options: Any) -> list[float]:
        if "held_out" in options:
            seen["rows"] = [len(args[0]), len(options["held_out"][0]), options["patience"]]
        return fit(self, *args, **options)

    monkeypatch.setattr(job.Saddle, "fit", record)
    short = ("--z-dim", "1", "--steps", "8", "--base", "gaussian", "--quiet")
    result = run("fit", data, *short, out=tmp_path)
    assert result.status == 130 and seen["rows"] == [144, 16, 5]
    assert result.summary["data"] == {
        "train": [144, 2],
        "held_out": [40, 2],
        "validation": [16, 2],
    }
    refused = run("fit", data, "--validation", "1.5", out=tmp_path / "out")
    assert refused.status == 2 and "between 0 and 1" in refused.stderr


def test_the_base_is_that_of_the_training_rows_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base fitted to held-out or validation rows too would know what it is judged by."""
    seen: list[Tensor] = []

    def record(energy: Any, x: Tensor, **_: Any) -> Any:
        seen.append(x)
        raise ValueError("seen")

    monkeypatch.setattr(job.LVEBM, "from_data", record)
    assert run("fit", data, "--seed", "3", out=tmp_path / "out").status == 2
    rows, _ = split(read_observations(data), 0.2, 3)
    train, _ = split(rows, 0.1, 3, Stream.VALIDATION_SPLIT)
    assert len(seen) == 1 and torch.equal(seen[0], torch.as_tensor(train, dtype=torch.float32))


# --- interrupts ------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[None]:
    """Interrupts are: a process in the background of a shell starts with them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard", "until_the_guides")
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_a_fit_that_goes_on(
    fitted: Run, data: Path, tmp_path: Path, quick: None, sent: int, status: int
) -> None:
    """To the bit as if it had never been broken off, and of use before."""
    step, before = job.Saddle.scaled_step, signal.getsignal(signal.SIGTERM)

    def stopped(self: Saddle, *args: Any) -> float:
        if self.step_count == 12:
            os.kill(os.getpid(), sent)
        return step(self, *args)

    short = ("--z-dim", "1", "--steps", "30", "--guide-steps", "10", "--seed", "3", "--quiet")
    options = ("fit", data, *short, "--validation", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Saddle, "scaled_step", stopped)
        broken = run(*options, out=tmp_path)
    assert broken.status == status and broken.stdout == ""
    assert broken.stderr == f"interrupted: the fit so far is in {tmp_path}/, and --resume goes on\n"
    assert signal.getsignal(signal.SIGTERM) is before
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model"}
    drawn = run("sample", tmp_path, "--rows", "9", "--quiet", out=tmp_path / "draws.csv")
    assert drawn.status == 0 and len(pd.read_csv(tmp_path / "draws.csv")) == 9
    again = run(*options, out=tmp_path)
    assert again.status == 2 and "--resume goes on" in again.stderr
    other = run("fit", data, *short, "--validation", "0", "--seed", "4", "--resume", out=tmp_path)
    assert other.status == 2 and other.stderr == (
        f"error: {tmp_path}/model.safetensors is another fit than this command's:\n"
        "  --seed is 4, and was 3\n"
        "--resume takes the same data and options as before, and --force starts anew\n"
    )
    if sent == signal.SIGTERM:
        return
    resumed = run(*options, "--resume", out=tmp_path)
    assert resumed.status == 130 and resumed.stderr == broken.stderr
    assert resumed.summary["steps"] == 30
    for key in ("held_out_log_evidence", "log_partition", "baselines"):
        assert resumed.summary[key] == fitted.summary[key]
    pd.testing.assert_frame_equal(resumed.rows, fitted.rows, check_exact=True)


def test_an_interrupt_before_the_fit_keeps_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.LVEBM, "from_data", stop)
    broken = run("fit", data, "--quiet", out=tmp_path / "out")
    assert broken.status == 130 and broken.stderr == "interrupted: nothing kept\n"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"of another fit")
    broken = run("fit", data, "--quiet", "--force", out=tmp_path / "out")
    said = f"interrupted: nothing kept of this fit; {tmp_path}/out/ is as it was\n"
    assert broken.status == 130 and broken.stderr == said
    broken = run("fit", data, "--quiet", "--resume", out=tmp_path / "out")
    assert broken.status == 130 and "and --resume goes on" in broken.stderr


# --- demo -----------------------------------------------------------------------------------


@pytest.fixture
def tiny_digits() -> DigitsData:
    """4 × 2 pixels with three grey levels, dark below."""
    rng = np.random.default_rng(0)
    levels = rng.binomial(2, np.repeat([0.2, 0.3, 0.6, 0.7], 2), size=(90, 8)).astype(float)
    train, test = split(dequantise_logit(levels, 3, 0), 0.2, 0)
    return DigitsData(train, test, (4, 2), 3)


def test_demo_is_fit_on_the_digits(
    tiny_digits: DigitsData, tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[tuple[Any, ...]] = []
    seeds: list[int] = []

    def load(seed: int) -> DigitsData:
        seeds.append(seed)
        return tiny_digits

    def keep(*args: Any) -> Any:
        figures.append(args)
        return image_figure(*args)

    image_figure = job.image_figure
    monkeypatch.setattr(observations, "load_digits_data", load)
    monkeypatch.setattr(job, "image_figure", keep)
    monkeypatch.setattr(job, "save_figure", draw_figure)
    short = ("--z-dim", "2", "--steps", "4", "--guide-steps", "2", "--seed", "5", "--quiet")
    demo = run("demo", *short, out=tmp_path / "demo")
    assert demo.status == 0 and seeds == [5]
    assert {p.name for p in demo.out.iterdir()} == OUTPUTS | {"latents.png"}
    assert demo.summary["base"]["class"] == "GeneratorBase"
    assert demo.summary["data"] == {"train": [64, 8], "held_out": [18, 8], "validation": [8, 8]}
    assert set(demo.table.index) == POSTERIORS

    ((shown, draws, masked, below, table, results),) = figures
    assert results.table is table and results.history.index.max() == 4
    assert shown.shape == (64, 4, 2) and draws.shape == (100, 4, 2)
    assert masked.shape == (10, 4, 2) and below.shape == (30, 4, 2)
    # Grey levels, as they were before the noise.
    assert shown.min() >= 0.0 and shown.max() <= 3.0 and np.ptp(shown) > 2.0
    assert draws.min() >= 0.0 and draws.max() <= 3.0 and np.ptp(draws) > 2.0
    assert not np.isnan(masked[:, :2]).any() and np.isnan(masked[:, 2:]).all()
    first, second, truth = below.reshape(3, 10, 4, 2)
    # Float32 and back.
    for completed in (first, second):
        np.testing.assert_allclose(completed[:, :2], masked[:, :2], atol=1e-4)
        np.testing.assert_allclose(completed[:, :2], truth[:, :2], atol=1e-4)
        assert (np.abs(completed[:, 2:] - truth[:, 2:]) > 1e-3).mean() > 0.9
    assert (np.abs(first[:, 2:] - second[:, 2:]) > 1e-3).mean() > 0.9
    assert list(table.rows.index) == list(demo.table.index)


# --- bad input ------------------------------------------------------------------------------


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


NUMBERS = np.random.default_rng(0).normal(size=(40, 9))

GOOD_ROWS = "\n".join(f"{a},{b}" for a, b, *_ in NUMBERS) + "\n"

WIDE_ROWS = "\n".join(",".join(map(str, row)) for row in NUMBERS[:8])

BAD_FILES = {
    "ragged.csv": (GOOD_ROWS + "1,2,3\n", "not a table"),
    "short.csv": (GOOD_ROWS + "1\n", "row 41 has 1 of 2 cells"),
    "quarters.csv": (
        "a,b\n" + "\n".join(f"{a},{i % 4}" for i, a in enumerate(NUMBERS[:, 0])),
        "column b takes 4 values only, whole numbers",
    ),
    "semicolons.csv": (GOOD_ROWS.replace(",", ";").replace(".", ","), "--sep ';' --decimal ','"),
    "inf.csv": (GOOD_ROWS + "1,inf\n", "row 41, column 2 holds 'inf'"),
    "words.csv": (GOOD_ROWS + "1,red\n", "row 41, column 2 holds 'red'"),
    "empty.csv": ("", "the file is empty"),
    "header.csv": ("a,b\n", "a header and no rows"),
    "constant.csv": (
        GOOD_ROWS.replace(",", ",5,"),
        "columns column 2 are constant in the training rows",
    ),
    "few.csv": (WIDE_ROWS, "needs more than 9 rows; got 5"),
    "collinear.csv": ("\n".join(f"{a},{2 * a}" for a in NUMBERS[:, 0]), "singular"),
    "broken.npy": ("not an array", "cannot be read as NumPy data"),
    "table.txt": (GOOD_ROWS, "cannot read the suffix '.txt'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    """Exit status 2, one line that names the fault, and nothing in the output folder."""
    text, message = BAD_FILES[name]
    result = run("fit", write(tmp_path, name, text), "--quiet", out=tmp_path / "out")
    assert result.status == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert not result.out.exists()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = run("fit", tmp_path / "none.csv", out=tmp_path / "out")
    assert result.status == 2 and "none.csv: no such file" in result.stderr
    assert result.stderr.startswith("error: ") and not result.out.exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--z-dim", "0", "z_dim must be at least 1; got 0"),
        ("--z-dim", "-2", "z_dim must be at least 1; got -2"),
        ("--steps", "0", "num_steps must be at least 1; got 0"),
        ("--guide-steps", "-1", "guide_steps must be at least 1; got -1"),
        ("--held-out", "0", "held_out is 0.0"),
        ("--held-out", "1", "held_out is 1.0"),
        ("--held-out", "nan", "held_out is nan"),
        ("--held-out", "0.999", "leaves 0 rows for training"),
        ("--seed", "-1", "non-negative"),
    ],
)
def test_bad_settings(data: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    result = run("fit", data, f"{option}={value}", out=tmp_path / "out")
    assert result.status == 2 and result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not result.out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit",),
        ("train", "x.csv"),
        (),
        ("fit", "x.csv", "--steps", "many"),
        ("fit", "x.csv", "--z-dim", "two"),
        ("fit", "x.csv", "--base", "cubic"),
    ],
)
def test_arguments_that_do_not_parse(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments, out=tmp_path / "out")
    assert (
        result.status == 2 and "usage: pyro_lvebm" in result.stderr and "error: " in result.stderr
    )
    assert not result.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"num_particles": 0}, "num_particles must be at least 1; got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive; got nan"),
    ],
)
def test_settings_without_an_option(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JobSettings(**change)


def test_one_held_out_row_is_refused_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard error over held-out rows needs two."""
    monkeypatch.setattr(Saddle, "fit", lambda *args, **options: pytest.fail("it was fitted"))
    path = write(tmp_path, "five.csv", "1,2\n2,1\n3,5\n4,4\n0,7\n")
    result = run("fit", path, "--quiet", out=tmp_path / "out")
    assert result.status == 2 and "held out" in result.stderr and not result.out.exists()


@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_is_a_file(
    data: Path, tmp_path: Path, below: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Saddle, "fit", lambda *args, **options: pytest.fail("it was fitted"))
    file = write(tmp_path, "taken", "kept")
    result = run("fit", data, "--quiet", out=file / "out" if below else file)
    assert result.status == 2 and result.stderr.startswith("error: ")
    assert "taken" in result.stderr and file.read_text() == "kept"


# --- help -----------------------------------------------------------------------------------


def test_help_names_the_outputs_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fit", "demo"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert all(name in text for name in OUTPUTS)
        assert f"default: {JobSettings.num_steps}" in text
        for option in ("--z-dim", "--steps", "--guide-steps", "--seed", "--quiet", "--out"):
            assert option in text
    assert "default: demo" in text and "1,797" in text


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "pyro_lvebm", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert shown.returncode == 0 and "fit" in shown.stdout and "demo" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_module_ends_with_the_status_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pyro_lvebm", "fit", "none.csv", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("pyro_lvebm", run_name="__main__")
    assert stop.value.code == 2 and "none.csv: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (1.0, "float32"),
        (1e30, "float32"),
        (1e-30, "float32"),
        (1e-42, "float64"),
        (1e60, "float64"),
    ],
)
def test_precision_is_that_which_holds_the_data(column: float, dtype: str) -> None:
    values = NUMBERS[:, :2] * np.array([1.0, column])
    values[3, 1] = np.nan
    found, notes = job.choose_dtype(values, ["a", "b"])
    assert str(found) == f"torch.{dtype}"
    assert notes == () if dtype == "float32" else "how b varies" in notes[0]
    far, _ = job.choose_dtype(NUMBERS[:, :2] + np.array([0.0, 1e7]), ["a", "b"])
    assert far is torch.float64


@pytest.mark.usefixtures("brief_settling")
def test_incomplete_rows_in_any_unit(tmp_path: Path, quick: None) -> None:
    """Missing cells, whole numbers that are spread, labels, and numbers beyond float32."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(NUMBERS[:, :2], columns=["a", "b"])
    frame["tiny"] = 1e-60 * (frame["a"] + rng.normal(size=40))
    frame["count"] = rng.integers(0, 5, 40)
    frame.loc[[1, 9], "b"] = np.nan
    frame.loc[20, "tiny"] = np.nan
    frame.index = pd.Index([f"r{i}" for i in range(40)])
    frame.to_csv(tmp_path / "x.csv")
    short = ("--z-dim", "1", "--steps", "3", "--guide-steps", "2", "--validation", "0", "--quiet")
    options = ("--dequantise", "count", *short)
    done = run("fit", tmp_path / "x.csv", *options, out=tmp_path / "out")
    assert done.status == 0, done.stderr
    summary = done.summary
    assert summary["columns"] == ["a", "b", "tiny", "count"]
    assert summary["transforms"] == [{"name": "dequantise", "steps": {"count": 1.0}}]
    assert [b["baseline"] for b in summary["baselines"]] == ["full Gaussian, by EM"]
    assert "are left out" in done.stdout and "how tiny varies" in done.stdout
    assert list(done.rows["label"]) == list(frame.index) and done.rows["log_p"].notna().all()
    idata = az.from_netcdf(str(tmp_path / "out" / "posterior.nc"))
    assert set(idata["posterior"]["data"].values) <= set(frame.index)
    drawn = run("sample", tmp_path / "out", "--rows", "50", "--quiet", out=tmp_path / "d.csv")
    assert drawn.status == 0
    draws = pd.read_csv(tmp_path / "d.csv")
    assert (draws["count"] == draws["count"].round()).all()
    assert 1e-61 < draws["tiny"].abs().mean() < 1e-59
    filled = run("impute", tmp_path / "out", tmp_path / "x.csv", "--quiet", out=tmp_path / "f.csv")
    assert filled.status == 0
    completed = pd.read_csv(tmp_path / "f.csv")
    np.testing.assert_array_equal(completed["count"], frame["count"])
    assert completed["b"].notna().all() and abs(completed["tiny"][20]) < 1e-58
