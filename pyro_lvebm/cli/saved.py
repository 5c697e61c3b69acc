# SPDX-License-Identifier: Apache-2.0
"""What a saved model can do without its training data: score rows, draw rows, fill in rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_lvebm.cli.rows import latents, scored_frame
from pyro_lvebm.data import Table, transforms
from pyro_lvebm.evidence import log_evidence
from pyro_lvebm.model import LVEBM, Description, read_lvebm
from pyro_lvebm.rng import Stream, generator_for

if TYPE_CHECKING:
    import pandas as pd


class Saved(NamedTuple):
    """A model from a file."""

    ebm: LVEBM
    description: Description

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the entries of x."""
        count = self.ebm.x_shape.numel()
        return self.description.columns or tuple(f"x[{k}]" for k in range(count))

    def unknown(self, table: Table) -> list[str]:
        """Names of the columns that the model leaves out of a table that has all of its own."""
        if not set(self.names) <= set(table.names):
            return []
        return [name for name in table.names if name not in self.names]


def load_model(path: Path) -> Saved:
    """Return the model in a folder of `LVEBM.save`, or in the output folder of a fit.

    Raises:
        ValueError: If there is none, or it is conditional.
    """
    if not (path / "model.json").exists() and (path / "model").is_dir():
        path = path / "model"
    _, description = read_lvebm(path)
    ebm = LVEBM.load(path)
    if ebm.context_shape is not None:
        raise ValueError(
            f"the model in {path} is conditional, and a table has no contexts; load it by "
            "LVEBM.load, and save ebm.at(context)"
        )
    return Saved(ebm, description)


def score(saved: Saved, table: Table, seed: int) -> pd.DataFrame:
    """Return log p(x) of rows, with standard errors, and the posterior of z; see `row_frame`."""
    table, x = _rows(saved, table, seed)
    found = log_evidence(saved.ebm, x, seed=seed)
    z = latents(saved.ebm, x, seed)
    return scored_frame(table.rows, table.labels, found.value.numpy(), found.std_error.numpy(), z)


def sample(saved: Saved, num_rows: int, seed: int) -> pd.DataFrame:
    """Return rows drawn from the model, in the units of its training data.

    Raises:
        ValueError: If `num_rows` is less than 1.
    """
    import pandas as pd

    if num_rows < 1:
        raise ValueError(f"the number of rows must be at least 1; got {num_rows}")
    ebm = saved.ebm
    generator = generator_for(seed, Stream.FIGURE, "sample")
    with ebm.frozen(), torch.no_grad():
        u = ebm.pool.draw(ebm, num_rows, num_moves=50, generator=generator)
        with torch.no_grad():
            x, _ = ebm.unwhiten(u)
    values = x.reshape(num_rows, -1).double().numpy()
    return pd.DataFrame(
        transforms.undo(saved.description.transforms, values, saved.names), columns=saved.names
    )


def impute(saved: Saved, table: Table, num_samples: int, seed: int) -> pd.DataFrame:
    """Return rows with their missing entries drawn from the model, `num_samples` times each.

    Raises:
        ValueError: If nothing is missing, or `num_samples` is less than 1.
    """
    import pandas as pd

    table, x = _rows(saved, table, seed)
    ebm, frames = saved.ebm, []
    drawn = ebm.impute(x, num_samples=num_samples, seed=seed)
    missing = np.isnan(table.values)
    for number, values in enumerate(drawn.reshape(num_samples, len(x), -1).double().numpy()):
        back = transforms.undo(saved.description.transforms, values, saved.names)
        frame = pd.DataFrame(np.where(missing, back, table.values), columns=saved.names)
        if table.labels is not None:
            frame.insert(0, "label", list(table.labels))
        frame.insert(0, "row", table.rows)
        frame.insert(1, "draw", number + 1)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _rows(saved: Saved, table: Table, seed: int) -> tuple[Table, Tensor]:
    """The columns of a table that the model is about, as its x.

    Raises:
        ValueError: If they are not there.
    """
    names, ebm = saved.names, saved.ebm
    if set(names) <= set(table.names):
        table = table.select(names)
    elif table.named or len(table.names) != len(names):
        raise ValueError(
            f"the model is about columns {', '.join(names[:12])}; the table has "
            f"{', '.join(table.names[:12])}"
        )
    values = transforms.apply(saved.description.transforms, table.values, names, seed)
    return table, torch.as_tensor(values, dtype=ebm.base_x.loc.dtype).reshape(-1, *ebm.x_shape)
