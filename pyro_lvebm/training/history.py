# SPDX-License-Identifier: Apache-2.0
"""What happened at each training step, and what to do about it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_lvebm.model import LVEBM
from pyro_lvebm.validation import warn_of_training

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 50
"""Steps over which numbers are averaged before they are called a symptom."""

LOW_ESS, LOW_SWAP_RATE, LOW_ACCEPTANCE = 0.05, 0.1, 0.2


class History:
    """Rows of numbers by step; a row may lack columns that others have."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._warned: set[str] = set()
        self._num_chains: dict[str, int] = {}

    def record(self, step: int, **values: float) -> None:
        """Add values to the row of a step, which is the last or a new one."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": float(step)})
        self.rows[-1].update(values)

    def record_step(
        self, step: int, row: dict[str, float], positive: dict[str, float], ebms: dict[str, LVEBM]
    ) -> None:
        """Record a training step.

        Args:
            step: Number of steps so far.
            row: What does not belong to one LVEBM.
            positive: Mean positive energies in nats, by the site of x.
            ebms: The LVEBMs, by the site of x; the columns of all but the first have suffixes.
        """
        num_chains: dict[str, int] = {}
        for name, ebm in ebms.items():
            suffix = f"@{name}" if num_chains else ""
            num_chains[suffix] = len(ebm.pool.log_weights)
            # A loss that replays a graph meets no pairs.
            mean = {"positive_energy": positive[name]} if name in positive else {}
            statistics = mean | pool_statistics(ebm)
            row = row | {f"{key}{suffix}": value for key, value in statistics.items()}
        self.record(step, **row)
        self._num_chains = num_chains

    def look_now_and_then(self, step: int) -> None:
        """Warn where the last rows say that something is wrong, once in a window of steps."""
        if step % WINDOW == 0:
            self.look(step)

    def look(self, step: int) -> None:
        """Warn of the symptoms of the last rows, if there are enough."""
        rows = self.rows[-WINDOW:]
        if len(rows) >= WINDOW // 2:
            for key, text in symptoms(rows, self._num_chains).items():
                self.warn(key, step, text)

    def warn(self, key: str, step: int, text: str) -> None:
        """Warn of a symptom, once, at the line outside this package that led to it."""
        if key in self._warned:
            return
        self._warned.add(key)
        warn_of_training(f"step {step}: {text}")

    def frame(self) -> pd.DataFrame:
        """Return all rows, indexed by step."""
        import pandas as pd

        frame = pd.DataFrame(self.rows, columns=None if self.rows else ["step"])
        return frame.astype({"step": int}).set_index("step")

    def losses(self, since: int) -> list[float]:
        """Return the losses of the steps after this one."""
        return [row["loss"] for row in self.rows if row["step"] > since and "loss" in row]

    def state(self) -> tuple[list[str], Tensor]:
        """Return column names and values (rows, columns), for a file."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = [[row.get(name, math.nan) for name in columns] for row in self.rows]
        return columns, torch.tensor(table, dtype=torch.float64).reshape(len(table), len(columns))

    def load(self, columns: list[str], values: Tensor) -> None:
        """Replace all rows by those of `state`."""
        rows = [dict(zip(columns, row, strict=True)) for row in values.tolist()]
        self.rows = [{k: v for k, v in row.items() if not math.isnan(v)} for row in rows]


def pool_statistics(ebm: LVEBM) -> dict[str, float]:
    """Return what the history says of a pool after a refresh.

    `negative_energy` is Σ w E_θ in nats; `ess` is a number of chains; the others are rates.
    """
    pool = ebm.pool
    u, log_w = pool.negatives()
    with torch.no_grad():
        energy = pool.negative_residuals() + ebm.base_energy(u)
    return {"negative_energy": float((log_w.exp() * energy).sum())} | pool.statistics()


def symptoms(rows: list[dict[str, float]], num_chains: dict[str, int]) -> dict[str, str]:
    """Say what is wrong with the training that led to these rows, and what to do.

    Args:
        rows: The last rows of a history.
        num_chains: Number of negatives, by the suffix of each LVEBM's columns.

    Returns:
        A sentence for each symptom, by its name; none if all is well.
    """
    import pandas as pd

    mean = {str(name): float(value) for name, value in pd.DataFrame(rows).mean().items()}
    found = {}
    for suffix, n in num_chains.items():
        share = mean.get(f"ess{suffix}", math.nan) / n
        if share < LOW_ESS:
            found[f"ess{suffix}"] = (
                f"the effective sample size of the pool{suffix} is {share:.1%} of its {n} chains, "
                "so few of them carry the negative phase and its gradient is noisy. Use a "
                "TemperedPool, with more chains or levels if it is one already, or lower max_kl"
            )
        rates = {}
        for name, rate in mean.items():
            pair = name.removeprefix("swap_rate_").removesuffix(suffix)
            if name == f"swap_rate_{pair}{suffix}" and pair.isdigit():
                rates[int(pair)] = rate
        if rates and min(rates.values()) < LOW_SWAP_RATE:
            low = min(rates, key=lambda k: rates[k])
            found[f"swap_rate{suffix}"] = (
                f"levels {low} and {low + 1} of the pool{suffix} exchange only "
                f"{rates[low]:.1%} of their chains, so the model's level is cut off from the base "
                "and may miss modes. Give the TemperedPool more levels (num_levels)"
            )
    for name, rate in mean.items():
        if name.startswith("latent_acceptance") and rate < LOW_ACCEPTANCE:
            found[name] = (
                f"only {rate:.1%} of the Langevin moves of the latent particles are accepted "
                f"({name}), so they lag behind θ. Take more moves (num_moves), or lower the "
                "learning rate"
            )
    if mean.get("halvings", 0.0) > 15:
        found["halvings"] = (
            f"updates are halved {mean['halvings']:.0f} times on average to keep KL below max_kl, "
            "so hardly anything is learnt. Lower the learning rate a hundredfold"
        )
    return found
