# SPDX-License-Identifier: Apache-2.0
"""The ELBO table: one θ, many posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_lvebm.guides import check_guide, find_particles, own_parameters
from pyro_lvebm.local_energy import LatentBlock, sum_other_axes
from pyro_lvebm.log_partition import LogPartition, log_partition
from pyro_lvebm.model_evidence import Sweep, Terms, model_log_evidence
from pyro_lvebm.particle_elbo import annealed_elbo
from pyro_lvebm.rng import isolated_rng
from pyro_lvebm.saddle import Saddle
from pyro_lvebm.tracing import (
    Model,
    Node,
    at_minibatch,
    energy_modules,
    frozen,
    sample_nodes,
    vectorise,
)


@dataclass(frozen=True)
class ElboTable:
    """ELBOs of several posteriors under one θ, in nats per datum, best first."""

    rows: pd.DataFrame  # index: name; columns: elbo, elbo_se, kl_gap, kl_gap_se
    log_evidence: float  # with the upper end of log Z, so that elbo + kl_gap = log_evidence
    log_evidence_se: float  # Monte Carlo error of log C
    log_partitions: list[LogPartition]
    num_data: int

    def to_dataframe(self) -> pd.DataFrame:
        """Return the rows, indexed by name, with columns elbo, elbo_se, kl_gap, kl_gap_se."""
        return self.rows.copy()

    def __str__(self) -> str:
        lines = [
            f"ELBO, nats per datum, {self.num_data} data, θ fixed (inference gap)",
            self.rows.to_string(float_format=lambda value: f"{value:.4f}"),
            f"log evidence {self.log_evidence:.4f} ± {self.log_evidence_se:.4f} "
            "(with the upper end of log Z, as every elbo)",
            *map(str, self.log_partitions),
            "± and _se are Monte Carlo standard errors over the draws, for these data.",
        ]
        return "\n".join(lines)

    __repr__ = __str__


def compare_elbo(
    model: Model,
    posteriors: dict[str, Callable[..., Any] | Saddle],
    *args: Any,
    num_samples: int = 64,
    seed: int = 0,
    **kwargs: Any,
) -> ElboTable:
    """Compare how tightly several posteriors bound the evidence of one model, at its present θ.

        elbo(q)   = E_q[log p(x, z) − log q(z)] − log Z_upper
        kl_gap(q) = log Ĉ(x) − E_q[log C-density of (x, z) − log q(z)] = KL(q ‖ p_θ(z|x))

    Both are means over the data. log Z cancels in the gap. Its upper bracket end makes every elbo
    low, and Ĉ, annealed from below, makes every gap small, so claims of tightness err on the safe
    side. Nothing is trained or changed.

    A guide's row is a plain Monte Carlo ELBO. A `Saddle` with `AutoParticles` has no density of
    its own, so its row is the ELBO of annealed Langevin from its particles: a Gaussian is fitted
    to draws of each datum's chains, and MALA carries new draws from it to the posterior. This is
    a lower bound on the space of paths (`particle_elbo`); its gap is zero when the particles have
    converged and the path is slow enough.

    Args:
        model: The Pyro model; all its latents inside the same plates.
        posteriors: Trained guides, or `Saddle`s, by name.
        args: Arguments of model and guides.
        num_samples: Draws for each datum.
        seed: Fixes every random number.
        kwargs: Keyword arguments of model and guides.

    Returns:
        A table that prints itself, best ELBO first.

    Raises:
        ValueError: If there are no posteriors, the model's latents are not all in the same
            plates, or a guide has parameters of the size of one minibatch or no sites.

    Source:
        docs/maths.md, "What may be called a bound"; Wu et al. (2017), On the quantitative
        analysis of decoder-based generative models (bounds by annealing).
    """
    if not posteriors:
        raise ValueError("posteriors is empty; give at least one guide or Saddle by name")
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2; got {num_samples}")
    device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
    with isolated_rng(seed, 20, device=device), poutine.block(), torch.no_grad():
        sweep = Sweep.of(model, seed, args, kwargs)
        ebms = energy_modules(sweep.prototype)
        log_zs = [log_partition(ebm, seed=seed) for ebm in ebms]
        # The sites carry the pool's log Z; the table uses the upper end of the bracket.
        shift = sum(float(e.log_partition) - z.upper for e, z in zip(ebms, log_zs, strict=True))
        check_not_shared(posteriors)
        _check_observed(sweep.prototype)
        run = _Comparison(sweep, num_samples)
        with frozen(ebms):
            evidence = model_log_evidence(run.sweep)
            elbos = {}
            for name, posterior in posteriors.items():
                guide = posterior.guide if isinstance(posterior, Saddle) else posterior
                with own_parameters(guide):
                    elbos[name] = run.elbo(posterior)
    log_evidence, log_evidence_se = evidence.mean()
    rows = {}
    for name, terms in elbos.items():
        elbo, elbo_se = terms.mean()
        gap_se = math.hypot(elbo_se, log_evidence_se)
        rows[name] = (elbo + shift, elbo_se, log_evidence - elbo, gap_se)
    columns = ["elbo", "elbo_se", "kl_gap", "kl_gap_se"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table = table.sort_values("elbo", ascending=False).rename_axis("posterior")
    return ElboTable(table, log_evidence + shift, log_evidence_se, log_zs, len(evidence.value))


@dataclass(frozen=True)
class _Comparison:
    """Per-datum estimates over all minibatches of a model."""

    sweep: Sweep
    num_samples: int

    def elbo(self, posterior: Callable[..., Any] | Saddle) -> Terms:
        """ELBO of every datum, with the pool's log Z."""
        guide = posterior.guide if isinstance(posterior, Saddle) else posterior
        particles = find_particles(guide)
        if particles is None:
            return self._guide_elbo(guide)
        if not isinstance(posterior, Saddle):
            raise ValueError(
                "AutoParticles by itself cannot move its particles; pass the Saddle that trained it"
            )
        nodes = sample_nodes(self.sweep.prototype)
        latents = {name for name, node in nodes.items() if not node["is_observed"]}
        others = latents - set(dict(particles.prototype_trace.iter_stochastic_nodes()))
        if others:
            raise ValueError(
                f"the latents {sorted(others)} are not particles of this Saddle; its row needs all "
                "latents of the model to be particles"
            )

        def estimate(block: LatentBlock, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            log_w = annealed_elbo(
                block,
                particles.step_size(block.columns[0].name),
                num_samples=self.num_samples,
                generator=generator,
            )
            return _mean_over_draws(log_w + block.offset)

        return self.sweep.over_data(estimate, 1, particles, guide)

    def _guide_elbo(self, guide: Model) -> Terms:
        check_guide(guide, self.sweep.prototype)

        def estimate(block: LatentBlock, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            nesting = block.at.nesting
            fixed = at_minibatch(vectorise(guide, self.num_samples, nesting), _choices(block))
            trace = poutine.trace(fixed).get_trace(*self.sweep.args, **self.sweep.kwargs)
            trace.compute_log_prob()
            sites = sample_nodes(trace)
            missing = [c.name for c in block.columns if c.name not in sites]
            if missing:
                raise ValueError(f"the guide has no site for the latents {missing}")
            batch = block.v.shape[1:-1]
            shape = (self.num_samples, *batch)
            values = {
                c.name: sites[c.name]["value"].reshape(
                    *shape, *self.sweep.probe.prototype_trace.nodes[c.name]["fn"].event_shape
                )
                for c in block.columns
            }
            v, log_det = block.join(values)
            own = {axis - len(batch) for axis, size in enumerate(batch) if size > 1}
            lead = (self.num_samples, *(1,) * (nesting - len(batch)), *batch)
            log_q = torch.zeros(lead, dtype=v.dtype, device=v.device)
            for node in sites.values():
                log_q = log_q + sum_other_axes(node["unscaled_log_prob"], own, nesting)
            log_p = -0.5 * (v * v).sum(-1) - 0.5 * v.shape[-1] * math.log(2 * math.pi)
            log_p = log_p - block.f(v)[0] - log_det + block.offset
            return _mean_over_draws(log_p - log_q.reshape(shape))

        return self.sweep.over_data(estimate, 2)


def check_not_shared(posteriors: dict[str, Callable[..., Any] | Saddle]) -> None:
    """Refuse a table in which two guides have parameters in common.

    Raises:
        ValueError: If they have, as when two guides of one class were trained without
            `pyro.clear_param_store()` in between: Pyro's store names them by their class.
    """
    owner: dict[int, str] = {}
    for name, posterior in posteriors.items():
        guide = posterior.guide if isinstance(posterior, Saddle) else posterior
        for param in guide.parameters() if isinstance(guide, nn.Module) else ():
            other = owner.setdefault(id(param), name)
            if other != name:
                raise ValueError(
                    f"the guides '{other}' and '{name}' share parameters, because Pyro's parameter "
                    "store names guides by their class. Call pyro.clear_param_store() before "
                    "training the second, or pyro.settings.set(module_local_params=True) first"
                )


def _check_observed(prototype: Trace) -> None:
    """Refuse models with observed sites that belong to no datum."""
    nodes = sample_nodes(prototype)
    plates = [
        {frame.name for frame in node["cond_indep_stack"]}
        for node in nodes.values()
        if not node["is_observed"]
    ]
    for name, node in nodes.items():
        inside = {frame.name for frame in node["cond_indep_stack"]}
        if node["is_observed"] and plates and not plates[0] <= inside:
            raise ValueError(
                f"the observed site '{name}' lies outside the plates of the latents, so its log "
                "probability belongs to no datum; compare_elbo reports nats per datum"
            )


def _choices(block: LatentBlock) -> dict[str, Node]:
    return {name: block.at.nodes[name] for name in block.indices}


def _mean_over_draws(terms: Tensor) -> tuple[Tensor, Tensor]:
    return terms.mean(0), terms.std(0) / math.sqrt(len(terms))
