# SPDX-License-Identifier: Apache-2.0
"""An LVEBM inside a Pyro program."""

from pyro_lvebm.sites.distributions import LatentSite, MissingSite, ObservedSite, is_prior
from pyro_lvebm.sites.given_rows import (
    GIVEN,
    GivenRows,
    check_not_replaced,
    find_rows,
    is_subsample,
)
from pyro_lvebm.sites.primitive import announce_theta, energy_prior, lvebm
from pyro_lvebm.sites.traces import (
    PARTICLE_PLATE,
    CheapLatents,
    Model,
    Node,
    PositivePairs,
    SamePlates,
    all_nodes,
    at_minibatch,
    cheap_draw,
    energy_modules,
    frozen,
    is_enumerated,
    is_improper,
    num_sites,
    observed_sites,
    plate_nesting,
    plates_of,
    sample_nodes,
    site_of,
    subsample_nodes,
    uniform_draw,
    unvectorise,
    vectorise,
    will_be_enumerated,
)
