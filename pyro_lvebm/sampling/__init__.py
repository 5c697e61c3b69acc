# SPDX-License-Identifier: Apache-2.0
"""Moves, annealing and weights, as pure functions of a state, an energy and a generator."""

from pyro_lvebm.sampling.annealing import (
    Annealed,
    RoughEnergyError,
    Schedule,
    anneal,
    pick_draws,
    pilot,
)
from pyro_lvebm.sampling.base import STANDARD_NORMAL, Base, StandardNormal, standard_normal
from pyro_lvebm.sampling.gauss_newton import (
    Linearised,
    Residuals,
    find_mode,
    gauss_newton_root,
    jacobian,
    linearise,
    linearised_step,
    start_near,
)
from pyro_lvebm.sampling.langevin import (
    MALA,
    ULA,
    Kernel,
    LangevinState,
    ValueAndGrad,
    check_finite,
    init_state,
    value_and_grad,
)
from pyro_lvebm.sampling.preconditioning import inverse_root, secant_root
from pyro_lvebm.sampling.problems import anneal_problems
from pyro_lvebm.sampling.tempering import (
    SNAPSHOT_STRIDE,
    Tempered,
    adapt_ladder,
    exchange,
    move_levels,
    num_gradients,
    running_fisher,
    temper,
)
from pyro_lvebm.sampling.weights import (
    bar_log_ratio,
    ess,
    log_mean_exp,
    log_mean_std_error,
    log_mixture,
    mbar_log_z,
    mbar_variance,
    pareto_k,
    systematic_resample,
)
