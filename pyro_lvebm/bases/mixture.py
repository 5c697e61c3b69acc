# SPDX-License-Identifier: Apache-2.0
"""Mixtures of Gaussians as bases, in coordinates whitened by one Gaussian for all components."""

from __future__ import annotations

import copy
import math

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.bases.mixture_fitting import fit_incomplete_mixture, fit_mixture
from pyro_lvebm.bases.supports import Support
from pyro_lvebm.bases.units import power_of_two
from pyro_lvebm.validation import as_data


class MixtureBase(GaussianBase):
    """A mixture of K Gaussians over events of any shape, whose tensors are buffers.

        x = loc + L w,    w ~ Σ_k π_k N(m_k, S_k S_kᵀ)

    Coordinates w, support and shapes are those of a `GaussianBase`; only the law of w differs, so
    that regions far apart have mass from the start, and negatives that begin there.

    Args:
        gaussian: The Gaussian whose whitened coordinates w are.
        log_weights: log π_k (K,), normalised.
        means: m_k (K, d).
        trils: S_k (K, d, d), lower triangular with a positive diagonal.

    Raises:
        ValueError: If a shape does not fit, weights do not add up to 1, or a scale is not positive
            and finite.

    Example:
        >>> import torch
        >>> draw = torch.Generator().manual_seed(0)
        >>> x = torch.randn(500, 2, generator=draw)
        >>> x[:50] += 8.0  # a rare mode
        >>> base = MixtureBase.fit(x)
        >>> drawn = base.unwhiten(base.draw((2000, 2), x, draw))
        >>> 0.08 < (drawn.mean(1) > 4).double().mean().item() < 0.12
        True
    """

    log_weights: Tensor
    means: Tensor
    trils: Tensor
    inverse_trils: Tensor

    def __init__(
        self, gaussian: GaussianBase, log_weights: Tensor, means: Tensor, trils: Tensor
    ) -> None:
        scale = gaussian.scale
        shape = gaussian.support.unconstrained_shape
        super().__init__(
            gaussian.loc.reshape(shape),
            scale.reshape(shape) if gaussian.diagonal else scale,
            gaussian.support,
        )
        k, d = log_weights.numel(), self.dim
        if log_weights.dim() != 1 or means.shape != (k, d) or trils.shape != (k, d, d):
            raise ValueError(
                f"log_weights, means and trils have shapes {tuple(log_weights.shape)}, "
                f"{tuple(means.shape)} and {tuple(trils.shape)}; expected (K,), (K, {d}) and "
                f"(K, {d}, {d})"
            )
        parts = [part.detach().to(torch.float64) for part in (log_weights, means, trils)]
        if (
            not all(part.isfinite().all() for part in parts[1:])
            or not abs(parts[0].logsumexp(0)) <= 1e-6  # a NaN is not
        ):
            raise ValueError("means and scales must be finite, and weights add up to 1")
        parts[0] = torch.log_softmax(parts[0], 0)
        diagonal = parts[2].diagonal(dim1=-2, dim2=-1)
        if not (diagonal > 0).all() or not torch.equal(parts[2], parts[2].tril()):
            raise ValueError("trils must be lower triangular, with a positive diagonal")
        eye = torch.eye(d, dtype=torch.float64, device=scale.device).expand(k, d, d)
        inverse = torch.linalg.solve_triangular(parts[2], eye, upper=False)
        for name, part in zip(
            ("log_weights", "means", "trils", "inverse_trils"), (*parts, inverse), strict=True
        ):
            self.register_buffer(name, part.to(scale))

    @classmethod
    def fit(
        cls, x: Tensor, support: Support | None = None, *, gaussian: GaussianBase | None = None
    ) -> MixtureBase:
        """Fit a mixture to rows x (N, *event_shape), its size chosen by `fit_mixture`.

        Args:
            x: Rows; NaN where an entry is missing.
            support: Where x lies; the real vectors if None.
            gaussian: The Gaussian whose coordinates it takes; by default `GaussianBase.fit`.

        Raises:
            ValueError: As `GaussianBase.fit`; if rows are infinite, not floating point or of
                another shape than the Gaussian's; if the fit breaks down.
        """
        x = as_data(x, None if gaussian is None else gaussian.event_shape, missing=True)
        base = GaussianBase.fit(x, support) if gaussian is None else gaussian
        wide = copy.deepcopy(base).to(torch.float64)
        y = wide.support.unconstrain(x.detach().to(torch.float64))
        if not y.isnan().any():
            return cls(base, *fit_mixture(wide.whiten_unconstrained(y)))
        unit = power_of_two(wide.tril.diagonal())
        centred = (y.flatten(1) - wide.loc) / unit
        return cls(base, *fit_incomplete_mixture(centred, wide.tril / unit[:, None]))

    @property
    def num_components(self) -> int:
        """K, with the broad component of a fit."""
        return len(self.log_weights)

    @property
    def law(self) -> MixtureBase:
        """The law of w, which is the mixture's own."""
        return self

    def energy(self, w: Tensor) -> Tensor:
        """Return U (*b,) with density exp(−U(w)) / (2π)^(d/2) at w (*b, d), in nats."""
        return -torch.logsumexp(self._terms(w)[0], -1)

    def energy_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return U (*b,) and ∇U (*b, d) at w (*b, d), without a graph."""
        with torch.no_grad():
            terms, r, inverse = self._terms(w)
            energy = -torch.logsumexp(terms, -1)
            share = (terms + energy[..., None]).exp_()
            return energy, (share[..., None] * r).flatten(-2) @ inverse

    def draw(
        self, shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return independent draws of w, of a shape (*b, d)."""
        n = math.prod(shape[:-1])
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        xi = torch.empty(n, self.dim, dtype=like.dtype, device=like.device)
        xi.normal_(generator=generator)
        # A new pool is of single precision until it has its place.
        w = self.means[k] + torch.einsum("nij,nj->ni", self.trils[k], xi.to(self.trils))
        return w.reshape(shape)

    def distribution(self) -> dist.TorchDistribution:
        """Return the Pyro distribution over events."""
        components = dist.MultivariateNormal(
            self.loc + self.means @ self.tril.T, scale_tril=self.tril @ self.trils
        )
        law: dist.TorchDistribution = dist.MixtureSameFamily(
            dist.Categorical(logits=self.log_weights), components
        )
        if not self.support.is_real:
            law = dist.TransformedDistribution(law, [self.support.transform])
        return law

    def _terms(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log π_k N(w; m_k, S_k S_kᵀ) but for a constant, r_k = S_k⁻¹ (w − m_k), and all S_k⁻¹."""
        inverse = self.inverse_trils.flatten(0, 1)  # (K d, d)
        shift = torch.einsum("kij,kj->ki", self.inverse_trils, self.means)
        r = (w @ inverse.T).unflatten(-1, self.means.shape) - shift
        log_det = self.inverse_trils.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.log_weights + log_det - 0.5 * r.square().sum(-1), r, inverse
