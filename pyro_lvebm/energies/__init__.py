# SPDX-License-Identifier: Apache-2.0
"""Residual energies f(x, z)."""

from pyro_lvebm.energies.at_rest import check_at_rest
from pyro_lvebm.energies.conjugate import ConjugateEnergy
from pyro_lvebm.energies.mlp import MLPEnergy
from pyro_lvebm.energies.quadratic import QuadraticEnergy
from pyro_lvebm.energies.whitened import WhitenedEnergy, check_energy
from pyro_lvebm.energies.zero import ZeroEnergy
