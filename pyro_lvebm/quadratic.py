# SPDX-License-Identifier: Apache-2.0
"""The quadratic energy: a linear-Gaussian LVEBM, in which everything has a closed form."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.energies import WhitenedEnergy


class QuadraticEnergy(WhitenedEnergy):
    """f(u) = ½ uᵀAu + bᵀu in whitened coordinates u, with closed forms for all that follows.

    With the base, E(u) = ½ uᵀPu + bᵀu + const, where the total precision P = I + A = RRᵀ is
    kept positive definite by a lower-triangular R with positive diagonal. Then

        log Z = −½ log det P + ½ bᵀP⁻¹b,    u ~ N(−P⁻¹b, P⁻¹).

    Args:
        x_dim: Number of entries of x.
        z_dim: Number of entries of z.

    Raises:
        ValueError: If a dimension is less than 1.

    Example:
        >>> import torch
        >>> energy = QuadraticEnergy(x_dim=2, z_dim=1)
        >>> with torch.no_grad():
        ...     _ = energy.linear.fill_(1.0)
        >>> round(energy.log_partition().item(), 6)  # ½ |b|²
        1.5
    """

    def __init__(self, x_dim: int, z_dim: int) -> None:
        super().__init__(x_dim, z_dim)
        self.raw_tril = nn.Parameter(torch.zeros(self.dim, self.dim))
        self.linear = nn.Parameter(torch.zeros(self.dim))

    @property
    def tril(self) -> Tensor:
        """R (d, d), the Cholesky factor of the total precision."""
        return self.raw_tril.tril(-1) + self.raw_tril.diagonal().exp().diag()

    @property
    def precision(self) -> Tensor:
        """P (d, d), the total precision in whitened coordinates."""
        return self.tril @ self.tril.T

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

    def whitened(self, u: Tensor) -> Tensor:
        """Return f (*b,) at whitened coordinates u (*b, x_dim + z_dim)."""
        r = u @ self.tril
        return 0.5 * ((r * r).sum(-1) - (u * u).sum(-1)) + u @ self.linear

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return f (*b,) and ∇f = Au + b (*b, d), without a graph."""
        with torch.no_grad():
            grad = u @ self.precision - u + self.linear
            return 0.5 * (u * (grad + self.linear)).sum(-1), grad

    def log_partition(self) -> Tensor:
        """Return log Z, a scalar, in nats."""
        half: Tensor = torch.linalg.solve_triangular(self.tril, self.linear[:, None], upper=False)
        return 0.5 * (half * half).sum() - self.raw_tril.diagonal().sum()

    def log_evidence(self, x: Tensor) -> Tensor:
        """Return log p(x) (*b,) of x (*b, *x_shape), in nats, in the coordinates of the data."""
        covariance = torch.cholesky_inverse(self.tril)
        mean = -covariance @ self.linear
        k = self.x_dim
        tril: Tensor = torch.linalg.cholesky(covariance[:k, :k])
        w = self.base_x.whiten(x)
        centred = (w - mean[:k])[..., None]
        r: Tensor = torch.linalg.solve_triangular(tril, centred, upper=False).squeeze(-1)
        log_norm = 0.5 * k * math.log(2 * math.pi) + tril.diagonal().log().sum()
        return -0.5 * (r * r).sum(-1) - log_norm - self.base_x.log_abs_det(w)

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """Return p(z | x), a Gaussian over flattened z, batch shape (*b,), for x (*b, *x_shape)."""
        k, precision = self.x_dim, self.precision
        w = self.base_x.whiten(x)
        tril = torch.linalg.cholesky(precision[k:, k:])
        rhs = -(self.linear[k:] + w @ precision[:k, k:])
        mean = torch.cholesky_solve(rhs[..., None], tril).squeeze(-1)
        scale = self.base_z.scale.diag() if self.base_z.diagonal else self.base_z.scale
        covariance = scale @ torch.cholesky_inverse(tril) @ scale.T
        return dist.MultivariateNormal(
            self.base_z.loc + mean @ scale.T, scale_tril=torch.linalg.cholesky(covariance)
        )

    def mean_field_gap(self) -> Tensor:
        """Return KL(q* ‖ p(z|x)) of the best mean-field Gaussian, a scalar, in nats.

            ½ (Σ_i log P_ii − log det P)    with P the posterior precision of z

        It is the same for every x. A base over z with a full covariance L rotates z; P is then
        L⁻ᵀ P_zz L⁻¹.
        """
        k = self.x_dim
        block = self.precision[k:, k:]
        if not self.base_z.diagonal:
            inverse = self.base_z.inverse_scale
            block = inverse.T @ block @ inverse
        return 0.5 * (block.diagonal().log().sum() - torch.logdet(block))
