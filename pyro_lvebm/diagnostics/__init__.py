# SPDX-License-Identifier: Apache-2.0
"""What to look at after a fit."""

from pyro_lvebm.diagnostics.convergence import ConvergenceRate, convergence_rate
from pyro_lvebm.diagnostics.disentanglement import Disentanglement, disentanglement
from pyro_lvebm.diagnostics.dissipativity import Dissipativity, check_dissipativity
from pyro_lvebm.diagnostics.particles import ParticleDiagnostics, particle_diagnostics
from pyro_lvebm.diagnostics.pools import PoolDiagnostics, pool_diagnostics
from pyro_lvebm.diagnostics.traversal import Traversal, traverse
