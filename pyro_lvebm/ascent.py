# SPDX-License-Identifier: Apache-2.0
"""One optimiser step on the parameters, kept inside the trust region of the LVEBMs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro import poutine
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from pyro_lvebm.model import LVEBM
from pyro_lvebm.tracing import PositivePairs, all_nodes
from pyro_lvebm.trust_region import (
    MAX_HALVINGS,
    lengthening,
    restore,
    scale_update,
    shrink_to_trust_region,
)
from pyro_lvebm.validation import DataError

_LEAST = 0.5
"""How far an update moves the model at least, in units of the radius of the trust region."""


class Ascent(NamedTuple):
    """What one step on the parameters did."""

    loss: float  # before the update, nats
    positive: dict[str, float]  # mean positive energy before the update, by the site of x, nats
    before: dict[Tensor, Tensor]  # the values before the update, by parameter
    halvings: int
    kl: float  # KL(p_old ‖ p_new), nats
    lengthening: float  # factor on the update of the energies, at least 1


def ascend(
    loss_and_grads: Callable[[], float],
    optim: PyroOptim,
    ebms: list[LVEBM],
    *,
    factor: float,
    max_kl: float | None,
    min_kl: float | None,
    last_good: dict[Tensor, Tensor],
    step: int,
) -> Ascent:
    """Take one optimiser step on all parameters that a loss meets.

    Args:
        loss_and_grads: Runs model and guide, leaves gradients, and returns the loss in nats.
        optim: The optimiser.
        ebms: The LVEBMs of the model.
        factor: Multiplies the update.
        max_kl: Radius of the trust region, in nats; None is `default_radius` of each LVEBM.
        min_kl: How far an update moves a model at least, in nats; None is half of `max_kl`.
        last_good: For each parameter, the last value whose loss was finite.
        step: Number of this step, for messages.

    Raises:
        ValueError: If the loss, a gradient or the update is NaN or infinite; parameters are then
            back at the last values with a finite loss.
    """
    pairs, capture = PositivePairs(), poutine.trace(param_only=True)
    try:
        with warnings.catch_warnings(), pairs, capture:
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
            loss = _loss_of(loss_and_grads, last_good, step)
        params = _params_met(capture.trace)
        check_finite(loss, params, last_good, step)
        positive = pairs.mean_energies()
        before, halvings, kl, longer = bounded_step(
            optim, params, factor=factor, ebms=ebms, max_kl=max_kl, min_kl=min_kl, step=step
        )
    finally:
        zero_grads(_params_met(capture.trace))
    return Ascent(loss, positive, before, halvings, kl, longer)


def _loss_of(
    loss_and_grads: Callable[[], float], last_good: dict[Tensor, Tensor], step: int
) -> float:
    """Run the loss; where the model cannot be evaluated, put parameters back first."""
    try:
        return loss_and_grads()
    except DataError:
        raise
    except (ValueError, LinAlgError) as error:
        restore_last_good(last_good)
        raise ValueError(
            f"the loss could not be computed at step {step}; parameters are back at the last "
            f"values with a finite loss: {error}"
        ) from error


def _params_met(trace: poutine.Trace) -> list[Tensor]:
    return list({n["value"].unconstrained() for n in all_nodes(trace).values()})


def default_radius(dim: int) -> float:
    """Return the radius of the trust region in nats for an LVEBM in `dim` dimensions, x and z.

        δ = 0.02 max(1, √(d / 8))

    In few dimensions a larger radius lets log Z online fall behind; in many a smaller one slows
    learning (docs/training.md).
    """
    return 0.02 * max(1.0, math.sqrt(dim / 8.0))


def check_finite(
    loss: float, params: list[Tensor], last_good: dict[Tensor, Tensor], step: int
) -> None:
    """Refuse a loss or gradient that is not finite, and put parameters back first.

    Args:
        loss: The loss of this step.
        params: Parameters with their gradients.
        last_good: For each parameter, the last value whose loss was finite.
        step: Number of this step, for the message.

    Raises:
        ValueError: If the loss or a gradient is NaN or infinite.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if math.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in grads):
        return
    restore_last_good(last_good)
    what = "a gradient" if math.isfinite(loss) else f"the loss ({loss})"
    raise ValueError(
        f"{what} is not finite at step {step}; parameters are back at the last values with a "
        "finite loss. Check the data and the energy for NaN, or lower the learning rate"
    )


