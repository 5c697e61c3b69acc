# SPDX-License-Identifier: Apache-2.0
"""Posterior draws and ELBO tables for ArviZ: `InferenceData` before ArviZ 1, then `DataTree`."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.elbo_table import ElboTable
from pyro_lvebm.given_rows import GivenRows
from pyro_lvebm.rng import isolated_rng
from pyro_lvebm.saddle import Saddle
from pyro_lvebm.tracing import (
    Model,
    all_nodes,
    at_minibatch,
    cover,
    energy_modules,
    frozen,
    plate_nesting,
    sample_nodes,
    vectorise,
)

Groups = dict[str, dict[str, np.ndarray]]


def to_arviz(
    saddle: Saddle,
    *args: Any,
    num_samples: int = 100,
    num_warmup: int = 200,
    thinning: int = 1,
    num_predictive: int | None = None,
    table: ElboTable | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Export posterior draws at frozen θ to ArviZ; a chain is a particle, a draw a kept step.

    Groups: `posterior`; `sample_stats` with the energy −log p(x, z) and the acceptance rate of
    each datum's chains, or of all together where latents lie in different plates; `observed_data`;
    `posterior_predictive`, replicates of the observed sites given the last `num_predictive` draws
    of z; and, where a table is given, `elbo_table`, with the table's columns along the dimension
    `posterior` and the brackets of log Z. There is no `log_likelihood`: the log probability of an x
    site is not log p(x | z).

    Args:
        saddle: A trained Saddle with `AutoParticles`; unchanged.
        args: Arguments of the model.
        num_samples: Draws to keep of each particle.
        num_warmup: Steps before the first of them.
        thinning: Steps from one draw to the next.
        num_predictive: Draws of each particle that get a replicate, at most `num_samples`; as many
            as there are particles if None.
        table: What `compare_elbo` returned for the model.
        seed: Fixes the replicates.
        kwargs: Keyword arguments of the model.

    Returns:
        `arviz.InferenceData` for ArviZ 0.2x, `xarray.DataTree` for ArviZ ≥ 1.

    Raises:
        ValueError: If the guide has no `AutoParticles`, a number is out of range, or `table` is not
            an `ElboTable`.
    """
    if num_predictive is not None and not 1 <= num_predictive <= num_samples:
        raise ValueError(f"num_predictive must lie in 1 … {num_samples}; got {num_predictive}")
    if table is not None and not isinstance(table, ElboTable):
        raise ValueError(f"table must be an ElboTable, of compare_elbo; got {type(table).__name__}")
    draws = saddle.draw_posterior(
        *args, num_samples=num_samples, num_warmup=num_warmup, thinning=thinning, **kwargs
    )
    first = next(iter(draws.samples.values()))
    device = first.device
    if num_predictive is None:
        num_predictive = min(num_samples, len(first))
    with isolated_rng(seed, 30, device=device), poutine.block(), torch.no_grad():
        prototype = poutine.trace(GivenRows()(saddle.model)).get_trace(*args, **kwargs)
        with frozen(energy_modules(prototype)):
            last = {name: value[:, -num_predictive:] for name, value in draws.samples.items()}
            observed, predictive = _observed_sites(saddle.model, prototype, last, args, kwargs)
    groups = {
        "posterior": _to_numpy(draws.samples),
        "sample_stats": _to_numpy(draws.sample_stats),
        "observed_data": _to_numpy(observed),
        "posterior_predictive": _to_numpy(predictive),
    }
    attrs = {
        "inference_library": "pyro_lvebm",
        "inference_library_version": version("pyro-lvebm"),
        "num_training_steps": saddle.step_count,
    }
    idata = _build(groups, _dims(prototype, draws.samples), attrs)
    return idata if table is None else _with_table(idata, table)


