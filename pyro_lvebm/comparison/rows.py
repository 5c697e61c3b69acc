# SPDX-License-Identifier: Apache-2.0
"""What a row of an ELBO table can be, and what is estimated for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.mcmc.api import MCMC
from torch import Tensor, nn

from pyro_lvebm.comparison.log_weights import (
    guide_log_weights,
    laplace_log_weights,
    mcmc_log_weights,
    particle_log_weights,
    prior_guide,
)
from pyro_lvebm.comparison.table import mean_over_data
from pyro_lvebm.guides import find_particles
from pyro_lvebm.latents import LatentBlock, Program, Sweep
from pyro_lvebm.rng import Stream
from pyro_lvebm.sampling import log_mean_exp, pareto_k
from pyro_lvebm.sites import Model
from pyro_lvebm.training import GuideState, Saddle, guide_state
from pyro_lvebm.validation import check_at_least


@dataclass(frozen=True)
class ImportanceWeighted:
    """A row of `compare_elbo`: a guide as the proposal of K importance samples a datum.

        L_K = E[log (1/K) Σ_k p(x, z_k) / q(z_k)],    elbo(q) = L_1 ≤ L_K ≤ log p(x)

    Args:
        guide: A trained guide.
        num_particles: K, at least 2.

    Raises:
        ValueError: If num_particles < 2.

    Source:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, equation 8.
    """

    guide: Model
    num_particles: int = 16

    def __post_init__(self) -> None:
        """Refuse a number of particles that weighs nothing."""
        check_at_least(2, num_particles=self.num_particles)


@dataclass(frozen=True)
class LaplaceApproximation:
    """A row of `compare_elbo`: for every datum, the Gaussian at a mode of the posterior.

    See `laplace_log_weights`. Nothing is trained.
    """


@dataclass(frozen=True)
class PriorProposal:
    """A row of `compare_elbo`: the prior of the latents in place of a guide.

        q(z, x_m) = base_z(z) base_x(x_m | x_o)

    for the latents of an LVEBM, whose sites have these laws (docs/maths.md, "Two sites"): base_z is
    the base's law of z given x, too, as the base has x and z independent. It is not p_θ(z), which
    has no density in closed form. Other latents have the laws that the model gives them, each
    given those before it, in their plates. Nothing is trained.
    """


Posterior = (
    Callable[..., Any] | Saddle | ImportanceWeighted | LaplaceApproximation | PriorProposal | MCMC
)
"""A trained guide, a `Saddle`, one of the rows above, or `MCMC` that has run on all data."""


@dataclass(frozen=True)
class RowTerms:
    """What was estimated for one posterior, with the pools' log Z."""

    log_weights: Tensor  # (draws, N), nats; their mean is the bound of each datum
    pareto_k: Tensor  # (N,), of the importance weights behind them; NaN with too few draws
    num_parameters: int  # trained numbers, or coordinates of stored particles or draws

    def mean(self) -> tuple[float, float]:
        """Mean bound over the data, and its Monte Carlo standard error."""
        return mean_over_data(self.log_weights)


def row_terms(posterior: Posterior, sweep: Sweep, num_samples: int) -> RowTerms:
    """Estimate the row of one posterior.

    Args:
        posterior: What the row is about.
        sweep: The model and its data, with θ frozen.
        num_samples: Draws of the bound for each datum.

    Raises:
        ValueError: If the posterior does not fit the model.
    """
    if isinstance(posterior, ImportanceWeighted):
        k = posterior.num_particles
        weights = guide_log_weights(posterior.guide, sweep, num_samples * k)
        bound = log_mean_exp(weights.reshape(num_samples, k, -1), 1)
        return RowTerms(bound, pareto_k(weights), _num_parameters(posterior.guide))
    if isinstance(posterior, LaplaceApproximation):

        def laplace(block: LatentBlock, generator: torch.Generator) -> Tensor:
            weights = laplace_log_weights(block, num_samples=num_samples, generator=generator)
            return weights + block.offset

        weights, count = sweep.over_data(laplace, Stream.LAPLACE_ROW), 0
    elif isinstance(posterior, PriorProposal):
        weights, count = guide_log_weights(prior_guide(sweep.program), sweep, num_samples), 0
    elif isinstance(posterior, MCMC):
        weights, count = mcmc_log_weights(posterior, sweep, num_samples)
    else:
        guide = posterior.guide if isinstance(posterior, Saddle) else posterior
        particles = find_particles(guide)
        if particles is None:
            weights, count = guide_log_weights(guide, sweep, num_samples), _num_parameters(guide)
        elif isinstance(posterior, Saddle):
            weights, count = particle_log_weights(particles, guide, sweep, num_samples)
        else:
            raise ValueError(
                "AutoParticles by itself cannot move its particles; pass the Saddle that trained it"
            )
    return RowTerms(weights, pareto_k(weights), count)


def convergence(posterior: Posterior, program: Program) -> GuideState:
    """Return what is known of the training of a posterior, for a model as it is now."""
    if isinstance(posterior, LaplaceApproximation | PriorProposal):
        return GuideState(True, False)
    if isinstance(posterior, MCMC):
        return GuideState(None, False)
    if isinstance(posterior, Saddle | ImportanceWeighted):
        return guide_state(posterior.guide, program)
    return guide_state(posterior, program)


def _num_parameters(guide: Model) -> int:
    return sum(p.numel() for p in guide.parameters()) if isinstance(guide, nn.Module) else 0
