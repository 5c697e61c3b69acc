# SPDX-License-Identifier: Apache-2.0
"""Speed of Langevin and saddle steps, as ratios to bare hand-written code or to matrix products.

Both sides of a ratio run in this process, in turns: ours, bare, ours, bare, … after a warm-up.
Each pair of turns gives one ratio of times; the table shows their median and quartiles, which
load from other processes moves little, since it meets both sides alike. Numbers of two runs
compare only through these ratios. In the rows "÷ products" the bare side is the two products with
a 128 × 128 matrix that each gradient of an MLP d-128-128-1 cannot do without, and nothing else. The
exit status is 1 where a row is over its bar; that of a quick run, which is noisy, says nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.optim import Adam
from torch import Tensor, nn

from pyro_lvebm.energies.mlp import MLPEnergy
from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.model.lvebm import LVEBM
from pyro_lvebm.pools.base import Pool
from pyro_lvebm.pools.persistent import PersistentPool
from pyro_lvebm.sampling.langevin import (
    MALA,
    ULA,
    Kernel,
    LangevinState,
    ValueAndGrad,
    init_state,
    value_and_grad,
)
from pyro_lvebm.sites.primitive import lvebm
from pyro_lvebm.training.saddle import Saddle

LANGEVIN_BARS = {"ULA": 1.05, "MALA": 1.2}
SADDLE_BAR = 1.5
PRODUCT_BARS = {"gradient": 3.0, "refresh": 6.0, "step": 10.0}
STEP_SIZE = 0.01
NUM_ROWS, BATCH, NUM_CHAINS, NUM_MOVES, LEARNING_RATE = 2000, 256, 256, 20, 1e-3


@dataclass(frozen=True)
class Row:
    """One line of the table: our code and bare code for the same work.

    Args:
        name: What is measured.
        ours: Runs one step of our code.
        bare: Runs one step of bare code.
        bar: The ratio that is still good enough; None for a line that is for information.
        weight: Time of one bare step, roughly, in ms; sets the steps in a turn.
    """

    name: str
    ours: Callable[[], object]
    bare: Callable[[], object]
    bar: float | None
    weight: float


@dataclass(frozen=True)
class Result:
    """Quartiles of the ratios of one row, and the median time of a bare step in ms."""

    lower: float
    median: float
    upper: float
    bare_ms: float


def bare_network(dim: int) -> nn.Sequential:
    """Return an MLP dim-128-128-1 with SiLU."""
    return nn.Sequential(
        nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)
    )


class BareLangevin:
    """Unadjusted Langevin steps as written by hand with `autograd.grad`."""

    def __init__(self, net: nn.Module, num_chains: int) -> None:
        self.net, self.u = net, torch.randn(num_chains, 2)

    def __call__(self) -> None:
        """Take one step."""
        u = self.u.detach().requires_grad_(True)
        (g,) = torch.autograd.grad(self.net(u).sum(), u)
        with torch.no_grad():
            self.u = u - STEP_SIZE * g + math.sqrt(2 * STEP_SIZE) * torch.randn_like(u)


class OurLangevin:
    """Steps of a kernel of the package."""

    def __init__(self, kernel: Kernel, f: ValueAndGrad, start: Tensor) -> None:
        self.kernel, self.f = kernel, f
        self.state: LangevinState = init_state(f, start)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self) -> None:
        """Take one step."""
        self.state, _ = self.kernel.step(
            self.f, self.state, STEP_SIZE, base=None, generator=self.generator
        )


class BareProducts:
    """The two products with a 128 × 128 matrix of so many gradients of so many chains."""

    def __init__(self, num_gradients: int, num_chains: int) -> None:
        self.num_gradients = num_gradients
        self.h, self.w = torch.randn(num_chains, 128), torch.randn(128, 128)

    def __call__(self) -> None:
        """Multiply."""
        for _ in range(self.num_gradients):
            self.h @ self.w.T
            self.h @ self.w


class BareSaddle:
    """A saddle step as written by hand: two Langevin loops, a loss, and an Adam step.

    The energy is ½ |u|² + f(u) with u = (x, z), as in an LVEBM on standard normal bases.
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.z = x, torch.randn(len(x), 2)
        self.pool = torch.randn(NUM_CHAINS, 4)
        self.net = bare_network(4)
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE)

    def _move(self, v: Tensor, f: Callable[[Tensor], Tensor], step_size: float) -> Tensor:
        noise_scale = math.sqrt(2 * step_size)
        for _ in range(NUM_MOVES):
            v = v.detach().requires_grad_(True)
            (g,) = torch.autograd.grad(f(v).sum(), v)
            with torch.no_grad():
                v = v - step_size * (g + v) + noise_scale * torch.randn_like(v)
        return v

    def __call__(self) -> Tensor:
        """Take one step and return the loss."""
        i = torch.randperm(len(self.x))[:BATCH]
        x = self.x[i]
        z = self._move(self.z[i], lambda z: self.net(torch.cat([x, z], -1)), 0.1)
        self.z[i] = z
        self.pool = self._move(self.pool, self.net, 0.05)
        loss = self.net(torch.cat([x, z], -1)).mean() - self.net(self.pool).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()


