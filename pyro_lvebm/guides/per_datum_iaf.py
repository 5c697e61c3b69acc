# SPDX-License-Identifier: Apache-2.0
"""Inverse autoregressive flows for every datum: shared networks, contexts of the data's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.transforms import ConditionalAffineAutoregressive
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.nn import ConditionalAutoRegressiveNN, PyroParam
from torch import Tensor, nn

from pyro_lvebm.guides.networks import as_pyro_params
from pyro_lvebm.guides.per_datum import PerDatumGuide
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.validation import check_at_least, check_widths


class AutoPerDatumIAFNormal(PerDatumGuide):
    """A Gaussian for every datum, bent by inverse autoregressive flows that all data share.

        z_0 ~ N(loc_i, diag(s_i²)),    z_t = μ_t + σ_t ⊙ z_{t−1},
        (μ_t, log σ_t) = net_t(z_{t−1}, h_i),    z = z_T

    Entry j of μ_t and σ_t depends on the entries before j of z_{t−1}, and on the context h_i; every
    other flow takes the entries in the reverse order. A datum has parameters loc and s (d,) and
    h (context_dim,); the networks are common to all. So the guide follows curved posteriors,
    such as a banana, at the cost of a mean-field one for each datum. One Gaussian mode remains
    one mode.

    The networks start with a zero last layer and the contexts at zero, so that the first q is
    z_0. Sites are independent of each other, with networks of their own. A site with one entry
    stays Gaussian: a flow of one entry is affine. A site on a constrained support has this law in
    unconstrained coordinates.

    Draws cost one pass through the networks; the density at a point that was not drawn just now
    costs d passes for each flow.

    Args:
        model: A Pyro model whose latent sites are continuous.
        hidden: Width of each hidden layer, at least the number of entries of each site.
        num_transforms: Number of flows.
        context_dim: Number of entries of each context.
        init_scale: First standard deviation.
        seed: Fixes the initial weights.
        init_loc_fn: Where locations start, as in Pyro's autoguides; by default at draws of the
            prior, one for each datum. With another one all data start alike.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If hidden is empty, a count is less than 1, or init_scale is not positive; at
            the first call, if a latent site is discrete or has more entries than a hidden layer.

    Source:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), Improved variational
        inference with inverse autoregressive flow, equation 10. There the context is the output
        of an encoder; here it is a parameter of the datum.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoPerDatumIAFNormal
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z[..., 1] - z[..., 0] ** 2, 0.5), obs=x[i])
        >>> guide = AutoPerDatumIAFNormal(model, hidden=(16,), context_dim=3)
        >>> guide(torch.zeros(100))["z"].shape
        torch.Size([10, 2])
        >>> guide.locs.z.shape, guide.scales.z.shape, guide.contexts.z.shape
        (torch.Size([100, 2]), torch.Size([100, 2]), torch.Size([100, 3]))
    """

    groups = ("locs", "scales", "contexts", "flows")

    def __init__(
        self,
        model: Callable[..., Any],
        hidden: Sequence[int] = (32,),
        num_transforms: int = 2,
        *,
        context_dim: int = 4,
        init_scale: float = 0.5,
        init_loc_fn: Callable[..., Any] = init_to_sample,
        seed: int = 0,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_widths(hidden)
        check_at_least(1, num_transforms=num_transforms, context_dim=context_dim)
        self._hidden, self._num_transforms = tuple(hidden), num_transforms
        self._context_dim, self._seed = context_dim, seed
        super().__init__(
            model, init_scale=init_scale, init_loc_fn=init_loc_fn, create_plates=create_plates
        )

    def _allocate(self, key: str, loc: Tensor) -> None:
        d = loc.shape[-1]
        scale = torch.full_like(loc, self._init_scale)
        setattr(self.scales, key, PyroParam(scale, constraints.softplus_positive, 1))
        if d == 1:
            return
        if min(self._hidden) < d:
            raise ValueError(
                f"hidden layers must be at least as wide as the {d} entries of each event; got "
                f"{self._hidden}"
            )
        context = loc.new_zeros((*loc.shape[:-1], self._context_dim))
        setattr(self.contexts, key, PyroParam(context, constraints.real, 1))
        with isolated_rng(self._seed, Stream.FLOW_WEIGHTS):
            networks = nn.ModuleList(
                _Network(d, self._context_dim, list(self._hidden), reverse=t % 2 == 1)
                for t in range(self._num_transforms)
            )
        setattr(self.flows, key, as_pyro_params(networks.to(loc)))

    def _law(self, key: str) -> dist.TorchDistribution:
        loc, scale = getattr(self.locs, key), getattr(self.scales, key)
        law: dist.TorchDistribution = dist.Normal(loc, scale).to_event(1)
        if loc.shape[-1] > 1:
            h = getattr(self.contexts, key)
            networks = getattr(self.flows, key)
            flows = [ConditionalAffineAutoregressive(net).condition(h) for net in networks]
            law = dist.TransformedDistribution(law, flows)
        return law


class _Network(ConditionalAutoRegressiveNN):
    """A smooth autoregressive network whose first outputs are zero: a flow that changes nothing."""

    def __init__(self, dim: int, context_dim: int, hidden: list[int], *, reverse: bool) -> None:
        order: Any = torch.arange(dim)
        order = order.flip(0) if reverse else order
        super().__init__(dim, context_dim, hidden, permutation=order, nonlinearity=nn.SiLU())
        for param in self.layers[-1].parameters():
            nn.init.zeros_(param)

    def forward(self, x: Tensor, context: Tensor) -> Any:
        """Return μ and log σ, each (*b, dim), for x (*b, dim) and contexts (*b, context_dim)."""
        # Pyro starts the inverse of a flow from zeros of the default type, whatever that of z.
        return super().forward(x.to(context), context)
