# SPDX-License-Identifier: Apache-2.0
"""Log weights of a posterior for every datum, whose mean is its bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.infer.mcmc.api import MCMC
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvebm.evidence import fit_gaussian, posterior_draws, relative_to
from pyro_lvebm.guides import AutoParticles, check_guide, own_parameters
from pyro_lvebm.latents import LatentBlock, Program, Sweep, as_problems, sum_other_axes
from pyro_lvebm.rng import Stream
from pyro_lvebm.sampling import anneal, pilot, standard_normal
from pyro_lvebm.sites import (
    LatentSite,
    Model,
    is_prior,
    sample_nodes,
    subsample_nodes,
)


class _FromBase(Messenger):
    """Draws the latent of an LVEBM from base_z, whose density its site has.

    Without data the site itself draws from the pool, from p_θ(z). An energy prior, whose density
    is known up to log Z only, is replaced by its base.
    """

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if isinstance(fn, LatentSite):
            msg["fn"] = fn.ebm.base_z.distribution().expand(fn.batch_shape)
        elif is_prior(fn) and not msg["is_observed"]:
            msg["fn"] = fn.ebm.base_x.distribution().expand(fn.batch_shape)


def prior_guide(program: Program) -> Model:
    """The prior of the model's latents as a guide."""
    shown = sorted(program.integrated() | set(subsample_nodes(program.prototype)))

    def prior(*args: Any, **kwargs: Any) -> None:
        with poutine.block(expose=shown), _FromBase():
            program.model(*args, **kwargs)

    return prior


def particle_log_weights(
    particles: AutoParticles, guide: Model, sweep: Sweep, num_samples: int
) -> tuple[Tensor, int]:
    """Log weights (num_samples, N) of annealed Langevin from particles, and their coordinates."""
    names = sweep.program.check_particles(particles)

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        draws = posterior_draws(block, particles.step_size(block.columns[0].name), generator)
        log_w = annealed_elbo(block, draws, num_samples=num_samples, generator=generator)
        return log_w + block.offset

    count = sum(particles.particles(name).numel() for name in names)
    return sweep.over_data(estimate, Stream.PARTICLE_ROW, particles, guide), count


def mcmc_log_weights(mcmc: MCMC, sweep: Sweep, num_samples: int) -> tuple[Tensor, int]:
    """Log weights (num_samples, N) of annealed Langevin from MCMC draws, and their numbers."""
    samples: dict[str, Tensor] = mcmc.get_samples()
    missing = sweep.program.integrated() - set(samples)
    if missing:
        raise ValueError(f"the MCMC run has no draws of the latents {sorted(missing)}")

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        rows = {
            c.name: samples[c.name][
                (slice(None), *sweep.program.probe.index(c.name, block.indices))
            ]
            for c in block.columns
        }
        draws, _ = block.join(rows)
        log_w = annealed_elbo(block, draws, num_samples=num_samples, generator=generator)
        return log_w + block.offset

    count = sum(value.numel() for value in samples.values())
    return sweep.over_data(estimate, Stream.MCMC_ROW), count


def guide_log_weights(guide: Model, sweep: Sweep, num_samples: int) -> Tensor:
    """Log weights log p − log q (num_samples, N) at draws of a guide, in nats."""
    program = sweep.program
    check_guide(guide, program.prototype)

    def estimate(block: LatentBlock, generator: torch.Generator) -> Tensor:
        choices = {name: block.at.nodes[name] for name in block.indices}
        with own_parameters(guide):
            trace = program.trace(program.vectorised(guide, num_samples, choices))
        trace.compute_log_prob()
        sites = sample_nodes(trace)
        missing = [c.name for c in block.columns if c.name not in sites]
        if missing:
            raise ValueError(f"the guide has no site for the latents {missing}")
        batch = block.v.shape[1:-1]
        shape = (num_samples, *batch)
        values = {
            c.name: sites[c.name]["value"].reshape(
                *shape, *c.rows, *program.probe.prototype_trace.nodes[c.name]["fn"].event_shape
            )
            for c in block.columns
        }
        v, log_det = block.join(values)
        own = {axis - len(batch) for axis, size in enumerate(batch) if size > 1}
        lead = (num_samples, *(1,) * (program.nesting - len(batch)), *batch)
        log_q = torch.zeros(lead, dtype=v.dtype, device=v.device)
        for node in sites.values():
            log_q = log_q + sum_other_axes(node["unscaled_log_prob"], own, program.nesting)
        log_p = -0.5 * (v * v).sum(-1) - 0.5 * v.shape[-1] * math.log(2 * math.pi)
        log_p = log_p - block.f(v)[0] - log_det + block.offset
        return log_p - log_q.reshape(shape)

    return sweep.over_data(estimate, Stream.GUIDE_ROW)


NUM_TEMPERATURES = 32

_PILOT_SAMPLES = 16


