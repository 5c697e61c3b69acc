# SPDX-License-Identifier: Apache-2.0
"""Supports of x other than the real vectors, and the bijection from unconstrained coordinates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_lvebm.validation import DataError

_SIMPLEX = type(constraints.simplex)

_RESOLUTION = 1e-2
"""Error of unconstrained coordinates beyond which they are called wrong."""


class Support:
    """A support of x, with the bijection x = T(y) from the unconstrained y.

        log p(x) = log p(y) − log |det dT/dy|,    y = T⁻¹(x)

    T is `biject_to` of the constraint: exp for positive entries, a scaled logistic function for
    intervals, stick-breaking for the simplex. Densities are with respect to Lebesgue measure on x.
    On the simplex, where x has K entries and y has K − 1, it is that of any K − 1 entries of x,
    for which Dirichlet densities are given too.

    Args:
        constraint: One of `torch.distributions.constraints`, of single entries, which then holds
            for all alike, or of the trailing axes of an event. `stack([...], dim=-1)` gives every
            column its own, and `cat([...], dim=-1, lengths=[...])` groups of columns.
        event_shape: Shape of one x.

    Raises:
        ValueError: If no bijection is known for it, or it does not fit the shape.

    Source:
        Carpenter et al. (2017), Stan: A probabilistic programming language, JSS 76; Stan reference
        manual, "Constraint transforms".

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> support = Support(constraints.simplex, torch.Size([3]))
        >>> support.unconstrained_shape
        torch.Size([2])
        >>> [round(entry, 6) for entry in support.constrain(torch.zeros(2)).tolist()]
        [0.333333, 0.333333, 0.333333]
    """

    def __init__(self, constraint: Constraint, event_shape: torch.Size) -> None:
        self.event_shape = event_shape
        constraint = _joined(_innermost(constraint))
        # Bounds may lie on any device; what follows needs a few numbers only.
        nearby = _map_tensors(constraint, lambda t: t.detach().cpu().double())
        transform = _bijection(nearby)
        # Some constraints of Pyro have no event_dim of their own, but their bijections do.
        extra = len(event_shape) - max(constraint.event_dim, transform.codomain.event_dim)
        if extra < 0:
            raise ValueError(
                f"support {constraint} needs x with {len(event_shape) - extra} event axes; one x "
                f"has shape {tuple(event_shape)}"
            )
        y, x, log_det = _probe(constraint, transform, event_shape)
        self.unconstrained_shape = y.shape[1:]
        self.is_real = y.shape == x.shape and torch.equal(x, y)
        self.elementwise = log_det.shape == y.shape == x.shape and _is_elementwise(transform, y)
        self.core = constraint
        self.constraint = constraints.independent(constraint, extra) if extra else constraint
        self.transform = _bijection(constraint)

    def __repr__(self) -> str:
        # The same on all devices and for all dtypes, for checkpoints.
        return _describe(_map_tensors(self.core, lambda t: t.detach().cpu().float()))

    def map_tensors(self, fn: Callable[[Tensor], Tensor]) -> Support:
        """Return the support with a function applied to all bounds that are tensors."""
        result = copy.copy(self)
        result.core = _map_tensors(self.core, fn)
        result.constraint = _map_tensors(self.constraint, fn)
        result.transform = _bijection(result.core)
        return result

    def constrain(self, y: Tensor) -> Tensor:
        """Return x (*b, *event_shape) for y (*b, *unconstrained_shape)."""
        x: Tensor = self.transform(y)
        return x

    def unconstrain(self, x: Tensor) -> Tensor:
        """Return y (*b, *unconstrained_shape) for x (*b, *event_shape)."""
        y: Tensor = self.transform.inv(x)
        return y

    def log_abs_det(self, y: Tensor, x: Tensor) -> Tensor:
        """Return log |det dT/dy| (*b,) at y (*b, *unconstrained_shape) with x = T(y), in nats."""
        batch = y.shape[: y.dim() - len(self.unconstrained_shape)]
        terms = self.log_derivatives(y, x)
        return terms.flatten(len(batch)).sum(-1) if terms.dim() > len(batch) else terms

    def log_derivatives(self, y: Tensor, x: Tensor) -> Tensor:
        """Return log |dx_i/dy_i| (*b, *event_shape) where the support is elementwise.

        Elsewhere the log determinants of the parts of x that are tied together.
        """
        result: Tensor = self.transform.log_abs_det_jacobian(y, x)
        return result

    def centre(self, like: Tensor) -> Tensor:
        """Return T(0), an event inside the support, with the dtype and device of a tensor."""
        return self.constrain(like.new_zeros(self.unconstrained_shape))

    def check(self, x: Tensor, observed: Tensor | None = None) -> None:
        """Refuse data that have no unconstrained coordinates.

        Args:
            x: Data (*b, *event_shape).
            observed: Which entries to look at, boolean, of the shape of x; all but NaN if None.

        Raises:
            ValueError: If entries are missing where the support ties entries together, or lie
                outside the support, on its boundary, or so near to it that dtype does not tell.
        """
        if self.is_real:
            return
        x = x.detach()
        observed = ~x.isnan() if observed is None else observed
        if not self.elementwise and not observed.all():
            raise DataError(
                f"entries of x are missing, and support {self} ties the entries of an x together, "
                "so that what is observed limits what is missing: that conditional of the base has "
                "no closed form. Give complete rows only"
            )
        filled = torch.where(observed, x, self.centre(x))
        self._refuse(
            filled,
            _on_boundary(self.core, filled),
            f"on the boundary of support {self}, where unconstrained coordinates are infinite. "
            "Remove those rows, set entries that are missing to NaN, or move values that were "
            "rounded to the boundary inside, by half of the resolution of the data",
        )
        self._refuse(
            filled,
            ~self.core.check(filled),
            f"outside support {self}. Correct or remove those rows, or give the support in which "
            "all of x lies (entries on a simplex add up to 1 within 1e-6)",
        )
        self._refuse(
            filled,
            self._unresolved(filled),
            f"so near to the boundary of support {self} that {x.dtype} does not resolve its "
            "unconstrained coordinates. Give x in float64, or put an entry of the simplex last "
            "that is never tiny",
        )

    def _unresolved(self, x: Tensor) -> Tensor:
        """Which entries, or events, of x have unconstrained coordinates that are wrong."""
        wide = self.map_tensors(lambda t: t.double())
        exact = wide.unconstrain(x.double())
        off = ~((self.unconstrain(x) - exact).abs() < _RESOLUTION)
        if isinstance(_innermost(self.core), _SIMPLEX):  # its inverse never looks at the last entry
            change = wide.constrain(exact) / x.double() - 1.0
            off = off.any(-1) | ~(change.abs() < _RESOLUTION).all(-1)
        if self.elementwise:
            return off
        return off.reshape(*x.shape[: x.dim() - len(self.event_shape)], -1).any(-1)

    def _refuse(self, x: Tensor, bad: Tensor, what: str) -> None:
        """Raise a DataError if there are bad entries, or events where entries are tied together."""
        if not bad.any():
            return
        lead = x.dim() if self.elementwise else x.dim() - len(self.event_shape)
        bad = bad.reshape(*x.shape[:lead], -1).any(-1)
        index = tuple(torch.nonzero(bad)[0].tolist())
        shown = ", ".join(f"{value:.6g}" for value in x[index].flatten()[:6].tolist())
        kind = "entries" if self.elementwise else "rows"
        raise DataError(
            f"{int(bad.sum())} of {bad.numel()} {kind} of x, the first of them x{list(index)} = "
            f"{shown}{', …' if x[index].numel() > 6 else ''}, lie {what}"
        )


def _bijection(constraint: Constraint) -> Transform:
    """Return `biject_to` of a constraint, or say why there is none."""
    if not isinstance(constraint, Constraint):
        raise ValueError(
            "support must be one of torch.distributions.constraints, such as constraints.positive; "
            f"got {type(constraint).__name__}"
        )
    try:
        transform: Transform = biject_to(constraint)
    except NotImplementedError as error:
        discrete = not constraints.is_dependent(constraint) and constraint.is_discrete
        cure = "; dequantise the data first" if discrete else ""
        raise ValueError(
            f"no bijection from real vectors to support {constraint} is known to biject_to{cure}"
        ) from error
    return transform


def _probe(
    constraint: Constraint, transform: Transform, event_shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Return two y (2, *unconstrained_shape), their x and log derivatives, after a round trip."""
    try:
        shape = torch.Size(transform.inverse_shape(event_shape))
        y = torch.linspace(-1.0, 1.0, 2 * shape.numel(), dtype=torch.float64, device="cpu")
        y = y.reshape(2, *shape)
        x = transform(y)
        back = transform.inv(x)
        log_det = transform.log_abs_det_jacobian(y, x)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"support {constraint} does not fit x of shape {tuple(event_shape)}, or its bijection "
            f"lacks an inverse or a Jacobian: {error}"
        ) from error
    exact = x.shape[1:] == event_shape and back.shape == y.shape and torch.allclose(back, y)
    fixed = not shape.numel() and bool(event_shape.numel())  # as the only entry of a simplex
    if not exact or fixed or not log_det.isfinite().all():
        raise ValueError(
            f"support {constraint} has no usable bijection to x of shape {tuple(event_shape)}: "
            "T⁻¹(T(y)) is not y, or shapes or the Jacobian are wrong"
        )
    return y, x, log_det


