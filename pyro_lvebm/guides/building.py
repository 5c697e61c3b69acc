# SPDX-License-Identifier: Apache-2.0
"""How a guide is built at its first call: from latents that it can hold, whole or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import nn
from torch.distributions import biject_to
from torch.distributions.transforms import Transform


@contextmanager
def unbuilt_on_error(guide: Callable[..., Any]) -> Iterator[None]:
    """Leave a guide, and Pyro's parameter store, as they were where the block raises an error.

    Pyro's autoguides keep what they had built so far, and their next call fails in another way or
    goes on without some of the latents.
    """
    modules = list(guide.modules()) if isinstance(guide, nn.Module) else []
    kept = [{key: _shallow(value) for key, value in m.__dict__.items()} for m in modules]
    store = pyro.get_param_store()
    names = set(store.keys())
    try:
        yield
    except BaseException:
        for module, attributes in zip(modules, kept, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for name in set(store.keys()) - names:
            del store[name]
        raise


def _shallow(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, dict) else value


def check_latent(guide: object, site: dict[str, Any]) -> Transform:
    """Return the bijection from unconstrained coordinates to the support of a latent site.

    Raises:
        ValueError: If the site is discrete, or its support has no such coordinates.
    """
    if site["fn"].support.is_discrete:
        raise ValueError(
            f"{type(guide).__name__} needs continuous latents; site '{site['name']}' is discrete. "
            "Hide it with poutine.block and enumerate it, or marginalise it out"
        )
    with helpful_support_errors(site):  # a sphere, say, takes a reparameterisation
        transform: Transform = biject_to(site["fn"].support)
    return transform
