# SPDX-License-Identifier: Apache-2.0
"""Penalties on energies, added to the loss of a `Saddle`.

Each function here returns a penalty: a function that maps an `LVEBM` to a scalar in nats. The loss
it is added to is a sum over all data, so a strength per datum is to be multiplied by their number.
An `MLPEnergy` brings `kl_to_base` along, and a `GeneratorBase` a prior on the correlations of its
noise. Training needs no others; they are for a smoother energy, or fewer effective parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_lvebm.bases import GeneratorBase
from pyro_lvebm.model import LVEBM

Penalty = Callable[[LVEBM], Tensor]


def energy_l2(strength: float) -> Penalty:
    """Penalise large residual energies of the negatives: strength · E_pool[f²].

    It pulls the model towards its base, where f = 0.

    Args:
        strength: Factor of the penalty, per nat, not negative.

    Raises:
        ValueError: If the strength is negative or not finite.

    Source:
        Du and Mordatch (2019), Implicit generation and modeling with energy-based models, section
        3.3, with the negatives alone: observed x have no finite energy to be pulled back from.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, MLPEnergy
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1)
        >>> energy_l2(0.1)(ebm).item()  # an untrained f is zero
        0.0
    """
    _check(strength)

    def penalty(ebm: LVEBM) -> Tensor:
        f, log_w = ebm.negative_residuals()
        return strength * (log_w.exp() * f**2).sum()

    return penalty


def kl_to_base(strength: float) -> Penalty:
    """Penalise the divergence of the model from its base: strength · log(1 + 2 KL(p_θ ‖ base)).

    Its exponential is a prior with heavy tails, (1 + 2 KL)^−strength. It holds a model near its
    base close to it, but the further the rows have taken the model, the less it does. A constant
    in f costs nothing, nor does a function of the context alone. A `Saddle` adds it by itself for
    an energy with an attribute `kl_penalty`, its strength, as an `MLPEnergy` has.
    Its gradient is that of KL as the pool sees it,

        ∇ KL(p_θ ‖ base) = Cov_θ(f, ∇f) = ½ ∇ Var_pool f    with the weights held fixed.

    Args:
        strength: Factor of the penalty, in nats, finite and not negative.

    Raises:
        ValueError: If the strength is negative or not finite.

    Source:
        The penalty of this package (docs/training.md).

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, MLPEnergy
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1)
        >>> kl_to_base(24.0)(ebm).item()  # an untrained model is its base
        0.0
    """
    _check(strength)

    def penalty(ebm: LVEBM) -> Tensor:
        f, _ = ebm.negative_residuals()
        scale = 1.0 + 2.0 * ebm.pool.kl_from_base()
        variance = ebm.pool.variance(f)
        return strength * (scale.log() + (variance - variance.detach()) / scale)

    return penalty


def add_penalties(penalties: Sequence[Penalty], ebms: Sequence[LVEBM]) -> float:
    """Add the gradients of penalties on energies that are not frozen, and return their sum.

    Each energy that has a `kl_penalty` gets its own beside them, once, even if it serves two
    LVEBMs, and so does a trained base with a `noise_penalty`.
    """
    total = 0.0
    met: set[int] = set()
    for ebm in ebms:
        strength = 0.0 if id(ebm.f) in met else getattr(ebm.f, "kl_penalty", 0.0)
        met.add(id(ebm.f))
        chosen = [*penalties, *([kl_to_base(strength)] if strength else [])]
        trained = any(p.requires_grad for p in ebm.f.parameters())
        terms = [p(ebm) for p in chosen] if trained else []
        base = ebm.base_x
        if isinstance(base, GeneratorBase) and base.noise_penalty and id(base) not in met:
            met.add(id(base))
            divergence = base.noise_divergence()
            terms += [base.noise_penalty * divergence] if divergence.requires_grad else []
        if terms:
            penalty = torch.stack(terms).sum()
            penalty.backward()
            total += float(penalty.detach())
    return total


def _check(strength: float) -> None:
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength must be finite and not negative; got {strength}")
