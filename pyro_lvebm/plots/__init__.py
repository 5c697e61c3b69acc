# SPDX-License-Identifier: Apache-2.0
"""Pictures of data, energies, posteriors and training."""

from pyro_lvebm.plots.canvas import new_figure, save_figure
from pyro_lvebm.plots.data import plot_images, plot_pair, plot_pairs, plot_reconstructions
from pyro_lvebm.plots.energy import plot_energy
from pyro_lvebm.plots.plane import plot_plane
from pyro_lvebm.plots.posterior import plot_elbo, plot_latents
from pyro_lvebm.plots.training import history_figure, plot_ladder, plot_log_partition