def our_saddle(
    name: str,
    x: Tensor,
    pool: Pool | None,
    kernel: Kernel | None,
    num_particles: int | None,
    kl_penalty: float | None,
) -> Callable[[], float]:
    """Return the step of a `Saddle` on rows x; None stands for the package default."""
    base = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    energy = MLPEnergy(2, 2, fourier_features=0, kl_penalty=kl_penalty)
    energy.out.reset_parameters()
    ebm = LVEBM(energy, base, base, pool=pool)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=BATCH) as i:
            lvebm(name, ebm, obs=x[i])

    guide = AutoParticles(model) if num_particles is None else AutoParticles(model, num_particles)
    optim = Adam({"lr": LEARNING_RATE})
    if kernel is None:
        saddle = Saddle(model, guide, optim)
    else:
        saddle = Saddle(model, guide, optim, kernel=kernel, num_moves=NUM_MOVES)
    return lambda: saddle.step(x)


def langevin_rows() -> Iterator[Row]:
    """Yield ULA and MALA steps on an MLP 2-128-128-1, each against the bare ULA loop."""
    net = bare_network(2)
    energy = MLPEnergy(1, 1, fourier_features=0)
    energy.out.reset_parameters()
    paths = {
        "autograd": value_and_grad(lambda u: net(u).squeeze(-1)),
        "MLPEnergy": energy.value_and_grad,
    }
    kernels: dict[str, Kernel] = {"ULA": ULA(), "MALA": MALA()}
    for kernel_name, kernel in kernels.items():
        for path, f in paths.items():
            for num_chains, weight in ((1024, 1.0), (8192, 6.0)):
                bare = BareLangevin(net, num_chains)
                ours = OurLangevin(kernel, f, bare.u)
                yield Row(
                    f"{kernel_name} step, {path}, {num_chains:,} chains",
                    ours,
                    bare,
                    LANGEVIN_BARS[kernel_name],
                    weight,
                )


def saddle_rows() -> Iterator[Row]:
    """Yield saddle steps on an MLP 4-128-128-1, each against the bare saddle step.

    The package defaults do other work than the bare step: 8 MALA steps of 4 particles for each
    row of the batch, and of 8 temperatures with 128 chains each. The bare step has no prior on
    the network, so the row with a bar has none either.
    """
    pyro.clear_param_store()
    x = torch.randn(NUM_ROWS, 2)
    plain = "Saddle.step, ULA, PersistentPool"
    for name, prior, bar in ((plain, 0.0, SADDLE_BAR), (plain + ", prior", None, None)):
        pool = PersistentPool(NUM_CHAINS, num_moves=NUM_MOVES)
        ours = our_saddle(name, x, pool, ULA(), 1, prior)
        yield Row(name, ours, BareSaddle(x), bar, 15.0)
    ours = our_saddle("default", x, None, None, None, None)
    yield Row("Saddle.step, package defaults", ours, BareSaddle(x), None, 15.0)


