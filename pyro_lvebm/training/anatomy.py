# SPDX-License-Identifier: Apache-2.0
"""What a Saddle needs to know of a model and a guide before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_lvebm.guides import check_guide, claim
from pyro_lvebm.latents import Program
from pyro_lvebm.model import LVEBM, context_rows
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sites import (
    CheapLatents,
    GivenRows,
    Model,
    Node,
    ObservedSite,
    all_nodes,
    at_minibatch,
    num_sites,
    plate_nesting,
)


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model and its guide."""

    nesting: int  # number of batch dimensions of model and guide
    ebms: dict[str, LVEBM]  # by the site of x, the first if there are several
    loose_params: dict[str, Tensor]  # unconstrained parameters outside all modules, by name
    beside: dict[str, Tensor]  # unconstrained parameters of the model outside its LVEBMs, by name

    def check_frozen(self) -> str | None:
        """Say what trains on while all LVEBMs are frozen, if anything of the model does."""
        if not self.ebms or not all(ebm.is_frozen for ebm in self.ebms.values()):
            return None
        names = sorted(name for name, p in self.beside.items() if p.requires_grad)
        if not names:
            return None
        return (
            f"ebm.frozen() holds the energy fixed, but the model's own parameters {names} train "
            "on, so that this is another model than the one fitted before. To train a guide with "
            "all of the model held fixed: saddle.fit_guide(guide, ...)"
        )


def inspect(program: Program, guide: Model) -> Anatomy:
    """Run model and guide once, refuse a guide that cannot work, and name the parts.

    Raises:
        ValueError: If the guide cannot work with the model, an energy depends on a latent beside
            its own x and z, or parameters are not in Pyro's store or those of another guide.
    """
    with torch.no_grad(), poutine.block(), CheapLatents():
        model_trace = program.prototype
        check_guide(guide, model_trace)
        for ebm in program.ebms:
            num_sites(model_trace, ebm)
        with isolated_rng(0, Stream.PROBED_ENERGIES, device=program.device):
            _check_energies(program)
        guide_trace = program.trace(GivenRows()(guide))
    claim(program.model, model_trace)
    claim(guide, guide_trace, model_trace)
    sites = {
        id(node["fn"].ebm): name
        for name, node in reversed(all_nodes(model_trace).items())
        if isinstance(node.get("fn"), ObservedSite)
    }
    ebms = {sites[id(ebm)]: ebm for ebm in program.ebms}
    modules: list[nn.Module] = [*ebms.values()]
    if isinstance(guide, nn.Module):
        modules.append(guide)
    owned = {id(p) for module in modules for p in module.parameters()}
    of_model, of_guide = (
        {
            name: _unconstrained(name, node)
            for name, node in all_nodes(trace).items()
            if node["type"] == "param"
        }
        for trace in (model_trace, guide_trace)
    )
    loose = {n: p for n, p in (of_model | of_guide).items() if id(p) not in owned}
    energies = {id(p) for ebm in ebms.values() for p in ebm.parameters()}
    beside = {n: p for n, p in of_model.items() if id(p) not in energies}
    nesting = max(program.nesting, plate_nesting(guide_trace))
    return Anatomy(nesting, ebms, loose, beside)


def _unconstrained(name: str, node: Node) -> Tensor:
    value = node["value"]
    if not hasattr(value, "unconstrained"):
        raise ValueError(
            f"parameter '{name}' is not in Pyro's parameter store, where Saddle finds what it "
            "trains, as SVI does. Leave pyro.settings 'module_local_params' off, or train with "
            "Trace_ELBO()(model, guide) and an optimiser of torch"
        )
    unconstrained: Tensor = value.unconstrained()
    return unconstrained


class _Energies(Messenger):
    """Evaluates the energy of every LVEBM site at two fixed pairs (x, z)."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], ObservedSite):
            ebm = msg["fn"].ebm
            u = torch.tensor([[-0.5], [0.5]]).to(ebm.base_x.loc).expand(2, ebm.dim)
            rows = context_rows(msg["fn"].context, ebm.context_shape)
            u = u.reshape(2, *[1] * len(rows), ebm.dim).expand(2, *rows, ebm.dim)
            energy = ebm.energy(*ebm.unwhiten(u), msg["fn"].context)
            self.values[msg["name"]] = energy.detach().clone()


def _check_energies(program: Program) -> None:
    """Refuse an energy that changes with a latent, by drawing latents anew.

    Raises:
        ValueError: If one does.
    """
    latents = list(program.latents)
    if len(latents) < 2:
        return
    others = {n: d for n, d in all_nodes(program.prototype).items() if d["type"] == "sample"}

    def energies(redrawn: list[str]) -> dict[str, Tensor]:
        kept = {name: node for name, node in others.items() if name not in redrawn}
        with _Energies() as seen:
            at_minibatch(program.model, kept)(*program.args, **program.kwargs)
        return seen.values

    start = energies([])
    if not _changed(start, energies(latents)):
        return
    for latent in latents:
        for site in _changed(start, energies([latent])):
            raise ValueError(
                f"the energy of '{site}' depends on the latent '{latent}', so that log Z varies "
                "with it and a pool, which estimates it at one value only, is wrong at all "
                f"others: the posterior of '{latent}' is doubly intractable. Let '{latent}' act "
                "on x or on what follows from z, or make it a parameter (pyro.param)"
            )


def _changed(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in a if n in b and not torch.equal(a[n].nan_to_num(), b[n].nan_to_num())]
