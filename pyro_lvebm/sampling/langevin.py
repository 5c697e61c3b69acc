# SPDX-License-Identifier: Apache-2.0
"""Langevin kernels as pure functions of a state, an energy, a step size and a generator.

Every kernel targets, for a residual energy f and u of shape (*b, d),

    p_β(u) ∝ exp(−E(u)),    E(u) = U(u) + β f(u)

with inverse temperature β and base energy U, ½ |u|² of a standard normal unless another `Base` is
given; without a base it is any energy f.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.sampling.base import STANDARD_NORMAL, Base

ValueAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Maps u (*b, d) to f(u) (*b,) and ∇f(u) (*b, d), both without a graph."""


class LangevinState(NamedTuple):
    """What the next step needs: positions, and f and ∇f there."""

    u: Tensor  # (*b, d)
    f: Tensor  # (*b,)
    grad: Tensor  # (*b, d), ∇f(u) without that of the base


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


def select(accept: Tensor, new: LangevinState, old: LangevinState) -> LangevinState:
    """Return the new state where `accept` (*b,) is true, the old one elsewhere."""
    return LangevinState(
        torch.where(accept[..., None], new.u, old.u),
        torch.where(accept, new.f, old.f),
        torch.where(accept[..., None], new.grad, old.grad),
    )


def _total(state: LangevinState, beta: float | Tensor, base: Base | None) -> tuple[Tensor, Tensor]:
    """Return E (*b,) and ∇E (*b, d)."""
    grad = state.grad * (beta[..., None] if isinstance(beta, Tensor) else beta)
    energy = beta * state.f
    if base is None:
        return energy, grad
    base_energy, base_grad = base.energy_and_grad(state.u)
    return energy.add_(base_energy), grad.add_(base_grad)


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
        ...     state, _ = ULA().step(f, state, 0.5, base=None, generator=g)
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
        base: Base | None = STANDARD_NORMAL,
        scale: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[LangevinState, Tensor]:
        """Move every chain once.

        With a `scale` L (*b', d, d), whose leading axes broadcast to those of u before its last
        two, the move is one in coordinates L⁻¹ u: v = u − η L Lᵀ ∇E(u) + √(2η) L ξ. It suits
        energies whose curvature is near (L Lᵀ)⁻¹.

        Args:
            f: Residual energy and its gradient.
            state: Positions u (*b, d) with f and ∇f there.
            step_size: η, a number or a tensor that broadcasts to (*b,).
            inverse_temperature: β, a number or a tensor that broadcasts to (*b,).
            base: The base with U; None for U = 0.
            scale: L; None is the identity.
            generator: Source of randomness; None means torch's global generator.

        Returns:
            The new state, and the acceptance probability (*b,) that a Metropolis test would
            have had (1 where `target_acceptance` is None and nothing needs it).
        """
        beta = inverse_temperature
        energy, grad = _total(state, beta, base)
        new, xi = _propose(f, state, grad, step_size, generator, scale)
        if self.target_acceptance is None:
            return new, new.u.new_ones(())
        log_alpha = _log_acceptance((energy, grad), _total(new, beta, base), xi, step_size, scale)
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
        ...     state, _ = MALA().step(f, state, 0.5, base=None, generator=g)
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
        base: Base | None = STANDARD_NORMAL,
        scale: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[LangevinState, Tensor]:
        """Move every chain once; arguments as in `ULA.step`.

        Returns:
            The new state, and the acceptance probability (*b,).
        """
        beta = inverse_temperature
        energy, grad = _total(state, beta, base)
        new, xi = _propose(f, state, grad, step_size, generator, scale)
        log_alpha = _log_acceptance((energy, grad), _total(new, beta, base), xi, step_size, scale)
        # −log(uniform) is exponential; a NaN log α compares false and so is rejected.
        accept = torch.empty_like(log_alpha).exponential_(generator=generator).neg_() < log_alpha
        return select(accept, new, state), log_alpha.clamp_(max=0.0).exp_().nan_to_num_(0.0)

    def adapt(self, step_size: Tensor, acceptance: Tensor, rate: float = 0.1) -> Tensor:
        """Return η moved towards the target acceptance, η exp(rate (acceptance − target))."""
        return _adapt(step_size, acceptance, self.target_acceptance, rate)


Kernel = ULA | MALA


def _step_scales(step_size: float | Tensor) -> tuple[Any, Any]:
    """Return η and √(2η), with a trailing axis where they are tensors."""
    if isinstance(step_size, Tensor):
        eta = step_size[..., None]
        return eta, (2.0 * eta).sqrt()
    return step_size, math.sqrt(2.0 * step_size)


def _propose(
    f: ValueAndGrad,
    state: LangevinState,
    grad: Tensor,
    step_size: float | Tensor,
    generator: torch.Generator | None,
    scale: Tensor | None = None,
) -> tuple[LangevinState, Tensor]:
    """Return the state at v = u − η ∇E(u) + √(2η) ξ, for ∇E (*b, d), and ξ (*b, d)."""
    eta, noise_scale = _step_scales(step_size)
    xi = _noise_like(state.u, generator)
    if scale is not None:
        move = torch.sub(xi * noise_scale, grad @ scale * eta)
        v = state.u + move @ scale.mT
    elif isinstance(eta, Tensor):
        v = torch.addcmul(state.u, grad, eta, value=-1.0).addcmul_(xi, noise_scale)
    else:
        v = torch.add(state.u, grad, alpha=-eta).add_(xi, alpha=noise_scale)
    return LangevinState(v, *f(v)), xi


def _log_acceptance(
    old: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    xi: Tensor,
    step_size: float | Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Return log α (*b,) for E and ∇E before and after."""
    s = old[1] + new[1]
    if scale is not None:
        s = s @ scale
    eta, noise_scale = _step_scales(step_size)
    # √(η/2) ξ·s − (η/4) |s|², with one sum over entries.
    terms = torch.sub(xi * (0.5 * noise_scale), s * (0.25 * eta)).mul_(s)
    return old[0] - new[0] + terms.sum(-1)


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
