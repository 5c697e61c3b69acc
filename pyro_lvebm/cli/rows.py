# SPDX-License-Identifier: Apache-2.0
"""What a model says of every row: log p(x), its standard error, and the posterior of z."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.data import Split
from pyro_lvebm.evidence import LogEvidence, latent_energy, log_evidence
from pyro_lvebm.model import LVEBM
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.sampling import anneal_problems

if TYPE_CHECKING:
    import pandas as pd

_PARTICLES = 64
"""Particles that stand for p(z | x)."""

_CHUNK = 512
"""Rows that are annealed side by side, which bounds the memory."""


def row_frame(
    ebm: LVEBM, data: Split, evidence: LogEvidence, dtype: torch.dtype, seed: int
) -> pd.DataFrame:
    """Return a table of all rows in the order of the file.

    Args:
        ebm: The LVEBM.
        data: All rows, and which are for what.
        evidence: Of the held-out rows, whose log Z serves the others.
        dtype: That of the LVEBM.
        seed: Fixes every random number.

    Returns:
        Columns `row` (number in the file, from 1), `label` where rows have one, `part`, `log_p` and
        `std_error` in nats, and mean and standard deviation of every entry of z given x.
    """
    parts = [("train", data.train_rows), ("held-out", data.held_out_rows)]
    if data.validation_rows is not None:
        parts.append(("validation", data.validation_rows))
    part = np.empty(len(data.table), dtype=object)
    for name, rows in parts:
        part[rows] = name
    log_p, error = np.empty(len(part)), np.empty(len(part))
    log_p[data.held_out_rows] = evidence.value.numpy()
    error[data.held_out_rows] = evidence.std_error.numpy()
    others = np.flatnonzero(part != "held-out")
    x = torch.as_tensor(data.table.values, dtype=dtype)
    rest = log_evidence(ebm, x[others], seed=seed, log_z=evidence.log_partition)
    log_p[others], error[others] = rest.value.numpy(), rest.std_error.numpy()
    frame = scored_frame(data.table.rows, data.table.labels, log_p, error, latents(ebm, x, seed))
    frame.insert(1 if data.table.labels is None else 2, "part", part)
    return frame.sort_values("row", ignore_index=True)


class Latents(NamedTuple):
    """Moments of p(z | x), of every row."""

    mean: Tensor  # (N, k)
    std: Tensor  # (N, k)


def scored_frame(
    rows: np.ndarray,
    labels: tuple[str, ...] | None,
    log_p: np.ndarray,
    std_error: np.ndarray,
    z: Latents,
) -> pd.DataFrame:
    """Return rows with log p(x) (N,), its standard error (N,) and what is known of z."""
    import pandas as pd

    columns: dict[str, object] = {"row": rows}
    if labels is not None:
        columns["label"] = list(labels)
    columns |= {"log_p": log_p, "std_error": std_error}
    for k in range(z.mean.shape[1]):
        columns[f"z[{k}]"] = z.mean[:, k].numpy()
        columns[f"z[{k}]_std"] = z.std[:, k].numpy()
    return pd.DataFrame(columns)


def latents(ebm: LVEBM, x: Tensor, seed: int) -> Latents:
    """Return mean and standard deviation of z given rows x (N, *x_shape), NaN where missing.

    The particles of one annealing run for each row, in which missing entries are integrated out.
    """
    means, variances = [], []
    with ebm.frozen(), torch.no_grad():
        for chunk, part in enumerate(x.split(_CHUNK)):
            generator = generator_for(seed, Stream.FIGURE, "rows", chunk, device=x.device)
            f, r, dim, _ = latent_energy(ebm, part)
            shape = (len(part), _PARTICLES, dim)
            found = anneal_problems(f, r, shape, x, generator=generator).state
            z = ebm.base_z.unwhiten(found.u[0, ..., : ebm.base_z.dim]).flatten(2)
            mean = z.mean(1)
            means.append(mean)
            variances.append((z - mean[:, None]).square().mean(1))
    return Latents(torch.cat(means), torch.cat(variances).sqrt())
