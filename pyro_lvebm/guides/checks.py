# SPDX-License-Identifier: Apache-2.0
"""What a guide must satisfy before it is trained or compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoContinuous, AutoGuide, AutoStructured
from pyro.infer.autoguide.gaussian import AutoGaussian
from pyro.poutine import Trace
from torch import nn

from pyro_lvebm.guides.particles import AutoParticles

# These allocate parameters for the latents of the minibatch at hand and say nothing.
_MINIBATCH_SIZED = (AutoContinuous, AutoStructured, AutoGaussian)


def find_particles(guide: Callable[..., Any]) -> AutoParticles | None:
    """Return the `AutoParticles` of a guide, if it has any.

    Raises:
        ValueError: If it has more than one.
    """
    modules = guide.modules() if isinstance(guide, nn.Module) else []
    found = [m for m in modules if isinstance(m, AutoParticles)]
    if len(found) > 1:
        raise ValueError(
            f"the guide holds {len(found)} AutoParticles; use one for all latents that are "
            "particles"
        )
    return found[0] if found else None


def needs_rows(guide: Callable[..., Any]) -> bool:
    """Return whether a guide may hold something for every row of a plate, as all autoguides may."""
    modules = guide.modules() if isinstance(guide, nn.Module) else []
    return any(isinstance(m, AutoGuide) for m in modules)


def check_guide(guide: Callable[..., Any], model_trace: Trace) -> None:
    """Refuse guides that would silently share parameters between the data of different minibatches.

    Args:
        guide: The guide.
        model_trace: A trace of the model, for its plates.

    Raises:
        ValueError: If the model subsamples a plate with latents and the guide, or a part of it,
            allocates parameters of the size of one minibatch.
    """
    modules = guide.modules() if isinstance(guide, nn.Module) else []
    bad = [type(m).__name__ for m in modules if isinstance(m, _MINIBATCH_SIZED)]
    if not bad:
        return
    for name, node in model_trace.iter_stochastic_nodes():
        for frame in node["cond_indep_stack"]:
            full = frame.full_size or frame.size
            if full != frame.size:
                raise ValueError(
                    f"{bad[0]} allocates parameters for the {frame.size} rows of one minibatch, "
                    f"but plate '{frame.name}' of latent '{name}' has {full} rows. Use AutoNormal, "
                    "AutoPerDatumMultivariateNormal or AutoAmortisedNormal, or do not subsample"
                )
