# SPDX-License-Identifier: Apache-2.0
"""Whether the errors that `log_partition` and `log_evidence` state are the errors they make.

Prints one table and exits with status 1 if a row falls short of its goal. Five kinds of rows, each
against a closed form or quadrature:

- coverage: 95 % intervals of log Z over many seeds;
- forward: Ẑ / Z of the runs from the base, which is 1 in expectation;
- bracket: how often [lower, upper] holds log Z;
- ill-conditioned: error and seconds in 64 dimensions at condition number 1,000;
- evidence: 95 % intervals of log C(x) of single rows.

An interval is the estimate ± t standard errors, with t the 97.5 % quantile of Student's
distribution for `num_runs` − 1 degrees of freedom: with few runs the standard error is itself
uncertain, and 1.96 would cover less.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from scipy import stats
from torch import Tensor

from benchmarks.noise import noise
from benchmarks.tables import table
from pyro_lvebm import (
    LVEBM,
    LogPartition,
    MLPEnergy,
    QuadraticEnergy,
    TemperedPool,
    log_evidence,
    log_partition,
)
from pyro_lvebm.energies.whitened import WhitenedEnergy

CONFIDENCE = 0.95
"""Of every interval, and the share of brackets that must hold the truth."""

COLUMNS = ("kind", "problem", "what", "value", "low", "high", "seconds", "short", "note")
CONDITION = 30.0
COVERAGE_BAND = (0.90, 0.99)
BIAS_Z = 3.5
FALSE_ALARM = 1e-3
"""Of the binomial test in place of the band, where there are few repeats."""

MAX_ERROR, MAX_SECONDS = 0.1, 60.0
"""Nats and seconds of the ill-conditioned problem."""

QUICK_MAX_ERROR = 0.3
"""A quick run has an eighth of the particles, and so nearly three times the error."""

GRID_TOLERANCE = 1e-3
"""Nats by which two grids may differ, of which one is twice as fine: a tenth of what is judged."""

_SETTLING_REFRESHES = 100


@dataclass(frozen=True)
class Effort:
    """How often things are repeated, and how large one estimate is."""

    repeats: int
    chunk: int  # repeats of one task
    num_runs: int
    num_refreshes: int
    max_particles: int
    hard_seeds: int
    hard_particles: int
    hard_runs: int
    num_data: int


FULL = Effort(200, 25, 8, 20, 256, 3, 1024, 16, 200)
QUICK = Effort(30, 30, 4, 8, 64, 1, 256, 8, 60)


@dataclass(frozen=True)
class Problem:
    """A model with a known log Z.

    Args:
        name: Its name in the table.
        build: Returns the model, always the same.
        num_particles: Particles of each run, so that all repeats take about three minutes.
        spacing: Of the coarser grid of the quadrature; None where log Z has a closed form.
    """

    name: str
    build: Callable[[], LVEBM]
    num_particles: int
    spacing: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table: what was reached, and between which limits it should lie."""

    kind: str
    problem: str
    what: str
    value: float
    low: float
    high: float
    seconds: float
    note: str = ""

    @property
    def short(self) -> bool:
        """Whether the value lies outside its limits; a NaN does."""
        return not self.low <= self.value <= self.high


