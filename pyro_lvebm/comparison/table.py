# SPDX-License-Identifier: Apache-2.0
"""The ELBO table: its numbers, their paired differences, and how it is written down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pyro_lvebm.evidence import LITTLE, LogPartition, MutualInformation

if TYPE_CHECKING:
    import pandas as pd

_HEADINGS = {
    "elbo": "ELBO",
    "kl_gap": "KL gap",
    "pareto_k": "Pareto k̂",
    "held_out": "held-out log p(x)",
    "parameters": "parameters",
    "converged": "converged",
    "seconds": "seconds",
}

NOT_CONVERGED = "(not converged)"
"""Mark of a row whose guide has not converged."""

_LATEX = str.maketrans({"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$"})


@dataclass(frozen=True)
class ElboTable:
    """ELBOs of several posteriors, in nats per datum, best first."""

    rows: pd.DataFrame  # index: name; columns: those of `compare_elbo`
    theta: str  # "fixed" or "refit"
    log_evidence: float  # with the upper end of log Z, so that elbo + kl_gap = log_evidence
    log_evidence_se: float  # Monte Carlo error of log C; both are NaN where θ was refitted
    log_partitions: list[LogPartition]  # where θ was refitted, those of every fit
    num_data: int
    terms: dict[str, Tensor]  # (draws, N) bounds; where θ was refitted, held-out log p (1, M)
    log_z_se: dict[str, float]  # error of log Z in the terms, by name; none where θ is fixed
    carried: MutualInformation | None = None  # what the latents carry, where θ is fixed

    def to_dataframe(self) -> pd.DataFrame:
        """Return the rows, indexed by name."""
        return self.rows.copy()

    def differences(self, reference: str | None = None) -> pd.DataFrame:
        """Return every row minus a reference row, in nats per datum, with standard errors.

        With θ fixed these are differences of ELBOs: draws are paired, so noise that both rows
        share cancels, and the error is Monte Carlo error for these data. With θ refitted they are
        differences of held-out log p(x) with the estimates of log Z, for upper ends differ by how
        well each is known. They are paired by datum, and the error is that over data and of both
        log Z.

        Args:
            reference: Name of the row to subtract; by default the first, which is the best.

        Returns:
            Columns difference and std_error, indexed by name, without the reference.

        Raises:
            ValueError: If there is no such row.
        """
        import pandas as pd

        reference = str(self.rows.index[0]) if reference is None else reference
        if reference not in self.terms:
            raise ValueError(f"there is no row '{reference}'; rows are {list(self.terms)}")
        found = {}
        for name in self.rows.index.drop(reference):
            difference = self.terms[name] - self.terms[reference]
            if self.theta == "fixed":
                found[name] = mean_over_data(difference)
            else:
                error = math.hypot(
                    float(difference.double().std()) / math.sqrt(difference.numel()),
                    self.log_z_se[name],
                    self.log_z_se[reference],
                )
                found[name] = (float(difference.double().mean()), error)
        frame = pd.DataFrame.from_dict(found, orient="index", columns=["difference", "std_error"])
        return frame.rename_axis(f"minus {reference}")

    def labels(self) -> dict[str, str]:
        """Return the marked names of the rows that have not converged, by name."""
        states = self.rows["converged"].items() if "converged" in self.rows else ()
        return {str(name): f"{name} {NOT_CONVERGED}" for name, state in states if state is False}

    def to_markdown(self) -> str:
        """Return the table in Markdown, values with their standard errors."""
        names, lines = self._cells()
        head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        return "\n".join(head + ["| " + " | ".join(line) + " |" for line in lines])

    def to_latex(self) -> str:
        """Return the table as a LaTeX `tabular` with rules of the booktabs package."""
        names, lines = self._cells()
        rows = [r"\toprule", " & ".join(names) + r" \\", r"\midrule"]
        rows += [" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in lines]
        text = "\n".join([*rows, r"\bottomrule"]).replace("±", r"$\pm$").replace("k̂", r"$\hat k$")
        columns = "l" + "r" * (len(names) - 1)
        return f"\\begin{{tabular}}{{{columns}}}\n{text}\n\\end{{tabular}}"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        columns = [name for name in _HEADINGS if name in self.rows]
        lines = [
            [self.labels().get(str(name), str(name)), *(_cell(row, column) for column in columns)]
            for name, row in self.rows.iterrows()
        ]
        return ["posterior", *(_HEADINGS[name] for name in columns)], lines

    def __str__(self) -> str:
        what = "θ fixed (inference gap)" if self.theta == "fixed" else "θ refitted for each row"
        shown = self.rows.rename(index=self.labels())
        if "converged" in shown:
            shown["converged"] = [converged_text(state) for state in shown["converged"]]
        lines = [
            f"ELBO, nats per datum, {self.num_data} data, {what}",
            shown.to_string(float_format=lambda value: f"{value:.4f}"),
        ]
        if self.labels():
            lines.append(
                f"{NOT_CONVERGED}: training has left undone a part of what this row loses, or was "
                "at other parameters of the model; see Saddle.fit_guide"
            )
        if self.theta == "fixed":
            lines.append(
                f"log evidence {self.log_evidence:.4f} ± {self.log_evidence_se:.4f} "
                "(with the upper end of log Z, as every elbo)"
            )
        lines += [
            *self._log_z_lines(),
            *self._carried_lines(),
            "Every kl_gap is small in expectation, for its evidence is annealed from below; every "
            "elbo is low, with log Z at its upper end, if the pool's draws follow the model.",
            "± and _se are Monte Carlo standard errors over the draws, for these data"
            + (", but held_out_se is that over held-out data." if self.theta == "refit" else "."),
        ]
        return "\n".join(lines)

    def _carried_lines(self) -> list[str]:
        if self.carried is None:
            return []
        lines = [str(self.carried)]
        if self.carried.interval[1] < LITTLE:
            lines.append(
                f"The latents carry less than {LITTLE} nats about x: every guide is nearly exact, "
                "and a comparison of guides says nothing. LVEBM.from_data(generator=...) has "
                "latents that carry the data."
            )
        return lines

    def _log_z_lines(self) -> list[str]:
        if self.theta == "fixed":
            return list(map(str, self.log_partitions))
        each = len(self.log_partitions) // len(self.terms)
        names = [name for name in self.terms for _ in range(each)]
        return [f"{n}: {z}" for n, z in zip(names, self.log_partitions, strict=True)]

    __repr__ = __str__


def converged_text(state: bool | None) -> str:
    """Return what a table shows for whether a row has converged; "-" where that is not known."""
    return "-" if state is None else "yes" if state else "no"


def _cell(row: pd.Series, column: str) -> str:
    if column == "converged":
        return converged_text(row[column])
    value = float(row[column])
    if f"{column}_se" in row:
        return f"{value:.4f} ± {float(row[f'{column}_se']):.4f}"
    return f"{value:.0f}" if column == "parameters" else f"{value:.2f}"


def mean_over_data(draws: Tensor) -> tuple[float, float]:
    """Mean of (draws, N) over both, and its Monte Carlo standard error, the draws being random."""
    num_draws, n = draws.shape
    variance = draws.double().var(0).sum() / num_draws
    return float(draws.double().mean()), float(variance.sqrt()) / n
