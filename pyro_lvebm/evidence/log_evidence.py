# SPDX-License-Identifier: Apache-2.0
"""The log evidence log p_θ(x) of observations, by annealing their latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.bases import Completion
from pyro_lvebm.evidence.annealed import MAX_PARTICLES, anneal_latents
from pyro_lvebm.evidence.contexts import ConditionalLogPartition, conditional_log_partition
from pyro_lvebm.evidence.log_partition import (
    LogPartition,
    check_range,
    log_partition,
    warn_of_unreliable,
)
from pyro_lvebm.model import (
    LVEBM,
    Density,
    as_context_of_rows,
    context_rows,
    given_observed,
    given_x,
    log_base_of,
    residuals_given_observed,
    residuals_given_x,
)
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import Residuals, ValueAndGrad, log_mean_exp, log_mean_std_error
from pyro_lvebm.validation import as_rows


@dataclass(frozen=True)
class LogEvidence:
    """Estimates of log p(x_i) in nats, with the log Z they rest on."""

    value: Tensor  # (N,), log C(x) − log Z with the estimate of log Z
    std_error: Tensor  # (N,), Monte Carlo error of log C and log Z together
    log_partition: LogPartition  # with contexts, of the mean of log Z(c_i) over the rows
    log_z_margin: Tensor  # from the estimate of log Z to its upper end: (), or (N,) of log Z(c_i)

    @property
    def is_reliable(self) -> bool:
        """Whether the log Z that it rests on is."""
        return self.log_partition.is_reliable

    @property
    def lower(self) -> Tensor:
        """Log p(x) (N,) with the upper end of the log Z bracket: low in expectation."""
        return self.value - self.log_z_margin

    @property
    def mean(self) -> float:
        """Mean of `value` over the rows."""
        return float(self.value.double().mean())

    @property
    def mean_std_error(self) -> float:
        """Standard error of `mean` as an estimate for new data: over rows, and of log Z."""
        rows = float(self.value.double().std()) / math.sqrt(len(self.value))
        return math.hypot(rows, self.log_partition.std_error)

    def __str__(self) -> str:
        text = f"mean log p(x) = {self.mean:.4f} ± {self.mean_std_error:.4f} of {len(self.value)}"
        return f"{text} rows, with {self.log_partition}"


def log_evidence(
    ebm: LVEBM,
    x: Tensor | np.ndarray,
    *,
    context: Tensor | np.ndarray | None = None,
    seed: int = 0,
    num_particles: int = 32,
    num_runs: int = 8,
    num_moves: int = 2,
    relative_ess: float = 0.8,
    log_z: LogPartition | ConditionalLogPartition | None = None,
) -> LogEvidence:
    """Estimate log p(x_i) = log C(x_i) − log Z for every row.

        C(x) = ∫ base_x(x) base_z(z) exp(−f(x, z)) dz,    base_x(x | z) where it varies with z

    Entries of x that are NaN are missing: then x stands for the observed entries, and the others
    are integrated out together with z.

    z is annealed from base_z to p_θ(z | x) by sequential Monte Carlo, all rows side by side, with
    temperatures and step sizes fixed by a pilot run. Ĉ is unbiased, so log Ĉ is low in
    expectation, by about half its squared standard error.

    Args:
        ebm: The LVEBM; unchanged.
        x: Observations (N, *x_shape), finite or NaN where missing.
        context: Contexts (N, *context_shape) of a conditional LVEBM: what is estimated is then
            log p(x_i | c_i), and each row has a log Z(c_i) of its own.
        seed: Fixes every random number.
        num_particles: Particles of each run, for each row.
        num_runs: Independent runs for each row, at least 2; they give the standard error.
        num_moves: MALA steps at each temperature.
        relative_ess: Wanted ESS / n between temperatures in the pilot run, in (0, 1).
        log_z: A bracket of log Z; by default `log_partition(ebm, seed=seed)`, or with contexts
            `conditional_log_partition(ebm, context, seed=seed)`.

    Returns:
        Estimates and their standard errors, in nats.

    Raises:
        ValueError: If x is empty, infinite, of another shape or outside its support, a context is
            missing, given where there are none or of another shape, or a number is out of range.
        RuntimeError: If the energy is too rough for the pilot run.

    Warns:
        TrainingWarning: If the log Z that it rests on is not reliable.

    Source:
        Del Moral, Doucet and Jasra (2006), Sequential Monte Carlo samplers; docs/maths.md.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool, log_evidence
        >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
        >>> pool = TemperedPool(3, 32)
        >>> ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, pool=pool)
        >>> evidence = log_evidence(ebm, x[:5], seed=0)  # f = 0, so log p = log base_x
        >>> torch.allclose(evidence.value, ebm.base_x.log_prob(x[:5]))
        True
    """
    check_range(num_particles, num_runs, num_moves, relative_ess)
    x = as_rows(x, ebm.x_shape, like=ebm.base_x.loc, missing=True)
    ebm.base_x.support.check(x)
    context = None if context is None else as_context_of_rows(context, x)
    context_rows(context, ebm.context_shape)
    _check_log_z(log_z, context)
    if log_z is None:
        if context is None:
            log_z = log_partition(ebm, seed=seed)
        else:
            log_z = conditional_log_partition(ebm, context, seed=seed)
    values, errors = [], []
    rows = max(1, MAX_PARTICLES // (num_particles * num_runs))
    with ebm.frozen(), torch.no_grad():
        for chunk, part in enumerate(x.split(rows)):
            given = None if context is None else context.split(rows)[chunk][:, None]
            f, r, dim, log_base = latent_energy(ebm.given(given), part)
            log_c = anneal_latents(
                f,
                (len(part), num_particles, dim),
                part,
                num_runs=num_runs,
                num_moves=num_moves,
                relative_ess=relative_ess,
                residuals=r,
                generator=generator_for(seed, Stream.LOG_EVIDENCE, chunk, device=x.device),
            )
            values.append(log_mean_exp(log_c, 0) + log_base)
            errors.append(log_mean_std_error(log_c, 0))
    value = torch.cat(values) - log_z.estimate
    error = torch.hypot(torch.cat(errors), torch.as_tensor(log_z.std_error).to(value))
    bracket = log_z if isinstance(log_z, LogPartition) else log_z.mean()
    warn_of_unreliable([bracket])
    return LogEvidence(
        value, error, bracket, torch.as_tensor(log_z.upper - log_z.estimate).to(value)
    )


def _check_log_z(
    log_z: LogPartition | ConditionalLogPartition | None, context: Tensor | None
) -> None:
    if log_z is None:
        return
    if context is None and not isinstance(log_z, LogPartition):
        raise ValueError("log_z is one of contexts, and there are none; give log_partition(ebm)")
    if context is not None and (
        isinstance(log_z, LogPartition) or len(log_z.estimate) != len(context)
    ):
        raise ValueError(
            f"log_z must be a bracket of the {len(context)} contexts; give "
            "conditional_log_partition(ebm, context)"
        )


def latent_energy(
    density: Density, x: Tensor
) -> tuple[ValueAndGrad, Residuals | None, int, Tensor]:
    """Return the energy f of the latents of rows x, its r, their number, and log base_x(x_o) (N,).

    The latents of a row are whitened z and, after them, what stands for its missing entries.

    Args:
        density: The density, at contexts if there are some.
        x: Observations (N, *x_shape), NaN where missing.
    """
    observed = ~x.isnan()
    columns = torch.nonzero(~observed.flatten(1).all(0)).flatten()
    if not len(columns):
        w_x = density.base_x.whiten(x)[:, None]
        f, r = given_x(density, w_x), residuals_given_x(density, w_x)
        return f, r, density.base_z.dim, log_base_of(density, x)
    completion = Completion(density.base_x, x[:, None], observed[:, None])
    f = given_observed(density, completion, columns)
    r = residuals_given_observed(density, completion, columns)
    return f, r, density.base_z.dim + len(columns), completion.log_base()[:, 0]
