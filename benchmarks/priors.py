# SPDX-License-Identifier: Apache-2.0
"""Does an energy prior pay? Binarised digits, a Bernoulli decoder, and two priors of its latent.

Every run fits a decoder with a standard normal prior to rows of scikit-learn's digits (8 × 8, one
where a pixel is above half of the brightest), then holds it fixed and fits an energy prior in the
place of the normal one. Both stop at the best step on left-out rows. Held-out log p(x) of both is
by annealing, that of the energy prior with log Z at its upper end, and the error of the difference
is that of paired rows. It is the same decoder, so that the prior alone makes the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.optim import ClippedAdam
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.noise import noise
from pyro_lvebm import (
    AutoParticles,
    EnergyPrior,
    LogEvidence,
    MLPEnergy,
    Saddle,
    TemperedPool,
    energy_prior,
    log_evidence_of,
)

Z_DIM, HIDDEN = 8, 64

BATCH, PARTICLES, RATE = 256, 4, 1e-2


@dataclass(frozen=True)
class Size:
    """How long a run is."""

    rows: int  # of the data, of which a tenth is left out and a fifth held out
    decoder_steps: int
    prior_steps: int
    particles: int  # of the annealing


FULL, QUICK = Size(1797, 500, 200, 64), Size(100, 12, 6, 8)


@dataclass(frozen=True)
class Result:
    """Held-out log p(x) of a run, in nats a row."""

    seed: int
    normal: float
    energy: float  # with the upper end of log Z
    difference: float
    std_error: float  # of the difference, over rows
    log_z: float
    width: float  # of the bracket of log Z
    seconds: float  # of the processor

    @property
    def failed(self) -> bool:
        """Whether the energy prior is not ahead by two standard errors; a NaN is a failure."""
        return not self.difference > 2.0 * self.std_error


def digits(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return binary rows (N, 64) in the order of a seed: to fit, left out and held out."""
    pixels = load_digits().data
    order = np.random.default_rng(seed).permutation(len(pixels))[:rows]
    x = torch.from_numpy((pixels[order] > 8.0).astype(np.float32))
    return x[: rows * 7 // 10], x[rows * 7 // 10 : rows * 8 // 10], x[rows * 8 // 10 :]


def make_decoder(x: Tensor, seed: int) -> nn.Sequential:
    """A network from z (*b, 8) to logits (*b, 64) that starts near the mean of rows x."""
    first, last = nn.Linear(Z_DIM, HIDDEN), nn.Linear(HIDDEN, x.shape[1])
    generator = noise(seed, 0)
    with torch.no_grad():
        for layer in (first, last):
            bound = layer.in_features**-0.5
            for p in layer.parameters():
                p.uniform_(-bound, bound, generator=generator)
        last.bias.copy_(x.mean(0).clamp(0.01, 0.99).logit())
    return nn.Sequential(first, nn.SiLU(), last)


def fit(
    model: Callable[[Tensor], None], x: Tensor, left_out: Tensor, steps: int, seed: int
) -> None:
    """Train by particles, and end at the parameters that are best on left-out rows."""
    guide = AutoParticles(model, num_particles=PARTICLES)
    saddle = Saddle(model, guide, ClippedAdam({"lr": RATE}), seed=seed)
    every = -(-steps // 4)
    saddle.fit(x, num_steps=steps, held_out=(left_out,), evaluate_every=every, progress=False)


def run(seed: int, size: Size) -> Result:
    """Fit a decoder with a normal prior, then the energy prior of that decoder."""
    torch.set_num_threads(1)
    start = time.process_time()
    pyro.clear_param_store()
    x, left_out, held_out = digits(size.rows, seed)
    decoder = make_decoder(x, seed)
    prior = EnergyPrior(MLPEnergy(Z_DIM, seed=seed), Z_DIM, TemperedPool(seed=seed))
    normal = dist.Normal(torch.zeros(Z_DIM), 1.0).to_event(1)

    def with_normal(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=min(BATCH, len(x))) as i:
            _observe(decoder, pyro.sample("z", normal), x[i])

    def with_energy(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=min(BATCH, len(x))) as i:
            _observe(decoder, energy_prior("z", prior), x[i])

    def evidence(model: Callable[[Tensor], None]) -> LogEvidence:
        return log_evidence_of(model, held_out, seed=seed, num_particles=size.particles)

    fit(with_normal, x, left_out, size.decoder_steps, seed)
    base = evidence(with_normal).value
    decoder.requires_grad_(False)
    fit(with_energy, x, left_out, size.prior_steps, seed)
    found = evidence(with_energy)
    better = (found.lower - base).double()
    return Result(
        seed,
        float(base.mean()),
        float(found.lower.mean()),
        float(better.mean()),
        float(better.std()) / len(better) ** 0.5,
        found.log_partition.estimate,
        found.log_partition.upper - found.log_partition.lower,
        time.process_time() - start,
    )


def _observe(decoder: nn.Module, z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet, print every result as it comes, and return 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rows and steps, not judged")
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3))
    parser.add_argument("--results", type=Path, help="file to go on with, a line for each run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    size, seeds = (QUICK, [0]) if args.quick else (FULL, list(args.seeds))
    done = _load(args.results)
    work = [seed for seed in seeds if seed not in done]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, seed, size) for seed in work]):
            result = future.result()
            done[result.seed] = result
            line = json.dumps(asdict(result))
            print(line, file=sys.stderr, flush=True)
            if args.results:
                with args.results.open("a") as file:
                    file.write(line + "\n")
    results = [done[seed] for seed in seeds]
    print(pd.DataFrame(map(asdict, results)).round(4).to_string(index=False))
    return int(not args.quick and any(result.failed for result in results))


def _load(path: Path | None) -> dict[int, Result]:
    """Read the results of an earlier call."""
    if path is None or not path.exists():
        return {}
    found = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {result.seed: result for result in found}


if __name__ == "__main__":
    raise SystemExit(main())
