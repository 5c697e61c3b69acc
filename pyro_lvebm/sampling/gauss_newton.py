# SPDX-License-Identifier: Apache-2.0
"""Energies that are half a sum of squares: their curvature, and moves to a linearised minimum."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.sampling.base import STANDARD_NORMAL, standard_normal
from pyro_lvebm.sampling.langevin import LangevinState, ValueAndGrad, init_state, select

_SHARE = 0.8
"""Of the Gaussian in a `DefensiveBase`."""

_NUM_STARTS = 4
"""From which modes of a problem are looked for."""

Residuals = Callable[[Tensor], Tensor]
"""Maps v (*b, k) to r(v) (*b, m) whose ½ |r|² is the energy, or its main part."""


class Linearised(NamedTuple):
    """The Gaussian N(mean, L Lᵀ) of an energy whose residuals are made linear."""

    mean: Tensor  # (*b, k)
    root: Tensor  # L (*b, k, k), upper triangular
    inverse: Tensor  # L⁻¹ (*b, k, k)


def jacobian(r: Residuals, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return r(v) (*b, m) and J = ∂r/∂v (*b, m, k) at v (*b, k), without a graph.

    k products J t of reverse mode twice, ∂(tᵀ Jᵀ c)/∂c: any network has these derivatives, and few
    have those of forward mode.
    """
    k = v.shape[-1]
    axes = torch.eye(k).to(v).reshape(k, *(1,) * (v.dim() - 1), k).expand(k, *v.shape)
    with torch.enable_grad():
        at = v.detach().expand(k, *v.shape).requires_grad_(True)
        value = r(at)
        c = torch.zeros_like(value, requires_grad=True)
        (by_v,) = torch.autograd.grad(value, at, c, create_graph=True)
        (columns,) = torch.autograd.grad(by_v, c, axes)
    return value[0].detach(), columns.movedim(0, -1)


def gauss_newton_root(r: Residuals, v: Tensor) -> Tensor:
    """Return L (*b, k, k) with L Lᵀ = M⁻¹ for M = mean Jᵀ J over the particles v (K, *b, k).

    It is the `scale` for MALA moves of other particles on ½ |r|²; M ≥ I where v is among r.

    Source:
        Girolami and Calderhead (2011), Riemann manifold Langevin and Hamiltonian Monte Carlo
        methods, JRSS B 73, section 4 (metric); Goodman and Weare (2010), Ensemble samplers with
        affine invariance, section 2 (a move of some particles in the metric of the others).
    """
    j = jacobian(r, v)[1]
    return _root_of_inverse((j.mT @ j).mean(0))[0]


def linearise(r: Residuals, v: Tensor) -> Linearised:
    """Return the Gaussian exp(−½ |r(v) + J (w − v)|²) over w, for J at v (*b, k).

    mean = v − M⁻¹ Jᵀ r,    covariance M⁻¹,    M = Jᵀ J
    """
    value, j = jacobian(r, v)
    root, factor = _root_of_inverse(j.mT @ j)
    step = root @ (root.mT @ (j.mT @ value[..., None]))
    return Linearised(v - step.squeeze(-1), root, factor.mT)


def find_mode(r: Residuals, v: Tensor, num_steps: int = 20) -> Tensor:
    """Return v (*b, k) lower in ½ |r|², by damped Gauss–Newton steps of each datum of its own.

    Source:
        Marquardt (1963), An algorithm for least-squares estimation of nonlinear parameters.
    """
    damping = torch.ones_like(v[..., 0])
    value, j = jacobian(r, v)
    for _ in range(num_steps):
        metric = (j.mT @ j).double()
        metric = metric + torch.diag_embed(
            damping.double()[..., None] * metric.diagonal(dim1=-2, dim2=-1)
        )
        slope = (j.mT @ value[..., None]).double()
        factor, failed = torch.linalg.cholesky_ex(metric)  # a metric may be NaN far out
        step = torch.cholesky_solve(slope, factor).squeeze(-1).to(v)
        step = torch.where((failed == 0)[..., None], step, 0.0)
        new_value, new_j = jacobian(r, v - step)
        better = new_value.square().sum(-1) < value.square().sum(-1)  # false where NaN
        v = torch.where(better[..., None], v - step, v)
        value = torch.where(better[..., None], new_value, value)
        j = torch.where(better[..., None, None], new_j, j)
        damping = torch.where(better, damping / 5.0, damping * 3.0).clamp(1e-6, 1e6)
    return v


