# SPDX-License-Identifier: Apache-2.0
"""Generators: networks from z to the mean of x, for a `GeneratorBase`."""

from pyro_lvebm.generators.conv import ConvGenerator
from pyro_lvebm.generators.mlp import MLPGenerator
