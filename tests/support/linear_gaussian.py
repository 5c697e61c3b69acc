# SPDX-License-Identifier: Apache-2.0
"""Models with known answers, shared by the tests of what is estimated at frozen θ.

The linear-Gaussian LVEBM has x in four dimensions and z in two, bases that are not standard, and a
correlated posterior: the best mean-field guide loses 0.19 nats. The neural ones have three
dimensions at most, so that quadrature over their energy in data coordinates is the referee.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from referee import gaussian_draws, normal
from scipy import stats
from torch import Tensor, nn

from pyro_lvebm import (
    LVEBM,
    MALA,
    ULA,
    AutoPerDatumMultivariateNormal,
    MLPEnergy,
    QuadraticEnergy,
    lvebm,
)
from pyro_lvebm.pools.base import Pool
from pyro_lvebm.sampling.langevin import LangevinState, ValueAndGrad

Model = Callable[..., None]


def make_base(dim: int, *, full: bool, seed: int, dtype: torch.dtype = torch.float64) -> object:
    """A Gaussian with a mean and scales of its own."""
    loc, std = normal((dim,), seed), 0.5 + normal((dim,), seed + 1).abs()
    if full:
        tril = 0.6 * normal((dim, dim), seed + 2).tril(-1) + std.diag()
        return dist.MultivariateNormal(loc.to(dtype), scale_tril=tril.to(dtype))
    return dist.Normal(loc.to(dtype), std.to(dtype)).to_event(1)


def make_quadratic(
    *, full_z: bool = False, dtype: torch.dtype = torch.float64, pool: Pool | None = None
) -> LVEBM:
    """The linear-Gaussian LVEBM."""
    root = 0.4 * normal((6, 6), 3)
    precision = root @ root.T + 0.6 * torch.eye(6, dtype=torch.float64)
    precision[4:, 4:] = torch.tensor([[1.4, 0.9], [0.9, 1.8]])
    energy = QuadraticEnergy(4, 2).to(dtype)
    ebm = LVEBM(
        energy,
        make_base(4, full=True, seed=10, dtype=dtype),
        make_base(2, full=full_z, seed=20, dtype=dtype),
        pool,
    )
    energy.set_precision(precision.to(dtype), (0.5 * normal((6,), 4)).to(dtype))
    return ebm


def draw_x(ebm: LVEBM, n: int, seed: int) -> Tensor:
    """Exact draws of x from a linear-Gaussian LVEBM."""
    u = gaussian_draws(ebm.f.precision.detach(), ebm.f.linear.detach(), (n,), seed)
    return ebm.base_x.unwhiten(u[:, : ebm.base_x.dim].to(ebm.base_x.loc))


def make_neural(
    x_dim: int,
    z_dim: int,
    *,
    full: bool = False,
    dtype: torch.dtype = torch.float64,
    pool: Pool | None = None,
    seed: int = 0,
) -> LVEBM:
    """An LVEBM whose network has a random last layer, so that it is far from its base."""
    energy = MLPEnergy(x_dim, z_dim, hidden=(16,), fourier_features=4, seed=seed).to(dtype)
    with torch.no_grad():
        # Rough enough for a network of random weights; its frequencies are those of 1.2 in 2-D.
        energy.frequencies.mul_(0.8)
        energy.out.weight.copy_(2.5 * normal((1, 16), seed + 5))
        energy.out.bias.fill_(0.4)
    return LVEBM(
        energy,
        make_base(x_dim, full=full, seed=seed + 30, dtype=dtype),
        make_base(z_dim, full=full, seed=seed + 40, dtype=dtype),
        pool,
    )


class PlainQuadratic(nn.Module):
    """½ uᵀAu + bᵀu of u = (x, z) flattened, written as a user would: any shapes, no whitening."""

    def __init__(self, curvature: Tensor, linear: Tensor, x_dims: int) -> None:
        super().__init__()
        self.curvature = nn.Parameter(curvature)
        self.linear = nn.Parameter(linear)
        self.x_dims = x_dims

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        u = torch.cat([x.flatten(-self.x_dims), z], -1)
        return 0.5 * ((u @ self.curvature) * u).sum(-1) + u @ self.linear


def _whitened_grid(dim: int, half_width: float, count: int) -> tuple[Tensor, float]:
    axis = torch.linspace(-half_width, half_width, count, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return points, dim * math.log(float(axis[1] - axis[0]))


def quadrature_log_partition(ebm: LVEBM, half_width: float = 9.0, count: int = 91) -> float:
    """log ∫∫ exp(−E) dx dz over a grid, from the energy in data coordinates."""
    u, log_cell = _whitened_grid(ebm.dim, half_width, count)
    volume = ebm.base_x.log_det + ebm.base_z.log_det
    with torch.no_grad():
        x, z = ebm.unwhiten(u.to(ebm.base_x.loc))
        return float(torch.logsumexp(-ebm.energy(x, z).double(), 0) + log_cell + volume)


def quadrature_log_c(ebm: LVEBM, x: Tensor, half_width: float = 9.0, count: int = 181) -> Tensor:
    """log ∫ exp(−E(x, z)) dz (N,) for rows x, over a grid."""
    v, log_cell = _whitened_grid(ebm.base_z.dim, half_width, count)
    with torch.no_grad():
        z = ebm.base_z.unwhiten(v.to(x))
        rows = x[:, None].expand(-1, len(z), *ebm.x_shape)
        energy = ebm.energy(rows, z.expand(len(x), *z.shape))
        return torch.logsumexp(-energy.double(), -1) + log_cell + ebm.base_z.log_det


class Unadjusted(MALA):
    """MALA that accepts every proposal."""

    def step(
        self, f: ValueAndGrad, state: LangevinState, step_size: float | Tensor, **options: Any
    ) -> tuple[LangevinState, Tensor]:
        options.pop("scale", None)
        state, _ = ULA().step(f, state, step_size, **options)
        return state, torch.full_like(state.f, 0.6)


def make_model(ebm: LVEBM, batch_size: int | None = None) -> Model:
    """A model of rows x; all of them in one batch if `batch_size` is None."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=batch_size and min(batch_size, len(x))) as i:
            lvebm("scene", ebm, obs=x[i])

    return model


