# SPDX-License-Identifier: Apache-2.0
"""The metric in which MALA moves, from gradients of the energy."""

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
