# SPDX-License-Identifier: Apache-2.0
"""An energy prior: an energy-based density of one vector, for latents of a Pyro model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.energies import WhitenedEnergy
from pyro_lvebm.model.lvebm import LVEBM
from pyro_lvebm.pools import Pool
from pyro_lvebm.validation import check_at_least


class EnergyPrior(LVEBM):
    """An energy-based prior of a latent z alone, with a pool and log Z of its own.

        p_θ(z) = exp(−f_θ(z)) N(z; 0, I) / Z_θ,    Z_θ = E_{N(0, I)}[exp(−f_θ)]

    `energy_prior("z", prior)` is its sample site; what follows from z in the model, such as a
    decoder with a Gaussian, Bernoulli or Poisson likelihood, is the user's. It is an `LVEBM` over
    one vector, without a second part (z_dim = 0), and all that takes an `LVEBM` takes it; z stands
    there in the place of x.

    Args:
        energy: The residual energy f, any `nn.Module` that maps z (*b, z_dim) to (*b); or one of
            this package for one vector, such as `MLPEnergy(z_dim)`.
        z_dim: Number of entries of z.
        pool: The pool of negatives; `TemperedPool()` if None.

    Raises:
        ValueError: If z_dim < 1, or the energy has another dimension, returns the wrong shape or
            NaN, or is random.

    Source:
        Pang et al. (2020), Learning latent space energy-based prior model.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import EnergyPrior, MLPEnergy, energy_prior
        >>> prior = EnergyPrior(MLPEnergy(2, hidden=(16,)), z_dim=2)
        >>> decoder = torch.nn.Linear(2, 5)
        >>> def model(x):
        ...     pyro.module("decoder", decoder)
        ...     with pyro.plate("data", len(x), subsample_size=10) as i:
        ...         z = energy_prior("z", prior)
        ...         pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[i])
        ...         return z
        >>> model(torch.ones(100, 5)).shape
        torch.Size([10, 2])
    """

    def __init__(self, energy: nn.Module, z_dim: int, pool: Pool | None = None) -> None:
        check_at_least(1, z_dim=z_dim)
        if not isinstance(energy, nn.Module):
            raise ValueError(f"energy must be an nn.Module; got {type(energy).__name__}")
        if not isinstance(energy, WhitenedEnergy):
            energy = EnergyOfOne(energy)
        like = next(energy.parameters(), torch.zeros(()))
        base = GaussianBase(like.new_zeros(z_dim), like.new_ones(z_dim))
        super().__init__(energy, base, GaussianBase(like.new_zeros(0), like.new_ones(0)), pool)


class EnergyOfOne(nn.Module):
    """An energy of one vector, in the form of one of a pair whose second part is empty.

    Args:
        energy: Maps (*b, d) to (*b).
    """

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Return f(x) (*b,) for x (*b, d) and z (*b, 0)."""
        value: Tensor = self.energy(x)
        return value
