# SPDX-License-Identifier: Apache-2.0
"""log Z and log p(x) of a Pyro model, with all its local latents integrated out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_lvebm.evidence.annealed import (
    MAX_PARTICLES,
    anneal_block,
    anneal_latents,
    fit_gaussian,
    posterior_draws,
    relative_to,
)
from pyro_lvebm.evidence.bracket import surprise
from pyro_lvebm.evidence.contexts import conditional_log_partition
from pyro_lvebm.evidence.log_evidence import LogEvidence
from pyro_lvebm.evidence.log_partition import (
    LogPartition,
    log_partition,
    total,
    warn_of_unreliable,
)
from pyro_lvebm.guides import AutoParticles, find_particles
from pyro_lvebm.latents import LatentBlock, Program, Sweep
from pyro_lvebm.model import LVEBM, expand_context
from pyro_lvebm.rng import Stream, derive_seed, generator_for
from pyro_lvebm.sampling import log_mean_exp, log_mean_std_error
from pyro_lvebm.sites import Model, ObservedSite, num_sites, sample_nodes, site_of
from pyro_lvebm.validation import check_at_least


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


def model_log_evidence(sweep: Sweep, *, num_particles: int = 64, num_runs: int = 8) -> Terms:
    """Estimate log p(x_i) = log ∫ p(x_i, z) dz of every datum, with the pools' present log Z.

    Latents are annealed from a standard normal by sequential Monte Carlo, as in `log_evidence`.

    Args:
        sweep: The model and its data, with θ frozen.
        num_particles: Particles of each run, for each datum.
        num_runs: Independent runs for each datum.
    """

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        log_c = anneal_block(block, block.f, num_particles, num_runs, generator, block.residuals)
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
    seed = derive_seed(sweep.seed, Stream.LOG_Z_OF_SITE, site_of(sweep.program.prototype, ebm))
    count, pool = num_sites(sweep.program.prototype, ebm), ebm.log_partition
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


def missed_log_z(sweep: Sweep, ebm: LVEBM) -> float:
    """Return how many nats of log Z the pool has missed, by a quick annealing run.

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
    site = site_of(sweep.program.prototype, ebm)
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
    return num_sites(sweep.program.prototype, ebm) * missed


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


def log_evidence_of(
    model: Model,
    *args: Any,
    saddle: SVI | None = None,
    seed: int = 0,
    num_particles: int = 64,
    num_runs: int = 8,
    **kwargs: Any,
) -> LogEvidence:
    """Estimate log p(x_i) = log ∫ p(x_i, z_i) dz_i of every datum of a Pyro model.

    This is `log_evidence` for models in which an LVEBM is one part of several: all sites inside
    the plates of the latents count, and all latents of a datum are annealed together. They start
    from a standard normal, or from a Gaussian fitted to the particles of a `Saddle`, which
    sharp posteriors need. Ĉ is unbiased from either, so log Ĉ is low in expectation.

    Args:
        model: The Pyro model; all its latents inside the same plates.
        args: Arguments of the model.
        saddle: A `Saddle` whose particles belong to these data.
        seed: Fixes every random number.
        num_particles: Particles of each run, for each datum.
        num_runs: Independent runs for each datum, at least 2.
        kwargs: Keyword arguments of the model.

    Returns:
        Estimates and standard errors (N,) in nats, with one bracket for the sum of all log Z.
        Latents in no plate belong to all data at once, which are then one datum, N = 1.

    Raises:
        ValueError: If the latents do not all lie in the same plates, a number is out of range, or
            the Saddle has no particles, or another guide holds some of the latents.

    Source:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; docs/estimators.md.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import log_evidence_of
        >>> def model(y):
        ...     with pyro.plate("data", len(y)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> y = torch.tensor([-1.0, 0.0, 2.0])
        >>> found = log_evidence_of(model, y)
        >>> exact = dist.Normal(0.0, 2.0**0.5).log_prob(y)
        >>> bool(((found.value - exact).abs() < 5 * found.std_error + 1e-3).all())
        True
    """
    check_at_least(2, num_particles=num_particles, num_runs=num_runs)
    particles = None if saddle is None else find_particles(saddle.guide)
    if saddle is not None and particles is None:
        raise ValueError("the guide of this Saddle has no AutoParticles to start from")
    program, seed = Program(model, args, kwargs), derive_seed(seed, Stream.EVIDENCE)
    with program.at_rest(seed, Stream.EVIDENCE_PROTOTYPE):
        sweep = Sweep(program, seed)
        if particles is not None:
            program.check_particles(particles)
        found = [row_log_z(sweep, ebm) for ebm in program.ebms]
        log_zs = [log_z.bracket for log_z in found]
        warn_of_unreliable(log_zs)
        if saddle is None or particles is None:
            terms = model_log_evidence(sweep, num_particles=num_particles, num_runs=num_runs)
        else:
            terms = _from_particles(sweep, particles, saddle.guide, num_particles, num_runs)
    log_p, error = terms.value, terms.std_error
    for log_z in found:
        log_p = log_p + log_z.correction
        error = torch.hypot(error, log_z.std_error.to(error))
    margin = sum((z.margin for z in found), log_p.new_zeros(()))
    return LogEvidence(log_p, error, total(log_zs), margin)


def _from_particles(
    sweep: Sweep, particles: AutoParticles, guide: Model, num_particles: int, num_runs: int
) -> Terms:
    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        step_size = particles.step_size(block.columns[0].name)
        mean, tril = fit_gaussian(posterior_draws(block, step_size, generator))
        f = relative_to(block.f, mean, tril)
        return anneal_block(block, f, num_particles, num_runs, generator) + block.offset

    return Terms.of_runs(
        sweep.over_data(estimate, Stream.EVIDENCE_FROM_PARTICLES, particles, guide)
    )
