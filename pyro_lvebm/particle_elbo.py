# SPDX-License-Identifier: Apache-2.0
"""The ELBO of Langevin particles, on the space of their paths."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lvebm.annealing import anneal, pilot, standard_normal
from pyro_lvebm.chains import run_chains
from pyro_lvebm.langevin import MALA, ValueAndGrad
from pyro_lvebm.local_energy import LatentBlock, as_problems

NUM_TEMPERATURES = 32
_PILOT_SAMPLES = 16


def posterior_draws(block: LatentBlock, step_size: Tensor, generator: torch.Generator) -> Tensor:
    """Run the particles of each datum on as MALA chains at frozen θ; return draws (n, *B, D)."""
    (chain,) = run_chains(
        [block],
        [step_size],
        MALA(),
        num_samples=500,
        num_warmup=200,
        thinning=1,
        generator=generator,
    )
    return chain.v.flatten(0, 1)


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
