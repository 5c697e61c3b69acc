# SPDX-License-Identifier: Apache-2.0
"""Entry point of `python -m pyro_lvebm`."""

import sys

from pyro_lvebm.cli import main

sys.exit(main())
