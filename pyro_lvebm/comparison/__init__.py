# SPDX-License-Identifier: Apache-2.0
"""The ELBO table: how tightly posteriors bound the evidence of one model."""

from pyro_lvebm.comparison.compare import compare_elbo
from pyro_lvebm.comparison.rows import ImportanceWeighted, LaplaceApproximation, PriorProposal
from pyro_lvebm.comparison.table import ElboTable
