# SPDX-License-Identifier: Apache-2.0
"""Speed of the package, measured."""

import os

# Threads that spin while they wait make steps a hundred times slower on busy cores. OpenMP reads
# this when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
