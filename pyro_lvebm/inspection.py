# SPDX-License-Identifier: Apache-2.0
"""What a Saddle needs to know of a model and a guide before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_lvebm.distributions import ObservedSite
from pyro_lvebm.guides import check_guide
from pyro_lvebm.model import LVEBM
from pyro_lvebm.tracing import all_nodes, energy_modules, plate_nesting


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model and its guide."""

    nesting: int  # number of batch dimensions of model and guide
    ebms: dict[str, LVEBM]  # by the site of x, the first if there are several
    loose_params: dict[str, Tensor]  # unconstrained parameters outside all modules, by name


def inspect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Anatomy:
    """Run model and guide once, refuse a guide that cannot work, and name the parts.

    Raises:
        ValueError: If the guide cannot work with the model.
    """
    with torch.no_grad(), poutine.block():
        model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        check_guide(guide, model_trace)
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    sites = {
        id(node["fn"].ebm): name
        for name, node in reversed(all_nodes(model_trace).items())
        if isinstance(node.get("fn"), ObservedSite)
    }
    ebms = {sites[id(ebm)]: ebm for ebm in energy_modules(model_trace)}
    modules: list[nn.Module] = [*ebms.values()]
    if isinstance(guide, nn.Module):
        modules.append(guide)
    owned = {id(p) for module in modules for p in module.parameters()}
    params = {
        name: node["value"].unconstrained()
        for trace in (model_trace, guide_trace)
        for name, node in all_nodes(trace).items()
        if node["type"] == "param"
    }
    nesting = max(plate_nesting(model_trace), plate_nesting(guide_trace))
    return Anatomy(nesting, ebms, {n: p for n, p in params.items() if id(p) not in owned})
