# SPDX-License-Identifier: Apache-2.0
"""Gaussian base distributions as modules, and the coordinates whitened by them."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.gaussian_fit import cross_validated_shrinkage, fit_incomplete


class GaussianBase(nn.Module):
    """A Gaussian over events of any shape, whose tensors are buffers.

        x = loc + L w,    w ~ N(0, I)

    Args:
        loc: Mean, one value for each entry of an event, shape `event_shape`.
        scale: Either the standard deviations, shape `event_shape`, or the lower Cholesky factor
            L (d, d) with d the number of entries of an event.

    Raises:
        ValueError: If a shape does not fit, or a scale is not positive and finite.
    """

    loc: Tensor
    scale: Tensor
    inverse_scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.event_shape = loc.shape
        self.dim = loc.numel()
        self.diagonal = scale.shape == loc.shape
        if not self.diagonal and scale.shape != (self.dim, self.dim):
            raise ValueError(
                f"scale has shape {tuple(scale.shape)}; expected {tuple(loc.shape)} (standard "
                f"deviations) or {(self.dim, self.dim)} (lower Cholesky factor)"
            )
        flat = scale.reshape(-1) if self.diagonal else scale
        positive = flat if self.diagonal else flat.diagonal()
        if not (torch.isfinite(flat).all() and torch.isfinite(loc).all() and (positive > 0).all()):
            raise ValueError("loc and scale must be finite, and scales positive")
        if not self.diagonal and not torch.equal(flat, flat.tril()):
            raise ValueError("a scale of shape (d, d) must be lower triangular: a Cholesky factor")
        self.register_buffer("loc", loc.detach().reshape(-1).clone())
        self.register_buffer("scale", flat.detach().clone())
        self.register_buffer("inverse_scale", _invert(flat.detach(), self.diagonal))

    @classmethod
    def from_distribution(cls, base: object, role: str) -> GaussianBase:
        """Read a Gaussian from a Pyro distribution.

        Args:
            base: `Normal(...).to_event(k)` or `MultivariateNormal(...)` without batch dimensions,
                or a `GaussianBase`, which is returned as it is.
            role: Name for messages, such as "base_x".

        Raises:
            ValueError: If `base` is another distribution, or has batch dimensions.
        """
        if isinstance(base, GaussianBase):
            return base
        core = base
        while isinstance(core, torch.distributions.Independent):
            core = core.base_dist
        expected = (
            f"{role} must be a Gaussian over real vectors: Normal(loc, scale).to_event(k) or "
            "MultivariateNormal(loc, ...)"
        )
        if not isinstance(
            core, torch.distributions.Normal | torch.distributions.MultivariateNormal
        ):
            support = getattr(base, "support", None)
            discrete = bool(getattr(support, "is_discrete", False))
            detail = " with a discrete support; dequantise the data first" if discrete else ""
            raise ValueError(f"{expected}; got {type(core).__name__}{detail}")
        assert isinstance(base, torch.distributions.Distribution)
        if base.batch_shape or not base.event_shape:
            raise ValueError(
                f"{expected}; got batch shape {tuple(base.batch_shape)} and event shape "
                f"{tuple(base.event_shape)}. Give it one axis or more, all of them by "
                f".to_event({max(1, len(base.batch_shape))})"
            )
        loc = base.mean.expand(base.event_shape)
        if isinstance(core, torch.distributions.MultivariateNormal):
            if len(base.event_shape) != 1:
                raise ValueError(f"{expected}; got event shape {tuple(base.event_shape)}")
            return cls(loc, core.scale_tril)
        return cls(loc, base.stddev.expand(base.event_shape))

    @classmethod
    def fit(cls, x: Tensor) -> GaussianBase:
        """Fit a Gaussian with a full covariance to rows x (N, *event_shape).

            Σ = S ((1 − a) R + a I) S

        Mean, standard deviations S and correlations R are those of maximum likelihood; the share a
        is chosen by `cross_validated_shrinkage`, is 0 or tiny where rows abound, and keeps the
        base from following the noise in the correlations of few rows. The same rows give the same
        base. Of rows with NaN for missing entries, mean and covariance are those of maximum
        likelihood, by `fit_incomplete`, without shrinkage.

        Raises:
            ValueError: If there are fewer rows than dimensions + 1, or the covariance is singular.
        """
        flat = x.detach().flatten(1).to(torch.float64)
        n, d = flat.shape
        if n <= d:
            raise ValueError(
                f"a full-covariance base for {d} dimensions needs more than {d} rows; got {n}. "
                "Give more rows, or a base with standard deviations only"
            )
        loc = flat.nanmean(0)
        std = (flat - loc).square().nanmean(0).sqrt()
        constant = torch.nonzero(~(std > 1e-12 * (1.0 + loc.abs()))).flatten().tolist()
        if constant:
            raise ValueError(f"columns {constant} of x are constant or never seen; remove them")
        complete = not flat.isnan().any()
        if complete:
            cov = (flat - loc).T @ (flat - loc) / n
        else:
            loc, cov = fit_incomplete(flat)
            std = cov.diagonal().sqrt()
        correlation = cov / std[:, None] / std[None, :]
        if torch.linalg.eigvalsh(correlation)[0] < 1e-9:
            raise ValueError(
                "the covariance of x is singular: some columns are linear combinations of others; "
                "remove them, or give a base with standard deviations only"
            )
        if complete:
            a = cross_validated_shrinkage((flat - loc) / std)
            correlation = torch.lerp(correlation, torch.eye(d).to(correlation), a)
        scale = std[:, None] * torch.linalg.cholesky(correlation)
        return cls(loc.reshape(x.shape[1:]).to(x.dtype), scale.to(x.dtype))

    @property
    def log_det(self) -> Tensor:
        """Log |det L|, a scalar: the volume change from w to x."""
        return (self.scale if self.diagonal else self.scale.diagonal()).log().sum()

    def distribution(self) -> dist.TorchDistribution:
        """Return the Pyro distribution over events."""
        if self.diagonal:
            shape = self.event_shape
            normal = dist.Normal(self.loc.reshape(shape), self.scale.reshape(shape))
            independent: dist.TorchDistribution = normal.to_event(len(shape))
            return independent
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale)

    def whiten(self, x: Tensor) -> Tensor:
        """Return w (*b, d) for x (*b, *event_shape)."""
        centred = x.reshape(*x.shape[: x.dim() - len(self.event_shape)], self.dim) - self.loc
        return centred * self.inverse_scale if self.diagonal else centred @ self.inverse_scale.T

    def unwhiten(self, w: Tensor) -> Tensor:
        """Return x (*b, *event_shape) for w (*b, d)."""
        x = self.loc + (w * self.scale if self.diagonal else w @ self.scale.T)
        return x.reshape(*w.shape[:-1], *self.event_shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the normalised log density (*b,) of x (*b, *event_shape), in nats."""
        w = self.whiten(x)
        return -0.5 * (w * w).sum(-1) - 0.5 * self.dim * math.log(2 * math.pi) - self.log_det


def _invert(scale: Tensor, diagonal: bool) -> Tensor:
    if diagonal:
        return scale.reciprocal()
    wide = scale.to(torch.float64)
    identity = torch.eye(len(wide), dtype=torch.float64, device=wide.device)
    inverse: Tensor = torch.linalg.solve_triangular(wide, identity, upper=False)
    return inverse.to(scale.dtype)
