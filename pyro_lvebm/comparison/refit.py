# SPDX-License-Identifier: Apache-2.0
"""Training one model several times from the same start, each time with another guide."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_lvebm.latents import Program
from pyro_lvebm.sites import all_nodes, energy_modules
from pyro_lvebm.training import Saddle, assign, pool_snapshot


def refits(
    program: Program, builders: Mapping[str, Any], num_steps: int
) -> Generator[tuple[str, Saddle, float]]:
    """Fit the model once for every builder, always from the parameters it has now.

    At its end, and when it is closed, parameters and pools are as they were before.

    Args:
        program: The model and its arguments.
        builders: Functions that return a new `Saddle` for this model, by name.
        num_steps: Steps of each fit.

    Yields:
        Name, fitted `Saddle` and seconds of the fit; the model then has the parameters of this fit.

    Raises:
        ValueError: If a builder returns something else, or a Saddle that has been trained.
    """
    args, kwargs = program.args, program.kwargs
    with poutine.block(), torch.no_grad():
        ebms = energy_modules(program.trace(program.model))
    put_pools_back = pool_snapshot(ebms)
    # Once more with gradients, for only then the energies announce their parameters.
    with poutine.block():
        nodes = all_nodes(program.trace(program.model))
    put_pools_back()
    store = pyro.get_param_store()
    own = {n: d["value"].unconstrained() for n, d in nodes.items() if d["type"] == "param"}
    start: dict[Tensor, Tensor] = {p: p.detach().clone() for p in own.values()}
    state = store.get_state()
    parts: dict[str, Any] = {**state}

    def without_guides() -> Any:
        # Pyro names guides by their class, and would give one the parameters of another.
        return {part: {n: v for n, v in parts[part].items() if n in own} for part in parts}

    try:
        for name, build in builders.items():
            assign(start)
            put_pools_back()
            with store.scope(without_guides()):
                saddle = build if isinstance(build, Saddle) else build()  # a Saddle is callable too
                if not isinstance(saddle, Saddle) or saddle.step_count:
                    raise ValueError(
                        f"with theta='refit', '{name}' must be a function that returns a new "
                        f"Saddle; it gave {type(saddle).__name__}"
                    )
                clock = time.perf_counter()
                saddle.fit(*args, num_steps=num_steps, progress=False, description=name, **kwargs)
                yield name, saddle, time.perf_counter() - clock
    finally:
        assign(start)
        put_pools_back()
