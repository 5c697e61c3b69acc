# SPDX-License-Identifier: Apache-2.0
"""Does a rare mode of the data break training? Fits over shares, distances and rates.

Every run fits a network at its defaults to a mixture of Gaussians with a rare mode, at one rate
from the first step to the last, and compares log Z online four times with the exact value. In the
end, at the averages that `Saddle.fit` would end with, it looks at the share of the model in each
mode, at held-out log p(x), and at the bracket of log Z. The exact values come from importance
sampling with the law of the data as half of the proposals, and from quadrature over the one
latent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.optim
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from pyro_lvebm import LVEBM, AutoParticles, MLPEnergy, Saddle, log_partition, lvebm

ROWS, HELD_OUT = 3000, 2000

PROPOSALS = 100_000

RATES = (3e-4, 1e-3, 2e-3, 1e-2)

MAX_ERROR, MAX_LOSS, MAX_SHARE_Z = 0.1, 0.02, 3.0
"""Goals: of log Z online and of held-out log p(x) in nats, and of shares in standard errors."""


@dataclass(frozen=True)
class Mixture:
    """A mixture of round Gaussians: the law of the data."""

    name: str
    shares: tuple[float, ...]
    centres: tuple[tuple[float, ...], ...]
    scales: tuple[float, ...]

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        """Return rows (count, d)."""
        k = rng.choice(len(self.shares), count, p=self.shares)
        centres, scales = np.array(self.centres)[k], np.array(self.scales)[k, None]
        return torch.from_numpy(centres + scales * rng.normal(size=centres.shape)).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density (n,) of rows x (n, d)."""
        means, scales = (torch.tensor(part).to(x) for part in (self.centres, self.scales))
        d = x.shape[1]
        square = torch.cdist(x, means).square() / scales**2
        log_norm = d * scales.log() + 0.5 * d * math.log(2 * math.pi)
        return torch.logsumexp(torch.tensor(self.shares).to(x).log() - 0.5 * square - log_norm, 1)


def plane(share: float, distance: float, scale: float = 1.0) -> Mixture:
    """A standard normal, and a rare mode so many standard deviations away."""
    at = distance / math.sqrt(2.0)
    name = f"2-D, {share:.0%} at {distance:g}"
    name += "" if scale == 1.0 else f", width {scale:g}"
    return Mixture(name, (1.0 - share, share), ((0.0, 0.0), (at, at)), (1.0, scale))


def tenth(share: float) -> Mixture:
    """Three modes in ten dimensions, two of them rare."""
    zero, far, aside = np.zeros(10), np.full(10, 2.0), np.tile([2.0, -2.0], 5)
    centres = tuple(tuple(c.tolist()) for c in (zero, far, aside))
    return Mixture(
        f"10-D, two of {share:.0%}", (1 - 2 * share, share, share), centres, (1.0, 0.7, 1.2)
    )


MIXTURES = (
    *(plane(s, d) for s, d in itertools.product((0.01, 0.02, 0.05, 0.1), (4.0, 6.0, 10.0))),
    plane(0.05, 6.0, 0.05),
    tenth(0.02),
    tenth(0.05),
)

QUICK = (plane(0.05, 6.0),)


@dataclass(frozen=True)
class Run:
    """One fit: what it is of."""

    mixture: str
    optimiser: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What a fit came to, in nats."""

    log_z_error: float  # online, from the exact value: the worst of four looks
    share_z: float  # of the share of a mode, in standard errors of the data's
    loss: float  # held-out log p(x) of the mixture fitted with the right size, minus ours
    std_error: float  # of the loss, over held-out rows
    held: bool  # whether the bracket of log Z holds the exact value
    width: float  # of the bracket
    components: int
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether a goal is missed; a NaN is."""
        return not (
            self.log_z_error <= MAX_ERROR
            and self.share_z <= MAX_SHARE_Z
            and self.loss <= MAX_LOSS + 2.0 * self.std_error
            and self.held
        )


