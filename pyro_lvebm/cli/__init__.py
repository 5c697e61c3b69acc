# SPDX-License-Identifier: Apache-2.0
"""The whole path for one table: fit, demo."""

from pyro_lvebm.cli.main import build_parser, main
