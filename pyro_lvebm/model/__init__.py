# SPDX-License-Identifier: Apache-2.0
"""The LVEBM: a density, its pool, and what follows from it."""

from pyro_lvebm.model.conditionals import (
    draw_conditional,
    given_observed,
    given_x,
    given_z,
    log_base_of,
    residuals_given_observed,
    residuals_given_x,
)
from pyro_lvebm.model.contexts import (
    as_context,
    as_context_of_rows,
    check_unconditional,
    context_rows,
    expand_context,
)
from pyro_lvebm.model.density import Density
from pyro_lvebm.model.energy_prior import EnergyPrior
from pyro_lvebm.model.lvebm import LVEBM, JointEnergy, pools_at_rest
from pyro_lvebm.model.posterior import Shape, as_problems, expand_events
from pyro_lvebm.model.rays import warn_of_falling
from pyro_lvebm.model.saving import Description, read_lvebm
from pyro_lvebm.model.tracing import check_not_traced
