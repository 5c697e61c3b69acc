# SPDX-License-Identifier: Apache-2.0
"""What every base promises. A new one gets these tests by a line in `BASES`."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache

import pyro.distributions as dist
import pytest
import torch
from referee import ALPHA, CERTAIN, global_seed, normal, plane_grid, seeded, variance_p_value
from scipy import stats
from small_models import rotations, same, snapshot
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from pyro_lvebm.bases import GaussianBase, MixtureBase, Support

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def scales(count: int, seed: int) -> Tensor:
    return 0.4 + torch.rand(count, generator=torch.Generator().manual_seed(seed)).double()


def tril(seed: int) -> Tensor:
    return 0.5 * normal((2, 2), seed).tril(-1) + scales(2, seed).diag()


def bounded(constraint: Constraint, shape: tuple[int, ...], seed: int) -> GaussianBase:
    """A base with a full covariance in the two unconstrained coordinates of a support."""
    support = Support(constraint, torch.Size(shape))
    return GaussianBase(normal(tuple(support.unconstrained_shape), seed), tril(seed), support)


def mixture(gaussian: GaussianBase, seed: int) -> MixtureBase:
    """Three components in the coordinates of a Gaussian, one of them small and far out."""
    d = gaussian.dim
    trils = torch.stack([0.4 * normal((d, d), seed + k).tril(-1) for k in range(3)])
    trils = trils + torch.diag_embed(0.3 + normal((3, d), seed).abs())
    means = torch.stack([torch.zeros(d), torch.full((d,), 2.5), torch.full((d,), -1.0)])
    return MixtureBase(gaussian, torch.tensor([0.6, 0.1, 0.3]).log(), means.double(), trils)


@cache
def fitted_mixture(seed: int) -> MixtureBase:
    """Two clusters, and the broad component."""
    x = normal((300, 2), seed) @ tril(seed).T
    x[:60] += 5.0
    return MixtureBase.fit(x)


def rows(seed: int) -> Tensor:
    return normal((50, 2), seed) @ tril(seed).T + seed


def with_holes(x: Tensor) -> Tensor:
    return x.masked_fill(normal(tuple(x.shape), 99) > 1.2, torch.nan)


COLUMNS = constraints.stack([constraints.positive, constraints.unit_interval], -1)

# One or two unconstrained entries, so that quadrature is the referee; other seeds are other bases.
BASES: dict[str, Callable[[int], GaussianBase]] = {
    "one entry": lambda s: GaussianBase(normal((1,), s), scales(1, s)),
    "diagonal": lambda s: GaussianBase(normal((2,), s), scales(2, s)),
    "diagonal, two axes": lambda s: GaussianBase(normal((2, 1), s), scales(2, s)[:, None]),
    "full": lambda s: GaussianBase(normal((2,), s), tril(s)),
    "full, two axes": lambda s: GaussianBase(normal((1, 2), s), tril(s)),
    "fitted": lambda s: GaussianBase.fit(rows(s)),
    "fitted with holes": lambda s: GaussianBase.fit(with_holes(rows(s))),
    "fitted on positive": lambda s: GaussianBase.fit(
        rows(s).exp(), Support(constraints.positive, torch.Size([2]))
    ),
    "positive": lambda s: bounded(constraints.positive, (2,), s),
    "interval": lambda s: bounded(constraints.interval(-0.5, 2.0), (1, 2), s),
    "mixed columns": lambda s: bounded(COLUMNS, (2,), s),
    "simplex": lambda s: bounded(constraints.simplex, (3,), s),
    "mixture of one entry": lambda s: mixture(GaussianBase(normal((1,), s), scales(1, s)), s),
    "mixture": lambda s: mixture(GaussianBase(normal((2,), s), tril(s)), s),
    "mixture, two axes": lambda s: mixture(
        GaussianBase(normal((2, 1), s), scales(2, s)[:, None]), s
    ),
    "mixture on positive": lambda s: mixture(bounded(constraints.positive, (2,), s), s),
    "fitted mixture": lambda s: copy.deepcopy(fitted_mixture(s)),
    "a log-normal": lambda s: GaussianBase.from_bounded(
        dist.LogNormal(normal((2,), s), scales(2, s)).to_event(1), "base_x"
    ),
    "a multivariate normal": lambda s: GaussianBase.from_distribution(
        dist.MultivariateNormal(normal((2,), s), scale_tril=tril(s)), "base_x"
    ),
}

every = pytest.mark.parametrize("name", BASES)
gaussian = pytest.mark.parametrize("name", [name for name in BASES if "mixture" not in name])


def points(base: GaussianBase, batch: tuple[int, ...] = (5,), seed: int = 1) -> Tensor:
    """Events (*batch, *event_shape) over all of the support."""
    return base.unwhiten(1.5 * normal((*batch, base.dim), seed, base.loc.dtype))


def free_entries(base: GaussianBase, x: Tensor) -> Tensor:
    """As many entries of x (*b, *event_shape) as there are unconstrained ones: (*b, dim)."""
    batch = x.shape[: x.dim() - len(base.event_shape)]
    return x.reshape(*batch, -1)[..., : base.dim]


def log_standard_normal(w: Tensor) -> Tensor:
    return -0.5 * (w * w).sum(-1) - 0.5 * w.shape[-1] * math.log(2 * math.pi)


def log_law(base: GaussianBase, w: Tensor) -> Tensor:
    return -base.law.energy(w) - 0.5 * w.shape[-1] * math.log(2 * math.pi)


@every
@pytest.mark.parametrize("batch", [(), (2, 1, 3)])
def test_whitening_and_back_is_the_identity(name: str, batch: tuple[int, ...]) -> None:
    base = BASES[name](1)
    w = normal((*batch, base.dim), 2)
    x = base.unwhiten(w)
    assert x.shape == (*batch, *base.event_shape) and base.log_prob(x).shape == batch
    torch.testing.assert_close(base.whiten(x), w, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(base.unwhiten(base.whiten(x)), x, rtol=1e-8, atol=1e-8)


@every
def test_a_base_says_how_many_gaussians_it_has(name: str) -> None:
    count = BASES[name](1).num_components
    assert count == 1 if "mixture" not in name else count == 3


@every
def test_events_lie_on_the_support(name: str) -> None:
    base = BASES[name](1)
    x = points(base, (200,))
    assert base.support.constraint.check(x).all()
    base.support.check(x)


@every
def test_the_density_is_that_of_a_change_of_variables(name: str) -> None:
    """Its law at w, less log |det dx/dw| with the Jacobian by automatic differentiation."""
    base = BASES[name](1)
    w = normal((4, base.dim), 3)
    x = base.unwhiten(w)
    jacobians = [
        torch.autograd.functional.jacobian(lambda v: free_entries(base, base.unwhiten(v)), row)
        for row in w
    ]
    log_det = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(base.log_abs_det(w), log_det, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(base.log_prob(x), log_law(base, w) - log_det)
    torch.testing.assert_close(base.log_normal(x), log_standard_normal(w) - log_det)


def mass(base: GaussianBase, log_density: Callable[[Tensor], Tensor]) -> float:
    """Integral over the support by the trapezoidal rule, in coordinates that are torch's own."""
    y, cell = plane_grid(14.0, 401)
    if base.dim == 1:
        y, cell = torch.linspace(-14.0, 14.0, 4001).double()[:, None], 28.0 / 4000
    support = base.support
    transform = biject_to(support.core)
    y = y.reshape(-1, *support.unconstrained_shape)
    x = transform(y)
    log_det = transform.log_abs_det_jacobian(y, x).reshape(len(y), -1).sum(-1)
    inside = log_det > -25.0  # beyond, double precision puts x on the boundary
    return float((log_density(x[inside]) + log_det[inside]).exp().sum() * cell)


