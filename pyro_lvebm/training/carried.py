# SPDX-License-Identifier: Apache-2.0
"""What the latents carry at the end of a fit."""

from __future__ import annotations

import sys

import torch
from tqdm import tqdm

from pyro_lvebm.evidence import LITTLE, Effort, MutualInformation, mutual_information_of
from pyro_lvebm.latents import Program, Sweep
from pyro_lvebm.rng import Stream, derive_seed
from pyro_lvebm.sampling import RoughEnergyError
from pyro_lvebm.training.history import History

LONG_FIT = 1_000
"""Steps from which a fit is meant to be used, and its latents are looked at."""

_EFFORT = Effort(num_rows=128, num_draws=4, num_runs=2, num_particles=16)


def record_carried(
    recorder: History, program: Program, seed: int, step: int, device: torch.device
) -> MutualInformation | None:
    """Record I(x; z) of a fitted model, and warn if it is next to nothing.

    Args:
        recorder: Where it goes, beside the last step.
        program: The model and its data, at the parameters of the end.
        seed: With the step, fixes the random numbers, of a stream of their own.
        step: Number of steps so far.
        device: Where draws are made.

    Returns:
        The estimate, by few draws; None where `mutual_information_of` has none, or the energy is
        too rough for annealing.
    """
    seed = derive_seed(seed, Stream.CARRIED, step)
    with program.at_rest(seed, Stream.CARRIED, device=device):
        try:
            found = mutual_information_of(Sweep(program, seed), _EFFORT)
        except RoughEnergyError:  # says nothing about how much the latents carry
            return None
    if found is None:
        return None
    recorder.record(step, mutual_information=found.value, mutual_information_se=found.std_error)
    if found.interval[1] < LITTLE:
        recorder.warn(
            "latents",
            step,
            f"the latents carry next to nothing about the data: {found}. Every posterior is nearly "
            "the prior, so every guide is nearly exact and a comparison of guides says nothing. A "
            "density of x alone may be what you want; for latents that carry the data, make x of "
            "z, with LVEBM.from_data(..., generator=MLPGenerator(...)), or couple them, with a "
            "ConjugateEnergy or a likelihood after an EnergyPrior",
        )
    return found


def end_line(description: str, found: MutualInformation) -> None:
    """Write what the latents carry under the progress bar of a fit."""
    tqdm.write(f"{description}: {found}", file=sys.stderr)
