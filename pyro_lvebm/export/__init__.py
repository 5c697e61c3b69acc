# SPDX-License-Identifier: Apache-2.0
"""Everything to ArviZ."""

from pyro_lvebm.export.to_arviz import to_arviz
