# SPDX-License-Identifier: Apache-2.0
"""The log evidence of a Pyro model, with all its local latents integrated out."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.local_energy import LatentBlock
from pyro_lvebm.log_evidence import LogEvidence
from pyro_lvebm.log_partition import LogPartition
from pyro_lvebm.model_evidence import Sweep, Terms, anneal_block, model_log_evidence, row_log_z
from pyro_lvebm.particle_elbo import fit_gaussian, posterior_draws, relative_to
from pyro_lvebm.rng import Stream, derive_seed, device_of, isolated_rng
from pyro_lvebm.saddle import Saddle
from pyro_lvebm.tracing import Model, energy_modules, frozen
from pyro_lvebm.validation import TrainingWarning


def log_evidence_of(
    model: Model,
    *args: Any,
    saddle: Saddle | None = None,
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
            the Saddle has no particles.

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
    for name, value in (("num_particles", num_particles), ("num_runs", num_runs)):
        if value < 2:
            raise ValueError(f"{name} must be at least 2; got {value}")
    if saddle is not None and saddle.particles is None:
        raise ValueError("the guide of this Saddle has no AutoParticles to start from")
    device = device_of(args, kwargs)
    seed = derive_seed(seed, Stream.EVIDENCE)
    noise = isolated_rng(seed, Stream.EVIDENCE_PROTOTYPE, device=device)
    with noise, poutine.block(), torch.no_grad():
        sweep = Sweep.of(model, seed, args, kwargs)
        ebms = energy_modules(sweep.prototype)
        found = [row_log_z(sweep, ebm) for ebm in ebms]
        log_zs = [log_z.bracket for log_z in found]
        warn_of_unreliable(log_zs)
        with frozen(ebms):
            if saddle is None:
                terms = model_log_evidence(sweep, num_particles=num_particles, num_runs=num_runs)
            else:
                terms = _from_particles(sweep, saddle, num_particles, num_runs)
    log_p, error = terms.value, terms.std_error
    for log_z in found:
        log_p = log_p + log_z.correction
        error = torch.hypot(error, log_z.std_error.to(error))
    margin = sum((z.margin for z in found), log_p.new_zeros(()))
    return LogEvidence(log_p, error, total(log_zs), margin)


def _from_particles(sweep: Sweep, saddle: Saddle, num_particles: int, num_runs: int) -> Terms:
    particles = saddle.particles
    assert particles is not None

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        step_size = particles.step_size(block.columns[0].name)
        mean, tril = fit_gaussian(posterior_draws(block, step_size, generator))
        f = relative_to(block.f, mean, tril)
        return anneal_block(block, f, num_particles, num_runs, generator) + block.offset

    return Terms.of_runs(
        sweep.over_data(estimate, Stream.EVIDENCE_FROM_PARTICLES, particles, saddle.guide)
    )


def warn_of_unreliable(log_zs: list[LogPartition]) -> None:
    """Warn of each log Z that cannot be relied on: in a sum, others may hide its width."""
    for number, log_z in enumerate(log_zs):
        if not log_z.is_reliable:
            text = f"log Z of LVEBM {number} is not reliable: {log_z.verdict}"
            warnings.warn(text, TrainingWarning, stacklevel=3)


def total(log_zs: list[LogPartition]) -> LogPartition:
    """Return the bracket of a sum of log Z, with the errors of independent estimates.

    Of no log Z at all it is zero. The ends of a sum of several are those of its terms, added.
    """
    if len(log_zs) == 1:
        return log_zs[0]
    sums = {
        name: float(sum(getattr(z, name) for z in log_zs))
        for name in (
            "estimate",
            "lower",
            "upper",
            "forward",
            "reverse",
            "reverse_limit",
            "max_width",
        )
    }
    return LogPartition(
        **sums,
        std_error=math.hypot(*(z.std_error for z in log_zs)),
        ess=min((z.ess for z in log_zs), default=math.inf),
        num_temperatures=max((z.num_temperatures for z in log_zs), default=0),
        num_runs=min((z.num_runs for z in log_zs), default=0),
    )
