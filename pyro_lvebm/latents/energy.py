# SPDX-License-Identifier: Apache-2.0
"""The energy of latent sites that share their plates, as a function of one flat vector a datum.

A block collects latent sites inside the same plates. Its coordinates are v (K, *B, D): K
particles, B the batch shape in a minibatch, D the unconstrained (and for an LVEBM whitened) event
dimensions of all its sites, flattened. Its residual energy f is defined by

    log p(sites | v) + log |dz/dv| = offset + log N(v; 0, I) − f(v)

so that the kernels of `langevin` and the runs of `annealing` apply to it with base precision 1,
and log ∫ p dz = offset + log E_{N(0,I)}[exp(−f)].
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents.blocks import (
    BlockAxes,
    LatentBlock,
    LatentColumns,
    OfRows,
    whitening,
)
from pyro_lvebm.latents.enumeration import check_latents_held
from pyro_lvebm.latents.masks import free_rows, hidden_prior, is_masked
from pyro_lvebm.latents.model_at import ModelAt, check_particles_apart, depends_on
from pyro_lvebm.latents.program import Program
from pyro_lvebm.model import (
    context_rows,
    given_observed,
    given_x,
    log_base_of,
    residuals_given_observed,
    residuals_given_x,
)
from pyro_lvebm.sampling import Residuals, ValueAndGrad, value_and_grad
from pyro_lvebm.sites import (
    LatentSite,
    ObservedSite,
    all_nodes,
    is_enumerated,
    plates_of,
    sample_nodes,
    subsample_nodes,
)


def latent_blocks(
    program: Program, guide: AutoParticles, guide_trace: Trace, *, traced: bool = False
) -> tuple[list[LatentBlock], Trace]:
    """Group the particle sites of a guide by their plates, each group with its energy.

    Args:
        program: The model and its arguments.
        guide: The particles.
        guide_trace: A trace of the guide under `vectorise` with its own number of particles;
            fixes the minibatch, and the latents that other guides hold.
        traced: Run the model at every evaluation, even if an LVEBM stands alone, so that
            energies follow the values of other latents in all their terms.

    Returns:
        The blocks, and a trace of the vectorised model at the particles.

    Raises:
        ValueError: If a site outside a plate depends on a latent inside it.
    """
    nodes = {n: d for n, d in all_nodes(guide_trace).items() if d["type"] == "sample"}
    at = ModelAt(program, nodes, guide.num_particles)
    with torch.no_grad():
        trace = at.trace(at.num_particles)
    # A guide without latents in a plate does not open it; all evaluations share one minibatch.
    at.nodes.update(subsample_nodes(trace))
    check_latents_held(sample_nodes(trace), set(nodes), guide.prototype_trace.stochastic_nodes)
    groups: dict[tuple[Any, ...], list[LatentColumns]] = {}
    for name, proto in guide.prototype_trace.iter_stochastic_nodes():
        if name not in trace:
            raise ValueError(
                f"the model has no site '{name}' in this minibatch, but the guide has. Where "
                "entries of x are missing, give lvebm(..., observed=...) in every minibatch"
            )
        fn, transform = all_nodes(trace)[name]["fn"], guide.transform(name)
        columns = LatentColumns(
            name,
            transform,
            torch.Size(transform.inverse_shape(fn.event_shape)),
            whitening(fn, program.nesting),
        )
        plates = plates_of(proto)
        groups.setdefault((plates, proto["fn"].batch_shape), []).append(columns)
    return [_block(group, guide, at, trace, traced) for group in groups.values()], trace


def _block(
    columns: list[LatentColumns], guide: AutoParticles, at: ModelAt, trace: Trace, traced: bool
) -> LatentBlock:
    proto = guide.prototype_trace.nodes[columns[0].name]
    choices = subsample_nodes(trace)
    frames = proto["cond_indep_stack"]
    indices = {f.name: choices[f.name]["value"] for f in frames}
    v = torch.cat([c.to_columns(guide.read(c.name, indices)) for c in columns], -1)
    subsampled = {n for n, d in choices.items() if len(d["value"]) < d["fn"].size}
    axes = BlockAxes(columns[0].name, proto["fn"].batch_shape, frames, at.nesting)
    if reader := _reader(columns, at, trace, axes):
        small = subsampled & set(indices)
        if small:
            raise ValueError(
                f"site '{reader}' depends on the latent '{columns[0].name}' and lies outside its "
                f"plate {sorted(small)}, which subsamples, so that rows which are not in the "
                "minibatch count too. Run the model with that plate at its full size"
            )
        columns = [replace(c, rows=proto["fn"].batch_shape) for c in columns]
        v = torch.cat([c.to_columns(guide.read(c.name, indices)) for c in columns], -1)
        axes = BlockAxes.joint(columns[0].name, proto["fn"].batch_shape, at.nesting)
        traced = True
    free = None
    if any(is_masked(all_nodes(trace)[c.name]) for c in columns):
        free = _free_rows(columns, at, axes, v)
        traced = True
    if traced:
        found = _Energy(_traced_energy(columns, at, axes, free), v.new_zeros(()))
    else:
        found = _energy(columns, at, trace, axes)
    is_global = bool(subsampled - set(indices))
    return LatentBlock(
        columns,
        indices,
        v,
        found.f,
        found.offset,
        is_global,
        at,
        found.is_direct,
        found.residuals,
        found.of_rows,
    )


def _reader(columns: list[LatentColumns], at: ModelAt, trace: Trace, axes: BlockAxes) -> str | None:
    """Return a site outside the plates of a block that depends on its latents, if there is one.

    Rows of the block are then not independent of each other given all else, and move together.
    """
    order, names = sample_nodes(trace), [c.name for c in columns]
    first = min(list(order).index(name) for name in names)
    later = {
        name for name in list(order)[first:] if axes.plates - plates_of(order[name])
    }  # what runs before the latents cannot depend on them
    if not later:
        return None
    with torch.enable_grad():
        values = {name: at.nodes[name]["value"].detach().requires_grad_(True) for name in names}
        run = at.trace(at.num_particles, **values)
        run.compute_log_prob(lambda name, _: name in later)
        for name in sorted(later):
            log_prob = all_nodes(run)[name]["log_prob"]
            if any(depends_on(log_prob, value) for value in values.values()):
                for value in values.values() if at.num_particles > 1 else ():
                    check_particles_apart(name, log_prob, value, at.nesting)
                return name
    return None


class _Energy(NamedTuple):
    """What `LatentBlock` holds under the same names."""

    f: ValueAndGrad
    offset: Tensor
    is_direct: bool = False
    residuals: Residuals | None = None
    of_rows: OfRows | None = None


def _energy(columns: list[LatentColumns], at: ModelAt, trace: Trace, axes: BlockAxes) -> _Energy:
    """Return the energy of a block.

    The part of an LVEBM comes straight from its energy, and what else depends on the latents from
    a trace of the model. Where there is nothing else the model is not run at all: a trace at every
    Langevin step would double its time.
    """
    names = [c.name for c in columns]
    own = _own_part(columns, at, trace)
    if own is None:
        zero = all_nodes(trace)[names[0]]["value"].new_zeros(())
        return _Energy(_traced_energy(columns, at, axes), zero)
    others = set(sample_nodes(trace)) - {*names, own.x_name}
    depending, log_rest = _split_others(names, others, at, axes)
    offset = own.log_base + log_rest / own.scale
    if not depending:
        return _Energy(own.f, offset, own.residuals is None, own.residuals, own.of_rows)
    log_prob = _traced_log_prob(columns, at, axes, depending)
    f = _sum(own.f, value_and_grad(lambda v: -log_prob(v)))
    return _Energy(f, offset, False, own.residuals)


@dataclass(frozen=True)
class _OwnPart:
    """What a block of the latents of one LVEBM has of that LVEBM."""

    f: ValueAndGrad  # its residual energy at the observations
    log_base: Tensor  # (*B), nats: with log N(v; 0, I) − f the log density, without log Z
    x_name: str
    scale: Tensor | float
    residuals: Residuals | None  # r(v) with ½ |r|² its main part, where there is one
    of_rows: OfRows | None = None  # the same two for some of the data


def _own_part(columns: list[LatentColumns], at: ModelAt, trace: Trace) -> _OwnPart | None:
    """Return the part of an LVEBM if its latents are the block, and nothing alters its sites."""
    nodes = all_nodes(trace)
    names = [c.name for c in columns]
    first = nodes[names[0]]
    if not isinstance(first["fn"], LatentSite):
        return None
    x_name, x_node = next(
        (name, node)
        for name, node in nodes.items()
        if isinstance(node.get("fn"), ObservedSite) and node["fn"].pairing is first["fn"].pairing
    )
    fn = x_node["fn"]
    completion = None if fn.missing is None else fn.missing[0]
    expected = [fn.ebm.base_z] if completion is None else [fn.ebm.base_z, completion]
    if [c.gaussian for c in columns] != expected:
        return None
    same_scale = bool(torch.as_tensor(x_node["scale"] == first["scale"]).all())
    plain = x_node["is_observed"] and x_node["mask"] is None and same_scale
    if not plain or _is_moved(x_name, names, at):
        return None
    density = fn.ebm.given(fn.context)
    if completion is None:
        x = x_node["value"]
        w_x = fn.ebm.base_x.whiten(x)
        f, residuals = given_x(density, w_x), residuals_given_x(density, w_x)
        log_base = log_base_of(density, x)
        of_rows = _of_rows(fn, w_x)
    else:
        entries = torch.arange(completion.dim, device=completion.mean.device)
        f = given_observed(density, completion, entries)
        residuals = residuals_given_observed(density, completion, entries)
        log_base = completion.log_base()
        of_rows = None
    log_base = log_base - fn.ebm.log_partition
    return _OwnPart(f, log_base, x_name, first["scale"], residuals, of_rows)


def _of_rows(fn: ObservedSite, w_x: Tensor) -> OfRows | None:
    """Return the energy of some of the observations w_x (B, d), where they lie in one plate."""
    c = fn.context
    one_each = c is None or context_rows(c, fn.ebm.context_shape) == w_x.shape[:1]
    if w_x.dim() != 2 or not one_each:
        return None

    def of_rows(rows: Tensor) -> tuple[ValueAndGrad, Residuals | None]:
        density = fn.ebm.given(None if c is None else c[rows])
        return given_x(density, w_x[rows]), residuals_given_x(density, w_x[rows])

    return of_rows


def _is_moved(x_name: str, names: list[str], at: ModelAt) -> bool:
    """Whether other latents move the observations, as in `obs=x - shift`, by autograd."""
    held = {
        name: node["value"].detach()
        for name, node in at.nodes.items()
        if name not in names and not node["is_observed"] and node["value"].is_floating_point()
    }
    if not held:
        return False
    with torch.enable_grad():
        values = {name: value.requires_grad_(True) for name, value in held.items()}
        x = all_nodes(at.trace(at.num_particles, **values))[x_name]["value"]
        return any(depends_on(x, value) for value in values.values())


def _split_others(
    names: list[str], others: set[str], at: ModelAt, axes: BlockAxes
) -> tuple[set[str], Tensor]:
    """Return which other sites depend on the latents, by autograd, and log p (*B) of the rest.

    Where a site is enumerated its sum does not split, and all sites count as depending.
    """
    values: dict[str, Tensor] = {name: at.nodes[name]["value"].detach() for name in names}
    z = values[names[0]]
    if not others:
        return set(), z.new_zeros(())
    with torch.enable_grad():
        values = {name: value.requires_grad_(True) for name, value in values.items()}
        trace = at.trace(at.num_particles, **values)
        trace.compute_log_prob(lambda name, _: name in others)
        nodes = {name: node for name, node in sample_nodes(trace).items() if name in others}
        if any(is_enumerated(node) for node in nodes.values()):
            return others, z.new_zeros(())
        depending = {
            name
            for name, node in nodes.items()
            if any(depends_on(node["log_prob"], value) for value in values.values())
        }
    rest = {name: node for name, node in nodes.items() if name not in depending}
    for node in rest.values():
        node["log_prob"] = node["log_prob"].detach()
    event_dim = all_nodes(trace)[names[0]]["fn"].event_dim
    end = z.dim() - event_dim
    batch = z.shape[end - len(axes.batch_shape) : end]
    log_rest: Tensor = axes.total_log_prob(rest, z.detach(), at.num_particles, batch)
    return depending, log_rest.mean(0)


def _traced_log_prob(
    columns: list[LatentColumns],
    at: ModelAt,
    axes: BlockAxes,
    sites: set[str] | None = None,
    free: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return log p of some sites, by default of all, as a function of v, by tracing the model."""
    dims, names = [c.dim for c in columns], [c.name for c in columns]

    def log_prob(v: Tensor) -> Tensor:
        batch = v.shape[1:-1]
        parts = axes.wide(v).split(dims, -1)
        pairs = zip(columns, parts, strict=True)
        trace = at.trace(len(v), **{c.name: c.transform(c.from_columns(p)) for c, p in pairs})
        with warnings.catch_warnings():
            # A proposal outside the support is NaN; MALA rejects it, and Pyro need not say so.
            warnings.filterwarnings("ignore", message="Encountered (NaN|\\+?-?inf)")
            trace.compute_log_prob(lambda name, _: sites is None or name in sites)
        nodes = sample_nodes(trace)
        scale = nodes[columns[0].name]["scale"]
        shown = {name: node for name, node in nodes.items() if sites is None or name in sites}
        log_p: Tensor = axes.total_log_prob(shown, v, len(v), batch)
        if free is not None:
            log_p = log_p + torch.where(free, hidden_prior(nodes, names, axes, v), 0.0)
        scaled: Tensor = log_p / scale
        return scaled

    return log_prob


