# SPDX-License-Identifier: Apache-2.0
"""Shrinking a parameter update until it is acceptable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError

from pyro_lvebm.model import LVEBM

MAX_HALVINGS = 20
"""An update that is still too large after as many is undone."""

_MAX_LENGTHENING = 8.0
"""Largest factor on an update that is too short."""

_MAX_JUMP = 1e9
"""An update that is larger than so many times the largest entry of a parameter, and 1, is refused.

The first may be as large: a location that starts at 0 jumps to data in any unit."""


@torch.no_grad()
def scale_update(params: Sequence[Tensor], before: Sequence[Tensor], factor: float) -> None:
    """Replace each update by `factor` times itself, θ ← θ_old + factor (θ − θ_old), in place."""
    if factor != 1.0:
        for p, old in zip(params, before, strict=True):
            p.copy_(old + factor * (p - old))


@torch.no_grad()
def restore(params: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Set each parameter to its former value, in place."""
    for p, old in zip(params, before, strict=True):
        p.copy_(old)


def lengthening(divergence: float, least: float) -> float:
    """Return the factor on an update that moves the model by `least`, at most 8.

    How far the model moves grows with the square of a short update.

    Args:
        divergence: How far the update moves the model, such as KL(p_old ‖ p_new) in nats.
        least: How far it is to move it.

    Returns:
        The factor; 1 where the update is long enough, moves nothing, or is NaN.

    Example:
        >>> lengthening(0.01, 0.04), lengthening(0.05, 0.04), lengthening(1e-9, 0.04)
        (2.0, 1.0, 8.0)
    """
    if not 0.0 < divergence < least:
        return 1.0
    return min(math.sqrt(least / divergence), _MAX_LENGTHENING)


def shrink_to_trust_region(
    params: Sequence[Tensor],
    before: Sequence[Tensor],
    divergence: Callable[[], Tensor],
    max_divergence: float,
    max_halvings: int = MAX_HALVINGS,
) -> tuple[int, float]:
    """Halve an update until the model has moved by at most `max_divergence`.

    An update that is still too large, or NaN, after `max_halvings` is undone.

    Args:
        params: Parameters after the update, changed in place.
        before: Their values before it.
        divergence: Returns how far the model has moved, such as KL(p_old ‖ p_new) in nats.
        max_divergence: The radius of the trust region.
        max_halvings: Give up and undo the update after this many.

    Returns:
        Number of halvings, where max_halvings + 1 means that the update was undone; and how far
        the model has moved in the end.

    Example:
        >>> import torch
        >>> p, old = torch.tensor(8.0), torch.tensor(0.0)
        >>> shrink_to_trust_region([p], [old], lambda: p**2, 5.0)
        (2, 4.0)
        >>> p
        tensor(2.)
    """
    for halvings in range(max_halvings + 1):
        moved = float(divergence())
        if moved <= max_divergence:
            return halvings, moved
        scale_update(params, before, 0.5)
    restore(params, before)
    return max_halvings + 1, 0.0


_LEAST = 0.5
"""How far an update moves the model at least, in units of the radius of the trust region."""


def default_radius(dim: int) -> float:
    """Return the radius of the trust region in nats for an LVEBM in `dim` dimensions, x and z.

        δ = 0.02 max(1, √(d / 8))

    In few dimensions a larger radius lets log Z online fall behind; in many a smaller one slows
    learning (docs/training.md).
    """
    return 0.02 * max(1.0, math.sqrt(dim / 8.0))


@dataclass(frozen=True)
class TrustRegion:
    """How far one update may move an LVEBM, and how far it should."""

    max_kl: float | None = None  # radius, nats; None is `default_radius` of each LVEBM
    min_kl: float | None = None  # nats, times the square of the factor; None is half of the radius
    factor: float = 1.0  # multiplies the update, such as a schedule between 0 and 1


