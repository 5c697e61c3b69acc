# SPDX-License-Identifier: Apache-2.0
"""Amortised guides: a network from an observation to a Gaussian over its latent."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from pyro_lvebm.bases import GaussianBase
from pyro_lvebm.guides.encoder import AmortisedGuide


class AutoAmortisedNormal(AmortisedGuide):
    """A mean-field Gaussian whose mean and scale are a network of the observation.

        q(z | x) = N(m(x), diag s(x)²),    (m, log s) = MLP(whitened x)

    This is the encoder of a variational autoencoder, for the latent site of one LVEBM in the
    model. x and z are whitened by the bases of the LVEBM, so the first q is base_z. Where entries
    of x are missing, q(x_m, z | x_o) = q(x_m | x_o) q(z | x): a second network, of the observed
    entries and of which these are, gives a Gaussian over the missing ones, in coordinates in which
    base_x(x_m | x_o) is standard normal and where q starts. Where the LVEBM is conditional, the
    networks get the context c of each row too, and q is q(z | x, c). Contexts, and which entries
    are missing, come from a run of the model up to the sites of the LVEBM, at every call.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent, beside missing
            entries of its x.
        observations: Picks the observations (N, *x_shape) out of the model's arguments, NaN where
            missing; by default the first argument. Minibatches are taken by the indices of the
            data plate, unless these are the rows of the minibatch already.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty; at the first call, if the model has other latents; at any
            call, if other entries are missing in it than are NaN in the observations; later, if
            entries are missing and none were at the first call.

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
            return _gaussian(base, mean, _scale(log_scale).diag_embed())
        shape = (*mean.shape[:-1], *base.event_shape)
        scale = (base.scale * _scale(log_scale)).reshape(shape)
        normal = dist.Normal(base.unwhiten(mean), scale)
        q: dist.TorchDistribution = normal.to_event(len(base.event_shape))
        return q


class AutoAmortisedMultivariateNormal(AmortisedGuide):
    """A Gaussian whose mean and full covariance are a network of the observation.

        q(z | x) = N(m(x), T(x) T(x)ᵀ),    (m, log diag T, T below its diagonal) = MLP(whitened x)

    It is `AutoAmortisedNormal` with correlations: d (d + 3) / 2 outputs for a latent with d
    entries in place of 2 d. x and z are whitened by the bases of the LVEBM, so the first q is
    base_z. Missing entries of x are drawn first, as by `AutoAmortisedNormal`, with correlations,
    and contexts are taken as there.

    Args:
        model: A Pyro model with exactly one LVEBM, whose z is the only latent, beside missing
            entries of its x.
        observations: Picks the observations (N, *x_shape) out of the model's arguments, NaN where
            missing; by default the first argument. Minibatches are taken by the indices of the
            data plate, unless these are the rows of the minibatch already.
        hidden: Width of each hidden layer.
        seed: Fixes the initial weights.

    Raises:
        ValueError: If hidden is empty; at the first call, if the model has other latents; at any
            call, if other entries are missing in it than are NaN in the observations; later, if
            entries are missing and none were at the first call.

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
        tril = _scale(log_scale).diag_embed()
        rows, columns = torch.tril_indices(d, d, -1, device=outputs.device)
        tril[..., rows, columns] = below
        return _gaussian(base, mean, tril)


def _scale(a: Tensor) -> Tensor:
    """Return exp(a), with a bent from −9 and 1 on so that it stays between −10 and 2.

    On a sharp posterior the first steps of an encoder overshoot, and exp would overflow, or end
    at 0. Where q is sensible nothing is bent.
    """
    inside = a.clamp(-9.0, 1.0)
    return (inside + torch.tanh(a - inside)).exp()


def _gaussian(base: GaussianBase, mean: Tensor, tril: Tensor) -> dist.TorchDistribution:
    """Return N(mean, tril trilᵀ) of whitened z (*b, d), as a law of z (*b, *z_shape)."""
    scale = base.scale.diag() if base.diagonal else base.scale
    q: dist.TorchDistribution = dist.MultivariateNormal(
        base.loc + mean @ scale.T, scale_tril=scale @ tril
    )
    if len(base.event_shape) != 1:
        q = dist.TransformedDistribution(q, [ReshapeTransform(q.event_shape, base.event_shape)])
    return q
