# SPDX-License-Identifier: Apache-2.0
"""Gaussian base distributions as modules, and the coordinates whitened by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.transforms import ComposeTransform

from pyro_lvebm.bases.fitting import cross_validated_shrinkage, fit_incomplete
from pyro_lvebm.bases.supports import Support
from pyro_lvebm.bases.units import invert_tril, moments, power_of_two
from pyro_lvebm.sampling import STANDARD_NORMAL, Base


class GaussianBase(nn.Module):
    """A Gaussian over events of any shape, whose tensors are buffers.

        x = loc + L w,    w ~ N(0, I)

    On another support than the real vectors, it is the law of x = T(y) for y with this Gaussian,
    and its density has the Jacobian of T. loc, scale and `dim` are those of the unconstrained y.

    Args:
        loc: Mean, one value for each entry of an event, of its shape.
        scale: Either the standard deviations, of the shape of loc, or the lower Cholesky factor
            L (d, d) with d the number of entries of loc.
        support: Where x lies, with T; the real vectors if None.

    Raises:
        ValueError: If a shape does not fit, or a scale is not positive and finite.
    """

    loc: Tensor
    scale: Tensor
    inverse_scale: Tensor
    support: Support

    depends_on_z = False
    """Whether the law of x varies with z, as a `GeneratorBase` has it."""

    def __init__(self, loc: Tensor, scale: Tensor, support: Support | None = None) -> None:
        super().__init__()
        support = Support(constraints.real, loc.shape) if support is None else support
        if loc.shape != support.unconstrained_shape:
            raise ValueError(
                f"loc has shape {tuple(loc.shape)}; support {support} has unconstrained "
                f"coordinates of shape {tuple(support.unconstrained_shape)}"
            )
        self.support = support.map_tensors(lambda t: t.detach().to(loc))
        self.event_shape = support.event_shape
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
        inverse = _invert(flat.detach(), self.diagonal)
        if not torch.isfinite(inverse).all():
            raise ValueError(
                f"a scale of {float(positive.min()):.3g} has no inverse in {flat.dtype}; give x in "
                "float64, or in a smaller unit"
            )
        if not self.diagonal and not torch.equal(flat, flat.tril()):
            raise ValueError("a scale of shape (d, d) must be lower triangular: a Cholesky factor")
        self.register_buffer("loc", loc.detach().reshape(-1).clone())
        self.register_buffer("scale", flat.detach().clone())
        self.register_buffer("inverse_scale", inverse)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianBase:
        super()._apply(fn, recurse)
        self.support = self.support.map_tensors(fn)  # bounds follow dtype and device
        return self

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
        # The stddev of an Independent is the root of a square, which may be 0 or infinite.
        return cls(loc, core.stddev.expand(base.event_shape))

    @classmethod
    def from_bounded(cls, base: object, role: str) -> GaussianBase:
        """Read a Gaussian, or one on a bounded support, from a Pyro distribution.

        Args:
            base: As in `from_distribution`, or a `TransformedDistribution` of such a Gaussian by
                the bijection that `biject_to` gives for its support, such as
                `LogNormal(...).to_event(k)`.
            role: Name for messages, such as "base_x".

        Raises:
            ValueError: If `base` is another distribution, has another transform, or has batch
                dimensions.
        """
        core = base
        while isinstance(core, torch.distributions.Independent):
            core = core.base_dist
        if not isinstance(core, torch.distributions.TransformedDistribution):
            return cls.from_distribution(base, role)
        assert isinstance(base, torch.distributions.Distribution)
        if base.batch_shape or not base.event_shape:
            raise ValueError(
                f"{role} has batch shape {tuple(base.batch_shape)} and event shape "
                f"{tuple(base.event_shape)}. Give it one axis or more, all of them by "
                f".to_event({max(1, len(base.batch_shape))})"
            )
        events = torch.distributions.Independent(core.base_dist, len(core.base_dist.batch_shape))
        gaussian = cls.from_distribution(events, f"the law that {role} transforms")
        constraint: Any = base.support
        support = Support(constraint, base.event_shape)
        w = torch.tensor([[-1.0], [0.5]]).to(gaussian.loc).expand(2, gaussian.dim)
        y = gaussian.unwhiten(w)
        x = ComposeTransform(core.transforms)(y)
        fits = y.shape[1:] == support.unconstrained_shape
        if not fits or not _agree(support.constrain(y), x):
            raise ValueError(
                f"{role} has support {support}, but its transform is not the one that biject_to "
                "gives for it, in which Pyro's algorithms move x. Use biject_to(support) (torch "
                "tells the supports of affine transforms wrongly), or LVEBM.from_data(..., "
                "support=...)"
            )
        shape = support.unconstrained_shape
        scale = gaussian.scale.reshape(shape) if gaussian.diagonal else gaussian.scale
        return cls(gaussian.loc.reshape(shape), scale, support)

    @classmethod
    def fit(cls, x: Tensor, support: Support | None = None) -> GaussianBase:
        """Fit a Gaussian with a full covariance to rows x (N, *event_shape).

            Σ = S ((1 − a) R + a I) S

        Mean, standard deviations S and correlations R are those of maximum likelihood; the share a
        is chosen by `cross_validated_shrinkage`, is 0 or tiny where rows abound, and keeps the
        base from following the noise in the correlations of few rows. The same rows give the same
        base. Of rows with NaN for missing entries, mean and covariance are those of maximum
        likelihood, by `fit_incomplete`, without shrinkage. On another support than the real
        vectors all this is done with the unconstrained coordinates of the rows.

        Raises:
            ValueError: If there are fewer rows than dimensions + 1, the covariance is singular, or
                rows have no unconstrained coordinates.
        """
        support = Support(constraints.real, x.shape[1:]) if support is None else support
        support.check(x)
        wide = support.map_tensors(lambda t: t.to(x.device, torch.float64))
        flat = wide.unconstrain(x.detach().to(torch.float64)).flatten(1)
        name = "x" if support.is_real else f"the unconstrained coordinates of x ({support})"
        n, d = flat.shape
        if n <= d:
            raise ValueError(
                f"a full-covariance base for {d} dimensions needs more than {d} rows; got {n}. "
                "Give more rows, or a base with standard deviations only"
            )
        loc, std, constant = moments(flat)
        if constant.any():
            raise ValueError(
                f"columns {torch.nonzero(constant).flatten().tolist()} of {name} are constant but "
                "for rounding, or never seen; remove them, or subtract what they have in common"
            )
        unit = power_of_two(std)
        flat, loc, std = flat / unit, loc / unit, std / unit
        complete = not flat.isnan().any()
        if complete:
            cov = (flat - loc).T @ (flat - loc) / n
        else:
            loc, cov = fit_incomplete(flat)
            std = cov.diagonal().sqrt()
        correlation = cov / std[:, None] / std[None, :]
        if torch.linalg.eigvalsh(correlation)[0] < 1e-9:
            raise ValueError(
                f"the covariance of {name} is singular: some columns are linear combinations of "
                "others; remove them, or give a base with standard deviations only"
            )
        if complete:
            a = cross_validated_shrinkage((flat - loc) / std)
            correlation = torch.lerp(correlation, torch.eye(d).to(correlation), a)
        scale = (unit * std)[:, None] * torch.linalg.cholesky(correlation)
        loc = (unit * loc).reshape(support.unconstrained_shape).to(x.dtype)
        scale = scale.to(x.dtype)
        lost = torch.nonzero(scale.diagonal() < torch.finfo(x.dtype).tiny).flatten().tolist()
        if lost:
            raise ValueError(
                f"columns {lost} of {name} vary by less than {x.dtype} can hold; give x in "
                "float64, or in a smaller unit"
            )
        return cls(loc, scale, support)

    @property
    def num_components(self) -> int:
        """Number of Gaussians."""
        return 1

    @property
    def law(self) -> Base:
        """The law of w."""
        return STANDARD_NORMAL

    @property
    def tril(self) -> Tensor:
        """The lower Cholesky factor L (d, d)."""
        return self.scale.diag() if self.diagonal else self.scale

    @property
    def inverse_tril(self) -> Tensor:
        """L⁻¹ (d, d)."""
        return self.inverse_scale.diag() if self.diagonal else self.inverse_scale

    @property
    def log_det(self) -> Tensor:
        """Log |det L|, a scalar: the volume change from w to x, or to y where x = T(y)."""
        return (self.scale if self.diagonal else self.scale.diagonal()).log().sum()

    def log_abs_det(self, w: Tensor) -> Tensor:
        """Return log |det dx/dw| (*b,) at w (*b, d), in nats."""
        y = self._unwhiten(w)
        return self.log_det + self.support.log_abs_det(y, self.support.constrain(y))

    def distribution(self) -> dist.TorchDistribution:
        """Return the Pyro distribution over events."""
        if self.diagonal:
            shape = self.support.unconstrained_shape
            normal = dist.Normal(self.loc.reshape(shape), self.scale.reshape(shape))
            law: dist.TorchDistribution = normal.to_event(len(shape))
        else:
            law = dist.MultivariateNormal(self.loc, scale_tril=self.scale)
        if not self.support.is_real:
            law = dist.TransformedDistribution(law, [self.support.transform])
        return law

    def whiten(self, x: Tensor) -> Tensor:
        """Return w (*b, d) for x (*b, *event_shape)."""
        return self.whiten_unconstrained(self.support.unconstrain(x))

    def unwhiten(self, w: Tensor) -> Tensor:
        """Return x (*b, *event_shape) for w (*b, d)."""
        return self.support.constrain(self._unwhiten(w))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the normalised log density (*b,) of x (*b, *event_shape), in nats."""
        return self._log_density(x, self.law)

    def log_prob_given(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the normalised log density of x (*b, *event_shape) given z (*b, *z_shape)."""
        return self.log_prob(x)

    def whiten_given(self, x: Tensor, z: Tensor) -> Tensor:
        """Return coordinates (*b, d) of x in which its law given z is `law`."""
        return self.whiten(x)

    def unwhiten_given(self, w: Tensor, z: Tensor) -> Tensor:
        """Return x (*b, *event_shape) for the coordinates of `whiten_given`."""
        return self.unwhiten(w)

    def coordinates(self) -> GaussianBase:
        """Return the base that an energy takes its coordinates from; they do not vary with z."""
        return self

    def log_normal(self, x: Tensor) -> Tensor:
        """Return the log density (*b,) of x where w ~ N(0, I), whatever its law, in nats."""
        return self._log_density(x, STANDARD_NORMAL)

    def _log_density(self, x: Tensor, law: Base) -> Tensor:
        y = self.support.unconstrain(x)
        energy = law.energy(self.whiten_unconstrained(y))
        constant = 0.5 * self.dim * math.log(2 * math.pi) + self.log_det
        return -energy - constant - self.support.log_abs_det(y, x)

    def whiten_unconstrained(self, y: Tensor) -> Tensor:
        """Return w (*b, d) for unconstrained y (*b, *unconstrained_shape)."""
        batch = y.shape[: y.dim() - len(self.support.unconstrained_shape)]
        centred = y.reshape(*batch, self.dim) - self.loc
        return centred * self.inverse_scale if self.diagonal else centred @ self.inverse_scale.T

    def _unwhiten(self, w: Tensor) -> Tensor:
        y = self.loc + (w * self.scale if self.diagonal else w @ self.scale.T)
        return y.reshape(*w.shape[:-1], *self.support.unconstrained_shape)


def _invert(scale: Tensor, diagonal: bool) -> Tensor:
    if diagonal:
        return scale.reciprocal()
    return invert_tril(scale.to(torch.float64)).to(scale.dtype)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether rows (2, *event_shape) agree, in units of the larger of each entry."""
    size = torch.maximum(a.abs(), b.abs()).amax(0)
    return bool(((a - b).abs() <= 1e-5 * size).all())
