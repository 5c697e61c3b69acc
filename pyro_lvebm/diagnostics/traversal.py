# SPDX-License-Identifier: Apache-2.0
"""What one latent does to x: the law of x given z, with one entry of z moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.model import LVEBM, check_unconditional, given_z
from pyro_lvebm.rng import Stream, generator_for, isolated_rng
from pyro_lvebm.sampling import anneal, pick_draws, pilot, standard_normal
from pyro_lvebm.validation import as_rows, check_at_least

_NUM_PARTICLES = 256

_MAX_PROBLEMS = 64
"""Pairs of datum and value that are annealed side by side, which bounds the memory."""

_POSTERIOR_DRAWS = 64


@dataclass(frozen=True)
class Traversal:
    """Draws and means of x given z, by datum and value of the moved entry."""

    z: Tensor  # (N, V, *z_shape)
    mean: Tensor  # (N, V, *x_shape), estimate of E[x | z]
    std_error: Tensor  # (N, V, *x_shape), of the mean
    draws: Tensor  # (num_runs, N, V, *x_shape)


def traverse(
    ebm: LVEBM,
    x: Tensor | np.ndarray,
    dim: int,
    values: Tensor | np.ndarray,
    *,
    num_runs: int = 8,
    seed: int = 0,
) -> Traversal:
    """Move one entry of z, with the others at the posterior mean of a datum, and show x given z.

        z_i = E[z | x_i] with entry `dim` set to v,    x' ~ p_θ(x | z_i)

    An LVEBM has no decoder: a latent changes a whole law of x, which is sampled by sequential
    Monte Carlo from base_x to e^{−f(x, z)} base_x(x). Each run has 256 particles; their mean
    estimates E[x | z], and one of them is a draw. The mean moves smoothly, and is what to look at
    first; where p(x | z) has several modes it lies between them, and the draws show that.

    Args:
        ebm: The LVEBM; unchanged.
        x: Observations (N, *x_shape) from which to start.
        dim: Entry of z to move, counted over a flattened z.
        values: Values that it takes (V,), in the units of z.
        num_runs: Independent runs for each mean, at least 2.
        seed: Fixes every random number.

    Raises:
        ValueError: If the LVEBM is conditional, x does not fit the model, `dim` is no entry of z,
            `values` is no vector, or `num_runs` is less than 2.

    Source:
        Traversals are those of Higgins et al. (2017), β-VAE, section 4; Del Moral, Doucet and
        Jasra (2006), Sequential Monte Carlo samplers.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, traverse
        >>> energy = QuadraticEnergy(1, 1)
        >>> x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.set_precision(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]))  # x rises with z
        >>> result = traverse(ebm, x[:1], 0, torch.tensor([-2.0, 2.0]))
        >>> low, high = result.mean.flatten().tolist()
        >>> low < high
        True
    """
    check_unconditional(ebm, "traverse")
    x = as_rows(x, ebm.x_shape, like=ebm.base_x.loc)
    values = torch.as_tensor(values).to(ebm.base_z.loc)
    k = ebm.base_z.dim
    if not 0 <= dim < k:
        raise ValueError(f"dim must be an entry of z, 0 … {k - 1}; got {dim}")
    if values.dim() != 1 or not len(values) or not torch.isfinite(values).all():
        raise ValueError(
            f"values must be a vector of finite numbers; got shape {tuple(values.shape)}"
        )
    check_at_least(2, num_runs=num_runs)
    generator = generator_for(seed, Stream.TRAVERSAL, device=x.device)
    with ebm.frozen(), torch.no_grad():
        with isolated_rng(seed, Stream.TRAVERSAL_START, device=x.device):
            centre = ebm.posterior(x).sample((_POSTERIOR_DRAWS,)).mean(0).flatten(1)
        z = centre[:, None].repeat(1, len(values), 1)
        z[..., dim] = values.to(z)
        z = z.reshape(len(x), len(values), *ebm.z_shape)
        parts = [
            _run(ebm, part, num_runs, generator) for part in z.flatten(0, 1).split(_MAX_PROBLEMS)
        ]
        means, draws = (torch.cat(halves, 1) for halves in zip(*parts, strict=True))
        shape = (num_runs, len(x), len(values))
        means = means.reshape(*shape, *ebm.x_shape)
        draws = draws.reshape(*shape, *ebm.x_shape)
    return Traversal(z, means.mean(0), means.std(0) / math.sqrt(num_runs), draws)


def _run(ebm: LVEBM, z: Tensor, num_runs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means of x (runs, P, *x_shape) and draws (runs, P, *x_shape) given z (P, *z_shape)."""
    f = given_z(ebm, ebm.base_z.whiten(z)[:, None])
    shape = (len(z), _NUM_PARTICLES, ebm.base_x.dim)
    schedule = pilot(f, standard_normal((1, *shape), z, generator), generator=generator)
    start = standard_normal((num_runs, *shape), z, generator)
    state = anneal(f, start, schedule, num_moves=4, generator=generator).state
    # On a bounded support the map to x is not linear: the mean is taken over x.
    w_z = ebm.base_z.whiten(z)[:, None].expand(*state.u.shape[:-1], -1)
    means = ebm.unwhiten(torch.cat([state.u, w_z], -1))[0].mean(2)
    drawn = torch.cat([pick_draws(state, generator), w_z[..., 0, :]], -1)
    return means, ebm.unwhiten(drawn)[0]
