# SPDX-License-Identifier: Apache-2.0
"""What all guides with parameters for every datum have in common, whatever their family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from torch.distributions.kl import register_kl

from pyro_lvebm.guides.building import check_latent, unbuilt_on_error
from pyro_lvebm.guides.plates import (
    KnownRows,
    draw_full_size,
    first_draw,
    open_plates,
    tile_to_full_size,
)
from pyro_lvebm.guides.quantiles import median_of, quantiles_of


class PerDatumGuide(AutoGuide):
    """Skeleton of a guide whose sites are independent, with parameters for every datum.

        q(z | i) = law(parameters_i),    over the flattened, unconstrained event of each site

    Parameters have plates at their full size: (*full_batch, ...). Pyro takes the rows of the
    minibatch. A subclass names its groups of parameters, and says how those of a site start
    (`_allocate`) and what they mean (`_law`). All have locations `locs` (*full_batch, d), which
    start at draws of the prior.

    Args:
        model: A Pyro model whose latent sites are continuous.
        init_scale: First standard deviation.
        init_loc_fn: Where locations start, as in Pyro's autoguides; by default at draws of the
            prior, one for each datum. With another one all data start alike.
        create_plates: As in every Pyro autoguide.

    Raises:
        ValueError: If init_scale is not positive; at the first call, if a latent site is
            discrete or has no unconstrained coordinates; later, if the plates of the model have
            other sizes than at the first call.
    """

    prototype_trace: Any  # a `Trace`; None before the first call
    groups: tuple[str, ...] = ("locs",)

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_scale: float = 0.5,
        init_loc_fn: Callable[..., Any] = init_to_sample,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale must be positive; got {init_scale}")
        self._init_scale, self._init_loc_fn = init_scale, init_loc_fn
        self._rows = KnownRows()
        first = first_draw if init_loc_fn is init_to_sample else init_loc_fn
        super().__init__(InitMessenger(first)(model), create_plates=create_plates)

    def _allocate(self, key: str, loc: Tensor) -> None:
        """Make the parameters of a site beside its locations (*full_batch, d)."""
        raise NotImplementedError

    def _law(self, key: str) -> dist.TorchDistribution:
        """Return the law of a site, of batch shape (*batch,) and event shape (d,)."""
        raise NotImplementedError

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with unbuilt_on_error(self):
            super()._setup_prototype(*args, **kwargs)
            sites = dict(self.prototype_trace.iter_stochastic_nodes())
            self._keys = attribute_names(sites)
            for group in self.groups:
                setattr(self, group, PyroModule())
            for name, site in sites.items():
                loc = self._first_location(site)
                setattr(self.locs, self._keys[name], PyroParam(loc, constraints.real, 1))
                self._allocate(self._keys[name], loc)

    def _first_location(self, site: dict[str, Any]) -> Tensor:
        """Return first locations (*full_batch, d) of a site."""
        transform, event_dim = check_latent(self, site), site["fn"].event_dim
        if self._init_loc_fn is init_to_sample:
            values = draw_full_size(site)
        else:
            values = tile_to_full_size(site["value"], site, event_dim)
        full = values.shape[: values.dim() - event_dim]
        loc: Tensor = transform.inv(values).reshape((*full, -1)).detach().clone()
        return loc

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site."""
        rows = self._rows.given(self, args, kwargs)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._rows.check(self, args, kwargs)
        plates = open_plates(self, rows, args, kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                result[name] = _sample_on_support(name, self._law(self._keys[name]), site)
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of every site for all data, as Pyro's autoguides do.

        It is that of every unconstrained coordinate, mapped to the support: of every entry where
        that map goes entry by entry.

        Args:
            args: Not used; the parameters are those of all data.
            kwargs: Not used.

        Returns:
            (*full_batch, *event_shape) for each site.

        Raises:
            ValueError: Before the first call of the guide.
            NotImplementedError: If the family has no closed form.
        """
        return {name: median_of(law, site) for name, law, site in self._gaussians()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return quantiles of every entry of every site for all data, as Pyro's autoguides do.

            P(z_j ≤ quantile | i) = level,    each entry j by itself

        Args:
            quantiles: The levels (Q,), each in [0, 1].
            args: Not used; the parameters are those of all data.
            kwargs: Not used.

        Returns:
            (Q, *full_batch, *event_shape) for each site.

        Raises:
            ValueError: If a level is out of range; before the first call of the guide; or if the
                entries of a site depend on several unconstrained coordinates, as on a simplex.
            NotImplementedError: If the family has no closed form.

        Example:
            >>> import pyro, torch
            >>> import pyro.distributions as dist
            >>> from pyro_lvebm import AutoPerDatumMultivariateNormal
            >>> def model(x):
            ...     with pyro.plate("data", 5, subsample_size=2) as i:
            ...         z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
            >>> guide = AutoPerDatumMultivariateNormal(model, init_scale=0.1)
            >>> z = guide(torch.zeros(5))
            >>> low, high = guide.quantiles([0.05, 0.95])["z"]
            >>> low.shape, bool((low < guide.median()["z"]).all())
            (torch.Size([5]), True)
        """
        levels = torch.as_tensor(quantiles, dtype=torch.float64)
        if levels.dim() != 1 or not bool(((levels >= 0.0) & (levels <= 1.0)).all()):
            raise ValueError(f"quantiles must be levels between 0 and 1; got {quantiles}")
        return {name: quantiles_of(law, site, levels) for name, law, site in self._gaussians()}

    def _gaussians(self) -> Iterator[tuple[str, dist.TorchDistribution, dict[str, Any]]]:
        """Name, law of the unconstrained coordinates, and node of every site."""
        if self.prototype_trace is None:
            raise ValueError(f"{type(self).__name__} has no parameters before its first call")
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            law = self._law(self._keys[name])
            if isinstance(law, dist.TransformedDistribution):
                raise NotImplementedError(
                    f"medians and quantiles of {type(self).__name__} have no closed form. Take "
                    "those of draws: pyro.infer.Predictive(model, guide=guide, num_samples=...)"
                )
            yield name, law, site


def attribute_names(sites: Iterable[str]) -> dict[str, str]:
    """Return a name of its own for every site, under which a `PyroModule` can hold a parameter.

    This is the name of the site, where possible. Dots are not allowed, a name such as "train"
    would be read as the method, and Pyro keeps the parameter "z" as "z_unconstrained".
    """
    keys: dict[str, str] = {}
    module = PyroModule()
    for name in sites:
        key = name.replace(".", "__")
        while hasattr(module, key) or key.endswith("_unconstrained") or key in keys.values():
            key += "_"
        keys[name] = key
    return keys


def _sample_on_support(name: str, fn: dist.TorchDistribution, site: dict[str, Any]) -> Tensor:
    """Sample a site whose unconstrained, flattened value has the distribution `fn`."""
    transform, event = biject_to(site["fn"].support), site["fn"].event_shape
    flat_event = transform.inverse_shape(event)
    if len(flat_event) == 1 and transform.bijective and _is_identity(transform):
        value: Tensor = pyro.sample(name, fn)
        return value
    flat = pyro.sample(f"{name}_unconstrained", fn, infer={"is_auxiliary": True})
    unconstrained = flat.reshape(flat.shape[:-1] + flat_event)
    value = transform(unconstrained)
    log_det = transform.inv.log_abs_det_jacobian(value, unconstrained)
    log_det = log_det.reshape(*flat.shape[:-1], -1).sum(-1)
    image = TransformedPoint(value, log_density=log_det, event_dim=len(event))
    result: Tensor = pyro.sample(name, image)
    return result


def _is_identity(transform: Any) -> bool:
    while isinstance(transform, torch.distributions.transforms.IndependentTransform):
        transform = transform.base_transform
    is_composed = isinstance(transform, torch.distributions.transforms.ComposeTransform)
    return is_composed and not transform.parts


class TransformedPoint(dist.Delta):
    """The image of an auxiliary draw; its log density is the log Jacobian of the inverse."""


# Pyro's own rule for a Delta leaves its log density out, and `TraceMeanField_ELBO` the Jacobian.
@register_kl(TransformedPoint, dist.Distribution)  # type: ignore[untyped-decorator]
def _kl_of_point(q: Any, p: Any) -> Tensor:
    result: Tensor = q.log_density - p.log_prob(q.v)
    return result
