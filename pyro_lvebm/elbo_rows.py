# SPDX-License-Identifier: Apache-2.0
"""What a row of an ELBO table can be, and the log weights of its posterior for every datum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.mcmc.api import MCMC
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_lvebm.annealing import log_mean_exp
from pyro_lvebm.block_axes import sum_other_axes
from pyro_lvebm.distributions import LatentSite
from pyro_lvebm.enumeration import will_be_enumerated
from pyro_lvebm.guides import AutoParticles, check_guide, find_particles, own_parameters
from pyro_lvebm.laplace import laplace_log_weights
from pyro_lvebm.local_energy import LatentBlock
from pyro_lvebm.model_evidence import Sweep
from pyro_lvebm.particle_elbo import annealed_elbo, posterior_draws
from pyro_lvebm.rng import Stream
from pyro_lvebm.saddle import Saddle
from pyro_lvebm.tracing import Model, Node, at_minibatch, sample_nodes, subsample_nodes, vectorise


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
        if self.num_particles < 2:
            raise ValueError(f"num_particles must be at least 2; got {self.num_particles}")


@dataclass(frozen=True)
class LaplaceApproximation:
    """A row of `compare_elbo`: for every datum, the Gaussian at a mode of the posterior.

    See `laplace_log_weights`. Nothing is trained.
    """


@dataclass(frozen=True)
class PriorProposal:
    """A row of `compare_elbo`: the prior of the latents in place of a guide."""


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


def mean_over_data(draws: Tensor) -> tuple[float, float]:
    """Mean of (draws, N) over both, and its Monte Carlo standard error, the draws being random."""
    num_draws, n = draws.shape
    variance = draws.double().var(0).sum() / num_draws
    return float(draws.double().mean()), float(variance.sqrt()) / n


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
        weights = _guide_log_weights(posterior.guide, sweep, num_samples * k)
        bound = log_mean_exp(weights.reshape(num_samples, k, -1), 1)
        return RowTerms(bound, pareto_k(weights), _num_parameters(posterior.guide))
    if isinstance(posterior, LaplaceApproximation):

        def laplace(block: LatentBlock, generator: torch.Generator) -> Tensor:
            weights = laplace_log_weights(block, num_samples=num_samples, generator=generator)
            return weights + block.offset

        weights, count = sweep.over_data(laplace, Stream.LAPLACE_ROW), 0
    elif isinstance(posterior, PriorProposal):
        weights, count = _guide_log_weights(_prior(sweep), sweep, num_samples), 0
    elif isinstance(posterior, MCMC):
        weights, count = _mcmc_log_weights(posterior, sweep, num_samples)
    else:
        guide = posterior.guide if isinstance(posterior, Saddle) else posterior
        particles = find_particles(guide)
        if particles is None:
            weights, count = _guide_log_weights(guide, sweep, num_samples), _num_parameters(guide)
        elif isinstance(posterior, Saddle):
            weights, count = _particle_log_weights(particles, guide, sweep, num_samples)
        else:
            raise ValueError(
                "AutoParticles by itself cannot move its particles; pass the Saddle that trained it"
            )
    return RowTerms(weights, pareto_k(weights), count)


def pareto_k(log_weights: Tensor) -> Tensor:
    """Return the Pareto shape k̂ (N,) of importance weights (draws, N), by PSIS.

    Below min(1 − 1 / log10 S, 0.7) the importance-weighted average of S draws can be relied on.
    Log weights within
    a thousandth of a nat have no tail and get −inf; fewer than 25 draws say nothing and get NaN.

    Source:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling,
        sections 2.4 and 3; ArviZ computes it.
    """
    if len(log_weights) < 25:
        return torch.full(log_weights.shape[1:], torch.nan)
    import arviz as az  # as in `export`: it warns once a day on import

    rows = log_weights.double().T.cpu().numpy()
    varying = np.ptp(rows, axis=1) > 1e-3
    k = np.full(len(rows), -np.inf)
    if varying.any():
        if int(az.__version__.split(".")[0]) >= 1:
            psis: Any = import_module("arviz_stats.base").array_stats
            k[varying] = np.asarray(psis.psislw(rows[varying], axis=-1)[1])
        else:
            k[varying] = np.asarray(az.psislw(rows[varying])[1])
    return torch.as_tensor(k)


def _num_parameters(guide: Model) -> int:
    return sum(p.numel() for p in guide.parameters()) if isinstance(guide, nn.Module) else 0


def _latent_names(sweep: Sweep) -> set[str]:
    nodes = sample_nodes(sweep.prototype)
    return {
        name
        for name, node in nodes.items()
        if not node["is_observed"] and not will_be_enumerated(node)
    }


class _FromBase(Messenger):
    """Draws the latent of an LVEBM from base_z, whose density its site has.

    Without data the site itself draws from the pool, from p_θ(z).
    """

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], LatentSite):
            base = msg["fn"].ebm.base_z.distribution()
            msg["fn"] = base.expand(msg["fn"].batch_shape)


def _prior(sweep: Sweep) -> Model:
    """The prior of the model's latents as a guide."""
    shown = sorted(_latent_names(sweep) | set(subsample_nodes(sweep.prototype)))

    def prior(*args: Any, **kwargs: Any) -> None:
        with poutine.block(expose=shown), _FromBase():
            sweep.model(*args, **kwargs)

    return prior


