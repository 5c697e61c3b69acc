# SPDX-License-Identifier: Apache-2.0
"""Training with default settings on many data sets, beside mixtures and other libraries.

Prints one table and exits with status 1 if a row falls short of its goal. Four kinds of rows:

- suite: held-out log p(x) against the best Gaussian mixture that cross-validation finds;
- rates: the same data at four learning rates and several seeds;
- online: log Z online against quadrature all through training;
- peers: other libraries with as many gradient evaluations as the longest fit, where installed;
  these are not judged.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.optim import Adam
from torch import Tensor

from benchmarks.mixtures import best_mixture
from benchmarks.peers import DOCUMENTED, TUNED, available, run_peer
from benchmarks.suite import NAMES, DataSet, load
from benchmarks.tables import table
from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, Saddle, log_evidence, log_partition, lvebm
from pyro_lvebm.data import split
from pyro_lvebm.pools.tempered import TemperedPool
from pyro_lvebm.training.fit import half_cosine

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
RATE_SETS = ("two moons", "8 Gaussians", "Lorenz-63", "digits")
PEER_SETS = ("two moons", "8 Gaussians", "Lorenz-63")
QUICK_SETS = ("two moons", "digits")
"""Suite rows of a quick run: one set with few columns, and one with many."""
QUICK_RATES = (RATES[0], RATES[-1])
LEARNING_RATE, BATCH, NUM_PARTICLES = 3e-3, 256, 2
SMALL = 1000
"""Rows below which two held-out parts are too few to choose the number of steps."""
COLUMNS = ("kind", "data", "what", "value", "std_error", "goal", "seconds", "short", "note")
TOLERANCE = 0.02
"""Nats per datum by which rows in 2-D and 3-D may stay behind the best mixture."""
LOG_Z_ERROR = 0.0015
"""Standard error of log Z there, which decides the number of runs."""
FEW_RUNS = 8
"""Runs of log Z elsewhere: fewer widen the bracket, which counts against us."""
QUICK_HELP = "one seed, a few steps, and of rates and online only two moons"
DATA_HELP = f"all by default; with --quick {' and '.join(QUICK_SETS)}"
SEEDS_HELP = "seeds of our fits at each learning rate; the first is that of suite and online too"


@dataclass(frozen=True)
class Effort:
    """How long things run."""

    num_steps: int
    rate_steps: int
    rate_every: int
    online_steps: int
    online_every: int
    patience: int
    log_z_particles: int
    log_z_runs: int
    seeds: int
    refit: bool


FULL = Effort(5000, 1000, 100, 1000, 20, 8, 2048, 64, 5, True)
QUICK = Effort(150, 60, 12, 60, 20, 8, 512, 8, 1, False)


@dataclass(frozen=True)
class Row:
    """One line of the table: what was reached, what was asked for, and how sure both are."""

    kind: str
    data: str
    what: str
    value: float
    std_error: float
    goal: float
    seconds: float
    note: str = ""

    @property
    def short(self) -> bool:
        """Whether the value falls short of the goal; a NaN does, a missing goal never."""
        return not math.isnan(self.goal) and not self.value >= self.goal


def build(data: DataSet, x: Tensor, rate: float, seed: int) -> tuple[LVEBM, Saddle]:
    """Return an untrained model of rows x, with default settings."""
    pyro.clear_param_store()
    energy = MLPEnergy(x.shape[1], data.z_dim, seed=seed)
    ebm = LVEBM.from_data(energy, x, z_dim=data.z_dim, pool=TemperedPool(seed=seed))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=min(BATCH, len(x))) as i:
            lvebm("x", ebm, obs=x[i])

    guide = AutoParticles(model, NUM_PARTICLES)
    return ebm, Saddle(model, guide, Adam({"lr": rate}), seed=seed)


def train(data: DataSet, effort: Effort, seed: int) -> tuple[LVEBM, Saddle]:
    """Choose the number of steps on held-out parts of the training rows, then fit all of them.

    Mixtures are chosen by cross-validation and fitted to all rows in the same way. The last fit
    has a whole schedule, and as many steps as make the sum of its factors that of the best step.
    """
    x = torch.as_tensor(data.train, dtype=torch.float32)
    num_steps = effort.num_steps
    if effort.refit:
        factors = half_cosine_factors(effort.num_steps)
        best = best_step(data, effort, seed)
        num_steps = round(effort.num_steps * factors[:best].sum() / factors.sum())
    ebm, saddle = build(data, x, LEARNING_RATE, seed)
    if num_steps:
        saddle.fit(x, num_steps=num_steps, progress=False)
    return ebm, saddle


def best_step(data: DataSet, effort: Effort, seed: int) -> int:
    """Return the step that is best on average over splits: two splits of large sets, five of small.

    Of large sets the mean over five evaluations stands for the one in their middle: the noise of
    log Z is as large as what a few hundred steps change. A fit that stopped keeps the last value
    of its curve, which is worse than its best.
    """
    small = len(data.train) < SMALL
    curves = []
    for number in range(5 if small else 2):
        parts = split(data.train, 0.2, seed + number)
        fit, held_out = (torch.as_tensor(part, dtype=torch.float32) for part in parts)
        _, saddle = build(data, fit, LEARNING_RATE, seed)
        saddle.fit(
            fit,
            num_steps=effort.num_steps,
            held_out=(held_out,),
            patience=effort.patience * (2 if small else 1),
            evaluate_every=25 if small else 100,
            progress=False,
        )
        curve = saddle.history["log_evidence"].dropna()
        curves.append(curve if small else curve.rolling(5, center=True, min_periods=3).mean())
    return int(pd.concat(curves, axis=1).ffill().mean(axis=1).idxmax())


def half_cosine_factors(num_steps: int) -> np.ndarray:
    """Return the factors of all steps of a fit under the default schedule."""
    return np.array([half_cosine(t / num_steps) for t in range(num_steps)])


def suite_row(name: str, effort: Effort, quick: bool, seed: int) -> Row:
    """Train on one data set and compare with the best mixture."""
    torch.set_num_threads(1)
    data = load(name)
    tolerance = TOLERANCE if data.train.shape[1] <= 3 else 0.0
    start = time.perf_counter()
    ebm, saddle = train(data, effort, seed)
    seconds = time.perf_counter() - start
    log_z = log_partition(
        ebm,
        seed=1,
        num_particles=effort.log_z_particles,
        num_runs=effort.log_z_runs if tolerance else FEW_RUNS,
        relative_ess=0.99,
        target_se=LOG_Z_ERROR if tolerance and not quick else None,
    )
    test = torch.as_tensor(data.test, dtype=torch.float32)
    ours = log_evidence(ebm, test, seed=1, log_z=log_z).lower.double().numpy()
    mixture = best_mixture(data.train, data.test, seed=0, quick=quick)
    difference = ours - mixture.held_out.log_evidence
    return Row(
        "suite",
        name,
        "held-out log p(x), upper log Z, minus best mixture",
        float(difference.mean()),
        float(difference.std(ddof=1)) / math.sqrt(len(difference)),
        math.nan if quick else -tolerance,
        seconds,
        f"ours {ours.mean():.4f}, {mixture.name} {mixture.log_evidence:.4f}; {log_z}; "
        f"{saddle.step_count} steps",
    )


def rate_run(name: str, rate: float, seed: int, effort: Effort) -> tuple[float, float, float]:
    """Train at one rate; return best and final held-out log evidence, and seconds."""
    torch.set_num_threads(1)
    data = load(name)
    x, test = (torch.as_tensor(part, dtype=torch.float32) for part in (data.train, data.test))
    _, saddle = build(data, x, rate, seed)
    start = time.perf_counter()
    saddle.fit(
        x,
        num_steps=effort.rate_steps,
        held_out=(test,),
        evaluate_every=effort.rate_every,
        progress=False,
    )
    curve = saddle.history["log_evidence"].dropna()
    return float(curve.max()), float(curve.iloc[-1]), time.perf_counter() - start


def rate_rows(
    results: dict[tuple[str, float, int], tuple[float, float, float]], quick: bool
) -> list[Row]:
    """Turn all runs at all rates into rows: loss from each run's best, and spread of rates.

    The spread of a quick run says how far each rate came in a few steps, and has no goal.
    """
    rows = []
    for name in RATE_SETS:
        runs = {key[1:]: value for key, value in results.items() if key[0] == name}
        if not runs:
            continue
        seconds = float(np.mean([run[2] for run in runs.values()]))
        worst = float(np.min([final - best for best, final, _ in runs.values()]))  # or NaN
        rows.append(
            Row("rates", name, f"final minus best, worst of {len(runs)}", worst, 0, -0.1, seconds)
        )
        by_rate = pd.Series({key: run[1] for key, run in runs.items()}).groupby(level=0).mean()
        spread = float(by_rate.max() - by_rate.min())
        goal = math.nan if quick or name == "digits" else -0.1
        note = ", ".join(f"{rate:g}: {value:.3f}" for rate, value in by_rate.items())
        rows.append(Row("rates", name, "minus spread over rates", -spread, 0, goal, seconds, note))
    return rows


def online_row(name: str, effort: Effort, seed: int) -> Row:
    """Compare log Z online with quadrature all through a fit."""
    torch.set_num_threads(1)
    data = load(name)
    x = torch.as_tensor(data.train, dtype=torch.float32)
    ebm, saddle = build(data, x, LEARNING_RATE, seed)
    errors = []

    def check(progress: float) -> float:
        step = round(progress * effort.online_steps)
        if step and step % effort.online_every == 0:
            # The pool follows the θ before the last update.
            errors.append(float(ebm.log_partition) - _quadrature_at_pool(ebm))
        return half_cosine(progress)

    start = time.perf_counter()
    saddle.fit(x, num_steps=effort.online_steps, schedule=check, progress=False)
    errors.append(float(ebm.log_partition) - quadrature(ebm))
    worst = float(np.abs(errors).max())
    rms = float(np.sqrt(np.mean(np.square(errors))))
    return Row(
        "online",
        name,
        f"minus largest error of log Z, {len(errors)} times",
        -worst,
        0.0,
        -0.1,
        time.perf_counter() - start,
        f"root mean square {rms:.4f}",
    )


def _quadrature_at_pool(ebm: LVEBM) -> float:
    params = list(ebm.f.parameters())
    own = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, old in zip(params, ebm.pool.theta, strict=True):
            p.copy_(old)
        value = quadrature(ebm)
        for p, new in zip(params, own, strict=True):
            p.copy_(new)
    return value


@torch.no_grad()
def quadrature(ebm: LVEBM, half_width: float = 5.5, points: int = 101) -> float:
    """Return log Z by the rectangle rule, for three dimensions in all."""
    axis = torch.linspace(-half_width, half_width, points).to(ebm.base_x.loc)
    plane = torch.cartesian_prod(*[axis] * (ebm.dim - 1))
    sums = []
    for first in axis:
        u = torch.cat([first.expand(len(plane), 1), plane], 1)
        sums.append(torch.logsumexp((-ebm.residual(u) - ebm.base.energy(u)).double(), 0))
    cell = ebm.dim * math.log(2 * half_width / (points - 1))
    total = float(torch.logsumexp(torch.stack(sums), 0))
    return total + cell - 0.5 * ebm.dim * math.log(2 * math.pi)


def peer_row(name: str, peer: str, tuned: bool, effort: Effort) -> Row:
    """Run another library on the budget of our own training."""
    torch.set_num_threads(1)
    data = load(name)
    per_step = 8 * (1024 + BATCH * NUM_PARTICLES)
    recipe = (TUNED if tuned else DOCUMENTED)[peer]
    result = run_peer(
        peer,
        data.train,
        data.test,
        gradient_evaluations=max(effort.num_steps * per_step, recipe.cost(1)),
        seed=0,
        recipe=recipe,
    )
    return Row(
        "peers",
        name,
        f"{peer} {result.version}, {'tuned' if tuned else 'documented'}: held-out log p(x)",
        -result.nll,
        result.std_error,
        math.nan,
        result.seconds,
        result.note,
    )


def tasks(
    effort: Effort, quick: bool, kinds: Sequence[str], sets: Sequence[str] = NAMES, seed: int = 0
) -> list[Callable[[], Row]]:
    """Return the work of all rows but those of the rates.

    The seed is that of our fits; data, mixtures and other libraries have seeds of their own.
    """
    work: list[Callable[[], Row]] = []
    if "suite" in kinds:
        # The longest first, so that no process is left alone with it.
        order = sorted(sets, key=lambda name: name != "digits")
        work += [partial(suite_row, name, effort, quick, seed) for name in order]
    if "online" in kinds:
        names = ("two moons",) if quick else ("two moons", "pinwheel", "8 Gaussians")
        work += [partial(online_row, name, effort, seed) for name in names if name in sets]
    if "peers" in kinds:
        work += [
            partial(peer_row, name, peer, tuned, effort)
            for name in (PEER_SETS[:1] if quick else PEER_SETS)
            if name in sets
            for peer in available()
            for tuned in (False, True)
        ]
    return work


def sweep(quick: bool, sets: Sequence[str] = NAMES) -> list[tuple[str, float]]:
    """Return the data set and the learning rate of each run of one seed for the rows of rates."""
    names, rates = (RATE_SETS[:1], QUICK_RATES) if quick else (RATE_SETS, RATES)
    return [(name, rate) for name in names if name in sets for rate in rates]


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows, print the table, and return 1 if a row falls short."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("suite", "online", "peers", "rates")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    parser.add_argument("--rows", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--data", nargs="+", choices=NAMES, help=DATA_HELP)
    parser.add_argument("--seeds", nargs="+", type=int, help=SEEDS_HELP)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    effort = QUICK if args.quick else FULL
    sets = args.data or (QUICK_SETS if args.quick else NAMES)
    seeds = range(effort.seeds) if args.seeds is None else args.seeds
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        work = tasks(effort, args.quick, args.rows, sets, seeds[0])
        futures = [pool.submit(task) for task in work]
        for future in futures:
            future.add_done_callback(_announce)
        runs = {
            (name, rate, seed): pool.submit(rate_run, name, rate, seed, effort)
            for seed in (seeds if "rates" in args.rows else ())
            for name, rate in sweep(args.quick, sets)
        }
        for key, run in runs.items():
            run.add_done_callback(partial(_announce_run, key))
        rows = [future.result() for future in futures]
        rows += rate_rows({key: future.result() for key, future in runs.items()}, args.quick)
    print(table(rows, COLUMNS))
    return int(any(row.short for row in rows))


def _announce(future: Future[Row]) -> None:
    """Show on standard error what is done; the table comes at the end."""
    if not future.cancelled() and future.exception() is None:
        row = future.result()
        value = f"{row.what} {row.value:.4f} ± {row.std_error:.2g}, {row.seconds:.0f} s"
        print(f"{row.kind}, {row.data}: {value} {row.note}", file=sys.stderr, flush=True)


def _announce_run(key: tuple[str, float, int], future: Future[tuple[float, float, float]]) -> None:
    """Show one run of the sweep on standard error: a sweep that is stopped is not lost."""
    if not future.cancelled() and future.exception() is None:
        best, final, seconds = future.result()
        name, rate, seed = key
        text = f"rate {rate:g}, seed {seed}: best {best:.4f}, final {final:.4f}, {seconds:.0f} s"
        print(f"rates, {name}: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
