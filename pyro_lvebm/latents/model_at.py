# SPDX-License-Identifier: Apache-2.0
"""A model at fixed latents, run for all particles at once, and models that cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from pyro_lvebm.latents.program import Program
from pyro_lvebm.sites import Node, sample_nodes

_FROM_THE_RIGHT = (
    "The model runs for all particles at once, with an axis for them left of those of its plates: "
    "count axes from the right, as in z[..., 0] in place of z[:, 0] and z.sum(-1) in place of "
    "z.sum(). One particle, AutoParticles(model, num_particles=1), needs no such axis"
)


@dataclass(frozen=True)
class ModelAt:
    """A program with fixed latents and minibatch, to run for any number of particles."""

    program: Program
    nodes: dict[str, Node]
    num_particles: int  # of the latents in `nodes`

    @property
    def nesting(self) -> int:
        """Number of batch dimensions of the model."""
        return self.program.nesting

    def trace(self, num_particles: int, **values: Tensor) -> Trace:
        """Trace the vectorised model, with the values of some sites replaced.

        Sites with `infer={"enumerate": "parallel"}` are enumerated left of the particles.

        Raises:
            ValueError: If the model runs for one particle, and fails for all at once.
        """
        nodes = self._nodes(values)
        try:
            return self._run(nodes, num_particles)
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
            if num_particles == 1 or not self._runs_alone(nodes):
                raise
            raise ValueError(
                f"the model runs for one particle, and fails for {num_particles} at once: "
                f"{str(error).partition('Trace Shapes')[0].strip()}. {_FROM_THE_RIGHT}"
            ) from error

    def check_vectorised(self) -> None:
        """Compare log probabilities of the first particle among all with those of it alone.

        A model that runs for all at once may still mean something else, as where `z[:, 0]` is the
        first datum and not the first entry. One that draws random numbers is not compared.

        Raises:
            ValueError: If they differ, or the model fails for all particles at once.
        """
        together = self._log_probs(self.trace(self.num_particles))
        alone, again = (self._log_probs(self._run(_first(self), 1)) for _ in range(2))
        for name, value in alone.items():
            if name not in together or not torch.equal(value, again[name]):
                continue
            if not torch.allclose(together[name], value, rtol=1e-3, atol=1e-3, equal_nan=True):
                raise ValueError(
                    f"site '{name}' has another log probability for the first of "
                    f"{self.num_particles} particles ({float(together[name]):.4g} nats) than for "
                    f"that particle alone ({float(value):.4g} nats). {_FROM_THE_RIGHT}"
                )

    def _nodes(self, values: dict[str, Tensor]) -> dict[str, Node]:
        return self.nodes | {n: {**self.nodes[n], "value": v} for n, v in values.items()}

    def _run(self, nodes: dict[str, Node], num_particles: int) -> Trace:
        fixed = self.program.vectorised(self.program.model, num_particles, nodes)
        return self.program.trace(poutine.enum(fixed, first_available_dim=-self.nesting - 2))

    def _runs_alone(self, nodes: dict[str, Node]) -> bool:
        try:
            self._run(_first(ModelAt(self.program, nodes, self.num_particles)), 1)
        except Exception:
            return False
        return True

    def _log_probs(self, trace: Trace) -> dict[str, Tensor]:
        """Log probabilities of the first particle, summed over all other axes, by site."""
        trace.compute_log_prob()
        parts = {name: node["log_prob"] for name, node in sample_nodes(trace).items()}
        axis = -self.nesting - 1
        return {n: (p.select(axis, 0) if p.dim() >= -axis else p).sum() for n, p in parts.items()}


def _first(at: ModelAt) -> dict[str, Node]:
    """Return the nodes of the first particle, shaped as in the plain model."""
    nodes = dict(at.nodes)
    for name, site in at.program.sites.items():
        if name not in nodes or nodes[name]["is_observed"]:
            continue
        value = nodes[name]["value"]
        axes = len(site["fn"].batch_shape) + len(site["fn"].event_shape)
        if value.dim() > axes:
            value = value[0].reshape(value.shape[value.dim() - axes :])
        nodes[name] = {**nodes[name], "value": value}
    return nodes


def depends_on(value: Tensor, v: Tensor) -> bool:
    """Return whether a value depends on v, by autograd."""
    if not value.requires_grad or not v.requires_grad:
        return False
    (grad,) = torch.autograd.grad(value.sum(), v, allow_unused=True, retain_graph=True)
    return grad is not None


def check_particles_apart(name: str, log_prob: Tensor, value: Tensor, nesting: int) -> None:
    """Refuse a site at which the log probability of one particle depends on the others, too.

    Args:
        name: The site.
        log_prob: Its log probability, vectorised.
        value: Particles (K, *b) that it may depend on, by autograd.
        nesting: Number of batch axes of the plain model.

    Raises:
        ValueError: If it does.
    """
    if not depends_on(log_prob, value):
        return
    first = log_prob.select(-nesting - 1, 0) if log_prob.dim() > nesting else log_prob
    (grad,) = torch.autograd.grad(first.sum(), value, allow_unused=True, retain_graph=True)
    if grad is not None and bool((grad[1:] != 0.0).any()):
        raise ValueError(f"site '{name}' mixes the {len(value)} particles. {_FROM_THE_RIGHT}")
