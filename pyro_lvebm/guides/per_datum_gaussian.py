# SPDX-License-Identifier: Apache-2.0
"""Gaussian guides with correlations for every datum: full covariance, and low rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions.kl import register_kl

from pyro_lvebm.guides.per_datum import PerDatumGuide
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sites import LatentSite
from pyro_lvebm.validation import check_at_least


class AutoPerDatumMultivariateNormal(PerDatumGuide):
    """A Gaussian with a full covariance over the event of each latent site, one for every datum.

        q(z | i) = N(loc_i, L_i L_iᵀ)

    Where Pyro's `AutoMultivariateNormal` allocates one covariance over all latents of the
    minibatch at hand, this guide has parameters loc (*full_batch, d) and L (*full_batch, d, d)
    with plates at their full size. Sites are independent of each other. A site on a constrained
    support is Gaussian in unconstrained coordinates.

    Args:
        model: A Pyro model whose latent sites are continuous.
        init_scale: First standard deviation.
        init_loc_fn: Where locations start, as in Pyro's autoguides; by default at draws of the
            prior, one for each datum. With another one all data start alike.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If init_scale is not positive, or (at the first call) a latent site is
            discrete.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoPerDatumMultivariateNormal
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])
        >>> guide = AutoPerDatumMultivariateNormal(model)
        >>> guide(torch.zeros(100, 2))["z"].shape
        torch.Size([10, 2])
        >>> sorted(tuple(p.shape) for p in guide.parameters())
        [(100, 2), (100, 2, 2)]
    """

    groups = ("locs", "scale_trils")

    def _allocate(self, key: str, loc: Tensor) -> None:
        eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
        tril = (self._init_scale * eye).expand(*loc.shape[:-1], -1, -1).clone()
        setattr(self.scale_trils, key, PyroParam(tril, constraints.softplus_lower_cholesky, 2))

    def _law(self, key: str) -> dist.TorchDistribution:
        loc, tril = getattr(self.locs, key), getattr(self.scale_trils, key)
        return dist.MultivariateNormal(loc, scale_tril=tril)


class AutoPerDatumLowRankMultivariateNormal(PerDatumGuide):
    """A Gaussian whose covariance is low rank plus diagonal, one for every datum.

        q(z | i) = N(loc_i, W_i W_iᵀ + diag(s_i²))

    Its parameters are loc and s (*full_batch, d) and W (*full_batch, d, r), with plates at their
    full size: O(d r) for each datum, where a full covariance needs O(d²). With r = d − 1 it is
    every Gaussian. Sites are independent of each other, and a site on a constrained support is
    Gaussian in unconstrained coordinates.

    W starts at fixed random numbers: at W = 0 its gradient would be zero.

    Args:
        model: A Pyro model whose latent sites are continuous.
        rank: r, the number of columns of W. A site with fewer entries has as many columns as
            entries.
        init_scale: First standard deviation of every entry; half of its square or less is W's.
        init_loc_fn: Where locations start, as in Pyro's autoguides; by default at draws of the
            prior, one for each datum. With another one all data start alike.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If rank < 1 or init_scale is not positive, or (at the first call) a latent
            site is discrete.

    Source:
        Ong, Nott and Smith (2018), Gaussian variational approximation with a factor covariance
        structure.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoPerDatumLowRankMultivariateNormal
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])
        >>> guide = AutoPerDatumLowRankMultivariateNormal(model, rank=2)
        >>> guide(torch.zeros(100, 5))["z"].shape
        torch.Size([10, 5])
        >>> sorted(tuple(p.shape) for p in guide.parameters())
        [(100, 5), (100, 5), (100, 5, 2)]
    """

    groups = ("locs", "scales", "cov_factors")

    def __init__(
        self,
        model: Callable[..., Any],
        rank: int = 1,
        *,
        init_scale: float = 0.5,
        init_loc_fn: Callable[..., Any] = init_to_sample,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_at_least(1, rank=rank)
        self.rank = rank
        super().__init__(
            model, init_scale=init_scale, init_loc_fn=init_loc_fn, create_plates=create_plates
        )

    def _allocate(self, key: str, loc: Tensor) -> None:
        rank = min(self.rank, loc.shape[-1])
        generator = generator_for(0, Stream.LOW_RANK_START)
        uniform = 2.0 * torch.rand((*loc.shape, rank), generator=generator).to(loc) - 1.0
        factor = self._init_scale * (0.5 / rank) ** 0.5 * uniform
        scale = (self._init_scale**2 - (factor**2).sum(-1)).sqrt()
        setattr(self.scales, key, PyroParam(scale, constraints.softplus_positive, 1))
        setattr(self.cov_factors, key, PyroParam(factor, constraints.real, 2))

    def _law(self, key: str) -> dist.TorchDistribution:
        loc, scale = getattr(self.locs, key), getattr(self.scales, key)
        return dist.LowRankMultivariateNormal(loc, getattr(self.cov_factors, key), scale**2)


@register_kl(torch.distributions.LowRankMultivariateNormal, LatentSite)  # type: ignore[untyped-decorator]
def _kl_low_rank_to_latent(q: Any, p: LatentSite) -> Tensor:
    """KL(N(m, W Wᵀ + D) ‖ base_z) = −H(q) − log base_z(m) + ½ tr(A (W Wᵀ + D) Aᵀ), A = L⁻¹."""
    base = p.ebm.base_z
    a = base.inverse_tril
    trace = ((a @ q.cov_factor) ** 2).sum((-2, -1)) + q.cov_diag @ (a**2).sum(0)
    result: Tensor = 0.5 * trace - base.log_prob(q.loc) - q.entropy()
    return result
