# SPDX-License-Identifier: Apache-2.0
"""Small models shared by the tests, with exact laws written without the package's closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from referee import gaussian_moments, normal
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from pyro_lvebm import LVEBM, PersistentPool, QuadraticEnergy, TemperedPool, lvebm


def tiny_pool(seed: int = 0) -> TemperedPool:
    """A pool that is quick to refresh and not at default settings."""
    return TemperedPool(3, 48, num_moves=1, seed=seed)


def quadratic_ebm(
    x_dim: int = 3,
    z_dim: int = 2,
    *,
    seed: int = 0,
    pool: TemperedPool | PersistentPool | None = None,
    dtype: torch.dtype = torch.float64,
) -> LVEBM:
    """A linear-Gaussian LVEBM away from its base, on a full base_x and a diagonal base_z."""
    d = x_dim + z_dim
    std = 0.5 + torch.rand(d, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    tril = 0.4 * normal((x_dim, x_dim), seed + 2, dtype).tril(-1) + std[:x_dim].diag()
    ebm = LVEBM(
        QuadraticEnergy(x_dim, z_dim).to(dtype),
        dist.MultivariateNormal(normal((x_dim,), seed + 3, dtype), scale_tril=tril),
        dist.Normal(normal((z_dim,), seed + 4, dtype), std[x_dim:]).to_event(1),
        pool=tiny_pool(seed) if pool is None else pool,
    )
    root = 0.5 * normal((d, d), seed + 5, dtype)
    precision = root @ root.T + 0.6 * torch.eye(d, dtype=dtype)
    ebm.f.set_precision(precision, 0.5 * normal((d,), seed + 6, dtype))
    return ebm


def warm(ebm: LVEBM, num_refreshes: int = 40) -> LVEBM:
    """Let the pool follow the present θ."""
    for _ in range(num_refreshes):
        ebm.pool.refresh(ebm)
    ebm.mark_pool(fresh=True)
    return ebm


def exact_joint(ebm: LVEBM) -> MultivariateNormal:
    """The exact law of (x, z) of a quadratic energy, from moments in whitened coordinates."""
    parts = (ebm.base_x, ebm.base_z)
    scales = [b.scale.diag() if b.diagonal else b.scale for b in parts]
    scale = torch.block_diag(*scales).double()
    loc = torch.cat([b.loc for b in parts]).double()
    mean, covariance = gaussian_moments(ebm.f.precision, ebm.f.linear)
    return MultivariateNormal(
        loc + scale @ torch.as_tensor(mean), scale @ torch.as_tensor(covariance) @ scale.T
    )


def condition(law: MultivariateNormal, given: list[int], value: Tensor) -> MultivariateNormal:
    """The law of the other entries of a Gaussian, given some of them (*b, len(given))."""
    other = [i for i in range(len(law.mean)) if i not in given]
    c = law.covariance_matrix
    gain = c[other][:, given] @ torch.linalg.inv(c[given][:, given])
    mean = law.mean[other] + (value.double() - law.mean[given]) @ gain.T
    covariance = c[other][:, other] - gain @ c[given][:, other]
    return MultivariateNormal(mean, 0.5 * (covariance + covariance.T))


def exact_posterior(ebm: LVEBM, x: Tensor) -> MultivariateNormal:
    """The exact p(z | x) of a quadratic energy, for x (*b, x_dim)."""
    return condition(exact_joint(ebm), list(range(ebm.base_x.dim)), x)


def whitened(draws: Tensor, law: MultivariateNormal) -> Tensor:
    """Draws (*s, *b, d) of a Gaussian in coordinates where it is N(0, I), flattened to (n, d)."""
    tril = torch.linalg.cholesky(law.covariance_matrix)
    centred = (draws.detach().double() - law.mean)[..., None]
    return torch.linalg.solve_triangular(tril, centred, upper=False).flatten(0, -3)[..., 0]


def rotations(white: Tensor) -> Tensor:
    """Standard normal rows (n, d) in d² orthonormal directions, which show correlations too."""
    d = white.shape[-1]
    columns = [white[:, i] for i in range(d)]
    for i in range(d):
        for j in range(i):
            columns.append((white[:, i] + white[:, j]) / math.sqrt(2))
            columns.append((white[:, i] - white[:, j]) / math.sqrt(2))
    return torch.stack(columns, -1)


def data_of(ebm: LVEBM, n: int, seed: int = 0) -> Tensor:
    """Rows x (n, *x_shape) spread like the base."""
    w = normal((n, ebm.base_x.dim), seed + 50, ebm.base_x.loc.dtype)
    return ebm.base_x.unwhiten(w)


def plate_model(ebm: LVEBM, subsample_size: int | None = None) -> Callable[[Tensor], Any]:
    """The model with one LVEBM site "scene" in a plate "data"."""

    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x), subsample_size=subsample_size) as i:
            return lvebm("scene", ebm, obs=x[i])

    return model


def classifier(ebm: LVEBM) -> Callable[..., None]:
    """`plate_model` with a logistic regression of labels y on its latent."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.param("w", torch.zeros(2).double())
        with pyro.plate("data", len(x)) as i:
            _, z = lvebm("scene", ebm, obs=x[i])
            pyro.sample("y", dist.Bernoulli(logits=(z * w).sum(-1)), obs=y)

    return model


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in a module's state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit, NaN being equal to NaN."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].nan_to_num(-7.0), b[k].nan_to_num(-7.0))
        for k in a
    )