def _observed_sites(
    model: Model,
    prototype: Trace,
    latents: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Observed values (N, …) of all data; replicates (K, S, N, …) given latents (K, S, N, …)."""
    nesting = plate_nesting(prototype)
    chains_draws = next(iter(latents.values())).shape[:2]
    blank = vectorise(poutine.uncondition(model), chains_draws.numel(), nesting)
    observed: dict[str, list[Tensor]] = {}
    replicates: dict[str, list[Tensor]] = {}
    axes: dict[str, int] = {}
    for batch in cover(prototype):
        nodes = dict(batch.nodes)
        for name, value in latents.items():
            node = all_nodes(prototype)[name]
            part = batch.take_rows(value, len(node["fn"].event_shape)).flatten(0, 1)
            ones = (1,) * (nesting - len(node["fn"].batch_shape))
            nodes[name] = {**node, "value": part.reshape(len(part), *ones, *part.shape[1:])}
        seen = poutine.trace(at_minibatch(model, batch.nodes)).get_trace(*args, **kwargs)
        drawn = poutine.trace(at_minibatch(blank, nodes)).get_trace(*args, **kwargs)
        for name, node in sample_nodes(seen).items():
            if not node["is_observed"]:
                continue
            event_dim = len(node["fn"].event_shape)
            shape = node["fn"].batch_shape + node["fn"].event_shape
            new = all_nodes(drawn)[name]["value"].reshape(*chains_draws, *shape)
            old = node["value"].expand(shape)
            if batch.plate in {frame.name for frame in node["cond_indep_stack"]}:
                new, old = batch.drop_repeats(new, event_dim), batch.drop_repeats(old, event_dim)
                axis = batch.dim - event_dim
            elif name in observed:
                continue  # outside the subsampled plate: the same in every minibatch
            else:
                axis = 0
            axes[name] = axis
            observed.setdefault(name, []).append(old)
            replicates.setdefault(name, []).append(new)
    return (
        {name: _join(parts, axes[name]) for name, parts in observed.items()},
        {name: _join(parts, axes[name]) for name, parts in replicates.items()},
    )


def _join(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _to_numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().cpu().numpy() for name, value in values.items()}


def _dims(prototype: Trace, particles: Collection[str]) -> dict[str, list[str]]:
    """Name the axes of each site after its plates, left to right, and its event axes after it."""
    dims: dict[str, list[str]] = {}
    latent: list[list[str]] = []
    for name, node in sample_nodes(prototype).items():
        frames = sorted(node["cond_indep_stack"], key=lambda frame: frame.dim)
        batch = [frame.name for frame in frames if frame.vectorized]
        if len(batch) == len(node["fn"].batch_shape):
            events = range(len(node["fn"].event_shape))
            dims[name] = batch + [f"{name}_dim_{axis}" for axis in events]
            if name in particles:
                latent.append(batch)
    # Latents in different plates have one energy and one rate together.
    same = all(batch == latent[0] for batch in latent)
    dims["energy"] = dims["acceptance_rate"] = latent[0] if same else []
    return dims


def _build(groups: Groups, dims: dict[str, list[str]], attrs: dict[str, Any]) -> Any:
    """Call `from_dict` as the installed generation of ArviZ has it."""
    # Imported here, for ArviZ 0.23 warns once a day on import, which would reach every user of
    # this package, also those who export nothing.
    import arviz as az

    from_dict: Any = az.from_dict  # takes other arguments from one generation to the next
    with warnings.catch_warnings():
        # Many particles and few draws of each are usual here, and no sign of swapped axes.
        warnings.filterwarnings("ignore", message="More chains")
        if int(az.__version__.split(".")[0]) >= 1:
            return from_dict(groups, dims=dims, attrs={"/": attrs})
        return from_dict(**groups, dims=dims, attrs=attrs)


def _with_table(idata: Any, table: ElboTable) -> Any:
    """Add the group `elbo_table`, which ArviZ 0.2x knows only as a group of one's own."""
    import xarray as xr

    brackets = ("estimate", "std_error", "lower", "upper")
    dataset = xr.Dataset(
        {name: ("posterior", column.to_numpy()) for name, column in table.rows.items()}
        | {
            f"log_partition_{name}": (
                "log_partition",
                np.array([getattr(log_z, name) for log_z in table.log_partitions]),
            )
            for name in brackets
        },
        coords={"posterior": [str(name) for name in table.rows.index]},
        attrs={
            "theta": table.theta,
            "num_data": table.num_data,
            "log_evidence": table.log_evidence,
            "log_evidence_se": table.log_evidence_se,
        },
    )
    if isinstance(idata, xr.DataTree):
        idata["elbo_table"] = xr.DataTree(dataset)
    else:
        idata.add_groups({"elbo_table": dataset}, warn_on_custom_groups=False)
    return idata