class Repeats(NamedTuple):
    """Results of repeated estimates of one log Z, each array (repeats,), in nats and seconds."""

    estimate: np.ndarray
    std_error: np.ndarray
    forward: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    seconds: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Repeats]) -> Repeats:
        """Return the repeats of all parts together."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def standard_lvebm(energy: WhitenedEnergy, pool: TemperedPool) -> LVEBM:
    """Return a model whose bases are standard normal."""
    base_x, base_z = (
        dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
        for dim in (energy.x_dim, energy.z_dim)
    )
    return LVEBM(energy, base_x, base_z, pool)


def quadratic(dim: int, condition: float, pool: TemperedPool | None = None) -> LVEBM:
    """Return a Gaussian model in random directions, wider than its base in some of them."""
    z_dim = 1 if dim == 2 else 2
    energy = QuadraticEnergy(dim - z_dim, z_dim)
    generator = noise(0, dim)
    square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(square).Q
    # Not symmetric about 1, so that log det does not vanish.
    powers = torch.linspace(-0.4, 0.6, dim, dtype=torch.float64)
    precision = (vectors * condition**powers) @ vectors.T
    linear = 0.5 * torch.randn(dim, generator=generator)
    energy.set_precision(0.5 * (precision + precision.T).float(), linear)
    return standard_lvebm(energy, TemperedPool(6, 64) if pool is None else pool)


def neural(x_dim: int, seed: int, scale: float = 10.0) -> LVEBM:
    """Return a model with a random network for its energy and one latent dimension."""
    energy = MLPEnergy(x_dim, 1, hidden=(32, 32), seed=seed)
    weight = energy.out.weight
    with torch.no_grad():
        weight.copy_(scale * torch.randn(weight.shape, generator=noise(seed, 1)))
    return standard_lvebm(energy, TemperedPool(6, 64))


# Networks and scale: log Z = 2.8 and 2.2.
PROBLEMS = (
    Problem("quadratic, d = 64", partial(quadratic, 64, CONDITION), 128),
    Problem("quadratic, d = 32", partial(quadratic, 32, CONDITION), 128),
    Problem("quadratic, d = 8", partial(quadratic, 8, CONDITION), 256),
    Problem("quadratic, d = 2", partial(quadratic, 2, CONDITION), 256),
    Problem("network, 3 + 1", partial(neural, 3, 0), 128, spacing=0.36),
    Problem("network, 2 + 1", partial(neural, 2, 1), 128, spacing=0.3),
)
QUICK_PROBLEMS = (PROBLEMS[1], PROBLEMS[-1])
"""One with a closed form in many dimensions, and one with quadrature."""
EVIDENCE = Problem("quadratic, d = 6 + 2", partial(quadratic, 8, CONDITION), 256)


def in_double(ebm: LVEBM) -> WhitenedEnergy:
    """Return a copy of the energy in float64 and without gradients."""
    energy = copy.deepcopy(ebm.f).double().requires_grad_(False)
    assert isinstance(energy, WhitenedEnergy)
    return energy


def truth(problem: Problem) -> float:
    """Return log Z by the closed form, or by quadrature on a grid that a coarser one confirms."""
    torch.set_num_threads(1)
    energy = in_double(problem.build())
    if isinstance(energy, QuadraticEnergy):
        return float(energy.log_partition())
    assert problem.spacing is not None
    coarse, fine = (quadrature(energy, problem.spacing / k) for k in (1, 2))
    if abs(coarse - fine) > GRID_TOLERANCE:
        raise RuntimeError(f"{problem.name}: quadrature gives {coarse:.5f}, and then {fine:.5f}")
    return fine


@torch.no_grad()
def quadrature(energy: WhitenedEnergy, spacing: float, radius: float = 6.0) -> float:
    """Return log Z by the rectangle rule on a ball, in the precision of the energy."""
    dim, dtype = energy.dim, next(energy.parameters()).dtype
    half = round(radius / spacing)
    axis = spacing * torch.arange(-half, half + 1, dtype=dtype)
    plane = torch.cartesian_prod(*[axis] * (dim - 1)).reshape(-1, dim - 1)
    square = (plane * plane).sum(-1)
    sums = []
    for first in axis:
        rest = plane[square + first**2 <= radius**2]
        # In parts that stay in the cache.
        for part in rest.split(2**14):
            u = torch.cat([first.expand(len(part), 1), part], 1)
            sums.append(torch.logsumexp(-energy.whitened(u) - 0.5 * (u * u).sum(-1), 0))
    total = float(torch.logsumexp(torch.stack(sums), 0))
    return total + dim * (math.log(spacing) - 0.5 * math.log(2 * math.pi))


def repeat(
    problem: Problem,
    seeds: Sequence[int],
    effort: Effort,
    estimator: Callable[..., LogPartition] = log_partition,
) -> Repeats:
    """Estimate log Z once for each seed, each time from the same settled pool."""
    torch.set_num_threads(1)
    ebm = problem.build()
    for _ in range(_SETTLING_REFRESHES):
        ebm.pool.refresh(ebm)
    rows = []
    for seed in seeds:
        # The pool's own seed fixes how its chains move. Were it the same in all repeats, so would
        # the model draws be, and their error could look like a bias.
        ebm.pool.seed = seed + 1
        start = time.perf_counter()
        result = estimator(
            ebm,
            seed=seed,
            num_particles=min(problem.num_particles, effort.max_particles),
            num_runs=effort.num_runs,
            num_refreshes=effort.num_refreshes,
        )
        seconds = time.perf_counter() - start
        rows.append([*(getattr(result, name) for name in Repeats._fields[:-1]), seconds])
    return Repeats(*np.array(rows, dtype=float).reshape(-1, len(Repeats._fields)).T)


def covered(error: np.ndarray, std_error: np.ndarray, num_runs: int) -> np.ndarray:
    """Return which errors lie within Student's 95 % interval; one that is NaN does not."""
    t = float(stats.t.ppf(0.5 + 0.5 * CONFIDENCE, num_runs - 1))
    result: np.ndarray = np.abs(error) <= t * std_error
    return result


