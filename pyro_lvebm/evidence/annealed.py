# SPDX-License-Identifier: Apache-2.0
"""Normalising constants of latents by annealing, from a prior or a fitted Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.latents import (
    ChainSettings,
    LatentBlock,
    as_problems,
    residuals_of_problems,
    run_chains,
)
from pyro_lvebm.sampling import MALA, Residuals, ValueAndGrad, anneal_problems

MAX_PARTICLES = 2**16


def anneal_latents(
    f: ValueAndGrad,
    shape: tuple[int, int, int],
    like: Tensor,
    *,
    num_runs: int,
    num_moves: int,
    relative_ess: float,
    residuals: Residuals | None = None,
    generator: torch.Generator,
) -> Tensor:
    """Estimate log E_{N(0,I)}[exp(−f)] of many problems, each by independent runs.

    Args:
        f: Residual energy on v (runs, problems, particles, d).
        shape: (problems, particles, d).
        like: Fixes dtype and device.
        num_runs: Independent runs.
        num_moves: MALA steps at each temperature.
        relative_ess: Wanted ESS / n between temperatures in the pilot run.
        residuals: r(v) with ½ |r|² the main part of ½ |v|² + f, as in `anneal_problems`.
        generator: Source of randomness.

    Returns:
        log Ĉ (num_runs, problems), nats.
    """
    if not shape[-1]:  # nothing to integrate over
        return -f(like.new_empty(num_runs, shape[0], 1, 0))[0][..., 0]
    return anneal_problems(
        f,
        residuals,
        shape,
        like,
        num_runs=num_runs,
        num_moves=num_moves,
        pilot_moves=num_moves,
        relative_ess=relative_ess,
        generator=generator,
    ).log_ratio


def anneal_block(
    block: LatentBlock,
    f: ValueAndGrad,
    num_particles: int,
    num_runs: int,
    generator: torch.Generator,
    residuals: Residuals | None = None,
) -> Tensor:
    """Estimate log E_{N(0,I)}[exp(−f)] of every datum of a block, (num_runs, *batch), in nats.

    Args:
        block: The latents of a minibatch.
        f: Its residual energy, in coordinates in which the annealing starts from N(0, I).
        num_particles: Particles of each run, for each datum.
        num_runs: Independent runs for each datum.
        generator: Source of randomness.
        residuals: Those of the block, where f is its own.
    """
    batch, dim = block.v.shape[1:-1], block.v.shape[-1]
    r = None if residuals is None else residuals_of_problems(residuals, batch)
    log_c = anneal_latents(
        as_problems(f, batch),
        (batch.numel(), num_particles, dim),
        block.v,
        num_runs=num_runs,
        num_moves=2,
        relative_ess=0.9,
        residuals=r,
        generator=generator,
    )
    return log_c.reshape(num_runs, *batch)


def posterior_draws(block: LatentBlock, step_size: Tensor, generator: torch.Generator) -> Tensor:
    """Run the particles of each datum on as MALA chains at frozen θ; return draws (n, *B, D)."""
    (chain,) = run_chains([block], [step_size], MALA(), ChainSettings(500, 200, 1), generator)
    return chain.v.flatten(0, 1)


def fit_gaussian(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (*b, d) and Cholesky factor (*b, d, d) of the covariance of draws (n, *b, d)."""
    mean = draws.mean(0)
    centred = draws - mean
    covariance = torch.einsum("n...i,n...j->...ij", centred, centred) / len(draws)
    # A datum whose chains never moved has no covariance; a small one keeps the bound valid.
    ridge = 1e-6 * torch.eye(draws.shape[-1], dtype=draws.dtype, device=draws.device)
    return mean, torch.linalg.cholesky(covariance + ridge)


def relative_to(f: ValueAndGrad, mean: Tensor, tril: Tensor) -> ValueAndGrad:
    """The residual energy g(y) on v = m + L y: g = f(v) + ½|v|² − ½|y|² − log |det L|."""
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def evaluate(y: Tensor) -> tuple[Tensor, Tensor]:
        v = mean + (tril @ y[..., None]).squeeze(-1)
        value, grad = f(v)
        g = value + 0.5 * (v * v).sum(-1) - 0.5 * (y * y).sum(-1) - log_det
        return g, (tril.mT @ (grad + v)[..., None]).squeeze(-1) - y

    return evaluate
