# SPDX-License-Identifier: Apache-2.0
"""The primitive `lvebm`: an LVEBM as two Pyro sample sites."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import pyro
import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, get_plates
from torch import Tensor, nn

from pyro_lvebm.bases import Completion, observed_entries
from pyro_lvebm.model import LVEBM, as_context, check_not_traced, context_rows
from pyro_lvebm.sites.distributions import LatentSite, MissingSite, ObservedSite, Pairing
from pyro_lvebm.validation import DataError, as_data


def lvebm(
    name: str,
    ebm: LVEBM,
    obs: Tensor | np.ndarray | None = None,
    *,
    observed: Tensor | None = None,
    context: Tensor | np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Open the sites of an LVEBM: `{name}_z`, latent, and `{name}`, observed where `obs` is given.

    Together their log probabilities are the joint log density, one of each for a datum:

        log base_z(z)  +  [log base_x(x) − f_θ(x, z) − log Z_θ]  =  log p_θ(x, z).

    Where entries of x may be missing there is a third, latent site, `{name}_missing`, with the law
    of the missing entries under base_x given the others, and what the x site has is

        log base_x(x_o) − f_θ(x, z) − log Z_θ,    x = (x_o, x_m),

    so that the three add up to log p_θ(x_o, x_m, z), and Pyro's algorithms treat x_m as any other
    latent. The site opens where `observed` is given, `obs` holds NaN, or the `LVEBM` was fitted by
    `from_data` to rows with NaN. It has all entries of x; its values mean nothing where x is
    observed.

    log Z carries the pool's value and gradient, so any Pyro ELBO over these sites trains θ. The
    parameters of the energy are announced to Pyro's parameter store.

    Where z has no entries there is no z site, and `{name}` has the density of x alone.

    Args:
        name: Name of the x site.
        ebm: The LVEBM.
        obs: Observed x (*b, *x_shape), floating point, finite or NaN where missing, with the rows
            of the plates around the call; None to draw x.
        observed: Which entries of obs are observed, boolean, of its shape, or of x_shape for all
            rows alike; by default all that are not NaN. In minibatches, give it where some have no
            NaN, unless the LVEBM comes from `from_data` with such rows: every minibatch must open
            the same sites.
        context: Contexts c (*b, *context_shape) of a conditional LVEBM, which then has
            log p_θ(x, z | c). They are data: neither a latent nor what needs a gradient, for
            log Z(c) varies with c. An embedding of contexts belongs into the energy.

    Returns:
        x (*b, *x_shape), completed where entries are missing, and z (*b, *z_shape).

    Raises:
        ValueError: If obs is empty, infinite, not floating point, of another event shape, outside
            the support of x, NaN at an entry that is said to be observed, or its rows are not
            those of the plates around the call; if entries are missing on a support that ties
            them together; if `observed` is not boolean or of another shape; if a parameter of the
            energy is a sample site, or `poutine.do` sets z where x is observed; if a context
            is missing, not finite, of another shape, or too much.

    Source:
        docs/maths.md, "Two sites".

    Example:
        >>> import pyro, torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, lvebm
        >>> data = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), data, z_dim=2)
        >>> def model(data):
        ...     with pyro.plate("data", len(data), subsample_size=10) as i:
        ...         return lvebm("scene", ebm, obs=data[i])
        >>> x, z = model(data)
        >>> x.shape, z.shape
        (torch.Size([10, 3]), torch.Size([10, 2]))
    """
    if not isinstance(ebm, LVEBM):
        raise ValueError(f"lvebm needs an LVEBM as its second argument; got {type(ebm).__name__}")
    completion = None
    if obs is not None and ebm.is_trained:
        check_not_traced()  # before θ is met, at which a trace fails with an error of its own
    if context is not None:
        context = as_context(context, ebm.base_x.loc)
        _check_no_gradient(name, context)
    _check_plates(name, "context", context_rows(context, ebm.context_shape))
    if obs is not None:
        obs = as_data(obs, ebm.x_shape, like=ebm.base_x.loc, missing=True)
        _check_plates(name, "obs", obs.shape[: obs.dim() - len(ebm.x_shape)])
        _check_do(name)
        if observed is not None or ebm.expects_missing or obs.isnan().any():
            completion = Completion(ebm.base_x, obs, observed_entries(obs, observed, ebm.x_shape))
        else:
            ebm.base_x.support.check(obs)
    elif observed is not None:
        raise ValueError(f"observed says which entries of obs are observed; '{name}' has no obs")
    for part in (ebm.f, ebm.base_x):
        _check_not_random(name, part)
    pairing = Pairing()
    with _FullName() as seen:
        if ebm.base_z.dim:
            z = pyro.sample(f"{name}_z", LatentSite(ebm, pairing, context=context))
        else:
            rows = context_rows(context, ebm.context_shape)
            rows = rows if completion is None else completion.batch_shape
            z = ebm.base_z.loc.expand(*rows, 0)
            x = _sample_x(name, ebm, z, pairing, obs, completion, context)
            z = z.expand(*x.shape[: x.dim() - len(ebm.x_shape)], 0)
    site = seen.name.removesuffix("_z") if ebm.base_z.dim else seen.name
    ebm.pool.belong_to(site)
    announce_theta(site, ebm)
    if ebm.base_z.dim:
        x = _sample_x(name, ebm, z, pairing, obs, completion, context)
    return x, z


