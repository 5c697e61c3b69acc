# SPDX-License-Identifier: Apache-2.0
"""The latents of a program as flat vectors, moved and drawn for all data."""

from pyro_lvebm.latents.blocks import LatentBlock, sum_other_axes
from pyro_lvebm.latents.chain_draws import PosteriorDraws, draw_posterior
from pyro_lvebm.latents.chains import ChainSettings, run_chains
from pyro_lvebm.latents.energy import as_problems, latent_blocks, residuals_of_problems
from pyro_lvebm.latents.enumeration import sum_out
from pyro_lvebm.latents.guide_draws import draw_guide
from pyro_lvebm.latents.minibatches import Minibatch
from pyro_lvebm.latents.model_at import ModelAt
from pyro_lvebm.latents.positive_phase import Moves, move_minibatch
from pyro_lvebm.latents.predictive import observed_values, posterior_replicates, prior_draws
from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import FullData, Sweep