def _is_elementwise(transform: Transform, y: Tensor) -> bool:
    """Return whether each entry of x depends on its own entry of y alone, and is NaN where that is.

    Every second y is NaN, which shows in sums over entries before or after.
    """
    hole = torch.zeros_like(y[0].flatten(), dtype=torch.bool)
    hole[::2] = True
    hole = hole.reshape(y.shape[1:]).expand(y.shape)
    return torch.equal(transform(y.masked_fill(hole, torch.nan)).isnan(), hole)


def _map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors inside a constraint, leaving the constraint unchanged."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, list):
        return [_map_tensors(part, fn) for part in value]
    if isinstance(value, Constraint):
        result = copy.copy(value)
        for name, part in vars(value).items():
            setattr(result, name, _map_tensors(part, fn))
        return result
    return value


def _innermost(constraint: Any) -> Any:
    if isinstance(constraint, constraints.independent):
        return _innermost(constraint.base_constraint)
    return constraint


def _joined(constraint: Any) -> Any:
    """Return `stack` as `cat`: the Jacobian of torch's `StackTransform` has an axis too many."""
    if not isinstance(constraint, constraints.stack | constraints.cat):
        return constraint
    if constraint.dim >= 0 or any(part.event_dim for part in constraint.cseq):
        raise ValueError(
            "support as stack or cat needs a negative dim, such as dim=-1 for columns, and parts "
            f"that constrain single entries; got dim={constraint.dim} and {constraint.cseq}"
        )
    lengths = getattr(constraint, "lengths", None)
    return constraints.cat(constraint.cseq, constraint.dim, lengths)


def _describe(constraint: Any) -> str:
    parts = getattr(constraint, "cseq", None)
    if parts is None:
        return str(_innermost(constraint))
    return f"{str(constraint).removesuffix('()')}({', '.join(map(_describe, parts))})"


def _on_boundary(constraint: Any, x: Tensor) -> Tensor:
    """Which entries of x lie on a boundary, that `Constraint.check` may or may not count as inside.

    A bijection that clips, as the logistic function does, hides it.
    """
    constraint = _innermost(constraint)
    if isinstance(constraint, constraints.cat):
        values = x.split(constraint.lengths, constraint.dim)
        pairs = zip(constraint.cseq, values, strict=True)
        return torch.cat([_on_boundary(part, value) for part, value in pairs], constraint.dim)
    if isinstance(constraint, _SIMPLEX):
        return x == 0
    result = torch.zeros_like(x, dtype=torch.bool)
    for name in ("lower_bound", "upper_bound"):
        if hasattr(constraint, name):
            result = result | (x == getattr(constraint, name))
    return result
