# SPDX-License-Identifier: Apache-2.0
"""The marginal log likelihood of every datum at draws of the latents that all data share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lvebm.bases import Completion
from pyro_lvebm.evidence.annealed import anneal_latents, fit_gaussian, relative_to
from pyro_lvebm.guides import AutoParticles
from pyro_lvebm.latents import (
    FullData,
    LatentBlock,
    Minibatch,
    ModelAt,
    Program,
    Sweep,
    latent_blocks,
    sum_other_axes,
    sum_out,
)
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import ValueAndGrad
from pyro_lvebm.sites import (
    PARTICLE_PLATE,
    observed_sites,
    plates_of,
    sample_nodes,
    will_be_enumerated,
)

_MAX_PARTICLES = 2**16

_DRAWS_FOR_EACH_DIMENSION = 10

_LEAST_SPREAD = 1e-3
"""Draws for each dimension of a datum's latents, and their standard deviation in units of the
prior, below which no Gaussian is fitted to them."""

Samples = dict[str, Tensor]


class PointwiseLikelihood(NamedTuple):
    """log p(x_i | w_s) in nats, with the pools' log Z."""

    value: Tensor  # (S, *full_batch)
    sites: list[str]  # the observed sites of a datum
    owner: str  # a site in the plates of a datum, and in no others


def marginal_likelihood(
    sweep: Sweep,
    samples: Samples,
    given: Samples,
    num_draws: int,
    *,
    num_particles: int = 64,
) -> PointwiseLikelihood:
    """Estimate the log likelihood of every datum with its own latents integrated out.

        log p(x_i | w_s) = log ∫ p(x_i, z_i | w_s) dz_i,    s = 1 … S

    w are the latents in no plate, z_i those in the plates of a datum, x_i its observed sites. For
    each draw w_s, z_i is annealed to p(z_i | x_i, w_s) by sequential Monte Carlo, with random
    numbers of its own, from a Gaussian fitted to all draws of z_i, or from a standard normal where
    they are too few or do not vary. The estimate is unbiased for p(x_i | w_s), whatever the draws
    of z_i are, so its logarithm is low by half its variance. Without z it is exact.

    Args:
        sweep: The model and its data, with θ frozen.
        samples: Draws by site, (S', *full_batch, *event), of which those of z_i say where to start.
        given: Draws by site, of which those of w, (S, *event), are where to evaluate.
        num_draws: S. Without any w, the S values differ by Monte Carlo error only.
        num_particles: Particles for each datum and draw.

    Raises:
        ValueError: If no observed site is in a plate, latents or data are in several kinds of
            plates, or there are no draws of some w.
    """
    program = sweep.program
    latents = dict(program.probe.prototype_trace.iter_stochastic_nodes())
    plates = {name: plates_of(node) for name, node in latents.items()}
    shared = [name for name in latents if not plates[name]]
    local = [name for name in latents if plates[name]]
    seen = {name: plates_of(node) for name, node in observed_sites(program.prototype).items()}
    if local:
        sites = [name for name, around in seen.items() if around >= plates[local[0]]]
        kinds = {plates[name] for name in local}
    else:
        sites = [name for name, around in seen.items() if around]
        kinds = {seen[name] for name in sites}
    if len(kinds) != 1:
        raise ValueError(
            "a log likelihood for every datum needs latents, or data where there are none, in "
            f"plates of one kind; got latents in {_in_words(plates)} and data in {_in_words(seen)}"
        )
    missing = [name for name in shared if name not in given]
    if missing:
        raise ValueError(
            f"there are no draws of {missing}, which all data share, to evaluate a likelihood at"
        )
    owner = local[0] if local else sites[0]
    given = {name: given[name] for name in shared}
    starts = {name: samples[name] for name in local if name in samples}
    if local:
        values = _annealed(sweep, given, starts, num_draws, num_particles)
    else:
        values = _evaluated(program, given, sites, num_draws)
    found = FullData()
    for batch, value in values:
        found.add(batch, program.sites[owner], value, 0)
    return PointwiseLikelihood(found.joined()[owner], sites, owner)


def _in_words(plates: dict[str, frozenset[str]]) -> dict[str, list[str]]:
    return {name: sorted(around) for name, around in plates.items()}