def initialise(guide: Callable[..., Any], *args: Any) -> None:
    """Run a guide once, so that it has its parameters, and leave Pyro and torch as they were.

    In Pyro's parameter store a guide goes by the name of its class: a second one of that class
    would take the parameters of the first.
    """
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(0)
        guide(*args)


def full_covariance_guide(model: Model, ebm: LVEBM, x: Tensor) -> AutoPerDatumMultivariateNormal:
    """The full-covariance guide at the exact posterior."""
    guide = AutoPerDatumMultivariateNormal(model)
    initialise(guide, x)
    with torch.no_grad():
        posterior = ebm.f.posterior(x)
        guide.locs.scene_z = posterior.mean
        guide.scale_trils.scene_z = posterior.scale_tril.expand(len(x), -1, -1).contiguous()
    return guide


def mean_field_guide(model: Model, ebm: LVEBM, x: Tensor) -> AutoNormal:
    """The mean-field guide that is closest to the posterior: its means, and variances 1 / P_ii."""
    guide = AutoNormal(model)
    initialise(guide, x)
    with torch.no_grad():
        posterior = ebm.f.posterior(x)
        precision = posterior.precision_matrix.diagonal(dim1=-2, dim2=-1)
        guide.locs.scene_z = posterior.mean
        guide.scales.scene_z = precision.rsqrt().expand(len(x), -1).contiguous()
    return guide


def z_p_value(estimate: float, std_error: float, expected: float) -> float:
    """Two-sided normal test of an estimate with a standard error."""
    z = (estimate - expected) / std_error
    return 2.0 * float(stats.norm.sf(abs(z))) if math.isfinite(z) else 0.0


@contextmanager
def assert_unchanged(*modules: nn.Module) -> Iterator[None]:
    """Every tensor of the modules, and whether it is trained, is afterwards as before."""
    before = [_snapshot(m) for m in modules]
    yield
    for old, module in zip(before, modules, strict=True):
        new = _snapshot(module)
        assert old.keys() == new.keys()
        for key, (value, trained) in old.items():
            assert torch.equal(value.nan_to_num(), new[key][0].nan_to_num()), key
            assert trained == new[key][1], key


def _snapshot(module: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    return {
        name: (value.detach().clone(), value.requires_grad)
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }
