# SPDX-License-Identifier: Apache-2.0
"""log Z and log p(x), with their errors."""

from pyro_lvebm.evidence.annealed import fit_gaussian, posterior_draws, relative_to
from pyro_lvebm.evidence.contexts import ConditionalLogPartition, conditional_log_partition
from pyro_lvebm.evidence.importance_weighted import ImportanceWeightedELBO
from pyro_lvebm.evidence.log_evidence import LogEvidence, latent_energy, log_evidence
from pyro_lvebm.evidence.log_partition import (
    LogPartition,
    log_partition,
    total,
    warn_of_unreliable,
)
from pyro_lvebm.evidence.mutual_information import (
    LITTLE,
    Effort,
    MutualInformation,
    mutual_information,
    mutual_information_of,
)
from pyro_lvebm.evidence.pointwise import marginal_likelihood
from pyro_lvebm.evidence.programs import (
    Terms,
    log_evidence_of,
    missed_log_z,
    model_log_evidence,
    row_log_z,
)
