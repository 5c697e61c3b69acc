# SPDX-License-Identifier: Apache-2.0
"""Posteriors and ELBO tables for ArviZ: `InferenceData` before ArviZ 1, then `DataTree`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from pyro_lvebm.comparison import ElboTable
from pyro_lvebm.evidence import marginal_likelihood, row_log_z, total, warn_of_unreliable
from pyro_lvebm.export.draws import Draws, Source, model_of, posterior_of
from pyro_lvebm.export.groups import SAMPLE_DIMS, Axes, as_arviz, table_dataset
from pyro_lvebm.latents import Program, Sweep, observed_values, posterior_replicates, prior_draws
from pyro_lvebm.rng import Stream, derive_seed
from pyro_lvebm.sites import Model, Node, ObservedSite
from pyro_lvebm.training import Saddle


def to_arviz(
    source: Source | ElboTable,
    *args: Any,
    model: Model | None = None,
    num_samples: int | None = None,
    num_warmup: int = 200,
    thinning: int = 1,
    num_predictive: int | None = None,
    num_prior: int = 0,
    num_log_likelihood: int = 0,
    table: ElboTable | None = None,
    coords: Mapping[str, Sequence[Any] | np.ndarray] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    """Export a posterior at frozen θ to ArviZ.

    | Group | What it is |
    |---|---|
    | `posterior` | draws of the latents of all data |
    | `sample_stats` | of particles: energy, acceptance, step size; `log_partition` of the pool |
    | `posterior_predictive` | replicates of the observed sites given the last draws |
    | `prior`, `prior_predictive` | joint draws of the model without data, from the pool |
    | `log_likelihood` | log p(x_i), in nats |
    | `observed_data` | values of the observed sites, NaN where missing, if no latent moves them |
    | `constant_data` | numbers among the arguments of the model that are no observed data |
    | `elbo_table` | the table's columns, and the brackets of log Z |

    Of a `Saddle` with `AutoParticles` a chain is a particle, and a draw a kept step with θ at rest;
    a guide gives one chain of independent draws of its own law. The log likelihood is marginal in
    the latents of a datum, and never the log probability of an x site,

        log p_θ(x_i | w_s) = log ∫ p_θ(x_i, z_i | w_s) dz_i

    with w the latents in no plate. docs/estimators.md says what each means, and what `az.loo` does.

    Args:
        source: A `Saddle` or other `SVI`, a trained guide, `MCMC` that has run, or an `ElboTable`
            for its group alone. Unchanged.
        args: Arguments of the model.
        model: The Pyro model, where the source does not know it; for a guide made of a part of a
            model, such as `poutine.block(...)`, the whole.
        num_samples: Draws of each chain; 100 if None, and all of `MCMC`.
        num_warmup: Steps of particles before the first of them.
        thinning: Steps from one draw to the next.
        num_predictive: Draws of each chain that get a replicate, at most `num_samples`; 0 for
            none, and as many as there are chains if None. Each x given z is annealed.
        num_prior: Joint draws of the model, each with as many rows as the data.
        num_log_likelihood: Draws of each chain, the last ones, that get a log likelihood. Each
            costs an annealing run of 64 particles for each datum, and log Z some seconds.
        table: What `compare_elbo` returned for the model.
        coords: Labels of axes by name; a plate names its axis.
        dims: For a variable, names of its last axes.
        seed: Fixes all draws but those of particles, which the Saddle's seed fixes.
        kwargs: Keyword arguments of the model.

    Returns:
        `arviz.InferenceData` for ArviZ 0.2x, `xarray.DataTree` for ArviZ ≥ 1, of the same groups.

    Raises:
        ValueError: If the source has no model, or particles and no Saddle; if a number is out of
            range, a name in coords or dims belongs to nothing or has another length, or `table` is
            not an `ElboTable`; if a log likelihood is asked of a model without data in plates.

    Source:
        Vehtari, Gelman and Gabry (2017), Practical Bayesian model evaluation using leave-one-out
        cross-validation and WAIC, section 2 (PSIS-LOO of pointwise log likelihoods).

    Example:
        >>> import pyro, torch
        >>> from pyro.optim import Adam
        >>> from pyro_lvebm import LVEBM, AutoParticles, QuadraticEnergy, Saddle, lvebm, to_arviz
        >>> x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), x, z_dim=2)
        >>> def scenes(x):
        ...     with pyro.plate("data", len(x)):
        ...         lvebm("scene", ebm, obs=x)
        >>> saddle = Saddle(scenes, AutoParticles(scenes), Adam({"lr": 1e-3}))
        >>> idata = to_arviz(saddle, x, num_samples=20, dims={"scene_z": ["factor"]})
        >>> dict(idata["posterior"]["scene_z"].sizes)
        {'chain': 4, 'draw': 20, 'data': 8, 'factor': 2}
    """
    if isinstance(source, ElboTable):
        return as_arviz({"elbo_table": table_dataset(source)}, _attributes())
    if table is not None and not isinstance(table, ElboTable):
        raise ValueError(f"table must be an ElboTable, of compare_elbo; got {type(table).__name__}")
    program, seed = Program(model_of(source, model), args, kwargs), derive_seed(seed, Stream.EXPORT)
    with program.quiet(seed, Stream.EXPORT_PROTOTYPE):
        nodes = program.sites
    draws = posterior_of(
        source,
        program,
        num_samples=num_samples,
        num_warmup=num_warmup,
        thinning=thinning,
        seed=seed,
    )
    chains, count = draws.shape
    if num_predictive is None:
        num_predictive = min(count, chains)
    for name, value, most in (
        ("num_predictive", num_predictive, count),
        ("num_prior", num_prior, None),
        ("num_log_likelihood", num_log_likelihood, count),
    ):
        if value < 0 or (most is not None and value > most):
            limit = "be at least 0" if most is None else f"lie in 0 … {most}"
            raise ValueError(f"{name} must {limit}; got {value}")
    axes = Axes(dims or {}, coords or {})
    stats = draws.sample_stats | _log_partitions(nodes, draws.shape)
    sites = nodes | {name: nodes[site] for name, site in draws.sites.items()}
    groups = {
        "posterior": axes.dataset(draws.samples, sites, SAMPLE_DIMS),
        "sample_stats": axes.dataset(stats, sites, SAMPLE_DIMS),
    }
    with program.at_rest(seed, Stream.EXPORT_REPLICATES):
        if num_predictive:
            last = {name: _last(value, num_predictive) for name, value in draws.samples.items()}
            flat = posterior_replicates(program, last)
            replicates = {
                n: v.reshape(chains, num_predictive, *v.shape[1:]) for n, v in flat.items()
            }
            groups["posterior_predictive"] = axes.dataset(replicates, sites, SAMPLE_DIMS)
        if num_prior:
            latent, seen = prior_draws(program, num_prior)
            for group, values in (("prior", latent), ("prior_predictive", seen)):
                one_chain = {name: value[None] for name, value in values.items()}
                groups[group] = axes.dataset(one_chain, sites, SAMPLE_DIMS)
        if num_log_likelihood:
            sweep = Sweep(program, seed)
            groups["log_likelihood"] = _log_likelihood(sweep, draws, num_log_likelihood, axes)
        observed = observed_values(program)
    constant = _constants(program, observed)
    if observed:
        groups["observed_data"] = axes.dataset(observed, sites)
    if constant:
        groups["constant_data"] = axes.dataset(constant, {})
    axes.check_used()
    if table is not None:
        groups["elbo_table"] = table_dataset(table)
    steps = {"num_training_steps": source.step_count} if isinstance(source, Saddle) else {}
    return as_arviz(groups, _attributes() | steps)


def _attributes() -> dict[str, Any]:
    return {
        "inference_library": "pyro_lvebm",
        "inference_library_version": version("pyro-lvebm"),
    }


def _last(value: Tensor, count: int) -> Tensor:
    """The last draws of every chain, chain after chain, (chains · count, …)."""
    return value[:, -count:].flatten(0, 1)


def _log_partitions(nodes: dict[str, Node], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return log Z of the pool of each LVEBM; names of all but the first end in `@<site>`."""
    found: dict[int, tuple[str, float]] = {}
    for name, node in nodes.items():
        if isinstance(node["fn"], ObservedSite):
            suffix = f"@{name}" if found else ""
            value = float(node["fn"].ebm.log_partition)
            found.setdefault(id(node["fn"].ebm), (f"log_partition{suffix}", value))
    return {name: np.broadcast_to(value, shape) for name, value in found.values()}


