# SPDX-License-Identifier: Apache-2.0
"""Tables of observations: read, looked at, split and transformed."""

from pyro_lvebm.data.frame import Frame
from pyro_lvebm.data.observations import (
    DigitsData,
    Split,
    dequantise_logit,
    load_digits_data,
    logit_to_levels,
    read_observations,
    split,
    split_of_digits,
    split_table,
)
from pyro_lvebm.data.reading import read_table
from pyro_lvebm.data.repeats import check_repeats
from pyro_lvebm.data.table import Table
from pyro_lvebm.data.transforms import Transforms, apply, dequantisation, logit_of_levels, undo
