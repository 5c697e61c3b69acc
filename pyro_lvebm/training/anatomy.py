# SPDX-License-Identifier: Apache-2.0
"""What a Saddle needs to know of a model and a guide before the first step."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from pyro_lvebm.guides import check_guide, claim, find_particles, needs_rows, unbuilt_on_error
from pyro_lvebm.latents import ModelAt, Program
from pyro_lvebm.model import LVEBM, context_rows, pools_at_rest
from pyro_lvebm.rng import Stream, isolated_rng
from pyro_lvebm.sites import (
    CheapLatents,
    GivenRows,
    Model,
    Node,
    ObservedSite,
    all_nodes,
    at_minibatch,
    energy_modules,
    num_sites,
    plate_nesting,
    sample_nodes,
    subsample_nodes,
)
from pyro_lvebm.training.step import check_not_replayed


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


def inspect(program: Program, guide: Model, loss: Any) -> Anatomy:
    """Run model and guide once, refuse a guide that cannot work, and name the parts.

    Without particles they run as the loss runs them, so that what `SVI` takes is taken: latents
    from the guide, vectorised and enumerated as the loss has them.

    Args:
        program: The model and its arguments.
        guide: The guide.
        loss: What will be minimised, an `ELBO` or a function of model, guide and arguments.

    Raises:
        ValueError: If the guide or the loss cannot work with the model, an energy depends on a
            latent beside its own x and z, or parameters are not in Pyro's store or those of another
            guide.
    """
    particles = find_particles(guide)
    check_not_replayed(loss, [], particles is not None)
    with unbuilt_on_error(guide), poutine.block(), pools_at_rest(), CheapLatents():
        if particles is None:
            traces = _as_the_loss(program, guide, loss)
            model_trace = traces[0]
        else:
            with torch.no_grad():
                model_trace = program.prototype
        check_guide(guide, model_trace)
        found = energy_modules(model_trace)
        for ebm in found:
            num_sites(model_trace, ebm)
        with torch.no_grad():
            if found:
                with isolated_rng(0, Stream.PROBED_ENERGIES, device=program.device):
                    _check_energies(program, guide if particles is None else None)
            if particles is not None:
                traces = [model_trace, program.trace(GivenRows()(guide))]
                _check_vectorised(program, guide, particles.num_particles)
    claim(program.model, model_trace)
    claim(guide, traces[1], model_trace)
    sites = {
        id(node["fn"].ebm): name
        for name, node in reversed(all_nodes(model_trace).items())
        if isinstance(node.get("fn"), ObservedSite)
    }
    ebms = {sites[id(ebm)]: ebm for ebm in found}
    modules: list[nn.Module] = [*ebms.values()]
    if isinstance(guide, nn.Module):
        modules.append(guide)
    owned = {id(p) for module in modules for p in module.parameters()}
    params = [
        {
            name: _unconstrained(name, node)
            for name, node in all_nodes(trace).items()
            if node["type"] == "param"
        }
        for trace in traces
    ]
    loose = {n: p for part in params for n, p in part.items() if id(p) not in owned}
    energies = {id(p) for ebm in ebms.values() for p in ebm.parameters()}
    beside = {n: p for n, p in params[0].items() if id(p) not in energies}
    return Anatomy(max(plate_nesting(trace) for trace in traces), ebms, loose, beside)


def check_precision(ebms: dict[str, LVEBM], loose_params: dict[str, Tensor], guide: Model) -> None:
    """Refuse parameters of half precision.

    Raises:
        ValueError: If one is float16 or bfloat16.
    """
    owned = [(f"energy of '{site}'", p) for site, ebm in ebms.items() for p in ebm.parameters()]
    if isinstance(guide, nn.Module):
        owned += [("guide", p) for p in guide.parameters()]
    for name, param in [*owned, *((f"parameter '{n}'", p) for n, p in loose_params.items())]:
        if param.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"the {name} has type {param.dtype}, in which training cannot work: the eps of an "
                "Adam, 1e-8, is 0 in float16, and a small update of a number is none in either. "
                "Train in float32 or float64, as after ebm.float(), with data of that type"
            )


class _Seen(TraceMessenger):
    """A trace around a function that stays one, by which Pyro knows a guide that is a handler."""

    def __call__(self, fn: Model) -> Model:  # type: ignore[override]
        return Messenger.__call__(self, fn)


def _as_the_loss(program: Program, guide: Model, loss: Any) -> list[Trace]:
    """Trace model and guide in an evaluation of the loss, and the parameters of all its runs."""
    model_run, guide_run, kept = _Seen(), _Seen(), guide
    needed = needs_rows(guide)
    model = model_run(GivenRows(needed=needed)(program.model))
    guide = guide_run(GivenRows(needed=needed)(guide))
    own: Any = copy.copy(loss)  # Pyro's losses keep what they learn at their first evaluation
    run = own.loss if isinstance(loss, ELBO) else own
    with warnings.catch_warnings(), poutine.trace(param_only=True) as params:
        warnings.simplefilter("ignore")  # the first step has them again
        try:
            with torch.no_grad():
                run(model, guide, *program.args, **program.kwargs)
        except ZeroDivisionError:  # Pyro's scale of a minibatch without rows
            program.trace(GivenRows(needed=needed)(program.model))
            raise
        except Exception as error:
            _check_unsuited(program, kept)
            if not isinstance(error, RuntimeError):
                raise
            # A model or a loss may take derivatives itself.
            run(model, guide, *program.args, **program.kwargs)
    # A guide that is a handler runs the model itself.
    model_trace = model_run.trace if model_run.trace.nodes else guide_run.trace
    return [model_trace, guide_run.trace, params.trace]


def _check_unsuited(program: Program, guide: Model) -> None:
    """Say if it is the guide that cannot work."""
    try:
        with torch.no_grad():
            model_trace = program.prototype
    except Exception:  # the model alone may not run, as with an improper prior
        return
    check_guide(guide, model_trace)


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


def _check_vectorised(program: Program, guide: Model, num_particles: int) -> None:
    """Refuse a model that is another one where it runs for all particles at once."""
    if num_particles == 1:
        return
    choices = subsample_nodes(program.prototype)
    drawn = program.trace(program.vectorised(guide, num_particles, choices))
    nodes = choices | {n: d for n, d in all_nodes(drawn).items() if d["type"] == "sample"}
    ModelAt(program, nodes, num_particles).check_vectorised()


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


def _check_energies(program: Program, guide: Model | None) -> None:
    """Refuse an energy that changes with a latent, by drawing latents anew.

    Args:
        program: The model and its arguments.
        guide: What the latents are drawn from at first; their prior if None.

    Raises:
        ValueError: If one does.
    """
    trace = program.prototype
    if guide is not None:
        drawn = all_nodes(program.trace(GivenRows()(guide)))
        drawn = {name: node for name, node in drawn.items() if node["type"] == "sample"}
        trace = program.trace(at_minibatch(GivenRows()(program.model), drawn))
    others = {n: d for n, d in all_nodes(trace).items() if d["type"] == "sample"}
    latents = [name for name, node in sample_nodes(trace).items() if not node["is_observed"]]
    if len(latents) < 2:
        return

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