def _particle_log_weights(
    particles: AutoParticles, guide: Model, sweep: Sweep, num_samples: int
) -> tuple[Tensor, int]:
    if particles.prototype_trace is None:
        raise ValueError("this Saddle has not taken a step, so it has no particles yet; fit it")
    names = dict(particles.prototype_trace.iter_stochastic_nodes())
    others = _latent_names(sweep) - set(names)
    if others:
        raise ValueError(
            f"the latents {sorted(others)} are not particles of this Saddle; its row needs all "
            "latents of the model to be particles"
        )

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        draws = posterior_draws(block, particles.step_size(block.columns[0].name), generator)
        log_w = annealed_elbo(block, draws, num_samples=num_samples, generator=generator)
        return log_w + block.offset

    count = sum(particles.particles(name).numel() for name in names)
    return sweep.over_data(estimate, Stream.PARTICLE_ROW, particles, guide), count


def _mcmc_log_weights(mcmc: MCMC, sweep: Sweep, num_samples: int) -> tuple[Tensor, int]:
    samples: dict[str, Tensor] = mcmc.get_samples()
    missing = _latent_names(sweep) - set(samples)
    if missing:
        raise ValueError(f"the MCMC run has no draws of the latents {sorted(missing)}")

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        rows = {
            c.name: samples[c.name][(slice(None), *sweep.probe.index(c.name, block.indices))]
            for c in block.columns
        }
        draws, _ = block.join(rows)
        log_w = annealed_elbo(block, draws, num_samples=num_samples, generator=generator)
        return log_w + block.offset

    count = sum(value.numel() for value in samples.values())
    return sweep.over_data(estimate, Stream.MCMC_ROW), count


def _guide_log_weights(guide: Model, sweep: Sweep, num_samples: int) -> Tensor:
    check_guide(guide, sweep.prototype)

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        nesting = block.at.nesting
        fixed = at_minibatch(vectorise(guide, num_samples, nesting), _choices(block))
        with own_parameters(guide):
            trace = poutine.trace(fixed).get_trace(*sweep.args, **sweep.kwargs)
        trace.compute_log_prob()
        sites = sample_nodes(trace)
        missing = [c.name for c in block.columns if c.name not in sites]
        if missing:
            raise ValueError(f"the guide has no site for the latents {missing}")
        batch = block.v.shape[1:-1]
        shape = (num_samples, *batch)
        values = {
            c.name: sites[c.name]["value"].reshape(
                *shape, *sweep.probe.prototype_trace.nodes[c.name]["fn"].event_shape
            )
            for c in block.columns
        }
        v, log_det = block.join(values)
        own = {axis - len(batch) for axis, size in enumerate(batch) if size > 1}
        lead = (num_samples, *(1,) * (nesting - len(batch)), *batch)
        log_q = torch.zeros(lead, dtype=v.dtype, device=v.device)
        for node in sites.values():
            log_q = log_q + sum_other_axes(node["unscaled_log_prob"], own, nesting)
        log_p = -0.5 * (v * v).sum(-1) - 0.5 * v.shape[-1] * math.log(2 * math.pi)
        log_p = log_p - block.f(v)[0] - log_det + block.offset
        return log_p - log_q.reshape(shape)

    return sweep.over_data(estimate, Stream.GUIDE_ROW)


def _choices(block: LatentBlock) -> dict[str, Node]:
    return {name: block.at.nodes[name] for name in block.indices}