def restore_last_good(last_good: dict[Tensor, Tensor]) -> None:
    """Set parameters to the last values whose loss was finite, in place."""
    restore(list(last_good.keys()), list(last_good.values()))


def bounded_step(
    optim: PyroOptim,
    params: list[Tensor],
    *,
    factor: float,
    ebms: list[LVEBM],
    max_kl: float | None,
    min_kl: float | None,
    step: int,
) -> tuple[dict[Tensor, Tensor], int, float, float]:
    """Let the optimiser change parameters, then shrink or lengthen the change.

    Every update is multiplied by `factor`; that of the energies is then halved until
    KL(p_old ‖ p_new) ≤ `max_kl` for every LVEBM among them, as its pool sees it; an energy that
    cannot be evaluated there has moved too far. An update that moves every LVEBM by less than
    `min_kl` times the square of `factor` is first made longer, up to eightfold. This works on the
    update, so it holds for any optimiser, with momentum, clipping or a schedule of its own.

    Args:
        optim: The optimiser.
        params: Parameters with their gradients, changed in place.
        factor: Multiplies the update, such as a schedule between 0 and 1.
        ebms: The LVEBMs of the model; those without a parameter among `params` do not count.
        max_kl: Radius of the trust region, in nats; None is `default_radius` of each LVEBM.
        min_kl: How far an update moves a model at least, in nats; None is half of `max_kl`.
        step: Number of this step, for the message.

    Returns:
        The values before, by parameter; the number of halvings; KL(p_old ‖ p_new) in nats, the
        largest of all LVEBMs; and the factor by which the update was lengthened.

    Raises:
        ValueError: If the update made a parameter NaN or infinite; it is undone then.
    """
    before = [p.detach().clone() for p in params]
    met = {id(p) for p in params if p.requires_grad}
    moving = [ebm for ebm in ebms if any(id(p) in met for p in ebm.f.parameters())]
    halvings, kl, longer = 0, 0.0, 1.0
    try:
        optim(params)
        scale_update(params, before, factor)
        if moving:
            halvings, kl, longer = _keep_near(params, before, moving, factor, max_kl, min_kl)
        if not all(bool(torch.isfinite(p).all()) for p in params):
            raise ValueError(
                f"the update of step {step} made a parameter NaN or infinite; it was undone. Lower "
                "the learning rate"
            )
    except BaseException:
        restore(params, before)
        raise
    return dict(zip(params, before, strict=True)), halvings, kl, longer


def _keep_near(
    params: list[Tensor],
    before: list[Tensor],
    ebms: list[LVEBM],
    factor: float,
    max_kl: float | None,
    min_kl: float | None,
) -> tuple[int, float, float]:
    """Shrink or lengthen the change of the energies; return halvings, KL and lengthening."""
    own = {id(p) for ebm in ebms for p in ebm.f.parameters()}
    energy = [i for i, p in enumerate(params) if id(p) in own]
    radii = torch.tensor([max_kl or default_radius(e.dim) for e in ebms], dtype=torch.float64)
    moved = torch.zeros_like(radii)

    def relative_kl() -> Tensor:
        try:
            moved.copy_(torch.stack([ebm.kl_of_update() for ebm in ebms]))
        except (ValueError, LinAlgError):
            moved.fill_(torch.nan)
        return (moved / radii).max()

    own_params, own_before = [params[i] for i in energy], [before[i] for i in energy]
    least = _LEAST if min_kl is None else float((min_kl / radii).min())
    longer = 1.0
    known: list[Tensor] = []  # the divergence of the update as it is: each costs a pool
    if least > 0.0:
        known = [relative_kl()]
        longer = lengthening(float(known[0]), least * factor**2)
        if longer > 1.0:
            known.clear()
    scale_update(own_params, own_before, longer)
    halvings, _ = shrink_to_trust_region(
        own_params, own_before, lambda: known.pop() if known else relative_kl(), 1.0
    )
    kl = float(moved.max()) if halvings <= MAX_HALVINGS else 0.0
    return halvings, kl, longer