def fit(run: Run, num_steps: int) -> Result:
    """Fit once."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    law = next(m for m in MIXTURES if m.name == run.mixture)
    rng = np.random.default_rng([run.seed, 1])
    x, test = law.draw(ROWS, rng), law.draw(HELD_OUT, rng)
    pyro.clear_param_store()
    ebm = LVEBM.from_data(MLPEnergy(x.shape[1], 1, seed=run.seed), x, z_dim=1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=256) as i:
            lvebm("x", ebm, obs=x[i])

    optimiser = getattr(pyro.optim, run.optimiser)({"lr": run.rate})
    saddle = Saddle(model, AutoParticles(model), optimiser, seed=run.seed)
    mixture = GaussianMixture(len(law.shares), n_init=5, random_state=0).fit(x.double().numpy())
    wanted = torch.from_numpy(mixture.score_samples(test.double().numpy()))
    errors = []
    for _ in range(4):
        for _ in range(num_steps // 4):
            saddle.step(x)
        ebm.follow()  # the pool at the θ of the last update, as the exact value is
        errors.append(abs(float(ebm.log_partition) - exact(ebm, law, rng)[0]))
    with saddle.averaged():
        log_z, share = exact(ebm, law, rng)
        loss = wanted - (log_c(ebm, test) - log_z)
        found = log_partition(ebm, seed=run.seed, num_particles=512, num_runs=8)
    data = torch.cdist(x, torch.tensor(law.centres)).argmin(1).bincount(minlength=len(share))
    data = data / len(x)
    z = (share - data) / (data * (1.0 - data) / len(x)).sqrt()
    return Result(
        float(np.max(errors)),
        float(z.abs().max()),
        float(loss.mean()),
        float(loss.std()) / math.sqrt(len(loss)),
        found.lower <= log_z <= found.upper,
        found.upper - found.lower,
        ebm.base_x.num_components,
        time.perf_counter() - start,
    )


@torch.no_grad()
def exact(ebm: LVEBM, law: Mixture, rng: np.random.Generator) -> tuple[float, Tensor]:
    """Return log Z, and the share of the model nearest to each centre (K,)."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    base = ebm.base.draw((PROPOSALS, ebm.dim), ebm.base_x.loc, generator)
    x, z = ebm.unwhiten(base)
    x = torch.cat([x, law.draw(PROPOSALS, rng)])
    z = torch.cat([z, torch.randn(PROPOSALS, 1, generator=generator)])
    log_q = torch.logaddexp(ebm.base_x.log_prob(x), law.log_prob(x)) - math.log(2.0)
    parts = zip(x.split(20000), z.split(20000), strict=True)
    f = torch.cat([ebm.residual_of(*part) for part in parts])
    log_w = (ebm.base_x.log_prob(x) - f - log_q).double()
    log_z = float(torch.logsumexp(log_w, 0)) - math.log(len(log_w))
    nearest = torch.cdist(x, torch.tensor(law.centres)).argmin(1)
    share = torch.zeros(len(law.shares)).double()
    return log_z, share.index_add(0, nearest, torch.softmax(log_w, 0)).float()


@torch.no_grad()
def log_c(ebm: LVEBM, x: Tensor, half_width: float = 7.0, points: int = 101) -> Tensor:
    """Return log C(x) = log ∫ exp(−E(x, z)) dz (n,), by the rectangle rule over z."""
    z = torch.linspace(-half_width, half_width, points)
    wide = x[:, None].expand(-1, points, -1).flatten(0, 1)
    parts = zip(wide.split(50000), z.repeat(len(x))[:, None].split(50000), strict=True)
    energy = torch.cat([ebm.energy(*part) for part in parts])
    terms = -energy.reshape(len(x), points).double()
    return torch.logsumexp(terms, 1) + math.log(2.0 * half_width / (points - 1))


def runs_of(quick: bool, seeds: Sequence[int]) -> Iterator[Run]:
    """Yield all runs, those of the first seed first."""
    if quick:
        yield Run(QUICK[0].name, "ClippedAdam", 2e-3, 0)
        return
    for seed in seeds:
        for optimiser, rate in itertools.product(("ClippedAdam", "Adam"), RATES):
            for mixture in MIXTURES:
                yield Run(mixture.name, optimiser, rate, seed)


def table(done: dict[Run, Result]) -> pd.DataFrame:
    """Return the worst of all runs of every mixture."""
    frame = pd.DataFrame([asdict(r) | asdict(v) | {"failed": v.failed} for r, v in done.items()])
    columns = ["log_z_error", "share_z", "loss", "width"]
    worst = frame.groupby("mixture", sort=False)[columns].max()
    counts = frame.groupby("mixture", sort=False).agg(
        held=("held", "sum"), failed=("failed", "sum"), runs=("failed", "size")
    )
    return worst.join(counts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, print every result as it comes, and return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one fit of 120 steps")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only", help="text that the name of a mixture must have")
    parser.add_argument("--every", type=int, default=1, help="take each k-th run only")
    parser.add_argument("--results", type=Path, help="file to go on with, a line for each run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    steps = 120 if args.quick else args.steps
    runs = [r for r in runs_of(args.quick, args.seeds) if not args.only or args.only in r.mixture]
    done = _load(args.results)
    work = [run for run in runs[:: args.every] if run not in done]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(fit, run, steps): run for run in work}
        for future in as_completed(futures):
            run, result = futures[future], future.result()
            done[run] = result
            line: dict[str, Any] = asdict(run) | asdict(result)
            print(json.dumps(line), file=sys.stderr, flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(table(done).round(4).to_string())
    return int(any(result.failed for result in done.values()))


def _load(path: Path | None) -> dict[Run, Result]:
    """Read the results of an earlier call."""
    if path is None or not path.exists():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = Run.__dataclass_fields__
    return {
        Run(**{k: line[k] for k in names}): Result(
            **{k: v for k, v in line.items() if k not in names}
        )
        for line in lines
    }


if __name__ == "__main__":
    raise SystemExit(main())
