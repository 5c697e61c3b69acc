# SPDX-License-Identifier: Apache-2.0
"""The command line: the whole path for one table."""

from pyro_lvebm.cli.main import build_parser, main
