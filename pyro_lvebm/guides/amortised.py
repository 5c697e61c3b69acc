# SPDX-License-Identifier: Apache-2.0
"""Amortised guides: a network from an observation to a Gaussian over its latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.distributions import LatentSite
from pyro_lvebm.guides.incomplete import features, law_of_entries
from pyro_lvebm.guides.networks import zero_network
from pyro_lvebm.guides.rows import KnownRows, open_plates
from pyro_lvebm.missing import Completion, MissingSite
from pyro_lvebm.validation import DataError


class AmortisedGuide(AutoGuide):
    """Skeleton of an encoder for the latent sites of the one LVEBM in a model.

    A subclass says how many outputs its encoder has (`_num_outputs`) and what they mean (`_law`),
    in coordinates whitened by base_z. The last layer starts at zero, so q starts where all
    outputs are zero. Where entries of x are missing, a second network of the same kind gives
    their law first, in coordinates whitened by base_x given the observed entries.
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

    @staticmethod
    def _of_missing(missing: Tensor) -> Tensor:
        """Return which outputs (*b, num_outputs) are about missing entries (*b, d) alone."""
        raise NotImplementedError

    def _read_plates(self, *args: Any, **kwargs: Any) -> None:
        """Learn the latent site and its plates from a run of the model."""
        before = self.prototype_trace, dict(self._prototype_frames)
        super()._setup_prototype(*args, **kwargs)
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        names = [n for n, s in sites.items() if isinstance(s["fn"], LatentSite)]
        missing = [n for n, s in sites.items() if isinstance(s["fn"], MissingSite)]
        expected = [[n, n.removesuffix("_z") + "_missing"][: len(sites)] for n in names]
        if [*names, *missing] not in expected or len(sites) != len(names) + len(missing):
            # A trained encoder must not be taken for one that was never built.
            self.prototype_trace, self._prototype_frames = before
            raise ValueError(
                f"{type(self).__name__} needs a model whose only latents are the z of one LVEBM "
                f"and its missing entries; got {sorted(sites)}. Hide the others with poutine.block"
            )
        self._name, self._missing = names[0], missing[0] if missing else None
        self._site = sites[self._name]
        holes = [~sites[name]["fn"].completion.observed for name in missing]
        x = self._observations(*args, **kwargs)
        if any(bool(part.any()) for part in holes) and not x.isnan().any():
            self.prototype_trace, self._prototype_frames = before
            raise DataError(
                f"entries of x are missing in the model, and none is NaN in what "
                f"{type(self).__name__} sees. Give it observations=..., with NaN at missing "
                "entries, as x.masked_fill(~observed, torch.nan)"
            )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        self._read_plates(*args, **kwargs)
        base_x, base_z = self._site["fn"].ebm.base_x, self._site["fn"].ebm.base_z
        self.encoder = self._network(base_x.dim, base_z.dim).to(base_x.loc)
        if self._missing is not None:
            self.completer = self._network(2 * base_x.dim, base_x.dim).to(base_x.loc)

    def _network(self, num_inputs: int, dim: int) -> nn.Module:
        """Return a network with the outputs of a law in `dim` dimensions, all of them zero."""
        return zero_network([num_inputs, *self._hidden, self._num_outputs(dim)], self._seed)

    def _follow_rows(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the plates of these arguments; the encoder is for any number of rows."""
        if self.master is not None:
            self._rows.check(self, args, kwargs)  # the plates are those of the list
        elif self._rows.changed(self, args, kwargs):
            self._read_plates(*args, **kwargs)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(z | x), of batch shape (*b,), for complete x (*b, *x_shape).

        Raises:
            ValueError: If entries of x are NaN.
        """
        if x.isnan().any():
            raise DataError(
                "x has NaN, and q(z | x) is that of complete rows. Where entries are missing, the "
                "guide itself draws them and z, if they were missing at its first call too: then "
                "every minibatch must open the site of missing entries (observed=...)"
            )
        return self._law_of_z(x)

    def _law_of_z(self, x: Tensor) -> dist.TorchDistribution:
        ebm = self._site["fn"].ebm
        return self._law(self.encoder(ebm.base_x.whiten(x)), ebm.base_z)

    def encode_missing(self, x: Tensor) -> dist.TorchDistribution:
        """Return q(x_m | x_o), of batch shape (*b,), for x (*b, *x_shape) with NaN.

        It is the law of the site `{name}_missing`, over events of the shape of x. Where x is
        observed, it is that of the site itself.
        """
        return self._law_of_missing(self._completion(x))

    def _completion(self, x: Tensor) -> Completion:
        return Completion(self._site["fn"].ebm.base_x, x, ~x.isnan())

    def _law_of_missing(self, completion: Completion) -> dist.TorchDistribution:
        outputs = self.completer(features(completion))
        zeros = completion.mean.new_zeros(completion.dim)
        standard = GaussianBase(zeros, zeros + 1.0)
        # At observed entries all outputs are zero: the standard normal that the site has there.
        law = self._law(outputs * self._of_missing(~completion.observed), standard)
        return law_of_entries(law, completion)

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
            if self._missing is None:
                return {self._name: pyro.sample(self._name, self.encode(x))}
            completion = self._completion(x)
            entries = pyro.sample(self._missing, self._law_of_missing(completion))
            z = pyro.sample(self._name, self._law_of_z(completion.complete(entries)))
            return {self._missing: entries, self._name: z}


class AutoAmortisedNormal(AmortisedGuide):
    """A mean-field Gaussian whose mean and scale are a network of the observation.

        q(z | x) = N(m(x), diag s(x)²),    (m, log s) = MLP(whitened x)

    This is the encoder of a variational autoencoder, for the latent site of one LVEBM in the
    model. x and z are whitened by the bases of the LVEBM, so the first q is base_z. Where entries
    of x are missing, q(x_m, z | x_o) = q(x_m | x_o) q(z | x): a second network, of the observed
    entries and of which these are, gives a Gaussian over the missing ones, in coordinates in which
    base_x(x_m | x_o) is standard normal and where q starts.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent, beside missing
            entries of its x.
        observations: Picks the observations (N, *x_shape) out of the model's arguments, NaN where
            missing; by default the first argument. Minibatches are taken by the indices of the
            data plate, unless these are the rows of the minibatch already.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty; at the first call, if the model has other latents, or
            entries are missing in it that are not NaN in the observations; later, if entries are
            missing that were not at the first call.

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
    def _of_missing(missing: Tensor) -> Tensor:
        return torch.cat([missing, missing], -1)

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
    base_z. Missing entries of x are drawn first, as by `AutoAmortisedNormal`, with correlations.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent, beside missing
            entries of its x.
        observations: Picks the observations (N, *x_shape) out of the model's arguments, NaN where
            missing; by default the first argument. Minibatches are taken by the indices of the
            data plate, unless these are the rows of the minibatch already.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty; at the first call, if the model has other latents, or
            entries are missing in it that are not NaN in the observations; later, if entries are
            missing that were not at the first call.

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
    def _of_missing(missing: Tensor) -> Tensor:
        d = missing.shape[-1]
        rows, columns = torch.tril_indices(d, d, -1, device=missing.device)
        return torch.cat([missing, missing, missing[..., rows] & missing[..., columns]], -1)

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
