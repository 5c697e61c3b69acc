# SPDX-License-Identifier: Apache-2.0
"""Latent-variable energy-based models in Pyro, trained by Langevin particles."""

from pyro_lvebm.compare import compare_elbo
from pyro_lvebm.conditional_partition import (
    ConditionalLogPartition,
    conditional_log_partition,
)
from pyro_lvebm.context_pool import ContextPool
from pyro_lvebm.convergence import ConvergenceRate, convergence_rate
from pyro_lvebm.disentanglement import Disentanglement, disentanglement
from pyro_lvebm.dissipativity import Dissipativity, check_dissipativity
from pyro_lvebm.elbo_rows import ImportanceWeighted, LaplaceApproximation, PriorProposal
from pyro_lvebm.elbo_table import ElboTable
from pyro_lvebm.energies import MLPEnergy
from pyro_lvebm.evidence_of import log_evidence_of
from pyro_lvebm.export import to_arviz
from pyro_lvebm.guides import (
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
)
from pyro_lvebm.importance_weighted import ImportanceWeightedELBO
from pyro_lvebm.ipla import ipla
from pyro_lvebm.langevin import MALA, ULA
from pyro_lvebm.log_evidence import LogEvidence, log_evidence
from pyro_lvebm.log_partition import LogPartition, log_partition
from pyro_lvebm.model import LVEBM, JointEnergy
from pyro_lvebm.particle_diagnostics import ParticleDiagnostics, particle_diagnostics
from pyro_lvebm.penalties import energy_l2, kl_to_base, spectral_norm, weight_decay
from pyro_lvebm.persistent_pool import PersistentPool
from pyro_lvebm.plots_data import plot_pairs, plot_reconstructions
from pyro_lvebm.plots_energy import plot_energy
from pyro_lvebm.plots_posterior import plot_elbo, plot_latents, plot_ranks
from pyro_lvebm.plots_training import history_figure, plot_ladder, plot_log_partition
from pyro_lvebm.pool_diagnostics import PoolDiagnostics, pool_diagnostics
from pyro_lvebm.quadratic import QuadraticEnergy
from pyro_lvebm.saddle import Saddle
from pyro_lvebm.schedules import half_cosine
from pyro_lvebm.sites import lvebm
from pyro_lvebm.tempered_pool import TemperedPool
from pyro_lvebm.traversal import Traversal, traverse
from pyro_lvebm.validation import TrainingWarning

__all__ = [
    "LVEBM",
    "MALA",
    "ULA",
    "AutoAmortisedMultivariateNormal",
    "AutoAmortisedNormal",
    "AutoParticles",
    "AutoPerDatumIAFNormal",
    "AutoPerDatumLowRankMultivariateNormal",
    "AutoPerDatumMultivariateNormal",
    "ConditionalLogPartition",
    "ContextPool",
    "ConvergenceRate",
    "Disentanglement",
    "Dissipativity",
    "ElboTable",
    "ImportanceWeighted",
    "ImportanceWeightedELBO",
    "JointEnergy",
    "LaplaceApproximation",
    "LogEvidence",
    "LogPartition",
    "MLPEnergy",
    "ParticleDiagnostics",
    "PersistentPool",
    "PoolDiagnostics",
    "PriorProposal",
    "QuadraticEnergy",
    "Saddle",
    "TemperedPool",
    "TrainingWarning",
    "Traversal",
    "check_dissipativity",
    "compare_elbo",
    "conditional_log_partition",
    "convergence_rate",
    "disentanglement",
    "energy_l2",
    "half_cosine",
    "history_figure",
    "ipla",
    "kl_to_base",
    "log_evidence",
    "log_evidence_of",
    "log_partition",
    "lvebm",
    "particle_diagnostics",
    "plot_elbo",
    "plot_energy",
    "plot_ladder",
    "plot_latents",
    "plot_log_partition",
    "plot_pairs",
    "plot_ranks",
    "plot_reconstructions",
    "pool_diagnostics",
    "spectral_norm",
    "to_arviz",
    "traverse",
    "weight_decay",
]
