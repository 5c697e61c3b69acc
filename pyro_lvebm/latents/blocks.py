# SPDX-License-Identifier: Apache-2.0
"""Latent sites that share their plates, as one flat vector for each datum."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from pyro_lvebm.bases import Completion, GaussianBase
from pyro_lvebm.latents.enumeration import check_enumerated, sum_out
from pyro_lvebm.latents.model_at import ModelAt, depends_on
from pyro_lvebm.sampling import Residuals, ValueAndGrad
from pyro_lvebm.sites import LatentSite, MissingSite, Node, is_prior, plates_of

_NO_ROWS = torch.Size()

OfRows = Callable[[Tensor], tuple[ValueAndGrad, Residuals | None]]
"""Maps indices (n,) of data of a minibatch (B,) to f and r on v (K, n, D)."""


@dataclass(frozen=True)
class LatentBlock:
    """Latent sites that share their plates, at the particles of one minibatch."""

    columns: list[LatentColumns]
    indices: dict[str, Tensor]  # data indices of each plate around the block
    v: Tensor  # (K, *B, D)
    f: ValueAndGrad  # (K', *B, D) with any K' that the model was vectorised for
    offset: Tensor  # broadcasts to (K, *B), nats
    is_global: bool  # lies outside a subsampled plate, so that f is a noisy estimate
    at: ModelAt  # the model in which the other blocks are fixed, shared by all blocks
    is_direct: bool = False  # f is that of one LVEBM on a base of x that does not vary with z
    residuals: Residuals | None = None  # r(v) with ½ |r|² the main part of ½ |v|² + f, if known
    of_rows: OfRows | None = None  # the same two for some of the data, where an LVEBM stands alone

    @property
    def rows(self) -> torch.Size:
        """Batch axes that are part of v, where all rows move together; else none."""
        return self.columns[0].rows

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Return unconstrained values (*b, *rows, *event_shape) of every site for v (*b, D)."""
        parts = v.split([c.dim for c in self.columns], -1)
        return {c.name: c.from_columns(p) for c, p in zip(self.columns, parts, strict=True)}

    def join(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return v (*b, D) and log |dz/dv| (*b,) for values (*b, *rows, *event) on the supports."""
        parts = [c.to_columns(c.transform.inv(values[c.name])) for c in self.columns]
        v = torch.cat(parts, -1)
        return v, self.log_abs_det(v)

    def log_abs_det(self, v: Tensor) -> Tensor:
        """Return log |dz/dv| (*b,) at v (*b, D), over all sites."""
        total, start = v.new_zeros(v.shape[:-1]), 0
        for column in self.columns:
            total = total + column.log_abs_det(v[..., start : start + column.dim])
            start += column.dim
        return total

    def constrain(self, v: Tensor) -> dict[str, Tensor]:
        """Return values (*b, *rows, *event_shape) on the supports of every site for v (*b, D)."""
        values = self.split(v)
        return {c.name: c.transform(values[c.name]) for c in self.columns}

    def fix(self, v: Tensor) -> None:
        """Let the energies of the other blocks see this one at v (K, *B, D)."""
        ones = (1,) * (self.at.nesting - (v.dim() - 2) - len(self.rows))
        wide = v[0] if len(v) == 1 else v.reshape(v.shape[0], *ones, *v.shape[1:])
        for name, value in self.constrain(wide).items():
            self.at.nodes[name] = {**self.at.nodes[name], "value": value}


@dataclass(frozen=True)
class LatentColumns:
    """How the unconstrained values of one latent site fill columns of v."""

    name: str
    transform: Transform
    event_shape: torch.Size  # unconstrained
    gaussian: GaussianBase | Completion | None  # the law that whitens the values, if one does
    rows: torch.Size = _NO_ROWS  # batch axes that are part of the columns

    @property
    def row_dim(self) -> int:
        """Number of columns of one row."""
        return self.event_shape.numel()

    @property
    def dim(self) -> int:
        """Number of columns."""
        return self.rows.numel() * self.row_dim

    def to_columns(self, value: Tensor) -> Tensor:
        """Return (*b, dim) for unconstrained values (*b, *rows, *event_shape)."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        if self.gaussian is not None:
            value = self.gaussian.whiten(value)
        return value.reshape(*batch[: len(batch) - len(self.rows)], self.dim)

    def from_columns(self, columns: Tensor) -> Tensor:
        """Return unconstrained values (*b, *rows, *event_shape) for (*b, dim)."""
        batch = columns.shape[:-1] + self.rows
        if self.gaussian is not None:
            return self.gaussian.unwhiten(columns.reshape(*batch, self.row_dim))
        return columns.reshape(batch + self.event_shape)

    def log_abs_det(self, columns: Tensor) -> Tensor:
        """Return log |dz/dv| (*b,), in nats."""
        total = columns.new_zeros(())
        if self.gaussian is not None:
            log_det = self.gaussian.log_det.expand(columns.shape[:-1] + self.rows)
            total = log_det.reshape(*columns.shape[:-1], -1).sum(-1)
            if self.gaussian.support.is_real:
                return total
        value = self.from_columns(columns)
        jacobian: Tensor = self.transform.log_abs_det_jacobian(value, self.transform(value))
        return total + jacobian.reshape(*columns.shape[:-1], -1).sum(-1)


def whitening(fn: Any, nesting: int) -> GaussianBase | Completion | None:
    """Return the Gaussian whose coordinates the values of a site take, if there is one."""
    if isinstance(fn, LatentSite):
        return fn.ebm.base_z
    if is_prior(fn):
        return fn.ebm.base_x if fn.ebm.base_x.support.is_real else None
    # Where latents move x, observed entries differ between particles, and so would coordinates.
    fixed = isinstance(fn, MissingSite) and len(fn.completion.batch_shape) <= nesting
    return fn.completion if fixed else None


class BlockAxes:
    """The batch axes of a block, and how the log probabilities of sites reduce to them."""

    def __init__(
        self, latent: str, batch_shape: torch.Size, frames: Collection[Any], nesting: int
    ) -> None:
        self.latent, self.nesting, self.batch_shape = latent, nesting, batch_shape
        self.plates = {frame.name for frame in frames}
        self.rows = torch.Size()
        self.own = {frame.dim for frame in frames} | {
            axis - len(batch_shape) for axis, size in enumerate(batch_shape) if size > 1
        }

    @classmethod
    def joint(cls, latent: str, rows: torch.Size, nesting: int) -> BlockAxes:
        """Axes of a block in which all rows of a plate move together, so that none is its own."""
        axes = cls(latent, torch.Size(), (), nesting)
        axes.rows = rows
        return axes

    def wide(self, v: Tensor) -> Tensor:
        """Return v (K, *B, D) with the axes before the last that the values of its sites need.

        These are those of the vectorised model, and for one particle those of the plain one.
        """
        if len(v) == 1:
            return v[0]
        lead = self.lead(len(v), v.shape[1:-1])
        return v.reshape(*lead[: len(lead) - len(self.rows)], v.shape[-1])

    def lead(self, num_particles: int, batch: torch.Size) -> tuple[int, ...]:
        """Shape (K, 1, …, *B) with as many axes as the vectorised model has."""
        return (num_particles, *(1,) * (self.nesting - len(batch)), *batch)

    def total_log_prob(
        self, nodes: dict[str, Node], v: Tensor, num_particles: int, batch: torch.Size
    ) -> Tensor:
        """Sum log probabilities of the sites inside the plates, (K, *B), without scale.

        Raises:
            ValueError: If the log probability of a site outside the plates depends on v.
        """
        terms = {"": v.new_zeros(())}
        for name, node in nodes.items():
            missing = self.plates - plates_of(node)
            if not missing:
                terms[name] = sum_other_axes(node["log_prob"], self.own, self.nesting)
            elif depends_on(node["log_prob"], v):
                raise ValueError(
                    f"site '{name}' depends on the local latent '{self.latent}' but lies outside "
                    f"its plate {sorted(missing)}, so that the particles of one datum cannot move "
                    "without those of the others. Move the site into the plate"
                )
        check_enumerated(nodes, terms.values(), self.plates, self.latent)
        total = sum_out(terms, nodes, self.nesting + 1)
        return total.expand(self.lead(num_particles, batch)).reshape(num_particles, *batch)


def sum_other_axes(log_prob: Tensor, own: set[int], nesting: int) -> Tensor:
    """Sum a vectorised log probability over the plate axes (negative) that are not `own`."""
    axes = range(-min(log_prob.dim(), nesting), 0)
    extra = [axis for axis in axes if axis not in own and log_prob.shape[axis] != 1]
    return log_prob.sum(extra, keepdim=True) if extra else log_prob