def _free_rows(
    columns: list[LatentColumns], at: ModelAt, axes: BlockAxes, v: Tensor
) -> Tensor | None:
    """Return the rows (*B) of a block that nothing holds, under a mask; None if all are held."""
    with torch.enable_grad():
        wanted = v.detach().requires_grad_(True)
        free = free_rows(_traced_log_prob(columns, at, axes)(wanted), wanted)
    return free if bool(free.any()) else None


def _traced_energy(
    columns: list[LatentColumns], at: ModelAt, axes: BlockAxes, free: Tensor | None = None
) -> ValueAndGrad:
    """Return f of a block from a trace of the model at v; free rows have their prior."""
    log_prob = _traced_log_prob(columns, at, axes, free=free)
    dims = [c.dim for c in columns]
    log_norm = 0.5 * sum(dims) * math.log(2 * math.pi)

    def f(v: Tensor) -> Tensor:
        log_p = log_prob(v)
        for c, part in zip(columns, v.split(dims, -1), strict=True):
            log_p = log_p + c.log_abs_det(part)
        return -log_p - 0.5 * (v * v).sum(-1) - log_norm

    return value_and_grad(f)


def _sum(f: ValueAndGrad, g: ValueAndGrad) -> ValueAndGrad:
    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        (a, grad_a), (b, grad_b) = f(v), g(v)
        return a + b, grad_a + grad_b

    return evaluate


def as_problems(f: ValueAndGrad, batch: torch.Size) -> ValueAndGrad:
    """Turn a block's f on v (K, *B, D) into one on v (runs, problems, particles, D).

    The data of the block are the problems of an annealing run.
    """

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        runs, problems, particles, d = v.shape
        value, grad = f(v.transpose(1, 2).reshape(runs * particles, *batch, d))
        value = value.reshape(runs, particles, problems).transpose(1, 2)
        return value, grad.reshape(runs, particles, problems, d).transpose(1, 2)

    return evaluate


def residuals_of_problems(r: Residuals, batch: torch.Size) -> Residuals:
    """Turn a block's r on v (*k, K, *B, D) into one on v (*k, runs, problems, particles, D)."""

    def evaluate(v: Tensor) -> Tensor:
        *lead, runs, problems, particles, d = v.shape
        flat = v.transpose(-3, -2).reshape(*lead, runs * particles, *batch, d)
        value = r(flat)
        value = value.reshape(*lead, runs, particles, problems, value.shape[-1])
        return value.transpose(-3, -2)

    return evaluate
