# SPDX-License-Identifier: Apache-2.0
"""Estimates for every datum of a Pyro model, and the log evidence as the first of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.annealing import log_mean_exp, log_mean_std_error
from pyro_lvebm.bracket import surprise
from pyro_lvebm.conditional import expand_context
from pyro_lvebm.conditional_partition import conditional_log_partition
from pyro_lvebm.distributions import ObservedSite
from pyro_lvebm.enumeration import will_be_enumerated
from pyro_lvebm.given_rows import GivenRows
from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.langevin import ValueAndGrad
from pyro_lvebm.local_energy import LatentBlock, as_problems, latent_blocks
from pyro_lvebm.log_evidence import MAX_PARTICLES, anneal_latents
from pyro_lvebm.log_partition import LogPartition, log_partition
from pyro_lvebm.model import LVEBM
from pyro_lvebm.probing import CheapLatents
from pyro_lvebm.rng import Stream, derive_seed, generator_for
from pyro_lvebm.tracing import (
    Model,
    at_minibatch,
    cover,
    num_sites,
    plate_nesting,
    sample_nodes,
    site_of,
    vectorise,
)

Estimate = Callable[[LatentBlock, torch.Generator], Tensor]
"""Maps the latents of a minibatch to independent log weights (draws, *batch) of every datum."""


class Terms(NamedTuple):
    """Monte Carlo estimates for every datum, in nats."""

    value: Tensor  # (N,)
    std_error: Tensor  # (N,)

    @classmethod
    def of_runs(cls, log_c: Tensor) -> Terms:
        """Combine independent runs (runs, N) whose exponentials are unbiased."""
        return cls(log_mean_exp(log_c, 0), log_mean_std_error(log_c, 0))

    def mean(self) -> tuple[float, float]:
        """Mean over the data, and its Monte Carlo standard error."""
        n = len(self.value)
        value, error = self.value.double(), self.std_error.double()
        return float(value.mean()), float((error**2).sum().sqrt()) / n

    def mean_std_error(self) -> float:
        """Standard error of the mean as an estimate for new data; NaN for a single datum."""
        if len(self.value) < 2:
            return math.nan
        return float(self.value.double().std()) / math.sqrt(len(self.value))


@dataclass(frozen=True)
class Sweep:
    """A model and its arguments, to go through all data in minibatches of the model's own size."""

    model: Model
    prototype: Trace
    probe: AutoParticles  # names the latents; its one particle is not used
    seed: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, model: Model, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sweep:
        """Run the model once, and name its latents."""
        with CheapLatents():
            prototype = poutine.trace(GivenRows()(model)).get_trace(*args, **kwargs)
            probe = AutoParticles(poutine.block(model, hide_fn=will_be_enumerated), 1)
            probe(*args, **kwargs)
        return cls(model, prototype, probe, seed, args, kwargs)

    def over_data(
        self,
        estimate: Estimate,
        stream: Stream,
        particles: AutoParticles | None = None,
        guide: Model | None = None,
    ) -> Tensor:
        """Collect log weights (draws, N) of all data, minibatch by minibatch.

        Args:
            estimate: What to estimate.
            stream: What the random numbers are for.
            particles: Where the latents are; the probe by default.
            guide: The guide that holds the particles, and perhaps more.

        Raises:
            ValueError: If the latents do not all lie in the same plates.
        """
        particles = self.probe if particles is None else particles
        guide = particles if guide is None else guide
        nesting = plate_nesting(self.prototype)
        values: list[Tensor] = []
        for number, batch in enumerate(cover(self.prototype)):
            fixed = at_minibatch(guide, batch.nodes)
            vectorised = vectorise(fixed, particles.num_particles, nesting)
            guide_trace = poutine.trace(vectorised).get_trace(*self.args, **self.kwargs)
            blocks, _ = latent_blocks(
                self.model, particles, guide_trace, nesting, self.args, self.kwargs
            )
            if len(blocks) != 1 or blocks[0].is_global:
                groups = [[c.name for c in b.columns] for b in blocks]
                raise ValueError(
                    "estimates for every datum need a model whose latents all lie in the same "
                    f"plates; this one has them in the groups {groups}, or outside the subsampled "
                    "plate"
                )
            generator = generator_for(self.seed, stream, number, device=blocks[0].v.device)
            log_weights = batch.drop_repeats(estimate(blocks[0], generator), 0)
            # Latents in no plate belong to all data at once, which are then one datum.
            values.append(log_weights.reshape(len(log_weights), -1))
        return torch.cat(values, 1)


def model_log_evidence(sweep: Sweep, *, num_particles: int = 64, num_runs: int = 8) -> Terms:
    """Estimate log p(x_i) = log ∫ p(x_i, z) dz of every datum, with the pools' present log Z.

    Latents are annealed from a standard normal by sequential Monte Carlo, as in `log_evidence`.

    Args:
        sweep: The model and its data, with θ frozen.
        num_particles: Particles of each run, for each datum.
        num_runs: Independent runs for each datum.
    """

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        log_c = anneal_block(block, block.f, num_particles, num_runs, generator)
        return log_c + block.offset

    return Terms.of_runs(sweep.over_data(estimate, Stream.EVIDENCE))


class RowLogZ(NamedTuple):
    """What annealing says of log Z of an LVEBM, summed over its sites, at the rows of some data."""

    correction: Tensor  # from the pool's log Z to the estimate, a scalar or (N,), nats
    std_error: Tensor  # of it, a scalar or (N,), nats
    margin: Tensor  # from the estimate to the upper end, a scalar or (N,), nats
    to_upper: float  # from the pool's log Z to the upper end of the mean over the rows, nats
    bracket: LogPartition  # of the mean over the rows


