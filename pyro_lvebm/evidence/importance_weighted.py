# SPDX-License-Identifier: Apache-2.0
"""The importance-weighted bound, with one mean of weights for every datum."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from pyro.util import warn_if_nan
from torch import Tensor
from torch.distributions import biject_to

from pyro_lvebm.latents import sum_other_axes
from pyro_lvebm.sampling import log_mean_exp
from pyro_lvebm.sites import PARTICLE_PLATE, Model, Node, sample_nodes
from pyro_lvebm.validation import check_at_least

Nodes = dict[str, Node]

Term = tuple[float, str, Node]  # 1 in the model or −1 in the guide, name, site


class ImportanceWeightedELBO(ELBO):
    """The importance-weighted bound on the log evidence, datum by datum, as a Pyro loss.

        L_K = Σ_i s_i E[log (1/K) Σ_k w_ik] ≤ Σ_i s_i log p(x_i),    w_ik = p(x_i, z_ik) / q(z_ik)

    A datum i is one element of the plates that all latents share, and s_i its scale: N / B under
    subsampling, times that of `poutine.scale`. L_1 is the ELBO; L_K does not fall with K and tends
    to the log evidence. The scale stands outside the logarithm, so minibatches estimate L_K of all
    data without bias. `pyro.infer.RenyiELBO` takes one weight for the whole minibatch, with the
    scale in its exponent, and bounds nothing where data are subsampled. With an LVEBM, L_K is a
    bound to the extent that the log Z of its pool is right.

    The weights of a datum take in all sites inside its plates, sums over further plates included.
    A datum whose sites in the model are all masked contributes zero. Observed sites outside the
    plates are added once. Gradients are those of log (1/K) Σ_k w_ik by reparametrisation; the
    signal for the guide becomes weaker as K grows (Rainforth et al. 2018).

    Args:
        num_particles: K, at least 1. All of them are drawn in one vectorised run.
        max_plate_nesting: Number of batch dimensions of model and guide; by default that of a
            first run, which leaves the random generators as they were.
        retain_graph: As in every Pyro ELBO.

    Returns:
        As every Pyro ELBO, `loss` and `loss_and_grads` return −L_K, estimated, in nats; and
        `differentiable_loss` returns it as a scalar tensor.

    Raises:
        ValueError: If num_particles < 1. From the loss: if the latents share no plate, so that the
            weights of all data are tied together; if a site outside the shared plates depends on
            the latents, or the guide draws one there; if the guide lacks a latent, has one that is
            not reparametrised, or has point masses, as `AutoParticles`, which have no density; if
            the sites of a datum differ in scale, or a plate inside a datum is subsampled.

    Source:
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders, equation 8.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_lvebm import ImportanceWeightedELBO
        >>> def model(x):
        ...     with pyro.plate("data", len(x), subsample_size=50) as i:
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])
        >>> def guide(x):
        ...     with pyro.plate("data", len(x), subsample_size=50):
        ...         pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> pyro.set_rng_seed(0)
        >>> x = 2**0.5 * torch.randn(100)
        >>> evidence = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
        >>> for k in (1, 4, 64):
        ...     elbo = ImportanceWeightedELBO(num_particles=k)
        ...     gaps = [evidence + elbo.loss(model, guide, x) for _ in range(200)]
        ...     print(k, round(float(sum(gaps)) / 200 / len(x), 1))  # nats per datum
        1 0.7
        4 0.1
        64 0.0
    """

    def __init__(
        self,
        num_particles: int = 8,
        max_plate_nesting: float = math.inf,
        retain_graph: bool | None = None,
    ) -> None:
        check_at_least(1, num_particles=num_particles)
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=True,
            retain_graph=retain_graph,
        )

    @torch.no_grad()
    def loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of −L_K, in nats."""
        return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def differentiable_loss(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> Tensor:
        """Return an estimate of −L_K, a scalar, in nats, with its gradient."""
        ((model_trace, guide_trace),) = self._get_traces(model, guide, args, kwargs)
        nesting = int(self.max_plate_nesting) - (self.num_particles > 1)
        loss = -_bound(_counted(model_trace), _counted(guide_trace), self.num_particles, nesting)
        warn_if_nan(loss, "loss")
        return loss

    def loss_and_grads(self, model: Model, guide: Model, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of −L_K, in nats, and add its gradient to that of every parameter."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return float(loss.detach())

    def _get_trace(
        self, model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Trace, Trace]:
        traces: tuple[Trace, Trace] = get_importance_trace(
            "flat", self.max_plate_nesting, model, guide, args, kwargs
        )
        return traces

    def _guess_max_plate_nesting(
        self, model: Model, guide: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        # A step must not depend on whether it was the first, as after a checkpoint; nor may the
        # guess let the pool of an LVEBM move.
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        devices = {a.device for a in tensors if a.is_cuda}
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            super()._guess_max_plate_nesting(model, guide, args, kwargs)


def _counted(trace: Trace) -> Nodes:
    """The sites with a log probability; that of deterministic ones is masked away."""
    nodes = sample_nodes(trace)
    return {name: n for name, n in nodes.items() if not n["infer"].get("_deterministic")}


def _bound(model: Nodes, guide: Nodes, num_particles: int, nesting: int) -> Tensor:
    """Estimate L_K, a scalar, from one vectorised run."""
    plates = _local_plates(model)
    _check_guide(model, guide, plates)
    signed = [(1.0, *item) for item in model.items()] + [(-1.0, *item) for item in guide.items()]
    inside = [term for term in signed if plates.keys() <= _plates_of(term[2]).keys()]
    outside = [term for term in signed if not plates.keys() <= _plates_of(term[2]).keys()]
    _check_nested(inside, plates)
    own = set(plates.values())
    log_w = torch.zeros(())
    for sign, _, node in inside:
        log_prob = scale_and_mask(node["unscaled_log_prob"], mask=node["mask"])
        log_w = log_w + sign * sum_other_axes(log_prob, own, nesting)
    log_w = log_w.expand(torch.broadcast_shapes(log_w.shape, (num_particles, *(1,) * nesting)))
    log_w = torch.where(_is_seen(inside, own, nesting), log_w, log_w.new_zeros(()))
    bound = (_common_scale(inside, own, log_w) * log_mean_exp(log_w, 0)).sum()
    for sign, name, node in outside:
        bound = bound + sign * _once(name, node, nesting)
    return bound


def _plates_of(node: Node) -> dict[str, int]:
    """The plates of a site by name, as batch dimensions (negative), without that of particles."""
    frames = [f for f in node["cond_indep_stack"] if f.vectorized]
    return {f.name: f.dim for f in frames if f.name != PARTICLE_PLATE}


def _local_plates(model: Nodes) -> dict[str, int]:
    """Return the plates that all latents share, whose elements are the data.

    Raises:
        ValueError: If there are none.
    """
    latents = {name: _plates_of(node) for name, node in model.items() if not node["is_observed"]}
    if not latents:
        raise ValueError("the model has no latents, so its evidence needs no bound; use Trace_ELBO")
    shared = set.intersection(*({*plates.items()} for plates in latents.values()))
    if not shared:
        where = ", ".join(f"'{name}' in {sorted(plates)}" for name, plates in latents.items())
        raise ValueError(
            f"the latents share no vectorised plate ({where}). Weights of single data need latents "
            "of single data: one that is global or in another plate ties the weights of all data "
            "together, and their variance grows with the data. Make it a parameter (pyro.param), "
            "move all latents into one pyro.plate with `with`, or use Trace_ELBO"
        )
    return dict(shared)


def _check_guide(model: Nodes, guide: Nodes, plates: dict[str, int]) -> None:
    """Refuse guides without a reparametrised density for every datum.

    Raises:
        ValueError: If the guide is one.
    """
    missing = [n for n, node in model.items() if not node["is_observed"] and n not in guide]
    if missing:
        raise ValueError(f"the guide has no site for the latents {missing}")
    drawn = {name: node for name, node in guide.items() if not node["is_observed"]}
    free = 0  # real dimensions with a density, minus those that point masses stand on
    for name, node in drawn.items():
        if not plates.keys() <= _plates_of(node).keys():
            raise ValueError(
                f"site '{name}' of the guide lies outside the plates {sorted(plates)} of the "
                "latents, so that its draws tie the weights of all data together. Use a guide that "
                "draws every datum by itself, such as AutoNormal, AutoPerDatumMultivariateNormal "
                "or AutoAmortisedNormal"
            )
        if not node["fn"].has_rsample:
            raise ValueError(
                f"site '{name}' of the guide, {type(node['fn']).__name__}, is not reparametrised, "
                "as the gradient of the importance-weighted bound needs. Use a distribution with "
                "rsample, enumerate the latent, or use Trace_ELBO"
            )
        if not _is_delta(node["fn"]):
            free += node["value"].numel()
        elif name in model:
            support = biject_to(model[name]["fn"].support)
            free -= support.inverse_shape(node["value"].shape).numel()
    if free < 0:
        deltas = [name for name, node in drawn.items() if _is_delta(node["fn"])]
        raise ValueError(
            f"the guide has point masses at {deltas}, as AutoParticles and AutoDelta have; they "
            "have no density, so their weights are not those of a bound. Use a guide with a "
            "density, or Trace_ELBO, whose value is then an energy"
        )


def _is_delta(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _check_nested(inside: list[Term], plates: dict[str, int]) -> None:
    """Refuse data of which only a part is seen.

    Raises:
        ValueError: If a plate inside a datum is subsampled.
    """
    for _, name, node in inside:
        for frame in node["cond_indep_stack"]:
            if frame.name not in plates and (frame.full_size or frame.size) != frame.size:
                raise ValueError(
                    f"plate '{frame.name}' of site '{name}' lies inside a datum and is subsampled; "
                    "a weight needs all of its datum, as the logarithm of a mean of estimated "
                    f"weights is no estimate of the bound. Give plate '{frame.name}' its full size"
                )


def _is_seen(inside: list[Term], own: set[int], nesting: int) -> Tensor:
    """Return which data have a site in the model that is not masked; broadcasts to (*B)."""
    seen = torch.tensor(False)
    for sign, _, node in inside:
        # A guide often does not know the masks of its model.
        if sign > 0 and node["mask"] is None:
            return torch.tensor(True, device=node["unscaled_log_prob"].device)
        if sign > 0:
            ones = scale_and_mask(torch.ones_like(node["unscaled_log_prob"]), mask=node["mask"])
            seen = seen.to(ones.device) | (sum_other_axes(ones, own, nesting) > 0)
    return seen


def _common_scale(inside: list[Term], own: set[int], like: Tensor) -> Tensor:
    """Return the scale of all sites of a datum; broadcasts to (*B).

    Raises:
        ValueError: If they differ, or it varies within a datum.
    """
    scales = [torch.as_tensor(node["scale"]).to(like) for _, _, node in inside]
    for scale, (_, name, _) in zip(scales, inside, strict=True):
        varies = any(n > 1 and a - scale.dim() not in own for a, n in enumerate(scale.shape))
        if varies or not torch.allclose(scale, scales[0], atol=0.0):
            raise ValueError(
                f"site '{name}' and others of the same datum differ in scale. The scale of a datum "
                "multiplies the logarithm of its mean weight and must be one number: use "
                "poutine.scale around all of its sites, in the model and in the guide"
            )
    return scales[0]


def _once(name: str, node: Node, nesting: int) -> Tensor:
    """Sum the log probability of a site outside the data, with its scale.

    Raises:
        ValueError: If it depends on the latents.
    """
    log_prob: Tensor = node["log_prob"]
    by_particle = log_prob.reshape((1,) * (nesting + 1 - log_prob.dim()) + log_prob.shape)
    tolerance = 1e3 * torch.finfo(log_prob.dtype).eps
    first = by_particle[:1].expand_as(by_particle)
    if not torch.allclose(by_particle, first, tolerance, tolerance, equal_nan=True):
        raise ValueError(
            f"site '{name}' depends on the latents but lies outside the plates that they share, so "
            "that its log probability is no part of the weight of any one datum. Move it into "
            "those plates"
        )
    return by_particle.mean(0).sum()