def coverage_limits(count: int, quick: bool) -> tuple[float, float]:
    """Return between which limits a coverage over `count` trials should lie."""
    if not quick:
        return COVERAGE_BAND
    law = stats.binom(count, CONFIDENCE)
    hits = np.arange(count + 1)
    tails = np.minimum(law.cdf(hits), law.sf(hits - 1))
    accepted = hits[tails > 0.5 * FALSE_ALARM]
    return float(accepted[0]) / count, float(accepted[-1]) / count


def bracket_limits(count: int, quick: bool) -> tuple[float, float]:
    """Return between which limits the share of brackets that hold the truth should lie."""
    if not quick:
        return CONFIDENCE, 1.0
    hits = np.arange(count + 1)
    accepted = hits[stats.binom(count, CONFIDENCE).cdf(hits) > FALSE_ALARM]
    return float(accepted[0]) / count, 1.0


def rows_of(name: str, log_z: float, repeats: Repeats, num_runs: int, quick: bool) -> list[Row]:
    """Judge repeated estimates of one log Z: intervals, the forward estimate, and brackets."""
    count, seconds = len(repeats.estimate), float(repeats.seconds.sum())
    return [
        coverage_row(
            "coverage",
            name,
            f"interval of log Z, {count} seeds",
            repeats.estimate - log_z,
            repeats.std_error,
            num_runs,
            quick,
            seconds,
            f"log Z = {log_z:.4f}",
        ),
        forward_row(name, repeats.forward - log_z, seconds),
        bracket_row(name, log_z, repeats, quick, seconds),
    ]


def coverage_row(
    kind: str,
    name: str,
    what: str,
    error: np.ndarray,
    std_error: np.ndarray,
    num_runs: int,
    quick: bool,
    seconds: float,
    note: str = "",
) -> Row:
    """Judge how often intervals hold the truth; bias and size of the errors are for information."""
    stated = math.sqrt(np.mean(std_error**2))
    rms = math.sqrt(np.mean(error**2))
    scatter = float(error.std(ddof=1)) / math.sqrt(len(error))
    return Row(
        kind,
        name,
        what,
        float(covered(error, std_error, num_runs).mean()),
        *coverage_limits(len(error), quick),
        seconds,
        f"bias {error.mean() / stated:+.2f} ± {scatter / stated:.2f} s.e.; rms error {rms:.4f}, "
        f"stated {stated:.4f}{'; ' if note else ''}{note}",
    )


def forward_row(name: str, log_ratio: np.ndarray, seconds: float) -> Row:
    """Judge by Student's test whether Ẑ / Z has mean 1."""
    ratio = np.exp(log_ratio)
    error = float(ratio.std(ddof=1)) / math.sqrt(len(ratio))
    mean = float(ratio.mean())
    z = (mean - 1.0) / error if error > 0.0 else math.nan
    alarms = 2.0 * float(stats.t.sf(BIAS_Z, len(ratio) - 1))
    return Row(
        "forward",
        name,
        "z of mean Ẑ / Z = 1",
        z,
        -BIAS_Z,
        BIAS_Z,
        seconds,
        f"mean {mean:.4f} ± {error:.4f}; false-alarm rate {alarms:.1g}",
    )


def bracket_row(name: str, log_z: float, repeats: Repeats, quick: bool, seconds: float) -> Row:
    """Judge how often the bracket holds the truth."""
    below, above = repeats.lower > log_z, repeats.upper < log_z
    held = (repeats.lower <= log_z) & (log_z <= repeats.upper)
    width = float((repeats.upper - repeats.lower).mean())
    return Row(
        "bracket",
        name,
        f"[lower, upper], {len(held)} seeds",
        float(held.mean()),
        *bracket_limits(len(held), quick),
        seconds,
        f"mean width {width:.3f}; {below.sum()} lower ends too high, {above.sum()} upper too low",
    )


def hard_run(seed: int, effort: Effort) -> tuple[float, float, float]:
    """Return error, standard error and seconds of an ill-conditioned problem, from a fresh pool."""
    torch.set_num_threads(1)
    ebm = quadratic(64, 1000.0, TemperedPool(seed=seed))
    energy = in_double(ebm)
    assert isinstance(energy, QuadraticEnergy)
    start = time.perf_counter()
    result = log_partition(
        ebm, seed=seed, num_particles=effort.hard_particles, num_runs=effort.hard_runs
    )
    seconds = time.perf_counter() - start
    return result.estimate - float(energy.log_partition()), result.std_error, seconds


