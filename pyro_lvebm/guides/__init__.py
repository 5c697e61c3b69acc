# SPDX-License-Identifier: Apache-2.0
"""Latent particles, and restricted guides that subsample rightly."""

from pyro_lvebm.guides.amortised import AutoAmortisedMultivariateNormal, AutoAmortisedNormal
from pyro_lvebm.guides.building import unbuilt_on_error
from pyro_lvebm.guides.checks import check_guide, find_particles, needs_rows
from pyro_lvebm.guides.names import claim, keep_apart, own_parameters, root_of
from pyro_lvebm.guides.particles import AutoParticles, undo_particles
from pyro_lvebm.guides.per_datum_gaussian import (
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
)
from pyro_lvebm.guides.per_datum_iaf import AutoPerDatumIAFNormal