@every
def test_the_density_integrates_to_one(name: str) -> None:
    """Without the Jacobian of whitening it does not."""
    base = BASES[name](1)
    assert mass(base, base.log_prob) == pytest.approx(1.0, abs=1e-5)
    assert abs(mass(base, lambda x: log_standard_normal(base.whiten(x))) - 1.0) > 0.05


@every
def test_the_distribution_is_the_same_law(name: str) -> None:
    """It has flat events where the covariance is full and x is unbounded."""
    base = BASES[name](1)
    law, x = base.distribution(), points(base)
    events = x.reshape(len(x), *law.event_shape)
    assert law.batch_shape == () and law.event_shape.numel() == base.event_shape.numel()
    torch.testing.assert_close(law.log_prob(events), base.log_prob(x), rtol=1e-8, atol=1e-8)


def whiteness_p_value(base: GaussianBase, widen: float) -> float:
    with global_seed(3):
        draws = base.distribution().sample((4000,)).reshape(4000, *base.event_shape)
    directions = rotations(base.whiten(draws))
    return variance_p_value(directions, torch.full((directions.shape[1],), widen))


def same_law_p_value(base: GaussianBase, widen: float) -> float:
    """Kolmogorov's test along axes and diagonals, draws of w beside those of torch's own law."""
    with global_seed(4):
        x = base.distribution().sample((3000,)).reshape(3000, *base.event_shape)
    w = widen * base.law.draw((3000, base.dim), base.loc, seeded(5))
    pairs = zip(rotations(base.whiten(x)).T, rotations(w).T, strict=True)
    p_values = [stats.ks_2samp(a.numpy(), b.numpy()).pvalue for a, b in pairs]
    return min(1.0, len(p_values) * min(p_values))


