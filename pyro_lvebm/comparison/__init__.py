# SPDX-License-Identifier: Apache-2.0
"""The ELBO table."""

from pyro_lvebm.comparison.compare import compare_elbo
from pyro_lvebm.comparison.rows import ImportanceWeighted, LaplaceApproximation, PriorProposal
from pyro_lvebm.comparison.table import ElboTable
