# SPDX-License-Identifier: Apache-2.0
"""A full-covariance Gaussian guide for every datum, which subsamples correctly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import biject_to

from pyro_lvebm.guides.full_size import draw_full_size


class AutoPerDatumMultivariateNormal(AutoGuide):
    """A Gaussian with a full covariance over the event of each latent site, one for every datum.

        q(z | i) = N(loc_i, L_i L_iᵀ)

    Where Pyro's `AutoMultivariateNormal` allocates one covariance over all latents of the
    minibatch at hand, this guide has parameters loc (*full_batch, d) and L (*full_batch, d, d)
    with plates at their full size. Sites are independent of each other. A site on a constrained
    support is Gaussian in unconstrained coordinates.

    Args:
        model: A Pyro model whose latent sites are continuous.
        init_scale: First standard deviation.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If init_scale is not positive.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import AutoPerDatumMultivariateNormal
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample_size=10) as i:
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x[i])
        >>> guide = AutoPerDatumMultivariateNormal(model)
        >>> guide(torch.zeros(100, 2))["z"].shape
        torch.Size([10, 2])
        >>> sorted(tuple(p.shape) for p in guide.parameters())
        [(100, 2), (100, 2, 2)]
    """

    prototype_trace: Any  # a `Trace`; None before the first call

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_scale: float = 0.5,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {init_scale}")
        self._init_scale = init_scale
        super().__init__(InitMessenger(init_to_sample)(model), create_plates=create_plates)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.locs, self.scale_trils = PyroModule(), PyroModule()
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            fn, draws = site["fn"], draw_full_size(site)
            full = draws.shape[: draws.dim() - fn.event_dim]
            loc = biject_to(fn.support).inv(draws).reshape(*full, -1).detach().clone()
            eye = torch.eye(loc.shape[-1], dtype=loc.dtype, device=loc.device)
            tril = (self._init_scale * eye).expand(*full, -1, -1).clone()
            key = name.replace(".", "__")
            setattr(self.locs, key, PyroParam(loc, constraints.real, 1))
            setattr(self.scale_trils, key, PyroParam(tril, constraints.softplus_lower_cholesky, 2))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            key = name.replace(".", "__")
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                loc, tril = getattr(self.locs, key), getattr(self.scale_trils, key)
                fn = dist.MultivariateNormal(loc, scale_tril=tril)
                result[name] = _sample_on_support(name, fn, site)
        return result


def _sample_on_support(name: str, fn: dist.TorchDistribution, site: dict[str, Any]) -> Tensor:
    """Sample a site whose unconstrained, flattened value has the distribution `fn`."""
    transform, event = biject_to(site["fn"].support), site["fn"].event_shape
    flat_event = transform.inverse_shape(event)
    if len(flat_event) == 1 and transform.bijective and _is_identity(transform):
        value: Tensor = pyro.sample(name, fn)
        return value
    flat = pyro.sample(f"{name}_unconstrained", fn, infer={"is_auxiliary": True})
    unconstrained = flat.reshape(*flat.shape[:-1], *flat_event)
    value = transform(unconstrained)
    log_det = transform.inv.log_abs_det_jacobian(value, unconstrained)
    log_det = log_det.reshape(*flat.shape[:-1], -1).sum(-1)
    delta = dist.Delta(value, log_density=log_det, event_dim=len(event))
    result: Tensor = pyro.sample(name, delta)
    return result


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    is_composed = isinstance(transform, torch.distributions.transforms.ComposeTransform)
    return is_composed and not transform.parts