def bounded_step(
    optim: Callable[[list[Tensor]], None],
    params: list[Tensor],
    ebms: list[LVEBM],
    region: TrustRegion,
    step: int,
) -> tuple[dict[Tensor, Tensor], int, float, float]:
    """Let the optimiser change parameters, then shrink or lengthen the change.

    Every update is multiplied by the factor; that of the energies is then halved until
    KL(p_old ‖ p_new) ≤ `max_kl` for every LVEBM among them, as its pool sees it; an energy that
    cannot be evaluated there has moved too far. An update that moves every LVEBM by less than
    `min_kl` times the square of the factor is first made longer, up to eightfold. This works on
    the update, so it holds for any optimiser, with momentum, clipping or a schedule of its own.

    Args:
        optim: Changes parameters by their gradients, as an optimiser does.
        params: Parameters with their gradients, changed in place.
        ebms: The LVEBMs of the model; those without a parameter among `params` do not count.
        region: Radius, least distance and factor.
        step: Number of this step, for the message.

    Returns:
        The values before, by parameter; the number of halvings; KL(p_old ‖ p_new) in nats, the
        largest of all LVEBMs; and the factor by which the update was lengthened.

    Raises:
        ValueError: If the update made a parameter NaN or infinite, or was absurdly large; it is
            undone then.
    """
    before = [p.detach().clone() for p in params]
    met = {id(p) for p in params if p.requires_grad}
    moving = [e for e in ebms if not e.is_base and any(id(p) in met for p in e.theta())]
    halvings, kl, longer = 0, 0.0, 1.0
    try:
        optim(params)
        scale_update(params, before, region.factor)
        if moving:
            halvings, kl, longer = _keep_near(params, before, moving, region)
        if not all(bool(torch.isfinite(p).all()) for p in params):
            raise ValueError(
                f"the update of step {step} made a parameter NaN or infinite; it was undone. Lower "
                "the learning rate"
            )
        if step > 0:
            _check_jump(params, before, step)
    except BaseException:
        restore(params, before)
        raise
    return dict(zip(params, before, strict=True)), halvings, kl, longer


@torch.no_grad()
def _check_jump(params: list[Tensor], before: list[Tensor], step: int) -> None:
    """Refuse an update that leaves nothing of where a parameter was."""
    for p, old in zip(params, before, strict=True):
        if p.numel() and (jump := (p - old).abs().max()) > _MAX_JUMP * old.abs().max().clamp(1.0):
            raise ValueError(
                f"the update of step {step} moved a parameter by {float(jump):.0e}, from "
                f"{float(old.abs().max()):.1e} at most; it was undone. Lower the learning rate, "
                "or look at penalties and data for what made a gradient so large"
            )


def _keep_near(
    params: list[Tensor],
    before: list[Tensor],
    ebms: list[LVEBM],
    region: TrustRegion,
) -> tuple[int, float, float]:
    """Shrink or lengthen the change of the energies; return halvings, KL and lengthening."""
    own = {id(p) for ebm in ebms for p in ebm.theta()}
    energies = {id(p) for ebm in ebms for p in ebm.f.parameters()}
    theta = [i for i, p in enumerate(params) if id(p) in own]
    energy = [i for i, p in enumerate(params) if id(p) in energies]
    own_radii = [region.max_kl or default_radius(e.dim) for e in ebms]
    radii = torch.tensor(own_radii, dtype=torch.float64)
    moved = torch.zeros_like(radii)

    def relative_kl() -> Tensor:
        try:
            moved.copy_(torch.stack([ebm.kl_of_update() for ebm in ebms]))
        except (ValueError, LinAlgError):
            moved.fill_(torch.nan)
        return (moved / radii).max()

    least = _LEAST if region.min_kl is None else float((region.min_kl / radii).min())
    longer = 1.0
    known: list[Tensor] = []  # the divergence of the update as it is: each costs a pool
    if least > 0.0:
        known = [relative_kl()]
        longer = lengthening(float(known[0]), least * region.factor**2)
        if longer > 1.0:
            known.clear()

    def shrink(part: list[int]) -> int:
        own_params, own_before = [params[i] for i in part], [before[i] for i in part]
        found, _ = shrink_to_trust_region(
            own_params, own_before, lambda: known.pop() if known else relative_kl(), 1.0
        )
        return found

    scale_update([params[i] for i in energy], [before[i] for i in energy], longer)
    halvings = shrink(energy) if energy else MAX_HALVINGS + 1
    # A generator moves the pool with it: its update is shrunk only where that of f does not do.
    if halvings > MAX_HALVINGS and len(theta) > len(energy):
        halvings = shrink(theta)
    kl = float(moved.max()) if halvings <= MAX_HALVINGS else 0.0
    return halvings, kl, longer
