# SPDX-License-Identifier: Apache-2.0
"""Running a Pyro model at chosen latents, minibatches and numbers of particles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_lvebm.distributions import ObservedSite
from pyro_lvebm.given_rows import GIVEN, is_subsample
from pyro_lvebm.guides.particles import PARTICLE_PLATE
from pyro_lvebm.model import LVEBM
from pyro_lvebm.validation import DataError

Model = Callable[..., Any]
Node = dict[str, Any]


def all_nodes(trace: Trace) -> dict[str, Node]:
    """Return the nodes of a trace, as plain dictionaries and not as Pyro's optional fields."""
    return cast(dict[str, Node], trace.nodes)


def subsample_nodes(trace: Trace) -> dict[str, Node]:
    """Return the nodes at which plates choose their minibatch."""
    return {name: node for name, node in all_nodes(trace).items() if is_subsample(node)}


def sample_nodes(trace: Trace) -> dict[str, Node]:
    """Return the sample sites of a trace, without those at which plates choose a minibatch."""
    return {
        name: node
        for name, node in all_nodes(trace).items()
        if node["type"] == "sample" and not is_subsample(node)
    }


def energy_modules(trace: Trace) -> list[LVEBM]:
    """Return the distinct LVEBMs with a site in a trace, in order."""
    functions = [node.get("fn") for node in all_nodes(trace).values()]
    found = [fn.ebm for fn in functions if isinstance(fn, ObservedSite)]
    return list({id(ebm): ebm for ebm in found}.values())


def site_of(trace: Trace, ebm: LVEBM) -> str:
    """Return the name of the first x site of an LVEBM in a trace."""
    nodes = all_nodes(trace).items()
    return next(n for n, d in nodes if isinstance(d.get("fn"), ObservedSite) and d["fn"].ebm is ebm)


def num_sites(trace: Trace, ebm: LVEBM) -> int:
    """Return at how many x sites of a trace an LVEBM stands, each with a log Z.

    Raises:
        ValueError: If the LVEBM is conditional, and stands at several or under a mask or scale
            that differs from row to row: its pool has contexts of one site, and each counts alike.
    """
    nodes = {
        name: node
        for name, node in all_nodes(trace).items()
        if isinstance(node.get("fn"), ObservedSite) and node["fn"].ebm is ebm
    }
    if ebm.context_shape is None:
        return len(nodes)
    if len(nodes) > 1:
        raise ValueError(
            f"a conditional LVEBM stands at the sites {sorted(nodes)}, but its pool has contexts "
            "of one. Join their rows in one site, or give each an LVEBM of its own"
        )
    for name, node in nodes.items():
        scale = node["scale"]
        if isinstance(node["mask"], Tensor) or (isinstance(scale, Tensor) and scale.numel() > 1):
            raise ValueError(
                f"the conditional site '{name}' has a mask or scale of its own for each row, which "
                "log Z of its contexts would not follow. Leave out the rows instead"
            )
    return len(nodes)


def frozen(ebms: list[LVEBM]) -> ExitStack:
    """Return a context in which θ of all these LVEBMs is held fixed."""
    stack = ExitStack()
    for ebm in ebms:
        stack.enter_context(ebm.frozen())
    return stack


def plate_nesting(trace: Trace) -> int:
    """Return the number of batch dimensions that the sites of a trace use."""
    depths = [0]
    for node in sample_nodes(trace).values():
        depths.append(len(node["fn"].batch_shape))
        depths += [-f.dim for f in node["cond_indep_stack"] if f.vectorized]
    return max(depths)


def vectorise(fn: Model, num_particles: int, nesting: int) -> Model:
    """Run a model or guide under a particle plate left of its `nesting` batch dimensions."""
    vectorised: Model = pyro.plate(PARTICLE_PLATE, num_particles, dim=-nesting - 1)(fn)
    return vectorised


def unvectorise(value: Tensor, site: Node, num_particles: int, nesting: int) -> Tensor:
    """Return (num_particles, *batch, *event) for the value of a site of a vectorised model.

    Args:
        value: The value; a draw that particles or data share may lack axes or have length 1 there.
        site: The same site in a trace of the plain model.
        num_particles: Size of the particle plate.
        nesting: Number of batch dimensions of the plain model.
    """
    batch, event = site["fn"].batch_shape, site["fn"].event_shape
    missing = 1 + nesting + len(event) - value.dim()
    value = value.reshape(*(1,) * missing, *value.shape)
    value = value.reshape(len(value), *value.shape[1 + nesting - len(batch) :])
    return value.expand(num_particles, *batch, *event)


def at_minibatch(fn: Model, nodes: dict[str, Node]) -> Model:
    """Run a model or guide with sites, such as the choice of a minibatch, fixed to given nodes."""
    trace = Trace()
    all_nodes(trace).update(nodes)
    fixed: Model = poutine.replay(fn, trace=trace)
    return fixed


