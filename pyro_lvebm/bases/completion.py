# SPDX-License-Identifier: Apache-2.0
"""The law of the missing entries of x given the others, under its base."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lvebm.bases.fitting import condition
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.bases.units import power_of_two


def observed_entries(x: Tensor, observed: Tensor | None, x_shape: torch.Size) -> Tensor:
    """Return which entries of x (*b, *x_shape) are observed, boolean and of its shape.

    Args:
        x: Observations, NaN where missing.
        observed: What the user says of them, for every row or for all alike; None for all but NaN.
        x_shape: Event shape of x.

    Raises:
        ValueError: If `observed` is not boolean or of another shape, or x is NaN where observed.
    """
    if observed is None:
        return ~x.isnan()
    if observed.dtype != torch.bool or observed.shape not in (x.shape, x_shape):
        raise ValueError(
            f"observed must be a boolean mask of shape {tuple(x_shape)}, the same for all rows, or "
            f"{tuple(x.shape)}; got {observed.dtype} of shape {tuple(observed.shape)}"
        )
    observed = observed.expand(x.shape)
    if x[observed].isnan().any():
        raise ValueError("x is NaN at entries that `observed` says are observed")
    return observed


class Completion:
    """The law of the missing entries of a batch of x given the observed ones, under one Gaussian.

    The Gaussian is that of the whitened coordinates of base_x: base_x itself, unless it is a
    mixture.

        x_m = T(y_m),    y_m = m(y_o) + R⁻ᵀ v,    v ~ N(0, I),    R Rᵀ the conditional precision

    T is elementwise, and the identity where x is unbounded. Values, y and v have all entries of x,
    also those that are observed, since rows may have different entries missing. At observed
    entries they mean nothing: the law of y there is Gaussian and independent of all else, so that
    they integrate to one.

    Args:
        base: The base of x.
        x: Observations (*b, *x_shape); anything may stand at missing entries.
        observed: Which entries are observed, boolean, of the shape of x.

    Raises:
        ValueError: If an observed entry lies outside the support of the base, or the support ties
            entries together.
    """

    def __init__(self, base: GaussianBase, x: Tensor, observed: Tensor) -> None:
        base.support.check(x, observed)
        self.support, self.event_shape = base.support, base.event_shape
        batch = x.shape[: x.dim() - len(self.event_shape)]
        self.base, self.dim, self.batch_shape = base, base.dim, batch
        filled = torch.where(observed, x, self.support.centre(x))
        flat = self.support.unconstrain(filled).reshape(*batch, -1)
        self.observed = observed.reshape(*batch, -1)
        # In units of which the precision is about 1: it has their inverse squares.
        tril = base.tril.double()
        unit = power_of_two(tril.diagonal())
        centred = torch.where(self.observed, flat - base.loc, 0.0).double() / unit
        precision = torch.cholesky_inverse(tril / unit[:, None])
        shift, root = condition(precision, centred, self.observed)
        self.mean = base.loc + (shift * unit).to(x.dtype)
        self.root = (root / unit[:, None]).to(x.dtype)  # R
        eye = torch.eye(self.dim).to(root).expand_as(root)
        inverse = torch.linalg.solve_triangular(root, eye, upper=False)
        self.inverse_root = (inverse * unit).to(x.dtype)  # R⁻¹
        centre = self.support.constrain(self.mean.reshape(x.shape))
        self.x = torch.where(observed, x, centre)
        self.y = torch.where(self.observed, flat, self.mean).reshape(x.shape)

    @property
    def log_det(self) -> Tensor:
        """Log |dy/dv| (*b,), in nats."""
        log_scales: Tensor = self.root.diagonal(dim1=-2, dim2=-1).log()
        return -log_scales.sum(-1)

    def whiten(self, value: Tensor) -> Tensor:
        """Return v (*, *b, d) for unconstrained values y (*, *b, *x_shape)."""
        centred = self._flatten(value) - self.mean
        v: Tensor = torch.einsum("...c,...cd->...d", centred, self.root)
        return v

    def unwhiten(self, v: Tensor) -> Tensor:
        """Return unconstrained values y (*, *b, *x_shape) for v (*, *b, d)."""
        value: Tensor = self.mean + torch.einsum("...c,...cd->...d", v, self.inverse_root)
        return value.reshape(*value.shape[:-1], *self.event_shape)

    def complete(self, value: Tensor, x: Tensor | None = None) -> Tensor:
        """Return x (*, *b, *x_shape) with missing entries taken from values of that shape.

        Observed entries are those of `x`, by default of the observations.
        """
        seen = self._flatten(self.x if x is None else x)
        whole = torch.where(self.observed, seen, self._flatten(value))
        return whole.reshape(*whole.shape[:-1], *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (*, *b) of values, all of whose entries count, in nats."""
        return self._log_density(value).sum(-1)

    def log_prob_missing(self, value: Tensor) -> Tensor:
        """Return log N(x_m | x_o) (*, *b) of the missing entries alone, in nats."""
        return torch.where(self.observed, 0.0, self._log_density(value)).sum(-1)

    def log_base(self) -> Tensor:
        """Return log N(x_o) (*b,), the marginal of the observed entries, in nats."""
        return self.base.log_normal(self.x) - self.log_prob_missing(self.x)

    def whitened(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return u (*b, d) and G (*b, c, d): whitened x is u + v G for v on some columns.

        Args:
            columns: Indices (c,) of the entries of v; the others are taken as 0, which is right
                where they are observed in every row.
        """
        slope = torch.where(self.observed[..., None, :], 0.0, self.inverse_root)
        slope = slope @ self.base.inverse_tril.T
        return self.base.whiten_unconstrained(self.y), slope[..., columns, :]

    def _flatten(self, value: Tensor) -> Tensor:
        return value.reshape(*value.shape[: value.dim() - len(self.event_shape)], self.dim)

    def _log_density(self, value: Tensor) -> Tensor:
        """Terms (*, *b, d) that add up to the log density of values (*, *b, *x_shape)."""
        y = self.support.unconstrain(value)
        scales: Tensor = self.root.diagonal(dim1=-2, dim2=-1)
        log_normal = scales.log() - 0.5 * self.whiten(y).square() - 0.5 * math.log(2 * math.pi)
        return log_normal - self._flatten(self.support.log_derivatives(y, value))
