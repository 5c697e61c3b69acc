# SPDX-License-Identifier: Apache-2.0
"""Saddle: maximum likelihood by particles, pools and an optimiser inside a trust region."""

from pyro_lvebm.training.averaging import assign
from pyro_lvebm.training.checkpoint import Checkpoint, read_checkpoint
from pyro_lvebm.training.fit import half_cosine
from pyro_lvebm.training.guide_fit import GuideFit, GuideState, guide_state
from pyro_lvebm.training.ipla import ipla
from pyro_lvebm.training.penalties import energy_l2, kl_to_base
from pyro_lvebm.training.saddle import Saddle
from pyro_lvebm.training.step import pool_snapshot
