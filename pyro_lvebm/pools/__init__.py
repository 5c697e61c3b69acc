# SPDX-License-Identifier: Apache-2.0
"""Negatives that know log Z."""

from pyro_lvebm.pools.base import Pool
from pyro_lvebm.pools.context import ContextPool
from pyro_lvebm.pools.ladder import LadderPool, ladder_of
from pyro_lvebm.pools.persistent import PersistentPool
from pyro_lvebm.pools.tempered import TemperedPool
