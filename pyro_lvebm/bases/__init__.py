# SPDX-License-Identifier: Apache-2.0
"""Where x and z start: bases, their supports, and what they say of missing entries."""

from pyro_lvebm.bases.completion import Completion, observed_entries
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.bases.generator import GeneratorBase, Noise
from pyro_lvebm.bases.joint import JointBase
from pyro_lvebm.bases.mixture import MixtureBase
from pyro_lvebm.bases.pairs import PairSupport
from pyro_lvebm.bases.supports import Support
from pyro_lvebm.bases.units import moments, unit_rows
