# SPDX-License-Identifier: Apache-2.0
"""The metric in which MALA moves, from gradients of the energy and positions."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_root(metric: Tensor, num_samples: int) -> Tensor:
    """Return L with L Lᵀ = M⁻¹ for mean outer products M (*b, d, d) of gradients.

    With M = E[∇E ∇Eᵀ] it is the `scale` under which MALA moves furthest: under p, M is the mean
    curvature of E, which also fits each of several narrow modes where a covariance spans them all.
    Off the diagonal, M is shrunk by d / (n + d), the share that noise has in it.

    Args:
        metric: M, symmetric and positive definite up to noise.
        num_samples: n, the number of gradients behind M.

    Source:
        Titsias (2023), Optimal preconditioning and Fisher adaptive Langevin sampling, arXiv
        2305.14442, section 3.
    """
    d = metric.shape[-1]
    wide = metric.double()
    diagonal = torch.diag_embed(wide.diagonal(dim1=-2, dim2=-1))
    factor = torch.linalg.cholesky(torch.lerp(wide, diagonal, d / (num_samples + d)))
    eye = torch.eye(d).to(wide).expand_as(wide)
    root: Tensor = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    return root.to(metric.dtype)


def secant_root(positions: Tensor, gradients: Tensor, num_samples: int) -> Tensor:
    """Return L with X = (L Lᵀ)⁻¹ the geometric mean of C⁻¹ and G: X C X = G.

    C and G are covariances (*b, d, d) of positions and of gradients ∇E there. On a Gaussian,
    G = P C P with P its precision, so X = P, whether or not the positions have spread out to the
    target; in the warm-up of a chain they have not, and G alone (`inverse_root`) is far off. In
    units where C and G have the same diagonal, both are shrunk towards it by d / (n + d).

    Args:
        positions: C, symmetric and positive semi-definite.
        gradients: G, symmetric and positive semi-definite.
        num_samples: n, the number of positions behind them.

    Source:
        Seyboldt, Carlson and Carpenter (2026), Preconditioning Hamiltonian Monte Carlo by
        minimizing Fisher divergence, arXiv 2603.18845.

    Example:
        >>> import torch
        >>> from pyro_lvebm.sampling.preconditioning import secant_root
        >>> p, c = torch.tensor([[4.0, 1.0], [1.0, 1.0]]), torch.tensor([[0.1, 0.0], [0.0, 0.2]])
        >>> root = secant_root(c, p @ c @ p, 1_000_000)
        >>> torch.linalg.inv(root @ root.T).round(decimals=3)
        tensor([[4., 1.],
                [1., 1.]])
    """
    d = positions.shape[-1]
    c, g = positions.double(), gradients.double()
    spread = c.diagonal(dim1=-2, dim2=-1), g.diagonal(dim1=-2, dim2=-1)
    # A coordinate along which nothing has moved keeps its unit.
    known = (spread[0] > 0) & (spread[1] > 0) & (spread[0] * spread[1]).isfinite()
    both, eye = known[..., :, None] & known[..., None, :], torch.eye(d).to(c)
    unit = torch.where(known, spread[0] / spread[1], 1.0) ** 0.25
    c = torch.where(both, c / unit[..., :, None] / unit[..., None, :], eye)
    g = torch.where(both, g * unit[..., :, None] * unit[..., None, :], eye)
    share = d / (num_samples + d)
    c, g = (torch.lerp(m, torch.diag_embed(m.diagonal(dim1=-2, dim2=-1)), share) for m in (c, g))
    root_c = _power(c, 0.5)
    values, vectors = torch.linalg.eigh(root_c @ g @ root_c)
    root: Tensor = unit[..., :, None] * (root_c @ (vectors * values[..., None, :] ** -0.25))
    return root.to(positions.dtype)


def _power(m: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    power: Tensor = (vectors * values[..., None, :] ** exponent) @ vectors.mT
    return power
