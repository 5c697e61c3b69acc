# SPDX-License-Identifier: Apache-2.0
"""Posterior draws from whatever stands for a posterior: a `Saddle`, a guide, or `MCMC`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from pyro.infer import SVI
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.api import MCMC
from torch import Tensor

from pyro_lvebm.guides import find_particles
from pyro_lvebm.latents import Program, draw_guide
from pyro_lvebm.rng import Stream
from pyro_lvebm.sites import Model, Node
from pyro_lvebm.training import Saddle
from pyro_lvebm.validation import check_at_least

Source = SVI | MCMC | Callable[..., Any]
"""A `Saddle` or other `SVI`, `MCMC` that has run, or a trained guide."""


@dataclass(frozen=True)
class Draws:
    """Draws of the latents of all data, in ArviZ's order."""

    samples: dict[str, Tensor]  # site -> (chains, draws, *batch, *event)
    sample_stats: dict[str, Tensor] = field(default_factory=dict)  # (chains, draws, *batch)
    sites: dict[str, str] = field(default_factory=dict)  # statistic -> a site in its plates

    @property
    def shape(self) -> tuple[int, int]:
        """Number of chains, and of draws of each."""
        chains, draws = next(iter(self.samples.values())).shape[:2]
        return chains, draws


def model_of(source: Source, model: Model | None) -> Model:
    """Return the model that a posterior is one of: the one given, or the one it knows.

    Raises:
        ValueError: If there is neither.
    """
    if model is not None:
        return model
    found = getattr(source.kernel if isinstance(source, MCMC) else source, "model", None)
    if not callable(found):
        raise ValueError(
            f"{type(source).__name__} does not say which model it belongs to; give model="
        )
    return _without_start(found)


def _without_start(model: Model) -> Model:
    """Return the model inside the handler of an autoguide that gives latents their first values."""
    layer: Any = model
    while isinstance(layer, partial):
        if layer.args and isinstance(layer.args[0], InitMessenger):
            return _without_start(layer.args[1])
        layer = layer.func
    return model


def posterior_of(
    source: Source,
    program: Program,
    *,
    num_samples: int | None,
    num_warmup: int,
    thinning: int,
    seed: int,
) -> Draws:
    """Draw the latents of all data.

    Args:
        source: Whose posterior.
        program: Its model, with arguments.
        num_samples: Draws of each chain; None is 100, or all that an `MCMC` run has.
        num_warmup: Steps of particles before the first draw.
        thinning: Steps from one draw to the next, of particles and of `MCMC`.
        seed: Fixes the draws of guides without particles.

    Raises:
        ValueError: If a number is out of range, the `MCMC` run has too few draws or lacks latents,
            or the source is a guide of particles without the Saddle that moves them.
    """
    if isinstance(source, MCMC):
        return _mcmc_draws(source, program.latents, num_samples, thinning)
    num_samples = 100 if num_samples is None else num_samples
    guide = source.guide if isinstance(source, SVI) else source
    if isinstance(source, Saddle) and source.particles is not None:
        options = {"num_samples": num_samples, "num_warmup": num_warmup, "thinning": thinning}
        found = source.draw_posterior(*program.args, **options, **program.kwargs)
        held = {
            name: value[:, None].expand(-1, num_samples, *value.shape[1:])
            for name, value in found.held.items()
        }
        return Draws(found.samples | held, found.sample_stats, found.sites)
    if find_particles(guide) is not None:
        raise ValueError(
            "AutoParticles by itself cannot move its particles; pass the Saddle that trained it"
        )
    with program.at_rest(seed, Stream.EXPORT_GUIDE):
        program.trace(program.model)  # the guide draws on from where a run leaves the stream
        samples = draw_guide(program, guide, num_samples)
    return Draws({name: value[None] for name, value in samples.items()})


def _mcmc_draws(
    mcmc: MCMC, latents: dict[str, Node], num_samples: int | None, thinning: int
) -> Draws:
    check_at_least(1, thinning=thinning)
    found = mcmc.get_samples(group_by_chain=True)
    samples = {name: value[:, ::thinning] for name, value in found.items() if name in latents}
    if not samples:
        raise ValueError(f"the MCMC run has no draws of the latents {sorted(latents)}")
    chains, count = next(iter(samples.values())).shape[:2]
    num_samples = count if num_samples is None else num_samples
    if not 1 <= num_samples <= count:
        raise ValueError(
            f"num_samples must lie in 1 … {count}, the thinned draws of the MCMC run; got "
            f"{num_samples}"
        )
    for name, value in samples.items():
        fn = latents[name]["fn"]
        if value.shape[2:] != fn.batch_shape + fn.event_shape:
            raise ValueError(
                f"the MCMC run has draws of '{name}' of shape {tuple(value.shape[2:])}, and the "
                f"model has {tuple(fn.batch_shape + fn.event_shape)}; give the data of the run"
            )
    stats = {}
    diverging = mcmc.diagnostics().get("divergences")
    if diverging is not None:
        flags = torch.zeros(chains, found[next(iter(samples))].shape[1], dtype=torch.bool)
        for chain in range(chains):
            flags[chain, list(diverging[f"chain {chain}"])] = True
        stats["diverging"] = flags[:, ::thinning][:, -num_samples:]
    return Draws({name: value[:, -num_samples:] for name, value in samples.items()}, stats)
