# SPDX-License-Identifier: Apache-2.0
"""Other libraries of energy-based models, trained on the same rows for the same work.

`torchebm` and `ebmkit` train p(x) ∝ exp(−E(x)) by persistent contrastive divergence, each with its
own loss, chains and sampler. Neither trains a joint E(x, z), so theirs is a model of x alone. The
network is an MLP D-128-128-1 with SiLU on standardised columns. Work is counted in gradient
evaluations: one is ∇E at one point, to move a chain. No library is imported before it runs.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.noise import noise
from benchmarks.speed import bare_network
from pyro_lvebm.cli.baselines import gaussian
from pyro_lvebm.sampling import anneal, pilot, standard_normal
from pyro_lvebm.sampling.langevin import value_and_grad
from pyro_lvebm.sampling.weights import log_mean_exp, log_mean_std_error

Energy = Callable[[Tensor], Tensor]
"""Maps u (n, D) to energies (n,)."""

MODULES = {"torchebm": "torchebm", "ebmkit": "ebm"}
"""Libraries by the name they are installed under, and the name they are imported by."""

NODES = {1: 4096, 2: 640, 3: 160}
"""Nodes along an axis of the grid, by dimension; beyond, log Z comes from annealing."""


@dataclass(frozen=True)
class Recipe:
    """How a library is run. The rest is as its authors set it by default.

    Args:
        chains: Chains moved in an update, and rows of the batch they are compared with.
        num_moves: Langevin steps of each chain in an update.
        step_size: η of u' = u − η ∇E(u) + √(2η) ξ.
        energy_penalty: Weight of the mean of E² over rows and over chains in the loss.
        buffer: Chains kept.
        warm_up: Langevin steps of every kept chain before the first update.
        learning_rate: Of Adam.
    """

    chains: int
    num_moves: int
    step_size: float
    energy_penalty: float
    buffer: int = 8192
    warm_up: int = 0
    learning_rate: float = 1e-3

    def updates(self, gradient_evaluations: int) -> int:
        """Return how many updates a budget allows after the warm-up."""
        updates = (gradient_evaluations - self.cost(0)) // (self.chains * self.num_moves)
        if updates < 1:
            raise ValueError(
                f"gradient_evaluations is {gradient_evaluations:,}; one update of this recipe "
                f"needs {self.cost(1):,}"
            )
        return updates

    def cost(self, updates: int) -> int:
        """Return the gradient evaluations of the warm-up and some updates."""
        return self.buffer * self.warm_up + updates * self.chains * self.num_moves


DOCUMENTED = {
    "torchebm": Recipe(256, 10, 0.1, 0.001, warm_up=100),
    "ebmkit": Recipe(256, 60, 0.01, 0.1),
}
"""Settings of the examples of persistent contrastive divergence that come with each library."""

TUNED = {
    "torchebm": Recipe(1024, 10, 0.01, 0.1, warm_up=100),
    "ebmkit": Recipe(1024, 10, 0.01, 0.1),
}
"""The best found by held-out NLL of two moons, which favours them; torchebm needs the penalty."""


@dataclass(frozen=True)
class PeerResult:
    """What a library reached.

    `nll` is the mean of −log p(x) over held-out rows in nats, the density of x as given, and
    `std_error` that of this mean. `seconds` counts training only; `log_partition` belongs to
    standardised columns; `gradient_evaluations` are those used. An empty `note` warns of nothing.
    """

    peer: str
    version: str
    nll: float
    std_error: float
    seconds: float
    log_partition: float
    log_partition_method: str
    gradient_evaluations: int
    note: str

    @property
    def diverged(self) -> bool:
        """Whether training left no finite density at the held-out rows."""
        return not math.isfinite(self.nll)


class LogPartition(NamedTuple):
    """Value of log Z, how it was found, and a warning or nothing."""

    value: float
    method: str
    note: str


def available() -> tuple[str, ...]:
    """Return the names of the libraries that are installed."""
    # The import name alone does not tell: `ebm` is short, and others may use it.
    installed = {distribution.name for distribution in metadata.distributions()}
    return tuple(
        name
        for name, module in MODULES.items()
        if name in installed and importlib.util.find_spec(module)
    )


def run_peer(
    name: str,
    train: np.ndarray,
    test: np.ndarray,
    *,
    gradient_evaluations: int,
    seed: int,
    recipe: Recipe | None = None,
) -> PeerResult:
    """Train one library on a table and return its held-out log density.

    Args:
        name: One of `available()`.
        train: Training rows (N, D).
        test: Held-out rows (M, D), M at least 2.
        gradient_evaluations: Budget of chains × steps × updates, with any warm-up of the chains.
        seed: Fixes the run. torch's global generator is as before afterwards.
        recipe: Settings; None means those in `DOCUMENTED`.

    Raises:
        ValueError: If the library is not installed, the budget is below one update, or the data
            are not two finite tables of equal width whose training columns are independent.
    """
    if name not in available():
        raise ValueError(f"{name!r} is not installed; installed are {available()}")
    recipe = DOCUMENTED[name] if recipe is None else recipe
    updates = recipe.updates(gradient_evaluations)
    reference = -float(gaussian(train, test).log_evidence.mean())
    mean, scale = train.mean(0), train.std(0)
    u, held_out = (torch.from_numpy((x - mean) / scale) for x in (train, test))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, seconds = _TRAINERS[name](u.float(), recipe, updates)
    net.double().eval().requires_grad_(False)

    if all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        half_width = max(6.0, math.ceil(held_out.abs().max().item()))
        log_z = log_partition(net, u.shape[1], half_width=half_width, seed=seed)
    else:
        log_z = LogPartition(math.nan, "none", "diverged: the weights are not finite")
    nll, std_error = held_out_nll(net, held_out, log_z.value, scale)
    notes = [log_z.note]
    if nll > reference:
        notes.append(f"worse than one Gaussian fitted to the same rows ({reference:.3f})")
    return PeerResult(
        peer=name,
        version=metadata.version(name),
        nll=nll,
        std_error=std_error,
        seconds=seconds,
        log_partition=log_z.value,
        log_partition_method=log_z.method,
        gradient_evaluations=recipe.cost(updates),
        note="; ".join(filter(None, notes)),
    )


def held_out_nll(energy: Energy, u: Tensor, log_z: float, scale: np.ndarray) -> tuple[float, float]:
    """Return mean −log p(x) and its standard error for rows u = (x − mean) / scale.

    log p(x) = −E(u) − log Z − Σ log scale, since du/dx is one over the product of the scales.
    """
    values = energy(u) + log_z + float(np.log(scale).sum())
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def log_partition(
    energy: Energy, dim: int, *, half_width: float = 6.0, seed: int = 0
) -> LogPartition:
    """Return log ∫ exp(−E(u)) du over R^D, or over a box where that has no finite value.

    Up to three dimensions it is a sum over the box of ±half_width and over six shells around it,
    each twice as wide as the last. In more it is an estimate by annealing from N(0, I), low in
    expectation, so that the likelihood looks better than it is.
    """
    # An MLP grows at most linearly, and where it falls forever Z is infinite.
    falls = lowest_slope(energy, dim, seed) <= 0
    if dim not in NODES:
        return _annealed(energy, dim, seed, falls)
    nodes = NODES[dim]
    inner = value = _midpoint(energy, dim, half_width, nodes)
    coarse = _midpoint(energy, dim, half_width, nodes // 2)
    width, shell = half_width, math.inf
    for _ in range(6):
        shell = _midpoint(energy, dim, 2 * width, nodes // 2, hole=width)
        width, value = 2 * width, float(np.logaddexp(value, shell))
    method = f"midpoint rule, {nodes} nodes an axis on ±{half_width:g}"
    notes = []
    if falls or shell > value + math.log(1e-4):
        why = f"not normalisable on R^{dim}" if falls else f"mass beyond ±{width / 2:g}"
        notes.append(f"{why}; normalised on the box of ±{half_width:g} standard deviations")
        value = inner
    else:
        method += f" and shells up to ±{width:g}"
    if not abs(inner - coarse) <= 0.01:
        notes.append(f"half as many nodes change log Z by {coarse - inner:.2g}")
    return LogPartition(value, method, "; ".join(notes))


def lowest_slope(energy: Energy, dim: int, seed: int) -> float:
    """Return the smallest growth of E per unit of length far out, over random directions.

    In one and two dimensions these leave no gap; in more they may miss a narrow cone.
    """
    directions = torch.randn((8192, dim), generator=noise(seed, 1), dtype=torch.float64)
    directions /= directions.norm(dim=-1, keepdim=True)
    radius = 1e4
    return float(((energy(2 * radius * directions) - energy(radius * directions)) / radius).min())


def _midpoint(energy: Energy, dim: int, half_width: float, nodes: int, hole: float = 0.0) -> float:
    """Return log ∫ exp(−E) over the box of ±half_width without that of ±hole."""
    width = 2 * half_width / nodes
    terms = [torch.tensor(-math.inf, dtype=torch.float64)]
    strides = nodes ** torch.arange(dim)
    for cells in torch.arange(nodes**dim).split(2**15):
        u = -half_width + width * (cells[:, None] // strides % nodes + 0.5).double()
        u = u[u.abs().amax(-1) > hole]
        terms.append(torch.logsumexp(-energy(u), 0))
    return float(torch.logsumexp(torch.stack(terms), 0)) + dim * math.log(width)


def _annealed(energy: Energy, dim: int, seed: int, falls: bool) -> LogPartition:
    """Estimate log Z by annealing from N(0, I), of which the residual energy is E − ½ |u|²."""
    f = value_and_grad(lambda v: energy(v) - 0.5 * (v * v).sum(-1))
    generator, like = noise(seed, 2), torch.empty((), dtype=torch.float64)
    runs, particles = 8, 512
    try:
        start = standard_normal((1, 1, particles, dim), like, generator)
        schedule = pilot(f, start, max_temperatures=2000, generator=generator)
    except RuntimeError as error:
        return LogPartition(math.nan, "none", str(error))
    start = standard_normal((runs, 1, particles, dim), like, generator)
    ratios = anneal(f, start, schedule, generator=generator).log_ratio[:, 0]
    value = float(log_mean_exp(ratios, 0)) + 0.5 * dim * math.log(2 * math.pi)
    method = (
        f"annealing from N(0, I) by pyro_lvebm, forward only, {runs} × {particles} particles, "
        f"{len(schedule.betas)} temperatures, std. error {float(log_mean_std_error(ratios)):.2g}"
    )
    notes = ["log Z is low in expectation, which makes the likelihood look better than it is"]
    if falls:
        notes.append(f"not normalisable on R^{dim}; log Z counts the mass that particles reached")
    return LogPartition(value, method, "; ".join(notes))


def _train_torchebm(u: Tensor, recipe: Recipe, updates: int) -> tuple[nn.Module, float]:
    """Run its loss in a plain loop, as its example of persistent contrastive divergence does."""
    base: Any = importlib.import_module("torchebm.core").BaseModel
    losses: Any = importlib.import_module("torchebm.losses")
    samplers: Any = importlib.import_module("torchebm.samplers")

    class MLP(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = bare_network(u.shape[1])

        def forward(self, x: Tensor) -> Tensor:
            energy: Tensor = self.net(x).squeeze(-1)
            return energy

    start = time.perf_counter()
    net: nn.Module = MLP()
    loss_fn = losses.ContrastiveDivergence(
        model=net,
        sampler=samplers.LangevinDynamics(net, step_size=recipe.step_size),
        k_steps=recipe.num_moves,
        persistent=True,
        buffer_size=recipe.buffer,
        init_steps=recipe.warm_up,
        energy_reg_weight=recipe.energy_penalty,
    )
    optimiser = torch.optim.Adam(net.parameters(), lr=recipe.learning_rate)
    for _ in range(updates):
        loss, _ = loss_fn(u[torch.randint(len(u), (recipe.chains,))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net, time.perf_counter() - start


def _train_ebmkit(u: Tensor, recipe: Recipe, updates: int) -> tuple[nn.Module, float]:
    """Run its trainer on its own network, as its documentation does."""
    if recipe.warm_up:
        raise ValueError("ebmkit starts its chains from N(0, I); expected warm_up = 0")
    ebm: Any = importlib.import_module("ebm")
    start = time.perf_counter()
    net: nn.Module = ebm.nets.MLPEnergy(dim=u.shape[1], hidden=(128, 128))
    loss_fn = ebm.ContrastiveDivergence(
        ebm.LangevinDynamics(step_size=recipe.step_size, steps=recipe.num_moves),
        buffer=ebm.ReplayBuffer(recipe.buffer, (u.shape[1],)),
        energy_reg=recipe.energy_penalty,
    )
    trainer = ebm.Trainer(net, loss_fn, lr=recipe.learning_rate, device="cpu")
    trainer.fit(u, steps=updates, batch_size=recipe.chains, verbose=False)
    return net, time.perf_counter() - start


_TRAINERS = {"torchebm": _train_torchebm, "ebmkit": _train_ebmkit}
