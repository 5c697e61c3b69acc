# SPDX-License-Identifier: Apache-2.0
"""Draws of the missing entries of x given the others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.bases import Completion, observed_entries
from pyro_lvebm.model.conditionals import (
    given_observed,
    residuals_given_observed,
)
from pyro_lvebm.model.contexts import as_context_of_rows, context_rows
from pyro_lvebm.model.density import Density
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import anneal_problems, pick_draws
from pyro_lvebm.validation import as_rows, check_at_least

_NUM_PARTICLES = 256

_MAX_PROBLEMS = 256
"""Draws that are annealed side by side, which bounds the memory."""


def impute(
    density: Density,
    x: Tensor | np.ndarray,
    observed: Tensor | None,
    context: Tensor | np.ndarray | None,
    *,
    num_samples: int,
    seed: int,
) -> Tensor:
    """Draw the missing entries of x; `LVEBM.impute` says how."""
    x = as_rows(x, density.x_shape, like=density.base_x.loc, missing=True)
    check_at_least(1, num_samples=num_samples)
    observed = observed_entries(x, observed, density.x_shape)
    density.base_x.support.check(x, observed)
    context = None if context is None else as_context_of_rows(context, x)
    context_rows(context, density.context_shape)
    columns = torch.nonzero(~observed.flatten(1).all(0)).flatten()
    if not len(columns):
        raise ValueError("nothing is missing: every entry of x is observed")
    generator = generator_for(seed, Stream.IMPUTATION, device=x.device)
    draws = []
    for index in torch.arange(num_samples * len(x), device=x.device).split(_MAX_PROBLEMS):
        rows = index % len(x)
        at_rows = density.given(None if context is None else context[rows, None])
        draws.append(_complete(at_rows, x[rows], observed[rows], columns, generator))
    return torch.cat(draws).reshape(num_samples, *x.shape)


def _complete(
    density: Density,
    x: Tensor,
    observed: Tensor,
    columns: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Complete every row (n, *x_shape) once, by a run of its own."""
    completion = Completion(density.base_x, x[:, None], observed[:, None])
    k = density.base_z.dim
    shape = (len(x), _NUM_PARTICLES, k + len(columns))
    with density.frozen(), torch.no_grad():
        f = given_observed(density, completion, columns)
        r = residuals_given_observed(density, completion, columns)
        state = anneal_problems(f, r, shape, x, generator=generator).state
    v = x.new_zeros(len(x), 1, completion.dim)
    v[..., columns] = pick_draws(state, generator)[0][:, None, k:]
    values = density.base_x.support.constrain(completion.unwhiten(v))
    return completion.complete(values)[:, 0]
