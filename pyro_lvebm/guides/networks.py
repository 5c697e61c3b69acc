# SPDX-License-Identifier: Apache-2.0
"""Networks of guides, whose parameters Pyro's store treats like all others of a guide."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pyro.nn import PyroParam
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_lvebm.rng import Stream, isolated_rng


def as_pyro_params(network: nn.Module) -> nn.Module:
    """Turn a network's parameters into `PyroParam`s, in place, and return it.

    Pyro announces a plain network under names made of the guide's class. A second guide of that
    class would find the names taken: it would keep weights of its own, and the optimiser would
    never see them. As `PyroParam`s both guides have the same weights, as they have the same
    locations and scales, and `compare_elbo` refuses them.
    """
    to_pyro_module_(network)
    for part in network.modules():
        for name, param in list(part.named_parameters(recurse=False)):
            setattr(part, name, PyroParam(param.detach().clone()))
    return network


def zero_network(widths: Sequence[int], seed: int) -> nn.Module:
    """Return layers of these widths with SiLU between them, the last of which starts at zero.

    Args:
        widths: Numbers of inputs, of hidden units in each layer, and of outputs.
        seed: Fixes the initial weights.
    """
    with isolated_rng(seed, Stream.ENCODER_WEIGHTS):
        layers: list[nn.Module] = []
        for a, b in pairwise(widths[:-1]):
            layers += [nn.Linear(a, b), nn.SiLU()]
        out = nn.Linear(widths[-2], widths[-1])
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return as_pyro_params(nn.Sequential(*layers, out))
