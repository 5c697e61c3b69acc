# SPDX-License-Identifier: Apache-2.0
"""Langevin kernels as pure functions of a state, an energy, a step size and a generator.

Every kernel targets, for a residual energy f and u of shape (*b, d),

    p_β(u) ∝ exp(−E(u)),    E(u) = ½ κ |u|² + β f(u)

with inverse temperature β and base precision κ. With κ = 1 this is an LVEBM in coordinates
whitened by its base; with κ = 0 and β = 1 it is any energy f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps u (*b, d) to f(u) (*b,) and ∇f(u) (*b, d), both without a graph."""


class LangevinState(NamedTuple):
    """What the next step needs: positions, and f and ∇f there."""

    u: Tensor  # (*b, d)
    f: Tensor  # (*b,)
    grad: Tensor  # (*b, d), ∇f(u) without the base


def value_and_grad(f: Callable[[Tensor], Tensor]) -> ValueAndGrad:
    """Turn an energy f: (*b, d) -> (*b,) into a function that also returns its gradient.

    Args:
        f: A differentiable energy; element i of the result may depend on element i of u only.

    Returns:
        A function u -> (f(u), ∇f(u)), detached from the graph.

    Example:
        >>> import torch
        >>> f = value_and_grad(lambda u: (u**2).sum(-1))
        >>> f(torch.tensor([[1.0, 2.0]]))
        (tensor([5.]), tensor([[2., 4.]]))
    """

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = f(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    return evaluate


def init_state(f: ValueAndGrad, u: Tensor) -> LangevinState:
    """Return the state at positions u (*b, d)."""
    return LangevinState(u, *f(u))


def _total_grad(state: LangevinState, beta: float | Tensor, kappa: float) -> Tensor:
    grad = state.grad * beta[..., None] if isinstance(beta, Tensor) else state.grad * beta
    return grad.add_(state.u, alpha=kappa) if kappa else grad


def _noise_like(u: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(u).normal_(generator=generator)


@dataclass(frozen=True)
class ULA:
    """Unadjusted Langevin algorithm.

    One step moves u to

        u' = u − η ∇E(u) + √(2η) ξ,    ξ ~ N(0, I).

    Its stationary law is not the target: on E = ½ λ u² the variance is 1 / (λ (1 − ηλ/2)).

    Args:
        target_acceptance: If given, `adapt` steers η to this acceptance probability of the
            Metropolis test that ULA leaves out; a value near 1 keeps the bias small. If None,
            η stays as it is.

    Source:
        Roberts and Tweedie (1996), Exponential convergence of Langevin distributions and their
        discrete approximations, equation 1.

    Example:
        >>> import torch
        >>> from pyro_lvebm.sampling import init_state, value_and_grad
        >>> f = value_and_grad(lambda u: 0.5 * (u**2).sum(-1))
        >>> g = torch.Generator().manual_seed(0)
        >>> state = init_state(f, torch.zeros(4096, 1))
        >>> for _ in range(50):
        ...     state, _ = ULA().step(f, state, 0.5, base_precision=0.0, generator=g)
        >>> abs(state.u.var().item() - 1 / (1 - 0.25)) < 0.1
        True
    """

    target_acceptance: float | None = None

    def step(
        self,
        f: ValueAndGrad,
        state: LangevinState,
        step_size: float | Tensor,
        *,
        inverse_temperature: float | Tensor = 1.0,
        base_precision: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> tuple[LangevinState, Tensor]:
        """Move every chain once.

        Args:
            f: Residual energy and its gradient.
            state: Positions u (*b, d) with f and ∇f there.
            step_size: η, a number or a tensor that broadcasts to (*b,).
            inverse_temperature: β, a number or a tensor that broadcasts to (*b,).
            base_precision: κ.
            generator: Source of randomness; None means torch's global generator.

        Returns:
            The new state, and the acceptance probability (*b,) that a Metropolis test would
            have had (1 where `target_acceptance` is None and nothing needs it).
        """
        beta, kappa = inverse_temperature, base_precision
        new, grad, xi = _propose(f, state, step_size, beta, kappa, generator)
        if self.target_acceptance is None:
            return new, new.u.new_ones(())
        log_alpha = _log_acceptance(state, new, grad, xi, step_size, beta, kappa)
        return new, log_alpha.clamp_(max=0.0).exp_().nan_to_num_(0.0)

    def adapt(self, step_size: Tensor, acceptance: Tensor, rate: float = 0.1) -> Tensor:
        """Return η moved towards the target acceptance, η exp(rate (acceptance − target))."""
        if self.target_acceptance is None:
            return step_size
        return _adapt(step_size, acceptance, self.target_acceptance, rate)


@dataclass(frozen=True)
class MALA:
    """Metropolis-adjusted Langevin algorithm: the ULA proposal, then a Metropolis test.

    With s = ∇E(u) + ∇E(v) and v = u − η ∇E(u) + √(2η) ξ, the proposal is accepted with
    probability min(1, α),

        log α = E(u) − E(v) + √(η/2) ξ·s − (η/4) |s|²,

    which is the usual ratio of proposal densities written without cancellation. The target is
    left invariant for every η. Proposals where f is NaN are rejected.

    Args:
        target_acceptance: `adapt` steers η to this acceptance probability; 0.574 is optimal in
            high dimension.

    Source:
        Roberts and Tweedie (1996), section 1.4.2; Roberts and Rosenthal (1998), Optimal scaling
        of discrete approximations to Langevin diffusions, theorem 2 (0.574).

    Example:
        >>> import torch
        >>> from pyro_lvebm.sampling import init_state, value_and_grad
        >>> f = value_and_grad(lambda u: 0.5 * (u**2).sum(-1))
        >>> g = torch.Generator().manual_seed(0)
        >>> state = init_state(f, torch.zeros(4096, 1))
        >>> for _ in range(50):
        ...     state, _ = MALA().step(f, state, 0.5, base_precision=0.0, generator=g)
        >>> round(state.u.var().item(), 1)
        1.0
    """

    target_acceptance: float = 0.574

    def step(
        self,
        f: ValueAndGrad,
        state: LangevinState,
        step_size: float | Tensor,
        *,
        inverse_temperature: float | Tensor = 1.0,
        base_precision: float = 1.0,
        scale: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[LangevinState, Tensor]:
        """Move every chain once; arguments as in `ULA.step`.

        With a `scale` L (*b', d, d), whose leading axes broadcast to those of u before its last
        two, the move is one in coordinates L⁻¹ u: v = u − η L Lᵀ ∇E(u) + √(2η) L ξ. It suits
        energies whose curvature is near (L Lᵀ)⁻¹.

        Returns:
            The new state, and the acceptance probability (*b,).
        """
        beta, kappa = inverse_temperature, base_precision
        new, grad, xi = _propose(f, state, step_size, beta, kappa, generator, scale)
        log_alpha = _log_acceptance(state, new, grad, xi, step_size, beta, kappa, scale)
        # −log(uniform) is exponential; a NaN log α compares false and so is rejected.
        accept = torch.empty_like(log_alpha).exponential_(generator=generator).neg_() < log_alpha
        moved = LangevinState(
            torch.where(accept[..., None], new.u, state.u),
            torch.where(accept, new.f, state.f),
            torch.where(accept[..., None], new.grad, state.grad),
        )
        return moved, log_alpha.clamp_(max=0.0).exp_().nan_to_num_(0.0)

    def adapt(self, step_size: Tensor, acceptance: Tensor, rate: float = 0.1) -> Tensor:
        """Return η moved towards the target acceptance, η exp(rate (acceptance − target))."""
        return _adapt(step_size, acceptance, self.target_acceptance, rate)


Kernel = ULA | MALA

Scales = tuple[float, float] | tuple[Tensor, Tensor]


def _step_scales(step_size: float | Tensor) -> Scales:
    """Return η and √(2η), with a trailing axis where they are tensors."""
    if isinstance(step_size, Tensor):
        eta = step_size[..., None]
        return eta, (2.0 * eta).sqrt()
    return step_size, math.sqrt(2.0 * step_size)


def _propose(
    f: ValueAndGrad,
    state: LangevinState,
    step_size: float | Tensor,
    beta: float | Tensor,
    kappa: float,
    generator: torch.Generator | None,
    scale: Tensor | None = None,
) -> tuple[LangevinState, Tensor, Tensor]:
    """Return the state at v = u − η ∇E(u) + √(2η) ξ, with ∇E(u) and ξ (*b, d)."""
    scales = _step_scales(step_size)
    grad = _total_grad(state, beta, kappa)
    xi = _noise_like(state.u, generator)
    if scale is not None:
        move = torch.sub(xi * scales[1], grad @ scale * scales[0])
        v = state.u + move @ scale.mT
    elif isinstance(scales[0], Tensor):
        eta, noise_scale = scales
        v = torch.addcmul(state.u, grad, eta, value=-1.0).addcmul_(xi, noise_scale)
    else:
        v = torch.add(state.u, grad, alpha=-scales[0]).add_(xi, alpha=scales[1])
    return LangevinState(v, *f(v)), grad, xi


def _log_acceptance(
    old: LangevinState,
    new: LangevinState,
    old_grad: Tensor,
    xi: Tensor,
    step_size: float | Tensor,
    beta: float | Tensor,
    kappa: float,
    scale: Tensor | None = None,
) -> Tensor:
    s = old_grad + _total_grad(new, beta, kappa)
    if scale is not None:
        s = s @ scale
    eta, noise_scale = _step_scales(step_size)
    # √(η/2) ξ·s − (η/4) |s|² + ½ κ (|u|² − |v|²), with one sum over entries.
    terms = torch.sub(xi * (0.5 * noise_scale), s * (0.25 * eta)).mul_(s)
    if kappa:
        terms.addcmul_(old.u - new.u, old.u + new.u, value=0.5 * kappa)
    return beta * (old.f - new.f) + terms.sum(-1)


def _adapt(step_size: Tensor, acceptance: Tensor, target: float, rate: float) -> Tensor:
    # No useful step leaves this range: it stops a run-away on flat energies, and reaches the narrow
    # posteriors of global latents.
    return (step_size * torch.exp(rate * (acceptance - target))).clamp(1e-10, 4.0)


def check_finite(f: Tensor, grad: Tensor | None = None) -> None:
    """Refuse energies f, or gradients, that are NaN or infinite at some negative.

    Raises:
        ValueError: If there are any.
    """
    for what, bad in (
        ("energy", ~torch.isfinite(f)),
        ("gradient of the energy", ~torch.isfinite(f if grad is None else grad.sum(-1))),
    ):
        if bad.any():
            raise ValueError(
                f"the {what} is NaN or infinite at {int(bad.sum())} of {f.numel()} negatives; it "
                "must be finite everywhere. Check the energy and its parameters, or lower the "
                "learning rate"
            )
