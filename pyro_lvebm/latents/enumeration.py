# SPDX-License-Identifier: Apache-2.0
"""Discrete latents of each datum, summed out of the energy of its continuous ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pyro_lvebm.sites import PARTICLE_PLATE, MissingSite, Node, is_enumerated


def check_latents_held(nodes: dict[str, Node], held: set[str], particles: list[str]) -> None:
    """Refuse latents that would be drawn anew at every Langevin move.

    Args:
        nodes: Sample sites of the model by name, at the particles.
        held: Names of the sites that a guide holds.
        particles: Names of the sites of the particles, for the message.

    Raises:
        ValueError: If there are any.
    """
    for name, node in nodes.items():
        if node["is_observed"] or name in held or is_enumerated(node):
            continue
        if type(node["fn"]).__name__ == "Delta":
            continue
        if isinstance(node["fn"], MissingSite):
            raise ValueError(
                f"'{name.removesuffix('_missing')}' has missing entries, and had none when the "
                "guide was made. Make a new guide with such data, and give lvebm(..., "
                "observed=...) where only some minibatches have missing entries"
            )
        later = list(nodes)[list(nodes).index(name) + 1 :]
        if not any(nodes[n]["is_observed"] or n in held for n in later):
            raise ValueError(
                f"'{name}' is not observed, no guide has it, and nothing observed comes after it: "
                "it is a prediction. Leave it to pyro.infer.Predictive(model, posterior_samples=..."
                f"), and hide it here with poutine.block(model, hide=['{name}']), or give its "
                "observations"
            )
        discrete = node["fn"].support.is_discrete
        cure = 'give it infer={"enumerate": "parallel"} and train with TraceEnum_ELBO,' * discrete
        raise ValueError(
            f"the latent '{name}' has no guide, so the energy in which the particles of "
            f"{particles} move would change with every draw of it: {cure} observe it, or give it "
            "a guide in an AutoGuideList"
        )


def check_enumerated(
    nodes: dict[str, Node], terms: Iterable[Tensor], plates: set[str], latent: str
) -> None:
    """Refuse enumerated sites that are not one value for each datum of the particles.

    Args:
        nodes: Sample sites of the model by name.
        terms: Log probabilities of those in the plates of the particles.
        plates: Names of the plates of the particles.
        latent: A site of the particles, for the message.

    Raises:
        ValueError: If there are any.
    """
    sizes = torch.broadcast_shapes(*(term.shape for term in terms))
    owners: dict[int, str] = {}
    for name, node in nodes.items():
        dim = node["infer"].get("_enumerate_dim")
        if dim is None or -dim > len(sizes) or sizes[dim] == 1:
            continue  # the energy does not depend on it
        own = {f.name for f in node["cond_indep_stack"] if f.vectorized} - {PARTICLE_PLATE}
        if own != plates or owners.setdefault(dim, name) != name:
            raise ValueError(
                f"the enumerated site '{name}' lies in the plates {sorted(own)}, and the particles "
                f"of '{latent}' in {sorted(plates)}. A discrete latent is summed out of the energy "
                "of a datum where both lie in the same plates, outside pyro.markov. Use a guide "
                "with a density, such as AutoNormal, with TraceEnum_ELBO"
            )


def sum_out(terms: dict[str, Tensor], nodes: dict[str, Node], num_axes: int) -> Tensor:
    """Sum log probabilities, and enumerated sites out of their exponential.

        s log Σ_c exp(Σ_i log p_i / s),    s the scale of the sites that depend on c

    Args:
        terms: Log probabilities (*enumerated, *b) by site, with their scales.
        nodes: The sites.
        num_axes: Number of batch axes b that are not enumerated.

    Returns:
        A tensor (*b).

    Raises:
        ValueError: If sites that depend on an enumerated one differ in scale.
    """
    total = torch.stack(torch.broadcast_tensors(*terms.values())).sum(0)
    extra = total.dim() - num_axes
    if extra <= 0:
        return total
    scales = [
        torch.as_tensor(nodes[name]["scale"]).to(total)
        for name, term in terms.items()
        if term.dim() > num_axes
    ]
    if any(not torch.allclose(scale, scales[0], atol=0.0) for scale in scales):
        raise ValueError("sites that depend on an enumerated one differ in scale (poutine.scale)")
    return scales[0] * (total / scales[0]).flatten(0, extra - 1).logsumexp(0)