def _annealed(
    sweep: Sweep, given: Samples, starts: Samples, num_draws: int, num_particles: int
) -> Iterator[tuple[Minibatch, Tensor]]:
    """Yield log p(x_i | w_s) (S, *batch) of every minibatch, by annealing z_i."""
    program, probe = sweep.program, sweep.program.probe
    for number, (batch, trace) in enumerate(program.traces(probe, 1)):
        blocks, _ = latent_blocks(program, probe, trace, traced=bool(given))
        (block,) = (b for b in blocks if b.indices)
        f = block.f
        draws = _draws_of(block, probe, starts)
        if draws is not None:
            f = relative_to(f, *fit_gaussian(draws))
        size, dim = block.v.shape[1:-1], block.v.shape[-1]
        step = max(1, _MAX_PARTICLES // (size.numel() * num_particles))
        values = []
        for chunk, start in enumerate(range(0, num_draws, step)):
            few = {name: value[start : start + step] for name, value in given.items()}
            count = min(step, num_draws - start)
            log_c = anneal_latents(
                _given(block, f, few, count),
                (count * size.numel(), num_particles, dim),
                block.v,
                num_runs=1,
                num_moves=2,
                relative_ess=0.95,
                generator=generator_for(
                    sweep.seed, Stream.POINTWISE_LIKELIHOOD, number, chunk, device=block.v.device
                ),
            )
            values.append(log_c.reshape(count, *size))
        yield batch, torch.cat(values) + block.offset.expand(1, *size)


def _draws_of(block: LatentBlock, probe: AutoParticles, samples: Samples) -> Tensor | None:
    """Draws of v (S', *batch, D), or None where no Gaussian can be fitted to them.

    Draws of missing entries hold the observed values where nothing is missing, and do not vary.
    """
    if any(c.name not in samples or isinstance(c.gaussian, Completion) for c in block.columns):
        return None
    values = {
        c.name: samples[c.name][(slice(None), *probe.index(c.name, block.indices))]
        for c in block.columns
    }
    v, _ = block.join(values)
    enough = len(v) >= _DRAWS_FOR_EACH_DIMENSION * v.shape[-1]
    return v if enough and bool((v.std(0) > _LEAST_SPREAD).all()) else None


def _given(block: LatentBlock, f: ValueAndGrad, given: Samples, num_draws: int) -> ValueAndGrad:
    """Return f on v (runs, S·n, particles, D), for n data at S draws of what they share."""
    batch, nesting = block.v.shape[1:-1], block.at.nesting

    def evaluate(v: Tensor) -> tuple[Tensor, Tensor]:
        runs, _, particles, d = v.shape
        shape = (runs, num_draws, batch.numel(), particles)
        lead = runs * num_draws * particles
        for name, value in given.items():
            event = value.shape[1:]
            wide = value[None, :, None].expand(runs, num_draws, particles, *event)
            wide = wide.reshape(lead, *(1,) * nesting, *event)
            block.at.nodes[name] = {**block.at.nodes[name], "value": wide}
        wide = v.reshape(*shape, d).transpose(2, 3).reshape(lead, *batch, d)
        energy, grad = f(wide)
        energy = energy.reshape(runs, num_draws, particles, -1).transpose(2, 3)
        grad = grad.reshape(runs, num_draws, particles, -1, d).transpose(2, 3)
        return energy.reshape(v.shape[:-1]), grad.reshape(v.shape)

    return evaluate


def _evaluated(
    program: Program, given: Samples, sites: list[str], num_draws: int
) -> Iterator[tuple[Minibatch, Tensor]]:
    """Yield log p(x_i | w_s) (S, *batch) of every minibatch of data without continuous latents."""
    proto, nesting = program.sites[sites[0]], program.nesting
    size = proto["fn"].batch_shape
    own = {frame.dim for frame in proto["cond_indep_stack"]}
    inside = plates_of(proto)
    step = max(1, _MAX_PARTICLES // size.numel())
    for batch in program.minibatches():
        values = []
        for start in range(0, num_draws, step):
            few = {name: value[start : start + step] for name, value in given.items()}
            count = min(step, num_draws - start)
            trace = ModelAt(program, program.nodes_at(few, batch), count).trace(count)
            trace.compute_log_prob()
            nodes = sample_nodes(trace)
            terms = {
                name: sum_other_axes(node["log_prob"], own, nesting)
                for name, node in nodes.items()
                if name in sites
                or (will_be_enumerated(node) and plates_of(node) - {PARTICLE_PLATE} == inside)
            }
            total = sum_out(terms, nodes, nesting + 1) / nodes[sites[0]]["scale"]
            lead = (count, *(1,) * (nesting - len(size)), *size)
            values.append(total.expand(lead).reshape(count, *size))
        yield batch, torch.cat(values)
