# SPDX-License-Identifier: Apache-2.0
"""What an encoder sees of a minibatch: contexts, and which entries of x are observed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_lvebm.bases import Completion
from pyro_lvebm.rng import Stream, device_of, isolated_rng
from pyro_lvebm.sites import is_subsample
from pyro_lvebm.validation import DataError


@dataclass
class SiteInputs:
    """What the sites of an LVEBM are given."""

    context: Tensor | None = None  # (*b, *context_shape); None if the LVEBM is not conditional
    observed: Tensor | None = None  # (*b, d); None where no site of missing entries was read
    rows: dict[str, Tensor] = field(default_factory=dict)  # of the minibatch, by plate


def read_inputs(
    model: Callable[..., Any],
    name: str,
    missing: str | None,
    rows: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> SiteInputs:
    """Return what a model gives an LVEBM, from a run that ends at its sites.

    A guide runs before the model, and the model alone knows which contexts belong to its rows.

    Args:
        model: The model.
        name: The z site of the LVEBM.
        missing: The site of its missing entries, if it has one.
        rows: Rows of the minibatch, by plate; the model chooses those that are not given.
        args: Arguments of the model.
        kwargs: Keyword arguments of the model.

    Raises:
        DataError: If the model hides which rows it takes.
    """
    reader = _Reader(name, missing, rows)
    # Handlers around, such as a plate of particles, are not for this run.
    noise = isolated_rng(0, Stream.PROBE, device=device_of(args, kwargs))
    with noise, torch.no_grad(), poutine.block():
        try:
            reader(model)(*args, **kwargs)
        except _Read:
            pass
    return reader.found


def check_observed(x: Tensor, observed: Tensor, what: str) -> None:
    """Refuse observations whose NaN are not where the model says that entries are missing.

    Args:
        x: Observations of the minibatch (*b, *x_shape).
        observed: Which entries the model observes (*b, d).
        what: Name of the guide.

    Raises:
        DataError: If they are not.
    """
    seen, observed = torch.broadcast_tensors(
        ~x.isnan().reshape(*x.shape[: observed.dim() - 1], -1), observed
    )
    wrong = int((seen != observed).sum())
    if wrong:
        raise DataError(
            f"NaN in what {what} sees is not where entries of x are missing in the model: "
            f"{wrong} of {seen.numel()} entries differ, and an encoder would take entries that "
            "are hidden as observed. Set hidden entries to NaN in the data, or give "
            "observations=..., as x.masked_fill(~observed, torch.nan)"
        )


class _Read(Exception):
    """Ends a run of a model whose inputs are known."""


class _Reader(Messenger):
    def __init__(self, name: str, missing: str | None, rows: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.missing, self.given = name, missing, rows
        self.found = SiteInputs()

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if is_subsample(msg):
            if msg["value"] is None:
                msg["value"] = self.given.get(msg["name"])
        elif msg["name"] == self.name:
            self._check_rows(msg["cond_indep_stack"])
            self.found.context = fn.context
            if self.missing is None:
                raise _Read
            # A draw from the pool would be for nothing.
            msg["value"] = fn.ebm.base_z.loc.new_zeros(fn.shape())
        elif msg["name"] == self.missing:
            self.found.observed = fn.completion.observed
            raise _Read

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_subsample(msg):
            self.found.rows[msg["name"]] = msg["value"]

    def _check_rows(self, frames: Any) -> None:
        for frame in frames:
            if frame.name not in self.found.rows and frame.size != frame.full_size:
                raise DataError(
                    f"the model of the guide hides which rows of plate '{frame.name}' it takes, "
                    f"and the guide needs what '{self.name}' is given there. Hide other latents "
                    "by poutine.block(model, hide=[...]), which leaves plates visible"
                )


def features(completion: Completion) -> Tensor:
    """Return what an encoder sees of incomplete rows, (*b, 2 d).

    These are the rows, filled by their means under base_x given the observed entries and
    whitened, and which of their entries are observed.
    """
    seen = completion.observed.to(completion.mean)
    return torch.cat([completion.base.whiten(completion.x), seen], -1)


def law_of_entries(law: dist.TorchDistribution, completion: Completion) -> dist.TorchDistribution:
    """Return the law of x_m = T(m(y_o) + R⁻ᵀ v) for a law of v, over events of the shape of x."""
    moved: dist.TorchDistribution = dist.TransformedDistribution(law, [_Unwhitening(completion)])
    return moved


class _Unwhitening(Transform):
    """From v to the values of a site `{name}_missing`."""

    bijective = True
    domain = constraints.real_vector

    def __init__(self, completion: Completion) -> None:
        super().__init__()
        self.completion = completion
        self.codomain = completion.support.constraint

    def _call(self, v: Tensor) -> Tensor:
        return self.completion.support.constrain(self.completion.unwhiten(v))

    def _inverse(self, value: Tensor) -> Tensor:
        return self.completion.whiten(self.completion.support.unconstrain(value))

    def log_abs_det_jacobian(self, v: Tensor, value: Tensor) -> Tensor:
        y = self.completion.support.unconstrain(value)
        return self.completion.log_det + self.completion.support.log_abs_det(y, value)

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size([*shape[:-1], *self.completion.event_shape])

    def inverse_shape(self, shape: Any) -> torch.Size:
        depth = len(self.completion.event_shape)
        return torch.Size([*shape[: len(shape) - depth], self.completion.dim])
