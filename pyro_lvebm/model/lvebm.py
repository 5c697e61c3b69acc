# SPDX-License-Identifier: Apache-2.0
"""The LVEBM: a residual energy, two bases and a pool of negatives in one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm.bases import GaussianBase, GeneratorBase, MixtureBase, Noise, PairSupport, Support
from pyro_lvebm.energies import MLPEnergy, QuadraticEnergy, check_at_rest
from pyro_lvebm.model.contexts import as_context, as_context_of_rows
from pyro_lvebm.model.density import Density
from pyro_lvebm.model.imputation import impute
from pyro_lvebm.model.posterior import Posterior, Shape
from pyro_lvebm.model.rays import warn_of_falling
from pyro_lvebm.model.saving import read_lvebm, write_lvebm
from pyro_lvebm.model.tracing import check_not_traced
from pyro_lvebm.pools import ContextPool, Pool, TemperedPool
from pyro_lvebm.rng import Stream, derive_seed
from pyro_lvebm.validation import as_data, check_at_least

_EMPTY = torch.Size()

_MAX_MIXTURE_DIM = 128
"""Entries of x up to which "auto" looks for a mixture; beyond, fitting one takes minutes."""


_AT_REST = ContextVar("pools are at rest", default=False)


@contextmanager
def pools_at_rest() -> Iterator[None]:
    """Leave all pools where they are inside the block, for runs whose values are thrown away."""
    token = _AT_REST.set(True)
    try:
        yield
    finally:
        _AT_REST.reset(token)


class LVEBM(Density):
    """A latent-variable energy-based model, one normalised density over pairs (x, z).

        p_θ(x, z) = exp(−E_θ(x, z)) / Z_θ,    E_θ = f_θ(x, z) − log base_x(x) − log base_z(z)

    The bases are normalised, so Z_θ = E_base[exp(−f_θ)]; f = 0 is the base with log Z = 0. All
    sampling happens in coordinates u whitened by the bases, where E = U(u) + f + const; U is ½ |u|²
    for Gaussian bases.

    With a `context_shape` it is conditional on a context c, such as covariates or a class:

        p_θ(x, z | c) = exp(−E_θ(x, z; c)) / Z_θ(c)

    with f_θ(x, z; c) and the same bases for all contexts. The methods that need an energy then
    take a context; `at(c)` is the LVEBM of one context.

    Args:
        energy: The residual energy f, any `nn.Module` that maps x (*b, *x_shape) and
            z (*b, *z_shape), and a context (*b, *context_shape) if there are any, to (*b).
        base_x: Gaussian over x: `Normal(...).to_event(k)` or `MultivariateNormal(...)`. Where x has
            bounds, a `TransformedDistribution` of one, such as `LogNormal(...).to_event(k)`.
        base_z: Gaussian over z.
        pool: `TemperedPool(...)` (the default) or `PersistentPool(...)`; with contexts,
            `ContextPool(...)`.
        context_shape: Shape of one context; None for an LVEBM without contexts.

    Raises:
        ValueError: If a base is not a Gaussian, the transform of base_x is not that of `biject_to`,
            the energy returns the wrong shape or NaN, the pool is not one for contexts where there
            are some, or the other way round, or it belongs to another LVEBM.

    Source:
        Tang et al., Particle Dynamics for Latent-Variable Energy-Based Models, arXiv 2510.15447.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy
        >>> x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(x_dim=3, z_dim=2), x, z_dim=2)
        >>> ebm.energy(x, torch.zeros(100, 2)).shape
        torch.Size([100])
    """

    expects_missing: Tensor  # whether the data of `from_data` had missing entries

    def __init__(
        self,
        energy: nn.Module,
        base_x: dist.TorchDistribution | GaussianBase,
        base_z: dist.TorchDistribution | GaussianBase,
        pool: Pool | None = None,
        *,
        context_shape: tuple[int, ...] | None = None,
    ) -> None:
        if pool is None:
            pool = TemperedPool() if context_shape is None else ContextPool()
        pool.check_free(context_shape)  # before the energy is bound to the bases
        super().__init__(energy, base_x, base_z, context_shape=context_shape)
        self._take(pool)
        warn_of_falling(self)

    def _take(self, pool: Pool) -> None:
        like = self.base_x.loc
        pool.prepare(self.dim, self.base, self.context_shape)
        self.pool = pool.to(device=like.device, dtype=like.dtype)
        self.register_buffer("expects_missing", torch.tensor(False))

    @classmethod
    def from_data(
        cls,
        energy: nn.Module,
        x: Tensor | np.ndarray,
        *,
        z_dim: int,
        support: Constraint | None = None,
        context: Tensor | np.ndarray | None = None,
        base: Literal["auto", "gaussian", "mixture"] = "auto",
        generator: nn.Module | Literal["linear"] | None = None,
        noise: Noise = "diagonal",
        pool: Pool | None = None,
    ) -> LVEBM:
        """Start from a law fitted to the data and a standard normal latent.

        The law is a Gaussian, or a mixture of Gaussians in its coordinates (`MixtureBase.fit`), so
        that modes far apart have negatives from the start and f learns what a mixture misses. The
        Gaussian has the means and variances of the columns, and their correlations, shrunk
        towards 0 by the share that cross-validation finds best; with many rows that is none. Where
        entries are missing it is that of maximum likelihood, by expectation maximisation.

        Args:
            energy: The residual energy f.
            x: Data (N, *x_shape), a floating-point tensor or array, more rows than dimensions; NaN
                where an entry is missing. The LVEBM takes their dtype.
            z_dim: Number of latent dimensions. With 0 it is an energy-based model of x alone: z is
                (*b, 0), and `lvebm` opens one site.
            support: Where x lies, one of `torch.distributions.constraints`, such as
                `constraints.positive`, of single entries or of the trailing axes of a row; the
                real vectors if None. The Gaussian is then one of y = T⁻¹(x), T = `biject_to`
                (support), and so are the whitened coordinates; f(x, z) still gets x.
            context: Contexts (N, *context_shape) of a conditional LVEBM, floating point. An
                `MLPEnergy` standardises its contexts by their means and standard deviations.
            base: "mixture" or "gaussian"; "auto" is a mixture if cross-validation finds more than
                one component, x has at most 128 entries, and the energy is not one whose closed
                forms need a Gaussian.
            generator: A network z → x for a `GeneratorBase`, in place of `base`: latents then carry
                what it makes of them. It starts at the factor analysis of x, plus what the network
                returns; "linear" is that alone.
            noise: Of the generator; see `GeneratorBase`.
            pool: The pool of negatives; `TemperedPool()` if None, or `ContextPool()`.

        Raises:
            ValueError: If x is empty, infinite or not floating point, has too few rows or
                constant columns, does not lie inside the support, or has entries missing on one
                that ties entries together; if z_dim < 0, no bijection to the support is known, or
                the energy does not fit.

        Example:
            >>> import torch
            >>> from torch.distributions import constraints
            >>> from pyro_lvebm import LVEBM, MLPEnergy
            >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).exp()
            >>> ebm = LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1, support=constraints.positive)
            >>> bool((ebm.unwhiten(torch.randn(50, 3))[0] > 0).all())
            True
        """
        check_at_least(0, z_dim=z_dim)
        x = as_data(x, missing=True)
        base_z = GaussianBase(x.new_zeros(z_dim), x.new_ones(z_dim))
        within = None if support is None else Support(support, x.shape[1:])
        if base not in ("auto", "gaussian", "mixture"):
            raise ValueError(f'base must be "auto", "gaussian" or "mixture"; got {base!r}')
        if generator is not None and base != "auto":
            raise ValueError(f"a generator stands in place of base={base!r}; give one of them")
        if generator is not None:
            check_at_least(1, z_dim=z_dim)
        if generator is None and noise != "diagonal":
            raise ValueError(f"noise={noise!r} is that of a generator, and there is none")
        if generator is not None:
            network = _network(generator)
            base_x: GaussianBase = GeneratorBase.from_factor_analysis(
                x, base_z.event_shape, network, support=within, noise=noise
            )
        else:
            base_x = GaussianBase.fit(x, within)
            wanted = base_x.dim <= _MAX_MIXTURE_DIM and not isinstance(energy, QuadraticEnergy)
            if base == "mixture" or (base == "auto" and wanted):
                mixture = MixtureBase.fit(x, gaussian=base_x)
                base_x = mixture if base == "mixture" or mixture.num_components > 1 else base_x
        energy.to(device=x.device, dtype=x.dtype)
        shape = None
        if context is not None:
            context = as_context_of_rows(context, x)
            shape = context.shape[1:]
            if isinstance(energy, MLPEnergy):
                energy.check_standardise(context)
        ebm = cls(energy, base_x, base_z, pool, context_shape=shape)
        ebm.expects_missing.copy_(x.isnan().any())
        if context is not None and isinstance(energy, MLPEnergy):
            energy.standardise(context)
        return ebm

    def save(
        self,
        folder: str | Path,
        *,
        columns: Sequence[str] = (),
        transforms: Sequence[Mapping[str, Any]] = (),
        overwrite: bool = False,
    ) -> None:
        """Write the model to a folder that says what it is, so that `load` needs no code.

        Classes and settings of the energy, bases, support and pool go to `model.json`, numbers to
        `model.safetensors`. Each file is written whole or not at all.

        Args:
            folder: Made if it is not there.
            columns: Names of the entries of x, flattened, for whoever reads the file.
            transforms: What was done to data before they became x, as JSON; it is kept, not used.
            overwrite: Whether a model in the folder is replaced.

        Raises:
            ValueError: If the energy, pool, base or support is a user's own, whose code a file
                cannot hold; if there is a model already, or names do not fit x. Nothing is
                written then.

        Example:
            >>> import tempfile, torch
            >>> from pyro_lvebm import LVEBM, MLPEnergy
            >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
            >>> ebm = LVEBM.from_data(MLPEnergy(2, 1, hidden=(8,)), x, z_dim=1)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ebm.save(folder, columns=["left", "right"])
            ...     again = LVEBM.load(folder)
            >>> z = torch.zeros(100, 1)
            >>> torch.equal(again.energy(x, z), ebm.energy(x, z))
            True
        """
        write_lvebm(self, Path(folder), columns=columns, transforms=transforms, overwrite=overwrite)

    @classmethod
    def load(cls, folder: str | Path) -> LVEBM:
        """Return the LVEBM that `save` wrote, on the CPU, with its pool. Nothing is executed.

        Raises:
            ValueError: If files are missing, damaged, or no model.
        """
        parts, _ = read_lvebm(Path(folder))
        ebm = cls.__new__(cls)
        nn.Module.__init__(ebm)
        context = parts.context
        ebm._compose(parts.energy, parts.base_x, parts.base_z, parts.context_shape, context)
        ebm._take(parts.pool)
        try:
            missing, unknown = ebm.load_state_dict(parts.tensors, strict=False)
            absent = [name for name in missing if not name.startswith(("f.base_x.", "f.base_z."))]
            if absent or unknown:
                raise ValueError(f"tensors {absent} are missing, and {unknown} unknown")
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"'{folder}' is no model that LVEBM.save wrote: {error}") from error
        ebm.mark_pool(fresh=parts.fresh)
        return ebm

    def at(self, context: Tensor | np.ndarray) -> LVEBM:
        """Return the LVEBM p_θ(x, z | c) of one context, with the same θ and a pool of its own.

        The pool has followed the present θ. θ and bases are shared: `.to(dtype)` changes both.

        Args:
            context: One context c (*context_shape).

        Raises:
            ValueError: If this LVEBM is not conditional, or the context has another shape.

        Example:
            >>> import torch
            >>> from pyro_lvebm import LVEBM, MLPEnergy, log_partition
            >>> draw = torch.Generator().manual_seed(0)
            >>> c, x = (torch.randn(100, 2, generator=draw) for _ in range(2))
            >>> energy = MLPEnergy(2, 1, context_dim=2)
            >>> ebm = LVEBM.from_data(energy, x, z_dim=1, context=c, base="gaussian")
            >>> log_partition(ebm.at(c[0]), num_runs=2, num_refreshes=2).estimate  # f is zero yet
            0.0
        """
        if self.context_shape is None:
            raise ValueError("this LVEBM has no contexts; at(context) is for conditional LVEBMs")
        context = as_context(context, self.base_x.loc)
        if context.shape != self.context_shape:
            raise ValueError(
                f"at() takes one context of shape {tuple(self.context_shape)}; got "
                f"{tuple(context.shape)}"
            )
        ebm = LVEBM.__new__(LVEBM)
        nn.Module.__init__(ebm)
        ebm._compose(self.f, self.base_x, self.base_z, self.context_shape, context.detach().clone())
        key = (self.pool.site, str(context.tolist()))
        seed = derive_seed(self.pool.seed, Stream.POOL_AT_CONTEXT, *key)
        ebm._take(TemperedPool(num_levels=self.pool.num_levels, seed=seed))
        ebm.expects_missing.copy_(self.expects_missing)
        ebm.pool.settle(ebm)
        ebm.mark_pool(fresh=True)
        return ebm

    @property
    def log_partition(self) -> Tensor:
        """The pool's present estimate of log Z, a scalar, in nats, without a gradient.

        With contexts it is the mean over those of the pool.
        """
        return self.pool.log_partition

    def log_norm(self, context: Tensor | None = None) -> Tensor:
        """Return log Z with the pool's value and the gradient −E_pool[∇_θ f].

        Where θ can change, the pool is refreshed first if θ has changed since it last was, so any
        loss that contains this term trains θ, without anyone having to move the pool by hand.

        Args:
            context: Contexts (*b, *context_shape) of a minibatch, in a conditional LVEBM. What is
                returned is then the mean of log Z(c) over contexts, the same for all data.

        Raises:
            ValueError: If θ can change and the caller is being traced or compiled.
        """
        if self.is_trained:
            check_not_traced()
        if not torch.is_grad_enabled() or not self.is_trained or _AT_REST.get():
            return self.pool.log_partition
        self.follow(context)
        f, log_w = self.negative_residuals()
        surrogate = -(log_w.exp() * f).sum()
        return self.pool.log_partition + (surrogate - surrogate.detach())

    @property
    def is_trained(self) -> bool:
        """Whether any parameter of f, or of a generator base, takes gradients."""
        return any(p.requires_grad for p in self.theta())

    def follow(self, context: Tensor | None = None) -> None:
        """Refresh the pool if θ can change, and has changed since it last was.

        Args:
            context: Contexts (*b, *context_shape) of a minibatch, in a conditional LVEBM.
        """
        # Optimisers that write through `.data` leave no trace but the values themselves.
        if self.is_trained and not self.pool_is_fresh():
            check_at_rest(self.f)
            self.pool.refresh(self, context)
            self.mark_pool(fresh=True)

    def negative_residuals(self) -> tuple[Tensor, Tensor]:
        """Return f (n,) at the negatives of the pool, with a graph, and their log weights (n,)."""
        u, log_w = self.pool.negatives()
        return self.residual(u, self.pool.negative_contexts()), log_w

    def pool_is_fresh(self) -> bool:
        """Return whether the pool has been refreshed under the present θ."""
        return self.pool.is_fresh(self.theta())

    def mark_pool(self, *, fresh: bool) -> None:
        """Record that the pool has, or has not, been refreshed under the present θ."""
        self.pool.mark(self.theta() if fresh else ())

    def settle(self, log_z_error: float | None = None) -> None:
        """Let the pool catch up with the present θ.

        A pool that has moved before rests where θ is frozen; one without contexts always does.

        Args:
            log_z_error: Go on, up to 80 refreshes in all, until a `TemperedPool` states this
                standard error of log Z, in nats. It does not count where a pool states none.

        Raises:
            ValueError: If `log_z_error` is not positive.
        """
        if log_z_error is not None and not log_z_error > 0:
            raise ValueError(f"log_z_error must be positive; got {log_z_error}")
        if self.is_trained or not self.pool.refreshes:
            self.pool.settle(self, log_z_error)
            if self.pool.refreshes:
                self.mark_pool(fresh=True)

    def kl_of_update(self) -> Tensor:
        """Return KL(p_old ‖ p_θ) in nats, with p_old the model at the pool's last refresh."""
        with torch.no_grad():
            return self.pool.kl_to(self.negative_residuals()[0])

    def joint(self) -> JointEnergy:
        """Return the distribution over (x, z), flattened and concatenated, with log_prob −E."""
        return JointEnergy(self)

    def posterior(
        self, x: Tensor | np.ndarray, context: Tensor | np.ndarray | None = None
    ) -> Posterior:
        """Return the distribution p_θ(z | x) for x (*b, *x_shape), sampled by annealed Langevin.

        With contexts (*b, *context_shape) it is p_θ(z | x, c).
        """
        x = as_data(x, self.x_shape, like=self.base_x.loc)
        self.base_x.support.check(x)
        context = None if context is None else as_context(context, self.base_x.loc)
        return Posterior(self, x, context)

    def impute(
        self,
        x: Tensor | np.ndarray,
        observed: Tensor | None = None,
        context: Tensor | np.ndarray | None = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
    ) -> Tensor:
        """Draw the missing entries of x, jointly with z, from p_θ(x_m | x_o).

        The conditional of the Gaussian base is exact; from its draws, (z, x_m) is annealed to the
        model by sequential Monte Carlo, every draw by a run of its own.

        Args:
            x: Observations (N, *x_shape), NaN where missing.
            observed: Which entries are observed, boolean, of the shape of x, or of x_shape for all
                rows alike; what x holds elsewhere does not matter. By default all but NaN.
            context: Contexts (N, *context_shape) of a conditional LVEBM.
            num_samples: Draws for each row.
            seed: Fixes every random number.

        Returns:
            Completed observations (num_samples, N, *x_shape).

        Raises:
            ValueError: If x is infinite, of another shape, outside its support or NaN where it is
                said to be observed, `observed` is no boolean mask of a shape that fits, nothing is
                missing, or the support ties entries of x together.

        Example:
            >>> import torch
            >>> from pyro_lvebm import LVEBM, MLPEnergy
            >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
            >>> ebm = LVEBM.from_data(MLPEnergy(2, 1), x, z_dim=1)
            >>> x[0, 1] = torch.nan
            >>> draws = ebm.impute(x[:3], num_samples=5)
            >>> draws.shape, bool(draws.isnan().any())
            (torch.Size([5, 3, 2]), False)
        """
        return impute(self, x, observed, context, num_samples=num_samples, seed=seed)