def energy_prior(name: str, prior: LVEBM) -> Tensor:
    """Open the sample site of an energy prior, a latent z with the density p_θ(z).

        log p_θ(z) = log base(z) − f_θ(z) − log Z_θ

    It is one site of Pyro, with any likelihood after it. log Z carries the value and the gradient
    of the pool, so any Pyro ELBO over the model trains the prior; a `Saddle` moves its pool and
    keeps its updates in the trust region, and `log_evidence_of`, `compare_elbo` and `to_arviz`
    bracket its log Z. Draws come from the pool.

    Args:
        name: Name of the site.
        prior: An `EnergyPrior`, or an `LVEBM` with z_dim = 0.

    Returns:
        z (*b, *z_shape), with the rows of the plates around the call.

    Raises:
        ValueError: If the prior is no such `LVEBM`, or is conditional; if a parameter of the energy
            is a sample site.

    Source:
        Pang et al. (2020), Learning latent space energy-based prior model.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import EnergyPrior, MLPEnergy, energy_prior
        >>> prior = EnergyPrior(MLPEnergy(1, hidden=(16,)), z_dim=1)
        >>> def model(counts):
        ...     with pyro.plate("data", len(counts), subsample_size=20) as i:
        ...         z = energy_prior("z", prior)
        ...         pyro.sample("n", dist.Poisson(z.exp()).to_event(1), obs=counts[i])
        ...     return z
        >>> model(torch.ones(50, 3)).shape
        torch.Size([20, 1])
    """
    if not isinstance(prior, LVEBM):
        raise ValueError(f"energy_prior needs an EnergyPrior; got {type(prior).__name__}")
    if prior.base_z.dim or prior.context_shape is not None:
        raise ValueError(
            "energy_prior needs an energy-based density of one vector: an EnergyPrior, or an LVEBM "
            "with z_dim=0 and without contexts. Sites of a pair (x, z) are opened by lvebm(...)"
        )
    return lvebm(name, prior)[0]


def _sample_x(
    name: str,
    ebm: LVEBM,
    z: Tensor,
    pairing: Pairing,
    obs: Tensor | None,
    completion: Completion | None,
    context: Tensor | None,
) -> Tensor:
    """Open the x site, and that of the missing entries; return x, completed."""
    if completion is None:
        x: Tensor = pyro.sample(name, ObservedSite(ebm, z, pairing, context=context), obs=obs)
        return x
    entries = pyro.sample(f"{name}_missing", MissingSite(completion))
    fn = ObservedSite(ebm, z, pairing, missing=(completion, entries), context=context)
    x = pyro.sample(name, fn, obs=obs)
    # A replicate of x, as under `uncondition`, is complete.
    return completion.complete(entries, x) if x is obs else x


class _FullName(Messenger):
    """Learns the name that a site has in the end, such as `left/scene_z` inside a scope."""

    name = ""

    def _pyro_post_sample(self, msg: Any) -> None:
        self.name = msg["name"]


def _check_no_gradient(name: str, context: Tensor) -> None:
    if context.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"the context of '{name}' needs a gradient, so it comes from a latent or a parameter, "
            "and so does log Z(c), whose gradient in c no pool has. With a latent the posterior is "
            "doubly intractable; an embedding with parameters belongs into the energy"
        )


def _check_plates(name: str, what: str, rows: torch.Size) -> None:
    sizes = {frame.dim: frame.size for frame in get_plates() if frame.dim is not None}
    for axis, size in zip(range(-len(rows), 0), rows, strict=True):
        plate = sizes.get(axis, 1)
        if size not in (1, plate):
            raise DataError(
                f"{what} of '{name}' has {size} rows on batch axis {axis}, where the plates around "
                f"the call have {plate}. Call lvebm inside pyro.plate(...) of that size, with the "
                "rows of its minibatch"
            )


def _check_do(name: str) -> None:
    handlers = [h for h in _PYRO_STACK if isinstance(h, DoMessenger)]
    if any(h.data.get(f"{name}_z") is not None for h in handlers):
        raise ValueError(
            f"poutine.do sets '{name}_z' where '{name}' is observed: the density of x given "
            "do(z) has a normaliser of its own, ∫ base_x(x) exp(−f(x, z)) dx, which no pool "
            f"estimates. Draw x without obs, or use poutine.condition on '{name}_z' for the joint "
            "density"
        )


def _check_not_random(name: str, module: nn.Module) -> None:
    for path, part in module.named_modules():
        for key in getattr(part, "_pyro_samples", {}):
            _refuse_random(name, f"{path}.{key}".lstrip("."))


def _refuse_random(name: str, param: str) -> NoReturn:
    raise ValueError(
        f"parameter '{param}' of the energy of '{name}' is given from outside, by PyroSample, "
        "poutine.lift or poutine.substitute. log Z varies with θ, and a pool estimates it at one θ "
        "only, so the posterior of θ is doubly intractable. Train θ by maximum likelihood; for a "
        "prior on θ add a penalty, such as energy_l2"
    )


def announce_theta(site: str, ebm: LVEBM) -> None:
    """Announce the trainable parameters of an energy and its base, as `announce` does."""
    announce(f"{site}_lvebm", ebm.f)
    announce(f"{site}_base", ebm.base_x)


def announce(prefix: str, module: nn.Module) -> None:
    """Announce trainable parameters to Pyro, each under one name and as the tensor it is.

    `pyro.module` leaves a module untrained without a word when its name is already taken, as
    after building a model a second time, and registers it twice under two names.
    """
    if not torch.is_grad_enabled():
        return
    store = pyro.get_param_store()
    held = dict(store.named_parameters())
    for key, param in module.named_parameters():
        if not param.requires_grad:
            continue
        name = store.param_name(param) or f"{prefix}$$${key}"
        # The store forgets a tensor under a name that another has taken, but not the name.
        if held.get(name) is not param:
            store[name] = param
        value: Any = pyro.param(name)
        if not hasattr(value, "unconstrained") or value.unconstrained() is not param:
            # A handler has put another tensor in its place, which the energy would not see.
            _refuse_random(prefix.rpartition("_")[0], key)