@every
def test_draws_have_the_law(name: str) -> None:
    """False alarms: 1e-3 a base. Draws that are half as wide fail."""
    assert same_law_p_value(BASES[name](1), 1.0) > ALPHA
    assert same_law_p_value(BASES[name](1), 0.5) < CERTAIN


@every
def test_the_generator_fixes_draws(name: str) -> None:
    base = BASES[name](1).float()
    draws = [base.law.draw((2, 3, base.dim), base.loc, seeded(s)) for s in (1, 1, 2)]
    assert draws[0].shape == (2, 3, base.dim) and draws[0].dtype is torch.float32
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@every
@pytest.mark.parametrize("batch", [(), (2, 1, 3)])
def test_the_base_energy_has_its_gradient(name: str, batch: tuple[int, ...]) -> None:
    base = BASES[name](1)
    w = (2.0 * normal((*batch, base.dim), 6)).requires_grad_(True)
    energy = base.law.energy(w)
    (expected,) = torch.autograd.grad(energy.sum(), w)
    value, grad = base.law.energy_and_grad(w)
    assert not value.requires_grad and not grad.requires_grad and value.shape == batch
    torch.testing.assert_close(value, energy.detach())
    torch.testing.assert_close(grad, expected)


@gaussian
def test_draws_of_the_distribution_are_white(name: str) -> None:
    """Mean 0 and variance 1 along all axes and diagonals. False alarms: 1e-3 a base.

    The check rejects a variance of 1.3.
    """
    assert whiteness_p_value(BASES[name](1), 1.0) > ALPHA
    assert whiteness_p_value(BASES[name](1), 1.3) < CERTAIN


@every
def test_tensors_follow_the_dtype(name: str) -> None:
    """Bounds of the support too; the density in single precision is near that in double."""
    base, single = BASES[name](1), BASES[name](1).float()
    x = points(base)
    assert all(t.dtype is torch.float32 for t in single.state_dict().values())
    assert points(single).dtype is torch.float32
    result = single.log_prob(x.float())
    assert result.dtype is torch.float32
    torch.testing.assert_close(result.double(), base.log_prob(x), rtol=1e-3, atol=1e-3)
    assert single.double().log_prob(x).dtype is torch.float64


@every
def test_state_is_buffers_and_travels(name: str) -> None:
    base, other = BASES[name](1), BASES[name](2)
    x = points(base)
    assert not list(base.parameters()) and not torch.equal(other.log_prob(x), base.log_prob(x))
    other.load_state_dict(base.state_dict())
    assert same(snapshot(other), snapshot(base))
    assert torch.equal(other.log_prob(x), base.log_prob(x))


@every
def test_copies_and_pickles_are_the_same_base(name: str) -> None:
    base = BASES[name](1)
    x = points(base)
    for other in (copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(other.log_prob(x), base.log_prob(x))
        other.loc.add_(1.0)
    assert torch.equal(points(base), x)


@every
def test_the_density_has_a_gradient_in_x(name: str) -> None:
    """Samplers of Pyro follow it; none reaches the base."""
    base = BASES[name](1)
    x = points(base).requires_grad_(True)
    (grad,) = torch.autograd.grad(base.log_prob(x).sum(), x)
    assert grad.isfinite().all() and grad.abs().sum() > 0.0
    assert not base.log_prob(x.detach()).requires_grad
