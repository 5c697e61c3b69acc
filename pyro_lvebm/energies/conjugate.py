# SPDX-License-Identifier: Apache-2.0
"""A neural energy whose posterior p(z | x) is a Gaussian in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase, unit_rows
from pyro_lvebm.energies.mlp import (
    FOURIER_SCALE,
    KL_PENALTY_PER_DIM,
    STANDARDISED_SCALE,
    WHITENED_SCALE,
)
from pyro_lvebm.energies.whitened import WhitenedEnergy
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.validation import check_at_least, check_widths

_MAX_MEAN = 8.0
"""Largest |h|, in standard deviations of the posterior."""


class ConjugateEnergy(WhitenedEnergy):
    """f(x, z) = −h(x)·ζ: z is the only coupling, and p(z | x) is a Gaussian that a network gives.

        ζ | x ~ N(h(x), I),    log C(x) = log base_x(x) + ½ |h(x)|²,    ζ = whitened z

    C(x) = ∫ base_x base_z e^{−f} dz is p(x) without log Z. It is the harmonium with s(z) = ζ; the
    quadratic term of its Gaussian posterior is that of base_z. h is a SiLU network of whitened and
    standardised x, with fixed Fourier features, each entry bounded by 8, so that Z is finite. It
    starts at zero: an untrained LVEBM is its base, with log Z = 0.

    There is no term of x alone, nor a precision that depends on x: either would explain p(x)
    without moving the posterior (docs/choosing.md). The posterior is the referee of particles and
    guides on a neural model, and loses nothing as a guide. log Z has no closed form.

    Args:
        x_dim: Number of entries of x.
        z_dim: Number of entries of z.
        hidden: Width of each hidden layer.
        fourier_features: Number of sines and of cosines. None chooses 32 where x_dim + z_dim ≤ 8
            and none above.
        kl_penalty: Strength of the `kl_to_base` that a `Saddle` adds to its loss, in nats. None
            is 8 (x_dim + z_dim), and 0 leaves maximum likelihood.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If a size is less than 1, `fourier_features` is negative, or `kl_penalty` is
            negative or not finite.

    Source:
        Welling, Rosen-Zvi and Hinton (2004), Exponential family harmoniums; Wu et al. (2021),
        Conjugate energy-based models.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, ConjugateEnergy
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> energy = ConjugateEnergy(x_dim=2, z_dim=1, hidden=(16,))
        >>> ebm = LVEBM.from_data(energy, x, z_dim=1)
        >>> energy.posterior(x).mean.abs().max().item()  # untrained, it is base_z
        0.0
        >>> torch.allclose(energy.log_marginal(x), ebm.base_x.log_prob(x))
        True
    """

    frequencies: Tensor  # (x_dim, fourier_features)

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden: Sequence[int] = (128, 128),
        fourier_features: int | None = None,
        *,
        kl_penalty: float | None = None,
        seed: int = 0,
    ) -> None:
        if kl_penalty is None:
            kl_penalty = KL_PENALTY_PER_DIM * (x_dim + z_dim)
        super().__init__(x_dim, z_dim, kl_penalty=kl_penalty)
        check_at_least(1, z_dim=z_dim)
        check_widths(hidden)
        if fourier_features is None:
            fourier_features = 32 if self.dim <= 8 else 0
        if fourier_features < 0:
            raise ValueError(f"fourier_features must be 0 or more; got {fourier_features}")
        self.hidden = tuple(hidden)
        with isolated_rng(seed, Stream.ENERGY_WEIGHTS):
            bandwidth = 1.5 * min(1.0, 2.0 / x_dim)
            self.register_buffer("frequencies", bandwidth * torch.randn(x_dim, fourier_features))
            self.register_buffer("standardise", self._standardise())
            layers: list[nn.Module] = []
            for a, b in pairwise((2 * (x_dim + fourier_features), *hidden)):
                layers += [nn.Linear(a, b), nn.SiLU()]
            out = nn.Linear(hidden[-1], z_dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.network = nn.Sequential(*layers, out)

    def bind(self, base_x: GaussianBase, base_z: GaussianBase) -> None:
        """Take the coordinates of these bases; an `LVEBM` calls this when it is built.

        Raises:
            ValueError: As in `WhitenedEnergy.bind`.
        """
        super().bind(base_x, base_z)
        self.standardise = self._standardise().to(base_x.loc)

    def _standardise(self) -> Tensor:
        return unit_rows(self.base_x.tril).T  # x̃ = u_x @ standardise

    def _mean(self, u_x: Tensor) -> Tensor:
        """Return h (*b, z_dim) at whitened x (*b, x_dim)."""
        phase = u_x @ self.frequencies
        features = [WHITENED_SCALE * u_x, STANDARDISED_SCALE * (u_x @ self.standardise)]
        features += [FOURIER_SCALE * phase.sin(), FOURIER_SCALE * phase.cos()]
        h: Tensor = self.network(torch.cat(features, -1))
        return _MAX_MEAN * torch.tanh(h / _MAX_MEAN)

    def whitened(self, u: Tensor, *context: Tensor) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, x_dim + z_dim).

        Raises:
            ValueError: If there is a context.
        """
        if context:
            raise ValueError("a ConjugateEnergy takes no context")
        u_x, zeta = u.split([self.x_dim, self.z_dim], -1)
        value: Tensor = -(self._mean(u_x) * zeta).sum(-1)
        return value

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x), a Gaussian over flattened z, batch shape (*b,), for x (*b, *x_shape)."""
        scale = self.base_z.tril
        h = self._mean(self.base_x.whiten(x))
        return dist.MultivariateNormal(self.base_z.loc + h @ scale.T, scale_tril=scale)

    def log_marginal(self, x: Tensor) -> Tensor:
        """Return log C(x) = log p(x) + log Z (*b,) of x (*b, *x_shape), in nats."""
        h = self._mean(self.base_x.whiten(x))
        return self.base_x.log_prob(x) + 0.5 * (h * h).sum(-1)