def row_log_z(sweep: Sweep, ebm: LVEBM) -> RowLogZ:
    """Bracket log Z, or that of every row's context, by annealing.

    Random numbers are those of the site of each LVEBM, so that several log Z of one model have
    independent errors, as their sum takes for granted.

    Args:
        sweep: The model and its data; its seed fixes the random numbers.
        ebm: One of its LVEBMs.
    """
    seed = derive_seed(sweep.seed, Stream.LOG_Z_OF_SITE, site_of(sweep.prototype, ebm))
    count, pool = num_sites(sweep.prototype, ebm), ebm.log_partition
    if ebm.context_shape is None:
        bracket = log_partition(ebm, seed=seed).times(count)
        value, error = pool.new_tensor(bracket.estimate), pool.new_tensor(bracket.std_error)
        margin = pool.new_tensor(bracket.upper - bracket.estimate)
    else:
        found = conditional_log_partition(ebm, contexts_of(sweep, ebm), seed=seed)
        value, error, bracket = found.estimate, found.std_error, found.mean()
        margin = found.upper - found.estimate
    to_upper = count * float(pool) - bracket.upper
    return RowLogZ(count * pool - value, error, margin, to_upper, bracket)


def contexts_of(sweep: Sweep, ebm: LVEBM) -> Tensor:
    """Return the contexts (N, *context_shape) that an LVEBM has at all data of a model."""
    shape = ebm.context_shape or torch.Size()

    def collect(block: LatentBlock, generator: torch.Generator) -> Tensor:
        nodes = sample_nodes(block.at.trace(1)).values()
        fns = [node["fn"] for node in nodes if isinstance(node["fn"], ObservedSite)]
        fn = next(fn for fn in fns if fn.ebm is ebm)
        (context,) = expand_context(fn.context, ebm.context_shape, fn.batch_shape)
        return context.reshape(*block.v.shape[1:-1], -1).movedim(-1, 0)

    return sweep.over_data(collect, Stream.CONTEXTS_OF_ROWS).T.reshape(-1, *shape)


def anneal_block(
    block: LatentBlock,
    f: ValueAndGrad,
    num_particles: int,
    num_runs: int,
    generator: torch.Generator,
) -> Tensor:
    """Estimate log E_{N(0,I)}[exp(−f)] of every datum of a block, (num_runs, *batch), in nats.

    Args:
        block: The latents of a minibatch.
        f: Its residual energy, in coordinates in which the annealing starts from N(0, I).
        num_particles: Particles of each run, for each datum.
        num_runs: Independent runs for each datum.
        generator: Source of randomness.
    """
    batch, dim = block.v.shape[1:-1], block.v.shape[-1]
    log_c = anneal_latents(
        as_problems(f, batch),
        (batch.numel(), num_particles, dim),
        block.v,
        num_runs=num_runs,
        num_moves=2,
        relative_ess=0.9,
        generator=generator,
    )
    return log_c.reshape(num_runs, *batch)


def missed_log_z(sweep: Sweep, ebm: LVEBM) -> float:
    """Return how many nats of log Z the pool has missed, as far as a quick annealing run can tell.

    With contexts it is how far the mean of log Z(c) over the data lies above that over the pool.

    A pool cannot see mass that has left it, and its log Z is then too low. Annealing from the base
    comes from the other side. A difference within three standard errors counts as none, and one
    within more where so few runs say what that of annealing is (`surprise`).

    Args:
        sweep: The model and its data, with θ frozen; its seed fixes the random numbers.
        ebm: One of its LVEBMs.

    Raises:
        RuntimeError: If the energy is too rough to anneal.
    """
    like = ebm.base_x.loc
    site = site_of(sweep.prototype, ebm)
    generator = generator_for(sweep.seed, Stream.MISSED_LOG_Z, site, device=like.device)
    if ebm.context_shape is not None:
        contexts = contexts_of(sweep, ebm)
        return _log_z_of_contexts(ebm, contexts, generator) - float(ebm.log_partition)
    log_z = anneal_latents(
        ebm.residual_and_grad,
        (1, 256, ebm.dim),
        like,
        num_runs=8,
        num_moves=2,
        relative_ess=0.9,
        generator=generator,
    )
    stated = ebm.pool.log_partition_std_error
    online = 0.0 if stated is None else float(stated)
    annealed = float(log_mean_std_error(log_z, 0))
    limit = math.hypot(surprise(len(log_z)) * annealed, 3.0 * online)
    difference = float(log_mean_exp(log_z, 0)) - float(ebm.log_partition)
    missed = difference if difference > limit else 0.0
    return num_sites(sweep.prototype, ebm) * missed


def _log_z_of_contexts(ebm: LVEBM, contexts: Tensor, generator: torch.Generator) -> float:
    """Estimate the mean of log Z(c) over contexts (N, *context_shape), from below."""
    num_particles, num_runs = 64, 2
    total = 0.0
    for part in contexts.split(max(1, MAX_PARTICLES // (num_particles * num_runs))):
        log_z = anneal_latents(
            ebm.given(part[:, None]).residual_and_grad,
            (len(part), num_particles, ebm.dim),
            ebm.base_x.loc,
            num_runs=num_runs,
            num_moves=2,
            relative_ess=0.9,
            generator=generator,
        )
        total += float(log_mean_exp(log_z, 0).double().sum())
    return total / len(contexts)