def _log_likelihood(sweep: Sweep, draws: Draws, count: int, axes: Axes) -> Any:
    chains, _ = draws.shape
    last = {name: _last(value, value.shape[1]) for name, value in draws.samples.items()}
    given = {name: _last(value, count) for name, value in draws.samples.items()}
    found = marginal_likelihood(sweep, last, given, chains * count)
    rows = [row_log_z(sweep, ebm) for ebm in sweep.program.ebms]
    log_zs = [row.bracket for row in rows]
    warn_of_unreliable(log_zs)
    log_z, value = total(log_zs), found.value
    for row in rows:
        value = value + row.correction
    name = "+".join(found.sites)
    dataset = axes.dataset(
        {name: value.reshape(chains, count, *value.shape[1:])},
        {name: sweep.program.sites[found.owner]},
        SAMPLE_DIMS,
    )
    ends = {f"log_partition_{end}": getattr(log_z, end) for end in ("lower", "upper", "std_error")}
    return dataset.assign_attrs(log_partition=log_z.estimate, **ends)


def _constants(program: Program, observed: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Numbers among the arguments of a model, by name, that are not all of an observed site."""
    bare = unwrap(program.model)
    try:
        takes = inspect.signature(bare.forward if isinstance(bare, nn.Module) else bare)
        given = takes.bind(*program.args, **program.kwargs).arguments
    except (TypeError, ValueError):  # a callable that does not say what it takes
        return {}
    data = [value.detach().cpu().numpy() for value in observed.values()]
    found = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, bool | int | float | np.ndarray):
            array = np.asarray(value)
            if not any(_equal(array, seen) for seen in data):
                found[name] = array
    return found


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
