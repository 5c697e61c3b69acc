# SPDX-License-Identifier: Apache-2.0
"""The quadratic energy: a linear-Gaussian LVEBM, in which everything has a closed form."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.bases import GaussianBase, MixtureBase, unit_rows
from pyro_lvebm.energies.whitened import WhitenedEnergy


class QuadraticEnergy(WhitenedEnergy):
    """f(u) = ½ uᵀAu + bᵀu in whitened coordinates u, with closed forms for all that follows.

    With the base, E(u) = ½ uᵀPu + bᵀu + const, where the total precision P = I + A = RRᵀ is
    kept positive definite by a lower-triangular R with positive diagonal. Then

        log Z = −½ log det P + ½ bᵀP⁻¹b,    u ~ N(−P⁻¹b, P⁻¹).

    With contexts, b(c) = b + Wᵀc takes the place of b.

    Args:
        x_dim: Number of entries of x.
        z_dim: Number of entries of z; 0 for an energy of x alone.
        context_dim: Number of entries of a context; 0 for an energy without contexts.

    Raises:
        ValueError: If x_dim is less than 1, or z_dim or `context_dim` is negative.

    Example:
        >>> import torch
        >>> energy = QuadraticEnergy(x_dim=2, z_dim=1)
        >>> with torch.no_grad():
        ...     _ = energy.linear.fill_(1.0)
        >>> round(energy.log_partition().item(), 6)  # ½ |b|²
        1.5
    """

    by_context: Tensor | None  # W (context_dim, d)

    def __init__(self, x_dim: int, z_dim: int = 0, *, context_dim: int = 0) -> None:
        super().__init__(x_dim, z_dim)
        if context_dim < 0:
            raise ValueError(f"context_dim must be 0 or more; got {context_dim}")
        self.raw_tril = nn.Parameter(torch.zeros(self.dim, self.dim))
        self.linear = nn.Parameter(torch.zeros(self.dim))
        weight = nn.Parameter(torch.zeros(context_dim, self.dim)) if context_dim else None
        self.register_parameter("by_context", weight)

    def bind(self, base_x: GaussianBase, base_z: GaussianBase) -> None:
        """Take the coordinates of these bases; see `WhitenedEnergy.bind`.

        Raises:
            ValueError: As there, or if base_x is a mixture, with which nothing here is a closed
                form.
        """
        if isinstance(base_x, MixtureBase):
            raise ValueError(
                "a QuadraticEnergy needs a Gaussian base, for its closed forms; give "
                "LVEBM.from_data(..., base='gaussian'), or an energy such as MLPEnergy"
            )
        super().bind(base_x, base_z)

    @property
    def tril(self) -> Tensor:
        """R (d, d), the Cholesky factor of the total precision."""
        return self.raw_tril.tril(-1) + self.raw_tril.diagonal().exp().diag()

    @property
    def precision(self) -> Tensor:
        """P (d, d), the total precision in whitened coordinates."""
        tril = self.tril
        return tril @ tril.T

    def set_precision(self, precision: Tensor, linear: Tensor | None = None) -> None:
        """Set P (d, d), and b (d,) where given, in place.

        Raises:
            ValueError: If P or b has another shape, or P is not symmetric and positive definite;
                nothing is changed then.
        """
        if linear is not None and linear.shape != (self.dim,):
            raise ValueError(f"linear has shape {tuple(linear.shape)}; expected {(self.dim,)}")
        if precision.shape != (self.dim, self.dim):
            raise ValueError(
                f"precision has shape {tuple(precision.shape)}; expected {(self.dim, self.dim)}"
            )
        tril, info = torch.linalg.cholesky_ex(precision)
        if info.item() or not torch.allclose(precision, precision.T):
            raise ValueError("precision must be symmetric and positive definite")
        with torch.no_grad():
            self.raw_tril.copy_(tril.tril(-1) + tril.diagonal().log().diag())
            if linear is not None:
                self.linear.copy_(linear)

    def linear_at(self, *context: Tensor) -> Tensor:
        """Return b (d,), or b(c) (*b, d) at contexts (*b, context_dim).

        Raises:
            ValueError: If there is a context and should be none, or the other way round.
        """
        weight = self.by_context
        if len(context) != (weight is not None):
            what = "no context" if weight is None else "a context"
            raise ValueError(f"this QuadraticEnergy takes {what}; see context_dim")
        return self.linear if weight is None else self.linear + context[0] @ weight

    def whitened(self, u: Tensor, *context: Tensor) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, x_dim + z_dim)."""
        r = u @ self.tril
        linear = self.linear_at(*context)
        return 0.5 * ((r * r).sum(-1) - (u * u).sum(-1)) + (u * linear).sum(-1)

    def value_and_grad(self, u: Tensor, *context: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (*b,) and ∇f = Au + b (*b, d), without a graph."""
        with torch.no_grad():
            linear = self.linear_at(*context)
            grad = u @ self.precision - u + linear
            return 0.5 * (u * (grad + linear)).sum(-1), grad

    def log_partition(self, *context: Tensor) -> Tensor:
        """Return log Z, a scalar, or log Z(c) (*b,), in nats."""
        linear = self.linear_at(*context)[..., None]
        half: Tensor = torch.linalg.solve_triangular(self.tril, linear, upper=False)
        return 0.5 * (half * half).sum((-1, -2)) - self.raw_tril.diagonal().sum()

    def log_evidence(self, x: Tensor, *context: Tensor) -> Tensor:
        """Return log p(x) (*b,) of x (*b, *x_shape), in nats, in the coordinates of the data."""
        covariance = torch.cholesky_inverse(self.tril)
        mean = -self.linear_at(*context) @ covariance
        k = self.x_dim
        tril: Tensor = torch.linalg.cholesky(covariance[:k, :k])
        w = self.base_x.whiten(x)
        centred = (w - mean[..., :k])[..., None]
        r: Tensor = torch.linalg.solve_triangular(tril, centred, upper=False).squeeze(-1)
        log_norm = 0.5 * k * math.log(2 * math.pi) + tril.diagonal().log().sum()
        return -0.5 * (r * r).sum(-1) - log_norm - self.base_x.log_abs_det(w)

    def posterior(self, x: Tensor, *context: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x), a Gaussian over flattened z, batch shape (*b,), for x (*b, *x_shape)."""
        k, precision = self.x_dim, self.precision
        w = self.base_x.whiten(x)
        tril = torch.linalg.cholesky(precision[k:, k:])
        rhs = -(self.linear_at(*context)[..., k:] + w @ precision[:k, k:])
        mean = torch.cholesky_solve(rhs[..., None], tril).squeeze(-1)
        scale = self.base_z.tril
        # A product of Cholesky factors is the factor, and no scale is squared.
        root = torch.linalg.cholesky(torch.cholesky_inverse(tril))
        return dist.MultivariateNormal(self.base_z.loc + mean @ scale.T, scale_tril=scale @ root)

    def mean_field_gap(self) -> Tensor:
        """Return KL(q* ‖ p(z|x)) of the best mean-field Gaussian, a scalar, in nats.

            ½ (Σ_i log P_ii − log det P)    with P the posterior precision of z

        It is the same for every x. A base over z with a full covariance L rotates z; P is then
        L⁻ᵀ P_zz L⁻¹.
        """
        k = self.x_dim
        block = self.precision[k:, k:]
        if not self.base_z.diagonal:
            # Units of z cancel.
            inverse = torch.linalg.inv(unit_rows(self.base_z.scale))
            block = inverse.T @ block @ inverse
        return 0.5 * (block.diagonal().log().sum() - torch.logdet(block))
