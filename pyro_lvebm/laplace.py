# SPDX-License-Identifier: Apache-2.0
"""The Laplace approximation of the posterior of every datum, with nothing trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lvebm.annealing import standard_normal
from pyro_lvebm.local_energy import LatentBlock

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
