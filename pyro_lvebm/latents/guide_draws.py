# SPDX-License-Identifier: Apache-2.0
"""Draws of latents from Pyro guides, for all data of a model."""

from __future__ import annotations

from torch import Tensor

from pyro_lvebm.guides import check_guide, own_parameters
from pyro_lvebm.latents.program import Program
from pyro_lvebm.latents.sweep import FullData
from pyro_lvebm.sites import Model
from pyro_lvebm.validation import check_at_least


def draw_guide(program: Program, guide: Model, num_samples: int) -> dict[str, Tensor]:
    """Draw the latents of all data from a guide with parameters, minibatch by minibatch.

    Latents outside a plate that subsamples are drawn once, and shared by all minibatches, so that
    every draw is one of the joint law of the guide.

    Args:
        program: The model and its arguments.
        guide: A guide for its latents.
        num_samples: Independent draws.

    Returns:
        For each latent of the model that the guide has, (num_samples, *batch_shape, *event_shape),
        from Pyro's present random state.

    Raises:
        ValueError: If num_samples < 1, the guide has no latent of the model, or it shares its
            parameters between minibatches.
    """
    check_at_least(1, num_samples=num_samples)
    check_guide(guide, program.prototype)
    found = FullData()
    with own_parameters(guide):
        for batch, trace in program.traces(guide, num_samples):
            found.add_sites(program, program.latents, batch, trace, num_samples)
    draws = found.joined()
    if not draws:
        raise ValueError("the guide has no site for any latent of the model")
    return draws
