# SPDX-License-Identifier: Apache-2.0
"""An amortised guide: a network from an observation to a Gaussian over its latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pyro_lvebm.distributions import LatentSite
from pyro_lvebm.rng import isolated_rng


class AutoAmortisedNormal(AutoGuide):
    """A mean-field Gaussian whose mean and scale are a network of the observation.

        q(z | x) = N(m(x), diag s(x)²),    (m, log s) = MLP(whitened x)

    This is the encoder of a variational autoencoder, for the latent site of one LVEBM in the
    model. x and z are whitened by the bases of the LVEBM, so the first q is base_z.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent.
        observations: Picks the observations (N, *x_shape) out of the model's arguments; by
            default the first argument. Minibatches are taken by the indices of the data plate.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty, or (at the first call) the model has other latents.

    Source:
        Kingma and Welling (2014), Auto-encoding variational Bayes, section 3.
    """

    prototype_trace: Any  # a `Trace`; None before the first call

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        observations: Callable[..., Tensor] | None = None,
        hidden: Sequence[int] = (128, 128),
        seed: int = 0,
    ) -> None:
        if not hidden or any(width < 1 for width in hidden):
            raise ValueError(f"hidden must name at least one positive width; got {tuple(hidden)}")
        super().__init__(model)
        self._observations = (lambda x, *_, **__: x) if observations is None else observations
        self._hidden, self._seed = tuple(hidden), seed

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        names = [n for n, s in sites.items() if isinstance(s["fn"], LatentSite)]
        if len(sites) != 1 or not names:
            self.prototype_trace = None
            raise ValueError(
                "AutoAmortisedNormal needs a model whose only latent is the z of one LVEBM; got "
                f"{sorted(sites)}. Hide the others with poutine.block"
            )
        self._name = names[0]
        self._site = sites[self._name]
        ebm = self._site["fn"].ebm
        widths = [ebm.base_x.dim, *self._hidden]
        with isolated_rng(self._seed):
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.SiLU()]
            out = nn.Linear(widths[-1], 2 * ebm.base_z.dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.encoder = nn.Sequential(*layers, out).to(ebm.base_x.loc)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x), of batch shape (*b,), for x (*b, *x_shape)."""
        ebm = self._site["fn"].ebm
        mean, log_scale = self.encoder(ebm.base_x.whiten(x)).chunk(2, -1)
        if not ebm.base_z.diagonal:
            tril = ebm.base_z.scale * log_scale.exp()[..., None, :]
            return dist.MultivariateNormal(ebm.base_z.unwhiten(mean), scale_tril=tril)
        shape = (*mean.shape[:-1], *ebm.z_shape)
        scale = (ebm.base_z.scale * log_scale.exp()).reshape(shape)
        normal = dist.Normal(ebm.base_z.unwhiten(mean), scale)
        q: dist.TorchDistribution = normal.to_event(len(ebm.z_shape))
        return q

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latent of every row of the minibatch."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        x = self._observations(*args, **kwargs)
        with ExitStack() as stack:
            for frame in self._site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
                axis = x.dim() - len(self._site["fn"].ebm.x_shape) + frame.dim
                indices = plates[frame.name]._indices
                if len(indices) != x.shape[axis]:
                    x = x.index_select(axis, indices)
            return {self._name: pyro.sample(self._name, self.encode(x))}
