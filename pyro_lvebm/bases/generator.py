# SPDX-License-Identifier: Apache-2.0
"""The base of x given z: a Gaussian around what a generator makes of z."""

from __future__ import annotations

import copy
import math
from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_lvebm.bases.factor_analysis import factor_analysis, rows_with_covariance
from pyro_lvebm.bases.gaussian import GaussianBase
from pyro_lvebm.bases.generator_check import check_generator
from pyro_lvebm.bases.supports import Support
from pyro_lvebm.bases.units import moments, row_lengths
from pyro_lvebm.rng import Stream, generator_for
from pyro_lvebm.validation import as_data

Noise = Literal["diagonal", "low-rank", "full"]

_FLOOR = 1e-3
"""Least standard deviation of the noise, in those of the columns: below it is resolution."""

_START = 0.01
"""Standard deviation of the entries of W at the start."""

NOISE_PENALTY_PER_DIM = 4.0
"""Rows for each entry of x (measured on digits, docs/training.md)."""

_MAX_RANK = 8
"""Columns of W in low-rank noise, or as many as x has entries."""


class GeneratorBase(GaussianBase):
    """A Gaussian over x given z, around A z + g_φ(z), whose parameters are trained.

        y = m + s ⊙ (b + A z + g_φ(z) + R ε),    x = T(y),    ε ~ N(0, I)

    m and s are means and standard deviations of the columns of y, so A, g and R have no unit. T is
    the bijection to the support of x, the identity where x is unbounded. Together with z ~ base_z
    it is a decoder model: under f = 0 an LVEBM on it is that model, with log Z = 0.

    Noise with correlations has d (d − 1) / 2 of them to learn. A `Saddle` holds them back as if
    `noise_penalty` more rows had been seen with noise of the same variances and no correlations:
    it adds so many times KL(N(0, diag S) ‖ N(0, S)), S = R Rᵀ, to its loss, which is 0 where the
    noise is diagonal. So few rows do not overfit; many overrule it.

    Coordinates that do not vary with z, for energies and missing entries, are those of a Gaussian
    over all x.

    Args:
        gaussian: That Gaussian over x, with its support.
        generator: g, any `nn.Module` from z (n, *z_shape) to (n, *unconstrained shape of x), in
            standard deviations of the columns; or to a pair of that and a log factor, of the same
            shape, on the standard deviation of the noise. None is g = 0: factor analysis.
        z_shape: Shape of one z.
        noise: R is a "diagonal", the Cholesky factor of diag(σ²) + W Wᵀ with 8 columns of W
            ("low-rank"), or lower triangular ("full").
        noise_penalty: Number of rows that speak against correlations of the noise; 4 for each entry
            of x if None, and 0 leaves maximum likelihood. Where the model is scaled, such as by
            1 / N, scale it likewise.

    Raises:
        ValueError: If the generator returns other shapes or NaN, is random, couples rows (BatchNorm
            in training) or cannot be differentiated twice; noise is none of these; or the penalty
            is negative or not finite.

    Source:
        Xiao et al. (2021), VAEBM, arXiv 2010.00654 (decoder and energy); Kuntz, Lim and Johansen
        (2023), Particle algorithms for maximum likelihood, arXiv 2204.12965 (no encoder).

    Example:
        >>> import torch
        >>> from pyro_lvebm.generators import MLPGenerator
        >>> x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
        >>> base = GeneratorBase.from_factor_analysis(x, torch.Size([2]), MLPGenerator(2, (5,)))
        >>> base.log_prob_given(x, torch.zeros(200, 2)).shape
        torch.Size([200])
    """

    unit: Tensor

    depends_on_z = True

    def __init__(
        self,
        gaussian: GaussianBase,
        generator: nn.Module | None,
        z_shape: torch.Size,
        noise: Noise = "diagonal",
        *,
        noise_penalty: float | None = None,
    ) -> None:
        shape = gaussian.support.unconstrained_shape
        super().__init__(
            gaussian.loc.reshape(shape),
            gaussian.scale.reshape(shape) if gaussian.diagonal else gaussian.scale,
            gaussian.support,
        )
        if noise not in ("diagonal", "low-rank", "full"):
            raise ValueError(f'noise must be "diagonal", "low-rank" or "full"; got {noise!r}')
        if noise_penalty is None:
            noise_penalty = NOISE_PENALTY_PER_DIM * self.dim
        if not 0 <= noise_penalty < math.inf:
            raise ValueError(f"noise_penalty must be finite and not negative; got {noise_penalty}")
        self.z_shape, self.noise = torch.Size(z_shape), noise
        self.noise_penalty = 0.0 if noise == "diagonal" else noise_penalty
        like, d, k = self.loc, self.dim, self.z_shape.numel()
        self.register_buffer("unit", row_lengths(gaussian.tril.double()).to(like))
        self.offset = nn.Parameter(like.new_zeros(d))
        self.linear = nn.Parameter(like.new_zeros(d, k))
        self.log_noise = nn.Parameter(like.new_zeros(d))
        if noise == "low-rank":
            self.noise_factor = nn.Parameter(like.new_zeros(d, min(_MAX_RANK, d)))
        elif noise == "full":
            self.noise_below = nn.Parameter(like.new_zeros(d, d))
        self.generator = None if generator is None else generator.to(like)
        if generator is not None:
            check_generator(generator, self.z_shape, shape, self.loc)

    @classmethod
    def from_factor_analysis(
        cls,
        x: Tensor,
        z_shape: torch.Size,
        generator: nn.Module | None = None,
        *,
        support: Support | None = None,
        noise: Noise = "diagonal",
        noise_penalty: float | None = None,
    ) -> GeneratorBase:
        """Start at the factor analysis of rows x (N, *event_shape), by maximum likelihood.

        With a generator whose output starts at 0 and base_z = N(0, I) the base is that factor
        analysis; low-rank noise adds W Wᵀ of about a thousandth of a variance. Where entries are
        missing, it is that of the covariance of maximum likelihood.

        Args:
            x: Rows; NaN where an entry is missing.
            z_shape: Shape of one z.
            generator: g; see the class.
            support: Where x lies; the real vectors if None.
            noise: See the class.
            noise_penalty: See the class.

        Raises:
            ValueError: As `GaussianBase.fit` but for few rows: with no more rows than entries, the
                Gaussian over x has standard deviations only.
        """
        x = as_data(x, missing=True)
        gaussian = _gaussian_over(x, support)
        base = cls(gaussian, generator, z_shape, noise, noise_penalty=noise_penalty)
        wide = copy.deepcopy(gaussian).to(torch.float64)
        y = wide.support.unconstrain(x.detach().to(torch.float64)).flatten(1)
        unit = row_lengths(wide.tril)
        rows = (y - wide.loc) / unit
        if rows.isnan().any():
            rows = rows_with_covariance(wide.tril / unit[:, None])
        a, psi = factor_analysis(rows, base.z_shape.numel())
        with torch.no_grad():
            base.linear.copy_(a)
            base.log_noise.copy_((psi.sqrt() - _FLOOR).clamp(min=_FLOOR).log())
            if noise == "low-rank":  # a W of zeros would have no gradient
                start = torch.empty(base.noise_factor.shape)
                start.normal_(generator=generator_for(0, Stream.GENERATOR_WEIGHTS, "noise"))
                base.noise_factor.copy_(_START * start)
        return base

    @property
    def num_components(self) -> int:
        """Number of Gaussians, in the law of x given z."""
        return 1

    def coordinates(self) -> GaussianBase:
        """Return the Gaussian over x, whose coordinates do not vary with z."""
        shape = self.support.unconstrained_shape
        scale = self.scale.reshape(shape) if self.diagonal else self.scale
        return GaussianBase(self.loc.reshape(shape), scale, self.support)

    def log_prob(self, x: Tensor) -> Tensor:
        """Refuse: the density of x alone is an integral over z.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "under a GeneratorBase x has a density given z only: log_prob_given(x, z). That of x "
            "alone is an integral, which log_evidence estimates"
        )

    def distribution(self) -> dist.TorchDistribution:
        """Refuse, as `log_prob` does.

        Raises:
            ValueError: Always.
        """
        raise ValueError("under a GeneratorBase x has a law given z only")

    def noise_divergence(self) -> Tensor:
        """Return KL(N(0, diag S) ‖ N(0, S)) (), in nats, for the S = R Rᵀ of the noise."""
        if self.noise == "diagonal":
            return self.log_noise.new_zeros(())
        variance = self._tril().square().sum(1)
        inverse, log_det = self.whitener()
        trace = (inverse.square() * variance).sum() - self.dim
        return 0.5 * (trace - variance.log().sum()) + log_det

    def mean(self, z: Tensor) -> Tensor:
        """Return T(E[y | z]) (*b, *event_shape), what the generator makes of z (*b, *z_shape)."""
        return self.unwhiten_given(z.new_zeros(self.dim), z)

    def log_prob_given(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the normalised log density (*b,) of x given z, in nats."""
        y = self.support.unconstrain(x)
        epsilon, log_det = self._noise_of(self._standardised(y), z, self.whitener())
        constant = 0.5 * self.dim * math.log(2 * math.pi)
        log_prob = -0.5 * (epsilon * epsilon).sum(-1) - log_det - constant
        return log_prob - self.support.log_abs_det(y, x)

    def whiten_given(self, x: Tensor, z: Tensor) -> Tensor:
        """Return ε (*b, d)."""
        r = self._standardised(self.support.unconstrain(x))
        return self._noise_of(r, z, self.whitener())[0]

    def unwhiten_given(self, w: Tensor, z: Tensor) -> Tensor:
        """Return x (*b, *event_shape) for ε (*b, d) and z (*b, *z_shape)."""
        y = self.loc + self.unit * self._from_noise(w, z)
        return self.support.constrain(y.reshape(*y.shape[:-1], *self.support.unconstrained_shape))

    def coordinates_of(self, epsilon: Tensor, z: Tensor) -> Tensor:
        """Return coordinates w (*b, d) of the Gaussian over x for ε (*b, d) and z."""
        centred = self.unit * self._from_noise(epsilon, z)
        return centred * self.inverse_scale if self.diagonal else centred @ self.inverse_scale.T

    def noise_and_log_det(self, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ε (*b, d) for w, and log |dw/dε| (*b,), in nats."""
        return self.noise_at(self.standardised(w), z, self.whitener())

    def standardised(self, w: Tensor) -> Tensor:
        """Return (y − m) / s (*b, d) for w (*b, d)."""
        return (w * self.scale if self.diagonal else w @ self.scale.T) / self.unit

    def whitener(self) -> tuple[Tensor, Tensor]:
        """Return R⁻¹ (d, d), or σ (d,) where it is diagonal, and log |R|, without a factor by z."""
        tril = self._tril()
        if self.noise == "diagonal":
            return tril, tril.log().sum()
        # One small inverse and a product are twice as fast as a solution for every row.
        inverse: Tensor = torch.linalg.solve_triangular(
            tril, torch.eye(self.dim).to(tril), upper=False
        )
        return inverse, tril.diagonal().log().sum()

    def noise_at(
        self, standardised: Tensor, z: Tensor, whitener: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ε (*b, d) and log |dw/dε| (*b,) for (y − m) / s, which expands to that of z.

        With R from `whitener`, which whoever holds θ and x fixed asks for once.
        """
        epsilon, log_det = self._noise_of(standardised, z, whitener)
        return epsilon, log_det - self.log_det

    def _standardised(self, y: Tensor) -> Tensor:
        """Return (y − m) / s (*b, d)."""
        batch = y.shape[: y.dim() - len(self.support.unconstrained_shape)]
        return (y.reshape(*batch, self.dim) - self.loc) / self.unit

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean of (y − m) / s (*b, d), and the log factor (*b, d) on the noise if there is one."""
        batch = z.shape[: z.dim() - len(self.z_shape)]
        mean = self.offset + z.reshape(*batch, self.z_shape.numel()) @ self.linear.T
        if self.generator is None:
            return mean, None
        # Layers such as convolutions take one batch axis only.
        out = self.generator(z.reshape(batch.numel(), *self.z_shape))
        if isinstance(out, tuple):
            return mean + out[0].reshape(mean.shape), out[1].reshape(mean.shape)
        return mean + out.reshape(mean.shape), None

    def _tril(self) -> Tensor:
        """R but for the factor that varies with z: (d,) where it is diagonal, else (d, d)."""
        sigma = _FLOOR + self.log_noise.exp()
        if self.noise == "diagonal":
            return sigma
        if self.noise == "full":
            return self.noise_below.tril(-1) + sigma.diag()
        w = self.noise_factor
        tril: Tensor = torch.linalg.cholesky(sigma.square().diag() + w @ w.T)
        return tril

    def _noise_of(
        self, standardised: Tensor, z: Tensor, whitener: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return ε (*b, d) for (y − m) / s (*b, d), and log |dy/dε| (*b,)."""
        mean, log_factor = self._parts(z)
        r = standardised - mean
        log_det = self.unit.log().sum() + whitener[1]
        if log_factor is not None:
            r, log_det = r * (-log_factor).exp(), log_det + log_factor.sum(-1)
        return r / whitener[0] if self.noise == "diagonal" else r @ whitener[0].T, log_det

    def _from_noise(self, epsilon: Tensor, z: Tensor) -> Tensor:
        """Return (y − m) / s (*b, d) for ε (*b, d)."""
        mean, log_factor = self._parts(z)
        tril = self._tril()
        r = epsilon * tril if self.noise == "diagonal" else epsilon @ tril.T
        if log_factor is not None:
            r = r * log_factor.exp()
        return mean + r


def _gaussian_over(x: Tensor, support: Support | None) -> GaussianBase:
    """A Gaussian over rows, with correlations if there are rows enough to tell them."""
    count = (support.unconstrained_shape if support is not None else x.shape[1:]).numel()
    if len(x) > count or x.isnan().any():
        return GaussianBase.fit(x, support)
    y = x if support is None else support.unconstrain(x)
    loc, std, constant = moments(y.detach().double().flatten(1))
    if constant.any():
        raise ValueError(
            f"columns {torch.nonzero(constant).flatten().tolist()} of x are constant but for "
            "rounding; remove them"
        )
    shape = y.shape[1:]
    return GaussianBase(loc.to(x).reshape(shape), std.to(x).reshape(shape), support)
