# SPDX-License-Identifier: Apache-2.0
"""Amortised guides: a network from an observation to a Gaussian over its latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.distributions import LatentSite
from pyro_lvebm.guides.networks import as_pyro_params
from pyro_lvebm.guides.rows import KnownRows, open_plates
from pyro_lvebm.rng import isolated_rng


class AmortisedGuide(AutoGuide):
    """Skeleton of an encoder for the latent site of the one LVEBM in a model.

    A subclass says how many outputs its encoder has (`_num_outputs`) and what they mean (`_law`),
    in coordinates whitened by base_z. The last layer starts at zero, so q starts where all
    outputs are zero.
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
        self._rows = KnownRows()

    @staticmethod
    def _num_outputs(dim: int) -> int:
        """Return the number of outputs for a latent with `dim` entries."""
        raise NotImplementedError

    @staticmethod
    def _law(outputs: Tensor, base: GaussianBase) -> dist.TorchDistribution:
        """Return q (*b,) over events of base_z, for outputs (*b, num_outputs)."""
        raise NotImplementedError

    def _read_plates(self, *args: Any, **kwargs: Any) -> None:
        """Learn the latent site and its plates from a run of the model."""
        before = self.prototype_trace, dict(self._prototype_frames)
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        names = [n for n, s in sites.items() if isinstance(s["fn"], LatentSite)]
        if len(sites) != 1 or not names:
            # A trained encoder must not be taken for one that was never built.
            self.prototype_trace, self._prototype_frames = before
            raise ValueError(
                f"{type(self).__name__} needs a model whose only latent is the z of one LVEBM; got "
                f"{sorted(sites)}. Hide the others with poutine.block"
            )
        self._name = names[0]
        self._site = sites[self._name]

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._read_plates(*args, **kwargs)
        ebm = self._site["fn"].ebm
        widths = [ebm.base_x.dim, *self._hidden]
        with isolated_rng(self._seed):
            layers: list[nn.Module] = []
            for a, b in pairwise(widths):
                layers += [nn.Linear(a, b), nn.SiLU()]
            out = nn.Linear(widths[-1], self._num_outputs(ebm.base_z.dim))
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.encoder = as_pyro_params(nn.Sequential(*layers, out).to(ebm.base_x.loc))

    def _follow_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the plates of these arguments; the encoder is for any number of rows."""
        if self.master is not None:
            self._rows.check(self, args, kwargs)  # the plates are those of the list
        elif self._rows.changed(self, args, kwargs):
            self._read_plates(*args, **kwargs)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x), of batch shape (*b,), for x (*b, *x_shape)."""
        ebm = self._site["fn"].ebm
        return self._law(self.encoder(ebm.base_x.whiten(x)), ebm.base_z)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latent of every row of the minibatch."""
        rows = self._rows.given(self, args, kwargs)
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._follow_rows(args, kwargs)
        plates = open_plates(self, rows, args, kwargs)
        x = self._observations(*args, **kwargs)
        with ExitStack() as stack:
            for frame in self._site["cond_indep_stack"]:
                stack.enter_context(plates[frame.name])
                axis = x.dim() - len(self._site["fn"].ebm.x_shape) + frame.dim
                indices = plates[frame.name]._indices
                if len(indices) != x.shape[axis]:
                    x = x.index_select(axis, indices)
            return {self._name: pyro.sample(self._name, self.encode(x))}


class AutoAmortisedNormal(AmortisedGuide):
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

    Example:
        >>> import pyro, torch
        >>> from pyro_lvebm import LVEBM, AutoAmortisedNormal, QuadraticEnergy, lvebm
        >>> data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), data, z_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x), subsample_size=10) as i:
        ...         lvebm("scene", ebm, obs=x[i])
        >>> guide = AutoAmortisedNormal(model, hidden=(16,))
        >>> guide(data)["scene_z"].shape
        torch.Size([10, 2])
        >>> guide.encode(data).mean.shape
        torch.Size([50, 2])
    """

    @staticmethod
    def _num_outputs(dim: int) -> int:
        return 2 * dim

    @staticmethod
    def _law(outputs: Tensor, base: GaussianBase) -> dist.TorchDistribution:
        mean, log_scale = outputs.chunk(2, -1)
        if not base.diagonal:
            return _gaussian(base, mean, log_scale.exp().diag_embed())
        shape = (*mean.shape[:-1], *base.event_shape)
        scale = (base.scale * log_scale.exp()).reshape(shape)
        normal = dist.Normal(base.unwhiten(mean), scale)
        q: dist.TorchDistribution = normal.to_event(len(base.event_shape))
        return q


class AutoAmortisedMultivariateNormal(AmortisedGuide):
    """A Gaussian whose mean and full covariance are a network of the observation.

        q(z | x) = N(m(x), T(x) T(x)ᵀ),    (m, log diag T, T below its diagonal) = MLP(whitened x)

    It is `AutoAmortisedNormal` with correlations: d (d + 3) / 2 outputs for a latent with d
    entries in place of 2 d. x and z are whitened by the bases of the LVEBM, so the first q is
    base_z.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent.
        observations: Picks the observations (N, *x_shape) out of the model's arguments; by
            default the first argument. Minibatches are taken by the indices of the data plate.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty, or (at the first call) the model has other latents.

    Source:
        Kingma and Welling (2019), An introduction to variational autoencoders, section 2.5.1.

    Example:
        >>> import pyro, torch
        >>> from pyro_lvebm import LVEBM, AutoAmortisedMultivariateNormal, QuadraticEnergy, lvebm
        >>> data = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), data, z_dim=2)
        >>> def model(x):
        ...     with pyro.plate("data", len(x), subsample_size=10) as i:
        ...         lvebm("scene", ebm, obs=x[i])
        >>> guide = AutoAmortisedMultivariateNormal(model, hidden=(16,))
        >>> guide(data)["scene_z"].shape
        torch.Size([10, 2])
        >>> guide.encode(data).covariance_matrix.shape
        torch.Size([50, 2, 2])
    """

    @staticmethod
    def _num_outputs(dim: int) -> int:
        return dim * (dim + 3) // 2

    @staticmethod
    def _law(outputs: Tensor, base: GaussianBase) -> dist.TorchDistribution:
        d = base.dim
        mean, log_scale, below = outputs.split([d, d, d * (d - 1) // 2], -1)
        tril = log_scale.exp().diag_embed()
        rows, columns = torch.tril_indices(d, d, -1, device=outputs.device)
        tril[..., rows, columns] = below
        return _gaussian(base, mean, tril)


def _gaussian(base: GaussianBase, mean: Tensor, tril: Tensor) -> dist.TorchDistribution:
    """Return N(mean, tril trilᵀ) of whitened z (*b, d), as a law of z (*b, *z_shape)."""
    scale = base.scale.diag() if base.diagonal else base.scale
    q: dist.TorchDistribution = dist.MultivariateNormal(
        base.loc + mean @ scale.T, scale_tril=scale @ tril
    )
    if len(base.event_shape) != 1:
        q = dist.TransformedDistribution(q, [ReshapeTransform(q.event_shape, base.event_shape)])
    return q
