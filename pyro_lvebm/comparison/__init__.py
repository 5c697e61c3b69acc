# SPDX-License-Identifier: Apache-2.0
"""The ELBO table."""

from pyro_lvebm.comparison.compare import compare_elbo
from pyro_lvebm.comparison.rows import ImportanceWeighted, LaplaceApproximation, PriorProposal
from pyro_lvebm.comparison.table import ElboTable

__all__ = [
    "ElboTable",
    "ImportanceWeighted",
    "LaplaceApproximation",
    "PriorProposal",
    "compare_elbo",
]
