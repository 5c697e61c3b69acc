# SPDX-License-Identifier: Apache-2.0
"""Latent-variable energy-based models in Pyro, trained by Langevin particles."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyro_lvebm.bases import GeneratorBase, MixtureBase
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
    from pyro_lvebm.energies import ConjugateEnergy, MLPEnergy, QuadraticEnergy, ZeroEnergy
    from pyro_lvebm.evidence import (
        ConditionalLogPartition,
        ImportanceWeightedELBO,
        LogEvidence,
        LogPartition,
        MutualInformation,
        conditional_log_partition,
        log_evidence,
        log_evidence_of,
        log_partition,
        mutual_information,
    )
    from pyro_lvebm.export import to_arviz
    from pyro_lvebm.generators import ConvGenerator, MLPGenerator
    from pyro_lvebm.guides import (
        AutoAmortisedMultivariateNormal,
        AutoAmortisedNormal,
        AutoParticles,
        AutoPerDatumIAFNormal,
        AutoPerDatumLowRankMultivariateNormal,
        AutoPerDatumMultivariateNormal,
    )
    from pyro_lvebm.model import LVEBM, EnergyPrior, JointEnergy
    from pyro_lvebm.plots import (
        history_figure,
        plot_elbo,
        plot_energy,
        plot_ladder,
        plot_latents,
        plot_log_partition,
        plot_pairs,
        plot_plane,
        plot_reconstructions,
    )
    from pyro_lvebm.pools import ContextPool, PersistentPool, TemperedPool
    from pyro_lvebm.sampling import MALA, ULA
    from pyro_lvebm.sites import energy_prior, lvebm
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
    "ConjugateEnergy",
    "ContextPool",
    "ConvGenerator",
    "ConvergenceRate",
    "Disentanglement",
    "Dissipativity",
    "ElboTable",
    "EnergyPrior",
    "GeneratorBase",
    "GuideFit",
    "ImportanceWeighted",
    "ImportanceWeightedELBO",
    "JointEnergy",
    "LaplaceApproximation",
    "LogEvidence",
    "LogPartition",
    "MLPEnergy",
    "MLPGenerator",
    "MixtureBase",
    "MutualInformation",
    "ParticleDiagnostics",
    "PersistentPool",
    "PoolDiagnostics",
    "PriorProposal",
    "QuadraticEnergy",
    "Saddle",
    "TemperedPool",
    "TrainingWarning",
    "Traversal",
    "ZeroEnergy",
    "check_dissipativity",
    "compare_elbo",
    "conditional_log_partition",
    "convergence_rate",
    "disentanglement",
    "energy_l2",
    "energy_prior",
    "half_cosine",
    "history_figure",
    "ipla",
    "kl_to_base",
    "log_evidence",
    "log_evidence_of",
    "log_partition",
    "lvebm",
    "mutual_information",
    "particle_diagnostics",
    "plot_elbo",
    "plot_energy",
    "plot_ladder",
    "plot_latents",
    "plot_log_partition",
    "plot_pairs",
    "plot_plane",
    "plot_reconstructions",
    "pool_diagnostics",
    "to_arviz",
    "traverse",
]

_FOLDERS = (
    "rng",
    "validation",
    "data",
    "sampling",
    "data",
    "generators",
    "bases",
    "energies",
    "pools",
    "model",
    "sites",
    "guides",
    "latents",
    "evidence",
    "diagnostics",
    "training",
    "comparison",
    "export",
    "plots",
    "cli",
)

if not TYPE_CHECKING:  # to a type checker it would mean that there is every name

    def __getattr__(name):
        """Return a public name from the folder that has it, lowest floors first.

        So the command line answers `--help` without torch, and a model costs what a model needs.
        """
        from importlib import import_module
        from types import ModuleType

        if name in _FOLDERS:
            return import_module(f"{__name__}.{name}")
        for folder in _FOLDERS if name in __all__ else ():
            found = vars(import_module(f"{__name__}.{folder}")).get(name)
            # A room may have the name of a function on another floor.
            if found is not None and not isinstance(found, ModuleType):
                globals()[name] = found
                return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        """Return public names and folders."""
        return sorted({*globals(), *__all__, *_FOLDERS})
