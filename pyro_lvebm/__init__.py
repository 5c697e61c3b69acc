# SPDX-License-Identifier: Apache-2.0
"""Latent-variable energy-based models in Pyro, trained by Langevin particles."""

from pyro_lvebm.bases import MixtureBase
from pyro_lvebm.comparison import (
    ElboTable,
    ImportanceWeighted,
    LaplaceApproximation,
    PriorProposal,
    compare_elbo,
)
from pyro_lvebm.diagnostics import (
    ConvergenceRate,
    Disentanglement,
    Dissipativity,
    ParticleDiagnostics,
    PoolDiagnostics,
    Traversal,
    check_dissipativity,
    convergence_rate,
    disentanglement,
    particle_diagnostics,
    pool_diagnostics,
    traverse,
)
from pyro_lvebm.energies import MLPEnergy, QuadraticEnergy
from pyro_lvebm.evidence import (
    ConditionalLogPartition,
    ImportanceWeightedELBO,
    LogEvidence,
    LogPartition,
    conditional_log_partition,
    log_evidence,
    log_evidence_of,
    log_partition,
)
from pyro_lvebm.export import to_arviz
from pyro_lvebm.guides import (
    AutoAmortisedMultivariateNormal,
    AutoAmortisedNormal,
    AutoParticles,
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
)
from pyro_lvebm.model import LVEBM, JointEnergy
from pyro_lvebm.plots import (
    history_figure,
    plot_elbo,
    plot_energy,
    plot_ladder,
    plot_latents,
    plot_log_partition,
    plot_pairs,
    plot_reconstructions,
)
from pyro_lvebm.pools import ContextPool, PersistentPool, TemperedPool
from pyro_lvebm.sampling import MALA, ULA
from pyro_lvebm.sites import lvebm
from pyro_lvebm.training import (
    GuideFit,
    Saddle,
    energy_l2,
    half_cosine,
    ipla,
    kl_to_base,
)
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
    "GuideFit",
    "ImportanceWeighted",
    "ImportanceWeightedELBO",
    "JointEnergy",
    "LaplaceApproximation",
    "LogEvidence",
    "LogPartition",
    "MLPEnergy",
    "MixtureBase",
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
    "plot_reconstructions",
    "pool_diagnostics",
    "to_arviz",
    "traverse",
]