class DefensiveBase:
    """Four parts of a Gaussian N(mean, L Lᵀ) for each problem to one of N(0, I), as a `Base`.

    An annealing that starts here has little to do where the Gaussian is right, and misses nothing
    where it is too narrow, or knows one mode of several.

    Args:
        law: Gaussians (problems, k); particles u are (runs, problems, particles, k).

    Source:
        Hesterberg (1995), Weighted average importance sampling and defensive mixture distributions.
    """

    def __init__(self, law: Linearised) -> None:
        self.mean = law.mean[:, None]
        self.root, self.inverse = law.root, law.inverse
        self.log_det = law.inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)[:, None]

    def energy(self, u: Tensor) -> Tensor:
        """Return U (*b,)."""
        near, far, _ = self._terms(u)
        return -torch.logaddexp(near, far)

    def energy_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return U (*b,) and ∇U (*b, k), without a graph."""
        with torch.no_grad():
            near, far, xi = self._terms(u)
            total = torch.logaddexp(near, far)
            share = (near - total).exp()[..., None]
            return -total, share * (xi @ self.inverse) + (1.0 - share) * u

    def draw(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return independent draws of a shape (runs, problems, particles, k)."""
        xi = standard_normal(shape, like, generator)
        picked = torch.rand(shape[:-1], dtype=like.dtype, device=like.device, generator=generator)
        return torch.where(picked[..., None] < _SHARE, self.mean + xi @ self.root.mT, xi)

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        xi = (u - self.mean) @ self.inverse.mT
        near = math.log(_SHARE) + self.log_det - 0.5 * (xi * xi).sum(-1)
        return near, math.log(1.0 - _SHARE) - 0.5 * (u * u).sum(-1), xi


def start_near(
    f: ValueAndGrad,
    r: Residuals,
    shape: tuple[int, int, int],
    like: Tensor,
    generator: torch.Generator | None,
) -> tuple[ValueAndGrad, DefensiveBase]:
    """Return the base that annealing of sharp problems starts from, and f relative to it.

    It holds the best of several modes of each problem, found from 0 and from draws of N(0, I).

    Args:
        f: Residual energy relative to N(0, I), on v (runs, problems, particles, k).
        r: Its residuals on v (runs, problems, particles, k).
        shape: (problems, particles, k).
        like: Fixes dtype and device.
        generator: Source of randomness.
    """
    problems, _, k = shape
    starts = standard_normal((1, problems, _NUM_STARTS, k), like, generator)
    starts[:, :, 0] = 0.0
    modes = find_mode(r, starts)
    with torch.no_grad():
        best = r(modes).square().sum(-1).nan_to_num(torch.inf).argmin(-1)
    mode = modes.gather(2, best[..., None, None].expand(-1, -1, 1, k))
    law = linearise(r, mode)
    base = DefensiveBase(Linearised(*(part[0, :, 0] for part in law)))

    def relative(v: Tensor) -> tuple[Tensor, Tensor]:
        value, grad = f(v)
        energy, slope = base.energy_and_grad(v)
        return value + STANDARD_NORMAL.energy(v) - energy, grad + v - slope

    return relative, base


def _root_of_inverse(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Return L with L Lᵀ = M⁻¹, and the Cholesky factor C of M = C Cᵀ; L = C⁻ᵀ."""
    wide = metric.double()
    factor = torch.linalg.cholesky(wide)
    eye = torch.eye(metric.shape[-1]).to(wide).expand_as(wide)
    root: Tensor = torch.linalg.solve_triangular(factor.mT, eye, upper=True)
    return root.to(metric.dtype), factor.to(metric.dtype)


def linearised_step(
    f: ValueAndGrad,
    state: LangevinState,
    law: Linearised,
    generator: torch.Generator | None = None,
) -> tuple[LangevinState, Tensor]:
    """Propose new places u (*b, K, k) by a Gaussian for each datum, by Metropolis' test.

    The target is exp(−½ |u|² − f(u)). Langevin moves need long to come from the base to a sharp
    posterior, and this is one move where a datum is nearly linear.

    Returns:
        The new state, and the acceptance probability (*b, K).
    """
    xi = torch.empty_like(state.u).normal_(generator=generator)
    new = init_state(f, law.mean[..., None, :] + xi @ law.root.mT)
    old_xi = (state.u - law.mean[..., None, :]) @ law.inverse.mT

    def log_ratio(at: LangevinState, own: Tensor) -> Tensor:
        return 0.5 * ((own * own).sum(-1) - (at.u * at.u).sum(-1)) - at.f

    log_alpha = log_ratio(new, xi) - log_ratio(state, old_xi)
    accept = torch.empty_like(log_alpha).exponential_(generator=generator).neg_() < log_alpha
    return select(accept, new, state), log_alpha.clamp(max=0.0).exp().nan_to_num(0.0)
