# SPDX-License-Identifier: Apache-2.0
"""Decoder models that are small enough for closed forms and quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from referee import normal
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_lvebm import LVEBM, GeneratorBase, TemperedPool, ZeroEnergy
from pyro_lvebm.bases import GaussianBase, Noise, Support

SHARP = 0.01
"""Noise, in standard deviations of what the generator makes."""


class Curve(nn.Module):
    """A curve in the plane, on which z moves fast here and slowly there, and never back."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([z + 0.8 * torch.tanh(2.0 * z), 0.5 * z.square()], -1)


class Sheet(nn.Module):
    """A curved sheet in three dimensions, over z in two."""

    def forward(self, z: Tensor) -> Tensor:
        a, b = z.unbind(-1)
        return torch.stack([a + 0.5 * torch.tanh(2.0 * b), b, 0.5 * a * b], -1)


def set_noise(base: GeneratorBase, sigma: float) -> GeneratorBase:
    """Give all entries one standard deviation of the noise, in those of the columns."""
    with torch.no_grad():
        base.log_noise.fill_(math.log(sigma - 1e-3))
    return base


def away(base: GeneratorBase, seed: int = 0) -> GeneratorBase:
    """Move all parameters away from where they start."""
    with torch.no_grad():
        for k, p in enumerate(base.parameters()):
            p.add_(0.3 * normal(tuple(p.shape), 100 * seed + k).to(p))
    return base


def base_of(
    generator: nn.Module | None,
    z_dim: int,
    shape: tuple[int, ...],
    noise: Noise = "diagonal",
    support: Support | None = None,
) -> GeneratorBase:
    """A base in float64 on a Gaussian over x with correlations, not at its start."""
    unconstrained = torch.Size(shape) if support is None else support.unconstrained_shape
    d = unconstrained.numel()
    tril = 0.5 * normal((d, d), 1).tril(-1) + (0.5 + normal((d,), 2).abs()).diag()
    gaussian = GaussianBase(normal(tuple(unconstrained), 3), tril, support)
    return away(GeneratorBase(gaussian, generator, torch.Size([z_dim]), noise))


def conditional(base: GeneratorBase, z: Tensor) -> MultivariateNormal:
    """The law of flat y given z, by torch, from the equation in the text of the class."""
    sigma = 1e-3 + base.log_noise.exp()
    cov = sigma.square().diag()
    if base.noise == "low-rank":
        cov = cov + base.noise_factor @ base.noise_factor.T
    if base.noise == "full":
        root = base.noise_below.tril(-1) + sigma.diag()
        cov = root @ root.T
    out = torch.zeros(()) if base.generator is None else base.generator(z)
    mean, factor = (out[0], out[1]) if isinstance(out, tuple) else (out, torch.zeros(()))
    flat = (*z.shape[:-1], base.dim)
    mean = mean.to(base.loc).expand(flat) if mean.dim() == 0 else mean.reshape(flat)
    stretch = (
        base.unit * (factor.reshape(flat) if factor.dim() else factor.to(z).expand(flat)).exp()
    )
    loc = base.loc + base.unit * (base.offset + z @ base.linear.T + mean)
    law = MultivariateNormal(loc, stretch[..., :, None] * cov * stretch[..., None, :])
    assert isinstance(law, MultivariateNormal)
    return law


def decoder(
    generator: nn.Module,
    z_dim: int,
    x_dim: int,
    sigma: float = SHARP,
    *,
    energy: nn.Module | None = None,
    pool: Any = None,
    dtype: torch.dtype = torch.float64,
) -> LVEBM:
    """x = g(z) + σ ε, without factor analysis or unit."""
    gaussian = GaussianBase(torch.zeros(x_dim, dtype=dtype), torch.ones(x_dim, dtype=dtype))
    base = set_noise(GeneratorBase(gaussian, generator, torch.Size([z_dim])), sigma)
    base_z = GaussianBase(torch.zeros(z_dim, dtype=dtype), torch.ones(z_dim, dtype=dtype))
    energy = ZeroEnergy(x_dim, z_dim) if energy is None else energy
    pool = TemperedPool(3, 48, num_moves=1) if pool is None else pool
    return LVEBM(energy.to(dtype), base, base_z, pool)


def simulate(ebm: LVEBM, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Exact draws x, z of a model with f = 0."""
    u = normal((count, ebm.dim), seed).to(ebm.base_x.loc)
    with torch.no_grad():
        return ebm.unwhiten(u)


class LinePosterior:
    """p(z | x) of each row for z in one dimension, by the trapezoidal rule around the truth.

    Args:
        log_joint: log p(x, z) (rows, points) on z (rows, points, 1).
        centre: Where the posteriors lie (rows,).
        half_width: Of the grid around it.
    """

    def __init__(
        self, log_joint: Callable[[Tensor], Tensor], centre: Tensor, half_width: float
    ) -> None:
        steps = torch.linspace(-half_width, half_width, 2001).double()
        self.z = centre.double()[:, None] + steps
        with torch.no_grad():
            self.log_p = log_joint(self.z[..., None].to(centre)).double()
        weights = torch.softmax(self.log_p, -1)
        # The value at a point is what lies left of it, with half of its own weight.
        self.cdf = weights.cumsum(-1) - 0.5 * weights
        self.log_evidence = torch.logsumexp(self.log_p, -1) + math.log(float(steps[1] - steps[0]))
        assert float(weights[:, [0, -1]].max()) < 1e-6

    def draw(self, count: int, seed: int) -> Tensor:
        """Draws (count, rows, 1)."""
        p = torch.rand((len(self.z), count), generator=torch.Generator().manual_seed(seed)).double()
        right = torch.searchsorted(self.cdf, p).clamp(1, self.z.shape[1] - 1)
        ends = [self.cdf.gather(1, right - k) for k in (1, 0)]
        places = [self.z.gather(1, right - k) for k in (1, 0)]
        share = ((p - ends[0]) / (ends[1] - ends[0])).clamp(0.0, 1.0)
        return torch.lerp(places[0], places[1], share).T[..., None]

    def position(self, z: Tensor) -> Tensor:
        """P(z' < z | x) (count, rows) of draws (count, rows, 1): uniform if they are exact."""
        at = z[..., 0].double().T.contiguous()
        step = self.z[:, 1:2] - self.z[:, :1]
        place = ((at - self.z[:, :1]) / step).clamp(0.0, self.z.shape[1] - 1.001)
        left = place.floor().long()
        ends = [self.cdf.gather(1, left + k) for k in (0, 1)]
        return torch.lerp(ends[0], ends[1], place - left).T


def line_posterior(ebm: LVEBM, x: Tensor, z: Tensor, half_width: float = 0.4) -> LinePosterior:
    """Posteriors around the z (rows, 1) that rows x came from; NaN in x is integrated out."""
    seen = ~x.isnan()

    def log_joint(grid: Tensor) -> Tensor:
        base = ebm.base_x
        assert isinstance(base, GeneratorBase)
        if bool(seen.all()):
            wide = x[:, None].expand(*grid.shape[:-1], -1)
            return -ebm.energy(wide, grid)
        # Diagonal noise: what is missing drops out.
        mean = base.mean(grid)
        sigma = (1e-3 + base.log_noise.exp()) * base.unit
        r = torch.where(seen[:, None], (x[:, None] - mean) / sigma, 0.0)
        log_scale = torch.where(seen[:, None], sigma.log() + 0.5 * math.log(2 * math.pi), 0.0)
        return (-0.5 * r.square() - log_scale).sum(-1) + ebm.base_z.log_prob(grid)

    return LinePosterior(log_joint, z[:, 0], half_width)
