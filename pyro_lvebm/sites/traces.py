# SPDX-License-Identifier: Apache-2.0
"""What is read from traces of a Pyro model, and runs at chosen rows and numbers of particles."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import pyro
import torch
from pyro.distributions import ImproperUniform, Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import Tensor
from torch.distributions import biject_to

from pyro_lvebm.model import LVEBM
from pyro_lvebm.sites.distributions import LatentSite, ObservedSite
from pyro_lvebm.sites.given_rows import is_subsample
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


def plates_of(node: Node) -> frozenset[str]:
    """Return the names of the plates around a site, of particles too."""
    return frozenset(frame.name for frame in node["cond_indep_stack"])


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
    """Run a model or guide under a particle plate left of its `nesting` batch dimensions.

    One particle needs no plate, as in Pyro's losses, and the model runs as it is.
    """
    if num_particles == 1:
        return fn
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
    fixed: Model = _Replay(trace)(fn)
    return fixed


class _Replay(ReplayMessenger):
    """Pyro's replay, which leaves a site where it is in `pyro.markov`, for enumeration around it.

    Pyro's own hides the site, and enumeration does not know it where later sites refer to it.
    """

    def _pyro_sample(self, msg: Any) -> None:
        own = msg["infer"]
        super()._pyro_sample(msg)
        markov = {key: own[key] for key in ("_markov_scope", "_markov_depth") if key in own}
        if markov and msg["infer"] is not own:
            msg["infer"] = {**msg["infer"], **markov}
            msg["done"] = will_be_enumerated(msg)


class PositivePairs(Messenger):
    """Collects the pairs (x, z) at which a model is run, by the site of x."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, tuple[ObservedSite, Tensor]] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ObservedSite):
            self.sites[msg["name"]] = (msg["fn"], msg["value"])

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


class CheapLatents(Messenger):
    """Draws latents of conditional LVEBMs from their base, not by a run of annealing for each.

    It is for runs whose values are thrown away. Improper priors have draws, too.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and (value := cheap_draw(msg["fn"])) is not None:
            msg["value"], msg["done"] = value, True


def cheap_draw(fn: Any) -> Tensor | None:
    """Draw a site whose own draws take a run of annealing, or do not exist; None for all others."""
    if isinstance(fn, LatentSite) and fn.context is not None:
        value: Tensor = fn.ebm.base_z.distribution().expand(fn.batch_shape).sample()
        return value
    return uniform_draw(fn, fn.batch_shape) if is_improper(fn) else None


def is_improper(fn: Any) -> bool:
    """Return whether a prior is improper, and has no draws."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, ImproperUniform)


def uniform_draw(fn: Any, batch_shape: torch.Size) -> Tensor:
    """Draw values (*batch_shape, *event_shape), uniform in −2 … 2 in unconstrained coordinates."""
    transform = biject_to(fn.support)
    shape = batch_shape + transform.inverse_shape(fn.event_shape)
    value: Tensor = transform(torch.empty(shape).uniform_(-2.0, 2.0))
    return value


PARTICLE_PLATE = "num_particles_vectorized"
"""Name of the plate that Pyro's ELBOs open for vectorised particles."""


def observed_sites(trace: Trace) -> dict[str, Node]:
    """Observed sites, without factors and deterministic values, which observe nothing."""
    return {
        name: node
        for name, node in sample_nodes(trace).items()
        if node["is_observed"]
        and not isinstance(node["fn"], Unit)
        and not node["infer"].get("_deterministic")
    }


def is_enumerated(node: Node) -> bool:
    """Return whether Pyro has enumerated a site in parallel."""
    return node["infer"].get("_enumerate_dim") is not None


def will_be_enumerated(msg: Any) -> bool:
    """Return whether a latent site asks to be enumerated in parallel, as `poutine.block` asks."""
    asks = msg["type"] == "sample" and (msg["infer"] or {}).get("enumerate") == "parallel"
    return asks and not msg["is_observed"]
