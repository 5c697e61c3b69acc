# SPDX-License-Identifier: Apache-2.0
"""Means and scales of columns in any unit, by factors that are powers of two and so exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RESOLVED = 16.0
"""Spacings of floating point numbers that a column must vary by, or it is called constant."""


class Moments(NamedTuple):
    """Moments of the columns of a table."""

    loc: Tensor  # (d,)
    std: Tensor  # (d,), of maximum likelihood
    constant: Tensor  # (d,), where a column does not vary, but for rounding, or is never seen


def power_of_two(x: Tensor) -> Tensor:
    """Return a power of two within a factor of two of |x|, 1 where x is 0 or not finite.

    Dividing by it changes no bit of a mantissa, and neither it nor its inverse is infinite.

    Example:
        >>> import torch
        >>> power_of_two(torch.tensor([3.0, -1e-30, 0.0])).log2().tolist()
        [1.0, -100.0, 0.0]
    """
    mantissa, _ = torch.frexp(x)
    limits = torch.finfo(x.dtype)
    power = (0.5 * (x / mantissa)).abs()
    return torch.where(power > 0, power, 1.0).nan_to_num(nan=1.0, posinf=1.0).clamp(limits.tiny)


def moments(x: Tensor) -> Moments:
    """Return means and standard deviations of columns (N, d), NaN where an entry is missing.

    Those of x · c are those of x times c, for every c that does not leave the range of floating
    point numbers: squares are taken of columns whose largest entry is about 1.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
        >>> [f"{float(part):.3g}" for part in moments(1e-300 * x)]
        ['2e-300', '1e-300', '0']
    """
    size = power_of_two(x.abs().nan_to_num(nan=0.0).amax(0))
    y = x / size
    loc = y.nanmean(0)
    std = (y - loc).square().nanmean(0).sqrt()
    largest = y.abs().nan_to_num(nan=0.0).amax(0)
    constant = ~(std > _RESOLVED * torch.finfo(x.dtype).eps * largest)
    return Moments(loc * size, std * size, constant)


def invert_tril(tril: Tensor) -> Tensor:
    """Return the inverse of lower-triangular factors (*b, d, d), whatever the units of their rows.

    Without the scaling of rows, products of a small row and a large one leave the range of floats.
    """
    size = power_of_two(tril.diagonal(dim1=-2, dim2=-1))
    eye = torch.eye(tril.shape[-1], dtype=tril.dtype, device=tril.device).expand(tril.shape)
    inverse: Tensor = torch.linalg.solve_triangular(tril / size[..., None], eye, upper=False)
    return inverse / size[..., None, :]


def unit_rows(tril: Tensor) -> Tensor:
    """Return lower-triangular L (d, d) with rows scaled to length 1, whatever their units."""
    rows = tril / power_of_two(tril.abs().amax(1))[:, None]
    result: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return result


def row_lengths(tril: Tensor) -> Tensor:
    """Return the lengths (d,) of the rows of L (d, d), whatever their units."""
    size = power_of_two(tril.abs().amax(1))
    lengths: Tensor = size * (tril / size[:, None]).norm(dim=1)
    return lengths