def hard_rows(runs: Sequence[tuple[float, float, float]], quick: bool) -> list[Row]:
    """Judge the largest error and the longest time over seeds."""
    errors, std_errors, seconds = (np.array(column) for column in zip(*runs, strict=True))
    name = "quadratic, d = 64, condition 1,000"
    note = ", ".join(f"{e:+.4f} ± {s:.4f}" for e, s in zip(errors, std_errors, strict=True))
    limit = QUICK_MAX_ERROR if quick else MAX_ERROR
    # The largest of values that include a NaN is NaN, which falls short.
    worst, longest = float(np.max(np.abs(errors))), float(seconds.max())
    what = f"of {len(runs)} seeds"
    return [
        Row("ill-conditioned", name, f"largest error {what}", worst, 0.0, limit, longest, note),
        Row("ill-conditioned", name, f"most seconds {what}", longest, 0.0, MAX_SECONDS, longest),
    ]


def evidence_row(effort: Effort, quick: bool) -> Row:
    """Judge intervals of log C(x), which are those of log p(x) where log Z is exact."""
    torch.set_num_threads(1)
    ebm, exact = EVIDENCE.build(), truth(EVIDENCE)
    x = quadratic_data(ebm, effort.num_data)
    num_runs = 8
    cheap = log_partition(ebm, num_particles=64, num_runs=2, num_refreshes=1)
    log_z = replace(cheap, estimate=exact, std_error=0.0, lower=exact, upper=exact)
    start = time.perf_counter()
    result = log_evidence(ebm, x, seed=0, num_runs=num_runs, log_z=log_z)
    seconds = time.perf_counter() - start
    energy = in_double(ebm)
    assert isinstance(energy, QuadraticEnergy)
    error = result.value.double() - energy.log_evidence(x.double())
    return coverage_row(
        "evidence",
        EVIDENCE.name,
        f"interval of log C(x), {len(x)} rows",
        error.numpy(),
        result.std_error.double().numpy(),
        num_runs,
        quick,
        seconds,
    )


def quadratic_data(ebm: LVEBM, count: int) -> Tensor:
    """Return draws x (count, d_x) of a Gaussian model whose bases are standard normal."""
    energy = in_double(ebm)
    assert isinstance(energy, QuadraticEnergy)
    white = torch.randn(count, ebm.dim, dtype=torch.float64, generator=noise(0, 2))
    covariance = torch.cholesky_inverse(energy.tril)
    u = white @ torch.linalg.cholesky(covariance).T - covariance @ energy.linear
    return u[:, : energy.x_dim].float()


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rows, print the table, and return 1 if a row falls short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller repeats")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    effort = QUICK if args.quick else FULL
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        hard = [pool.submit(hard_run, seed, effort) for seed in range(effort.hard_seeds)]
        problems = QUICK_PROBLEMS if args.quick else PROBLEMS
        work = [_submit(pool, problem, effort) for problem in problems]
        evidence = pool.submit(evidence_row, effort, args.quick)
        rows = []
        for problem, (log_z, parts) in zip(problems, work, strict=True):
            repeats = Repeats.join([part.result() for part in parts])
            rows += rows_of(problem.name, log_z.result(), repeats, effort.num_runs, args.quick)
            print(rows[-3].problem, rows[-3].value, rows[-3].note, file=sys.stderr, flush=True)
        rows += hard_rows([run.result() for run in hard], args.quick)
        rows.append(evidence.result())
    print(heading(effort, args.quick))
    print(table(by_kind(rows), COLUMNS))
    return int(any(row.short for row in rows))


def _submit(
    pool: ProcessPoolExecutor, problem: Problem, effort: Effort
) -> tuple[Future[float], list[Future[Repeats]]]:
    starts = range(0, effort.repeats, effort.chunk)
    seeds = [range(k, min(k + effort.chunk, effort.repeats)) for k in starts]
    return pool.submit(truth, problem), [pool.submit(repeat, problem, s, effort) for s in seeds]


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with those of one kind together, kinds in the order in which they appear."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    return sorted(rows, key=lambda row: kinds.index(row.kind))


def heading(effort: Effort, quick: bool) -> str:
    """Say what an interval is and how its coverage is judged."""
    judged = f"binomial tests at false-alarm rate {FALSE_ALARM:g}" if quick else "fixed limits"
    return (
        "Intervals of 95 % by Student's t with num_runs − 1 degrees of freedom; "
        f"{effort.num_runs} runs for log Z.\n"
        f"Quadratic energies have condition number {CONDITION:g} where no other is given.\n"
        f"Coverage and brackets are judged by {judged}. Seconds are those of all repeats."
    )


if __name__ == "__main__":
    raise SystemExit(main())
