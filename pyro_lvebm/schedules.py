# SPDX-License-Identifier: Apache-2.0
"""How the size of updates changes in the course of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""Maps the part of a fit that is done, from 0 to 1, to a factor on the updates."""


def half_cosine(progress: float) -> float:
    """Return a factor that falls from 1 to 1/50 along a half cosine.

        0.51 + 0.49 cos(π progress)

    Args:
        progress: Part of the fit that is done, from 0 to 1.

    Source:
        Loshchilov and Hutter (2017), SGDR: stochastic gradient descent with warm restarts,
        equation 5, without restarts.

    Example:
        >>> [round(half_cosine(p), 2) for p in (0.0, 0.5, 1.0)]
        [1.0, 0.51, 0.02]
    """
    return 0.51 + 0.49 * math.cos(math.pi * progress)