def _network(generator: nn.Module | str) -> nn.Module | None:
    if isinstance(generator, nn.Module):
        return generator
    if generator == "linear":
        return None
    raise ValueError(f'generator must be an nn.Module or "linear"; got {generator!r}')


class JointEnergy(TorchDistribution):
    """The joint p_θ(x, z) as one distribution over (x, z), flattened and concatenated.

    x is in data coordinates, even if its support is bounded; `support` says so to Pyro.
    `log_prob` is the unnormalised −E_θ(x, z); add −log Z for a normalised density. `sample` draws
    from the pool and moves the draws on by MALA; draws are as good as the pool has converged.

    Args:
        ebm: The LVEBM.
        batch_shape: Batch shape.

    Example:
        >>> import torch
        >>> from pyro_lvebm import LVEBM, QuadraticEnergy
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> ebm = LVEBM.from_data(QuadraticEnergy(3, 2), x, z_dim=2)
        >>> ebm.joint().sample((10,)).shape
        torch.Size([10, 5])
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, ebm: LVEBM, batch_shape: torch.Size = _EMPTY) -> None:
        if not isinstance(ebm, LVEBM):
            raise ValueError(f"a joint draws from a pool: give an LVEBM; got {type(ebm).__name__}")
        if ebm.context_shape is not None:
            raise ValueError("a conditional LVEBM has a joint for each context: ebm.at(c).joint()")
        self.ebm = ebm
        shape = torch.Size((ebm.x_shape.numel() + ebm.z_shape.numel(),))
        super().__init__(torch.Size(batch_shape), shape, validate_args=False)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        """Real vectors, or pairs of an x on its support and a real z."""
        x = self.ebm.base_x.support
        return constraints.real_vector if x.is_real else PairSupport(x, self.ebm.z_shape.numel())

    def expand(self, batch_shape: Shape, _instance: Any = None) -> JointEnergy:
        """Return the distribution with another batch shape."""
        return JointEnergy(self.ebm, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return −E_θ (*b,) for values (*b, entries), in nats, without log Z."""
        k = self.ebm.x_shape.numel()
        x = value[..., :k].reshape(*value.shape[:-1], *self.ebm.x_shape)
        z = value[..., k:].reshape(*value.shape[:-1], *self.ebm.z_shape)
        log_prob = -self.ebm.energy(x, z)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Shape = _EMPTY) -> Tensor:
        """Draw from the pool."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            x, z = self.ebm.unwhiten(self.ebm.pool.draw(self.ebm, shape.numel()))
        return torch.cat([x.flatten(1), z.flatten(1)], -1).reshape(*shape, *self.event_shape)
