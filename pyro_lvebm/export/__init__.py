# SPDX-License-Identifier: Apache-2.0
"""Posteriors, tables and data as ArviZ objects."""

from pyro_lvebm.export.to_arviz import to_arviz