def annealed_elbo(
    block: LatentBlock, draws: Tensor, *, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Log weights whose mean is a lower bound of log ∫ p dz in expectation, one bound a datum.

    A Gaussian q_0 = N(m, LLᵀ) is fitted to draws from the posterior of each datum. New draws
    v_0 = m + L y_0 are then carried from q_0 to p_θ(z | x) along q_0^{1−β} p^β by MALA, with
    weights

        log w = Σ_k (β_{k+1} − β_k) (log p(x, v_k) − log q_0(v_k)),    E[log w] ≤ log E[w] = log C.

    E[log w] is the ELBO of the forward path against the backward path, and its gap is their
    Kullback–Leibler divergence, at least that of the last positions from the posterior. Fit, step
    sizes and temperatures come from draws that the bound does not use, so it holds however well
    they fit.

    Args:
        block: The block, at the particles of a minibatch.
        draws: Draws from the posterior of each datum (n, *B, D), such as `posterior_draws`.
        num_samples: Draws for each datum.
        generator: Source of randomness.

    Returns:
        log w (num_samples, *batch), without the block's offset, in nats.

    Source:
        Neal (2001), Annealed importance sampling; Wu et al. (2017), On the quantitative analysis
        of decoder-based generative models, section 3 (as a variational bound).
    """
    mean, tril = fit_gaussian(draws)
    f = relative_to(block.f, mean, tril)
    batch, d = block.v.shape[1:-1], block.v.shape[-1]
    problems = as_problems(f, batch)
    betas = torch.linspace(0.0, 1.0, NUM_TEMPERATURES + 1)
    start = standard_normal((1, batch.numel(), _PILOT_SAMPLES, d), block.v, generator)
    schedule = pilot(problems, start, betas=betas, num_moves=1, generator=generator)
    start = standard_normal((1, batch.numel(), num_samples, d), block.v, generator)
    run = anneal(problems, start, schedule, num_moves=1, resample=False, generator=generator)
    log_w = run.log_weights
    return log_w[0].T.reshape(num_samples, *batch)


_NUM_STARTS = 8

_NUM_STEPS = 200

_DIFFERENCE = 1e-2
"""Distance of the gradients whose differences are second derivatives, in whitened units."""


def laplace_log_weights(
    block: LatentBlock, *, num_samples: int, generator: torch.Generator
) -> Tensor:
    """Log weights under the Gaussian at a mode of each posterior.

        q(v) = N(m, H⁻¹),    m = argmin E(v),    H = ∇²E(m),    E(v) = ½ |v|² + f(v)

    The mode is the lowest that gradient descent finds from several prior draws. Directions in which
    E does not curve upwards there get the precision of the base, 1.

    Args:
        block: The latents of a minibatch.
        num_samples: Draws for each datum.
        generator: Source of randomness.

    Returns:
        log w = −E(v) − log q(v) less the constant of the base, (num_samples, *batch), without the
        block's offset, in nats.

    Source:
        Tierney and Kadane (1986), Accurate approximations for posterior moments and marginal
        densities, section 2.
    """
    batch, d = block.v.shape[1:-1], block.v.shape[-1]
    mode = _mode(block, standard_normal((_NUM_STARTS, *batch, d), block.v, generator))
    values, vectors = torch.linalg.eigh(_hessian(block, mode))
    values = torch.where(values > 1e-3, values, torch.ones_like(values))
    xi = standard_normal((num_samples, *batch, d), block.v, generator)
    v = mode + (vectors @ (xi / values.sqrt())[..., None]).squeeze(-1)
    energy, _ = _energy_and_grad(block, v)
    log_q = 0.5 * values.log().sum(-1) - 0.5 * (xi * xi).sum(-1)
    # The factors (2π)^(d/2) of the base and of q cancel.
    return -energy - log_q


def _energy_and_grad(block: LatentBlock, v: Tensor) -> tuple[Tensor, Tensor]:
    f, grad = block.f(v)
    return 0.5 * (v * v).sum(-1) + f, grad + v


def _mode(block: LatentBlock, v: Tensor) -> Tensor:
    """Descend from v (starts, *B, D), each with its own step size; return the lowest (*B, D)."""
    energy, grad = _energy_and_grad(block, v)
    step = torch.full_like(energy, 0.1)
    for _ in range(_NUM_STEPS):
        new = v - step[..., None] * grad
        new_energy, new_grad = _energy_and_grad(block, new)
        better = new_energy < energy
        v, grad = (torch.where(better[..., None], a, b) for a, b in ((new, v), (new_grad, grad)))
        energy = torch.where(better, new_energy, energy)
        step = torch.where(better, 1.3 * step, 0.5 * step).clamp(min=1e-8)
    best = energy.nan_to_num(nan=math.inf).argmin(0, keepdim=True)
    return v.gather(0, best[..., None].expand(1, *v.shape[1:])).squeeze(0)


def _hessian(block: LatentBlock, v: Tensor) -> Tensor:
    """∇²E (*B, D, D) at v (*B, D), by central differences of gradients."""
    d = v.shape[-1]
    shifts = _DIFFERENCE * torch.eye(d).to(v).reshape(d, *(1,) * (v.dim() - 1), d)
    _, above = _energy_and_grad(block, v + shifts)
    _, below = _energy_and_grad(block, v - shifts)
    rows = ((above - below) / (2.0 * _DIFFERENCE)).movedim(0, -2)
    return 0.5 * (rows + rows.mT)