def product_rows() -> Iterator[Row]:
    """Yield a gradient, a pool refresh and a saddle step at all defaults, against their products.

    A refresh takes the gradients of 8 moves and of their start, on 8 × 128 chains; the positive
    phase of a step as many on 256 rows × 4 particles.
    """
    pyro.clear_param_store()
    energy = MLPEnergy(2, 1)
    energy.out.reset_parameters()
    u = torch.randn(896, 3)
    yield Row(
        "MLPEnergy gradient ÷ products",
        lambda: energy.value_and_grad(u),
        BareProducts(1, 896),
        PRODUCT_BARS["gradient"],
        0.7,
    )
    x = torch.randn(NUM_ROWS, 2)
    ebm = LVEBM.from_data(energy, x, z_dim=1, base="gaussian")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=BATCH) as i:
            lvebm("x", ebm, obs=x[i])

    yield Row(
        "pool refresh ÷ products",
        lambda: ebm.pool.refresh(ebm),
        BareProducts(9, 1024),
        PRODUCT_BARS["refresh"],
        8.0,
    )
    saddle = Saddle(model, AutoParticles(model), Adam({"lr": LEARNING_RATE}))
    yield Row(
        "Saddle.step, defaults ÷ products",
        lambda: saddle.step(x),
        BareProducts(18, 1024),
        PRODUCT_BARS["step"],
        16.0,
    )


def time_turn(step: Callable[[], object], num_steps: int) -> float:
    """Return the seconds that a turn of `num_steps` steps takes."""
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    return time.perf_counter() - start


def measure(row: Row, repetitions: int, turn_ms: float, limit_s: float) -> Result:
    """Time both sides of a row in turns.

    Args:
        row: What to time.
        repetitions: Pairs of turns.
        turn_ms: Rough length of one turn of bare code, in ms.
        limit_s: Stop after this many seconds, but not before the third pair.
    """
    num_steps = max(2, round(turn_ms / row.weight))
    for step in (row.ours, row.bare):
        time_turn(step, num_steps)
    ratios: list[float] = []
    bare_ms: list[float] = []
    end = time.perf_counter() + limit_s
    while len(ratios) < repetitions and (len(ratios) < 3 or time.perf_counter() < end):
        ours = time_turn(row.ours, num_steps)
        bare = time_turn(row.bare, num_steps)
        ratios.append(ours / bare)
        bare_ms.append(1e3 * bare / num_steps)
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return Result(lower, median, upper, statistics.median(bare_ms))


def verdict(row: Row, result: Result) -> str:
    """Return 'ok' or 'over' for a row with a bar, and nothing for one without."""
    if row.bar is None:
        return ""
    return "ok" if result.median <= row.bar else "over"


def main(argv: list[str] | None = None) -> int:
    """Measure every row and print the table; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few repetitions, under 20 seconds")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--only", default="", help="only rows whose name contains this text")
    args = parser.parse_args(argv)
    if args.threads < 1:
        parser.error(f"--threads must be at least 1; got {args.threads}")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    repetitions, turn_ms, limit_s = (5, 30.0, 0.8) if args.quick else (31, 60.0, 15.0)
    print(
        f"time of ours / time of bare code; {args.threads} threads, torch {torch.__version__}, "
        f"up to {repetitions} repetitions"
    )
    print(f"{'':42}{'ratio':>7}{'quartiles':>15}{'bar':>7}{'':>6}{'bare ms':>10}")
    over = []
    for rows in (product_rows(), langevin_rows(), saddle_rows()):
        for row in rows:
            if args.only not in row.name:
                continue
            r = measure(row, repetitions, turn_ms, limit_s)
            if verdict(row, r) == "over":
                over.append(row.name)
            bar = "" if row.bar is None else f"{row.bar:.2f}"
            quartiles = f"{r.lower:.2f} to {r.upper:.2f}"
            print(
                f"{row.name:42}{r.median:7.2f}{quartiles:>15}{bar:>7}{verdict(row, r):>6}"
                f"{r.bare_ms:10.2f}",
                flush=True,
            )
    if over:
        print("over their bars: " + ", ".join(over))
    return int(bool(over) and not args.quick)


if __name__ == "__main__":
    sys.exit(main())
