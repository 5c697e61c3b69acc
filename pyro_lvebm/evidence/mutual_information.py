# SPDX-License-Identifier: Apache-2.0
"""How much the latents carry: the mutual information of x and z under the posterior."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.bases import Completion
from pyro_lvebm.evidence.annealed import fit_gaussian
from pyro_lvebm.latents import Program, Sweep, as_problems, latent_blocks, residuals_of_problems
from pyro_lvebm.model import (
    LVEBM,
    as_context_of_rows,
    context_rows,
    given_x,
    residuals_given_x,
)
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import Residuals, ValueAndGrad, anneal_problems, log_mean_exp
from pyro_lvebm.sites import Model, subsample_nodes
from pyro_lvebm.validation import as_rows, check_at_least

_ACTIVE = 0.01
"""Variance of posterior means, in units of base_z, from which a dimension counts as active."""

_MAX_EVALUATIONS = 2**17

MAX_ROWS = 1024
"""Rows whose pairs can be compared."""

_LEFT = 0.1
"""Share of high − low that the middle may be off, as measured: see docs/estimators.md."""

_FEW_ROWS = 0.5
"""Nats between low and high from which more rows are worth their time."""

LITTLE = 0.1
"""Nats below which guides have next to nothing to lose."""


@dataclass(frozen=True)
class Effort:
    """How much work an estimate is given.

    Args:
        num_rows: Rows that are taken, at random where there are more.
        num_draws: Draws of each posterior.
        num_runs: Annealing runs for each row, two or more.
        num_particles: Particles of a run.
    """

    num_rows: int
    num_draws: int = 16
    num_runs: int = 4
    num_particles: int = 64


@runtime_checkable
class FittedModel(Protocol):
    """A Pyro model with parameters to evaluate it at, as a `Saddle` has them."""

    model: Model

    def averaged(self) -> AbstractContextManager[None]:
        """Give the model the parameters to evaluate, inside the block."""


@dataclass(frozen=True)
class MutualInformation:
    """I(x; z) = E KL(p(z | x) ‖ p̄(z)) of rows, in nats.

    Attributes:
        value: The middle of `low` and `high`, in which most of both errors cancels.
        std_error: Standard error of `value` over rows, with a tenth of `high` − `low` for what does
            not cancel.
        low: The mean over rows, p̄ being the mean of the posteriors of these rows: at most log N,
            and for new rows of the same kind low in expectation.
        high: The same with each row left out of its own p̄: high in expectation.
        num_rows: N.
        active_dimensions: Principal axes of the posterior means, in units of base_z, along which
            their variance is above 0.01.
    """

    value: float
    std_error: float
    low: float
    high: float
    num_rows: int
    active_dimensions: int

    @property
    def interval(self) -> tuple[float, float]:
        """`value` less and plus two standard errors, from 0 on."""
        margin = 2.0 * self.std_error
        return max(0.0, self.value - margin), max(0.0, self.value + margin)

    def __str__(self) -> str:
        low, high = self.interval
        text = f"I(x; z) = {self.value:.3f} ± {self.std_error:.3f} nats in [{low:.3f}, {high:.3f}]"
        text += f" of {self.num_rows} rows, {self.active_dimensions} active dimensions"
        if self.high - self.low > _FEW_ROWS:
            text += (
                f"; low {self.low:.2f}, at most log N = {math.log(self.num_rows):.2f}, and high "
                f"{self.high:.2f} meet where there are more rows"
            )
        return text


def mutual_information(
    ebm: LVEBM | FittedModel,
    x: Tensor | np.ndarray,
    *,
    context: Tensor | np.ndarray | None = None,
    num_rows: int = 256,
    num_draws: int = 16,
    seed: int = 0,
) -> MutualInformation:
    """Estimate how much z tells of x: the distance of posteriors from their mean, in nats.

        I(x; z) = 1/N Σ_i E_{p(z | x_i)}[log p(z | x_i) − log p̄(z)],    p̄ = 1/N Σ_k p(z | x_k)

    Draws and normalisers of each p(z | x_i) come from annealing; each density is evaluated at all
    draws of all rows. With the row itself in p̄ the estimate is low in expectation, without it
    high; a share 1 / √N of p̄ is then a Gaussian of all draws, which bounds the estimate where a
    posterior has no neighbours. To second order both errors are χ² / 2N, χ² = E ∫ p(z | x)² / p̄(z)
    dz − 1, and cancel in the middle. Where it is near 0 the posterior is the prior, every guide is
    exact, and a comparison of guides says nothing.

    Args:
        ebm: The LVEBM, or a `Saddle` that has taken a step: its model is then taken at its averaged
            parameters and, with x and the context as its arguments, with all that it observes; rows
            are those of a minibatch. It is unchanged.
        x: Observations (N, *x_shape), complete.
        context: Contexts (N, *context_shape) of a conditional LVEBM; it is then I(x, c; z).
        num_rows: Rows that are taken, at random where there are more.
        num_draws: Draws of each posterior.
        seed: Fixes every random number.

    Raises:
        ValueError: If `ebm` is none, entries of x are missing, x or context has another shape, or
            there are fewer than two rows; if the latents of a datum in the model of a `Saddle` do
            not lie in the same plates.
        RuntimeError: If the energy is too rough for annealing.

    Source:
        Poole et al. (2019), On variational bounds of mutual information, sections 2.1 and 2.3;
        Burda, Grosse and Salakhutdinov (2016), Importance weighted autoencoders (active units).

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool, mutual_information
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, pool=TemperedPool(3, 8))
        >>> abs(mutual_information(ebm, x).value) < 0.01  # f = 0: the posterior is the prior
        True
    """
    check_at_least(2, num_rows=num_rows)
    check_at_least(1, num_draws=num_draws)
    effort = Effort(num_rows, num_draws)
    if isinstance(ebm, FittedModel):
        return _of_fitted(ebm, (x,) if context is None else (x, context), effort, seed)
    if not isinstance(ebm, LVEBM):
        raise ValueError(f"mutual_information needs an LVEBM; got {type(ebm).__name__}")
    x = as_rows(x, ebm.x_shape, like=ebm.base_x.loc)
    ebm.base_x.support.check(x)
    context = None if context is None else as_context_of_rows(context, x)
    context_rows(context, ebm.context_shape)
    check_at_least(2, rows_of_x=len(x))
    generator = generator_for(seed, Stream.MUTUAL_INFORMATION, device=x.device)
    if len(x) > num_rows:
        rows = torch.randperm(len(x), generator=generator, device=x.device)[:num_rows]
        x = x[rows]
        context = None if context is None else context[rows]
    with ebm.frozen(), torch.no_grad():
        at = ebm.given(None if context is None else context[:, None])
        w_x = ebm.base_x.whiten(x)[:, None]
        shape = (len(x), effort.num_particles, ebm.base_z.dim)
        problem = (given_x(at, w_x), residuals_given_x(at, w_x))
        return _estimate(*problem, shape, x, effort, generator)


def _of_fitted(
    fitted: FittedModel, args: tuple[Any, ...], effort: Effort, seed: int
) -> MutualInformation:
    """I(x; z) of the model of a `Saddle` at its averaged parameters."""
    sweep = Sweep(Program(fitted.model, args, {}), seed)
    with fitted.averaged(), sweep.program.at_rest(seed, Stream.CARRIED):
        found = mutual_information_of(sweep, effort)
    if found is None:
        raise ValueError(
            "mutual_information of a model needs data whose latents all lie in the same plates, at "
            f"least two and at most {MAX_ROWS} in a minibatch, and complete x"
        )
    return found


def mutual_information_of(
    sweep: Sweep, effort: Effort = Effort(MAX_ROWS)
) -> MutualInformation | None:
    """Estimate I(x; z) of a model, for the latents of each datum of one random minibatch.

    Args:
        sweep: The model and its data, with θ frozen; its seed fixes the random numbers.
        effort: How much work to do; all rows are taken where an LVEBM does not stand alone.

    Returns:
        The estimate; None where the latents of a datum are not one block, entries of x are missing,
        there are fewer than two rows, or more than pairs of them can be compared.
    """
    program = sweep.program
    if not program.integrated():
        return None
    # The minibatch of the prototype is random: the first rows may all be of one class.
    minibatch = program.vectorised(program.probe, 1, dict(subsample_nodes(program.prototype)))
    trace = program.trace(minibatch)
    blocks, _ = latent_blocks(program, program.probe, trace)
    block = blocks[0]
    batch = block.v.shape[1:-1]
    whole = len(blocks) == 1 and not block.is_global and not block.rows
    incomplete = any(isinstance(column.gaussian, Completion) for column in block.columns)
    if not whole or incomplete or batch.numel() < 2:
        return None
    generator = generator_for(
        sweep.seed, Stream.MUTUAL_INFORMATION, "program", device=block.v.device
    )
    f, r = block.f, block.residuals
    if block.of_rows is not None and batch.numel() > effort.num_rows:
        order = torch.randperm(batch.numel(), generator=generator, device=block.v.device)
        batch = torch.Size([effort.num_rows])
        f, r = block.of_rows(order[: effort.num_rows])
    if batch.numel() > MAX_ROWS:
        return None
    r = None if r is None else residuals_of_problems(r, batch)
    shape = (batch.numel(), effort.num_particles, block.v.shape[-1])
    return _estimate(as_problems(f, batch), r, shape, block.v, effort, generator)


def _estimate(
    f: ValueAndGrad,
    r: Residuals | None,
    shape: tuple[int, int, int],
    like: Tensor,
    effort: Effort,
    generator: torch.Generator,
) -> MutualInformation:
    """The estimate for rows whose latents have energies f, and r, on v (runs, N, particles, k)."""
    draws, log_c, means = _posteriors(f, r, shape, like, effort, generator)
    n = shape[0]
    log_density = _log_densities(f, draws, log_c)  # (N rows k, N, S)
    own = log_density.diagonal(dim1=0, dim2=1).T  # (N, S)
    inside = own - log_mean_exp(log_density, 0)
    itself = torch.eye(n, dtype=torch.bool, device=like.device)[..., None]
    others = log_density.masked_fill(itself, -torch.inf).logsumexp(0) - math.log(n - 1)
    # Far from all others a leave-one-out mean is as good as zero; a Gaussian is not.
    share = 1.0 / math.sqrt(n)
    wide = _log_gaussian(draws.double()) + math.log(share)
    outside = own - torch.logaddexp(others + math.log1p(-share), wide)
    # The Gaussian has seen the row's own draws, so that without information high is a hair low.
    low = float(inside.mean())
    high = max(low, float(outside.mean()))
    middle = 0.5 * (inside + outside).mean(1)
    return MutualInformation(
        0.5 * (low + high),
        math.hypot(float(middle.std()) / math.sqrt(n), _LEFT * (high - low)),
        low,
        high,
        n,
        _active_dimensions(means.double()),
    )


def _log_gaussian(draws: Tensor) -> Tensor:
    """Log density (N, S) of the Gaussian fitted to all draws (N, S, k), relative to N(0, I)."""
    mean, tril = fit_gaussian(draws.flatten(0, 1))
    y: Tensor = torch.linalg.solve_triangular(tril, (draws - mean).flatten(0, 1).T, upper=False).T
    inner: Tensor = y.square().sum(-1).reshape(draws.shape[:-1])
    return 0.5 * (draws.square().sum(-1) - inner) - tril.diagonal().log().sum()


def _posteriors(
    f: ValueAndGrad,
    r: Residuals | None,
    shape: tuple[int, int, int],
    like: Tensor,
    effort: Effort,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws v (N, S, k) of each posterior, log C (N,), its normaliser, and means (N, runs, k).

    Normalisers are relative to N(0, I); each mean is that of one of the independent runs.
    """
    found = anneal_problems(f, r, shape, like, num_runs=effort.num_runs, generator=generator)
    # A run counts by its weight, so that draws have the law of the posterior.
    run = torch.multinomial(
        torch.softmax(found.log_ratio, 0).T,
        effort.num_draws,
        replacement=True,
        generator=generator,
    )
    particle = torch.randint(shape[1], run.shape, generator=generator, device=like.device)
    rows = torch.arange(shape[0], device=like.device)[:, None]
    means = found.state.u.mean(2).transpose(0, 1)
    return found.state.u[run, rows, particle], log_mean_exp(found.log_ratio, 0), means


def _log_densities(f: ValueAndGrad, draws: Tensor, log_c: Tensor) -> Tensor:
    """Log p(v | x_k) / N(v; 0, I) at draws (N, S, k) of all rows, (N rows k, N, S), in float64."""
    n, count, k = draws.shape
    step = max(1, _MAX_EVALUATIONS // n)
    parts = [
        -f(part.expand(1, n, -1, -1))[0][0] - log_c[:, None]
        for part in draws.reshape(n * count, k).split(step)
    ]
    return torch.cat(parts, 1).reshape(n, n, count).double()


def _active_dimensions(means: Tensor) -> int:
    """Axes along which means (N, runs, k) of posteriors have a noticeable variance over rows.

    Means of finitely many particles vary without any help from x. Runs are independent, so what
    they have in common has none of that noise.
    """
    n, runs, _ = means.shape
    centred = means - means.mean((0, 1))
    both = torch.einsum("nri,nsj->ij", centred, centred)
    same = torch.einsum("nri,nrj->ij", centred, centred)
    covariance = (both - same) / (n * runs * (runs - 1))
    return int((torch.linalg.eigvalsh(covariance) > _ACTIVE).sum())
