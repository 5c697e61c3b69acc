# SPDX-License-Identifier: Apache-2.0
"""Guides: latent particles, and restricted guides that subsample correctly."""

from pyro_lvebm.guides.amortised import AutoAmortisedNormal
from pyro_lvebm.guides.checks import check_guide, find_particles, own_parameters
from pyro_lvebm.guides.particles import AutoParticles
from pyro_lvebm.guides.per_datum import AutoPerDatumMultivariateNormal

__all__ = [
    "AutoAmortisedNormal",
    "AutoParticles",
    "AutoPerDatumMultivariateNormal",
    "check_guide",
    "find_particles",
    "own_parameters",
]
