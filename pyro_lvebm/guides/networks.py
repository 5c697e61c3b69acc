# SPDX-License-Identifier: Apache-2.0
"""Networks of guides, whose parameters Pyro's store treats like all others of a guide."""

from __future__ import annotations

from pyro.nn import PyroParam
from pyro.nn.module import to_pyro_module_
from torch import nn


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