@dataclass(frozen=True)
class Minibatch:
    """One choice of data, of the size that the model's own minibatches have."""

    nodes: dict[str, Node]  # for `at_minibatch`
    plate: str | None  # the plate that subsamples, if one does
    dim: int  # its batch dimension, negative
    rows: Tensor  # data indices
    num_new: int  # as many at the front are in no earlier minibatch

    def take_rows(self, value: Tensor, event_dim: int) -> Tensor:
        """Return the rows of this minibatch of a value (*, *full_batch, *event)."""
        if self.plate is None:
            return value
        return value.index_select(self.dim - event_dim, self.rows)

    def drop_repeats(self, value: Tensor, event_dim: int) -> Tensor:
        """Return a value (*, *batch, *event) without rows that an earlier minibatch had."""
        if self.plate is None:
            return value
        return value.narrow(self.dim - event_dim, 0, self.num_new)


def cover(trace: Trace) -> Iterator[Minibatch]:
    """Yield minibatches that together visit every datum; the last may repeat data of the first.

    Without subsampling there is one, of all data; where the model is given its rows, as in
    `pyro.plate(..., subsample=ids)`, there is one, of these.

    Args:
        trace: A trace of the model, under `GivenRows`, for its plates.

    Raises:
        ValueError: If more than one plate subsamples.
    """
    choices = subsample_nodes(trace)
    free = {name: node for name, node in choices.items() if GIVEN not in node["infer"]}
    small = {k: n for k, n in free.items() if len(n["value"]) < n["fn"].size}
    if len(small) > 1:
        raise ValueError(
            f"plates {sorted(small)} all subsample; going through all data needs at most one "
            "subsampled plate. Give the others their full size"
        )
    if not small:
        yield Minibatch(dict(choices), None, 0, torch.empty(0), 0)
        return
    ((name, node),) = small.items()
    size, batch = node["fn"].size, len(node["value"])
    frames = [f for n in sample_nodes(trace).values() for f in n["cond_indep_stack"]]
    dim = next(f.dim for f in frames if f.name == name)
    for start in range(0, size, batch):
        index = torch.arange(start, start + batch, device=node["value"].device) % size
        nodes = {**choices, name: {**node, "value": index}}
        yield Minibatch(nodes, name, dim, index, min(batch, size - start))


class FullData:
    """Collects values of sites, minibatch by minibatch, into values of all data."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor]] = {}
        self._axes: dict[str, int] = {}

    def add(
        self, batch: Minibatch, node: Node, value: Tensor, event_dim: int | None = None
    ) -> None:
        """Add a value (*, *batch, *event) of a site in one minibatch.

        Args:
            batch: The minibatch.
            node: The site.
            value: Its value. Outside the plate that subsamples only the first one is kept.
            event_dim: Number of event axes; those of the site if None.
        """
        name = str(node["name"])
        event_dim = len(node["fn"].event_shape) if event_dim is None else event_dim
        parts = self._parts.setdefault(name, [])
        if batch.plate in {frame.name for frame in node["cond_indep_stack"]}:
            self._axes[name] = batch.dim - event_dim
            parts.append(batch.drop_repeats(value, event_dim))
        elif not parts:
            parts.append(value)

    def joined(self) -> dict[str, Tensor]:
        """Return values (*, *full_batch, *event) by site."""
        return {
            name: parts[0] if len(parts) == 1 else torch.cat(parts, self._axes[name])
            for name, parts in self._parts.items()
        }


@dataclass(frozen=True)
class ModelAt:
    """A model with fixed latents, minibatch and arguments, to run for any number of particles."""

    model: Model
    nesting: int
    nodes: dict[str, Node]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def trace(self, num_particles: int, **values: Tensor) -> Trace:
        """Trace the vectorised model, with the values of some sites replaced.

        Sites with `infer={"enumerate": "parallel"}` are enumerated left of the particles.
        """
        nodes = dict(self.nodes)
        for name, value in values.items():
            nodes[name] = {**nodes[name], "value": value}
        fixed = at_minibatch(vectorise(self.model, num_particles, self.nesting), nodes)
        fixed = poutine.enum(fixed, first_available_dim=-self.nesting - 2)
        return poutine.trace(fixed).get_trace(*self.args, **self.kwargs)


class PositivePairs(Messenger):
    """Collects the pairs (x, z) at which a model is run, by the site of x."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, tuple[ObservedSite, Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ObservedSite):
            self.sites[msg["name"]] = (msg["fn"], msg["value"].detach())

    @torch.no_grad()
    def mean_energies(self) -> dict[str, float]:
        """Return the mean of E_θ over the pairs, in nats, by the site of x."""
        return {name: float(fn.energy(x).mean()) for name, (fn, x) in self.sites.items()}


class SamePlates(Messenger):
    """Refuses a guide whose plates have other sizes than those of the model it is run with.

    Pyro replays the guide's choice of rows in the model. Where the guide was made for other data,
    the model would silently run on some of its rows only, or on rows that do not exist.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if not is_subsample(msg):
            return
        name, size = msg["name"], msg["fn"].size
        held = self.sizes.setdefault(name, size)
        if held != size:
            raise DataError(
                f"plate '{name}' has {held} rows in the guide and {size} in the model; the guide "
                "was made for other data. Build a new guide, or use an amortised one"
            )
