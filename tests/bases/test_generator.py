# SPDX-License-Identifier: Apache-2.0
"""A Gaussian over x around what a generator makes of z, beside torch's."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from generator_models import Sheet, base_of, conditional
from referee import global_seed, normal
from small_models import same, snapshot
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, biject_to, constraints

from pyro_lvebm import LVEBM, GeneratorBase, MLPGenerator, ZeroEnergy
from pyro_lvebm.bases import GaussianBase, Support

pytestmark = pytest.mark.usefixtures("global_rng_untouched")

NOISES = ["diagonal", "low-rank", "full"]

every_noise = pytest.mark.parametrize("noise", NOISES)


def network(shape: tuple[int, ...] = (3,), *, scale: bool = False) -> MLPGenerator:
    return MLPGenerator(2, shape, (7,), scale=scale)


@every_noise
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 1, 3)])
def test_the_density_is_that_of_torch(noise: Any, scale: bool, batch: tuple[int, ...]) -> None:
    base = base_of(network(scale=scale), 2, (3,), noise)
    x, z = normal((*batch, 3), 1), normal((*batch, 2), 2)
    found = base.log_prob_given(x, z)
    assert found.shape == batch
    torch.testing.assert_close(found, conditional(base, z).log_prob(x))


@every_noise
def test_no_rows_have_no_densities(noise: Any) -> None:
    """As in a search that finds nothing."""
    base = base_of(network(scale=True), 2, (3,), noise)
    x, z = torch.zeros(0, 3).double(), torch.zeros(0, 2).double()
    assert base.log_prob_given(x, z).shape == (0,)
    assert base.unwhiten_given(base.whiten_given(x, z), z).shape == (0, 3)


@every_noise
def test_events_may_have_two_axes(noise: Any) -> None:
    base = base_of(network((2, 2), scale=True), 2, (2, 2), noise)
    x, z = normal((5, 2, 2), 1), normal((5, 2), 2)
    expected = conditional(base, z).log_prob(x.flatten(1))
    torch.testing.assert_close(base.log_prob_given(x, z), expected)
    assert base.mean(z).shape == (5, 2, 2)
    torch.testing.assert_close(base.mean(z).flatten(1), conditional(base, z).mean)


def test_z_may_have_two_axes() -> None:
    class Flat(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return torch.sin(z).sum(-1)

    gaussian = GaussianBase(torch.zeros(2), torch.ones(2))
    base = GeneratorBase(gaussian, Flat(), torch.Size([2, 2]))
    with torch.no_grad():
        base.linear.copy_(normal((2, 4), 3))
    z = normal((5, 2, 2), 4, torch.float32)
    expected = z.flatten(1) @ base.linear.T + torch.sin(z).sum(-1)
    torch.testing.assert_close(base.mean(z), expected)


SUPPORTS = {
    "positive": (constraints.positive, (3,)),
    "interval": (constraints.interval(-0.5, 2.0), (3,)),
    "simplex": (constraints.simplex, (4,)),
}


@pytest.mark.parametrize("name", SUPPORTS)
@every_noise
def test_on_a_support_it_is_that_of_a_change_of_variables(name: str, noise: Any) -> None:
    constraint, shape = SUPPORTS[name]
    support = Support(constraint, torch.Size(shape))
    base = base_of(network(), 2, shape, noise, support)
    y, z = 0.5 * normal((6, 3), 1), normal((6, 2), 2)
    x = biject_to(constraint)(y)
    log_det = biject_to(constraint).log_abs_det_jacobian(y, x)
    log_det = log_det.sum(-1) if log_det.dim() > 1 else log_det
    expected = conditional(base, z).log_prob(y) - log_det
    torch.testing.assert_close(base.log_prob_given(x, z), expected)
    mean = biject_to(constraint)(conditional(base, z).mean)
    torch.testing.assert_close(base.mean(z), mean)
    assert constraint.check(base.unwhiten_given(normal((6, 3), 3), z)).all()


@every_noise
@pytest.mark.parametrize("batch", [(), (2, 1, 3)])
def test_coordinates_and_back(noise: Any, batch: tuple[int, ...]) -> None:
    """ε, and w that does not vary with z, which is that of a Gaussian over x."""
    base = base_of(network(scale=True), 2, (3,), noise)
    epsilon, z = normal((*batch, 3), 1), normal((*batch, 2), 2)
    x = base.unwhiten_given(epsilon, z)
    torch.testing.assert_close(base.whiten_given(x, z), epsilon)
    w = base.coordinates_of(epsilon, z)
    torch.testing.assert_close(base.coordinates().whiten(x), w)
    torch.testing.assert_close(base.whiten(x), w)
    found, log_det = base.noise_and_log_det(w, z)
    torch.testing.assert_close(found, epsilon)
    change = base.coordinates().log_prob(x) + 0.5 * (w * w - epsilon * epsilon).sum(-1)
    torch.testing.assert_close(change - base.log_prob_given(x, z), log_det)


@every_noise
def test_noise_is_white(noise: Any) -> None:
    """The covariance of x given z is that of R, from its derivative in ε."""
    base = base_of(network(scale=True), 2, (3,), noise)
    z = normal((2,), 2)
    slope = torch.autograd.functional.jacobian(
        lambda e: base.unwhiten_given(e, z), torch.zeros(3).double()
    )
    torch.testing.assert_close(slope @ slope.T, conditional(base, z).covariance_matrix)


@every_noise
def test_single_precision_is_close_to_double(noise: Any) -> None:
    base = base_of(network(scale=True), 2, (3,), noise)
    x, z = normal((20, 3), 1), normal((20, 2), 2)
    expected = base.log_prob_given(x, z)
    single = copy.deepcopy(base).float()
    found = single.log_prob_given(x.float(), z.float())
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@every_noise
def test_the_divergence_from_noise_without_correlations(noise: Any) -> None:
    base = base_of(None, 1, (4,), noise)
    cov = conditional(base, torch.zeros(1).double()).covariance_matrix
    zero = torch.zeros(4).double()
    apart, together = (MultivariateNormal(zero, c) for c in (cov.diagonal().diag(), cov))
    expected = torch.distributions.kl_divergence(apart, together)
    torch.testing.assert_close(base.noise_divergence(), expected)
    assert (expected.item() > 1e-3) is (noise != "diagonal")


@every_noise
@pytest.mark.parametrize(("unit", "dtype"), [(1e-200, 64), (1e200, 64), (1e-30, 32), (1e30, 32)])
def test_units_of_columns_do_not_matter(noise: Any, unit: float, dtype: int) -> None:
    """Same parameters, and a density that is the same but for log of the unit."""
    dtype_of = {32: torch.float32, 64: torch.float64}[dtype]
    rows = (normal((60, 3), 1) @ normal((3, 3), 2)).to(dtype_of)
    units = torch.tensor([1.0, unit, unit], dtype=dtype_of)
    z = normal((60, 2), 3).to(dtype_of)
    plain, scaled = (
        GeneratorBase.from_factor_analysis(x, torch.Size([2]), network(), noise=noise)
        for x in (rows, rows * units)
    )
    tolerance = {32: 1e-3, 64: 1e-8}[dtype]
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    shift = 2.0 * math.log(unit)
    found = scaled.log_prob_given(rows * units, z) + shift
    rounding = {32: 1e-3, 64: 1e-9}[dtype]  # of log p near 1e2, and in float64 log of the unit
    torch.testing.assert_close(found, plain.log_prob_given(rows, z), rtol=0.0, atol=rounding)
    epsilon = plain.whiten_given(rows, z)
    again = scaled.whiten_given(scaled.unwhiten_given(epsilon, z), z)
    torch.testing.assert_close(again, epsilon, rtol=0.0, atol=0.1 * rounding)


@every_noise
def test_every_parameter_has_a_gradient_at_the_start(noise: Any) -> None:
    """But for what a last layer of zeros hides behind it."""
    rows, z = normal((60, 3), 1), normal((60, 2), 3)
    base = GeneratorBase.from_factor_analysis(
        rows, torch.Size([2]), network(scale=True), noise=noise
    )
    base.log_prob_given(rows, z).sum().backward()
    silent = {name for name, p in base.named_parameters() if p.grad is None or not p.grad.any()}
    assert all(name.startswith("generator.hidden") for name in silent)


def test_a_state_travels() -> None:
    base, other = (base_of(network(), 2, (3,), "full") for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    x, z = normal((5, 3), 1), normal((5, 2), 2)
    assert not torch.equal(other.log_prob_given(x, z), base.log_prob_given(x, z))
    other.load_state_dict(base.state_dict())
    assert same(snapshot(other), snapshot(base))
    for twin in (other, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert torch.equal(twin.log_prob_given(x, z), base.log_prob_given(x, z))


def test_what_only_an_integral_tells_is_refused() -> None:
    base = base_of(network(), 2, (3,))
    with pytest.raises(ValueError, match=r"a density given z only: log_prob_given\(x, z\)"):
        base.log_prob(torch.zeros(5, 3).double())
    with pytest.raises(ValueError, match="a law given z only"):
        base.distribution()
    assert base.num_components == 1


# --- generators of users ---------------------------------------------------------------------


def test_layers_that_take_one_batch_axis_serve() -> None:
    with global_seed(0):
        layers = (nn.Linear(2, 8), nn.ConvTranspose2d(2, 1, 2, 2))
    generator = nn.Sequential(layers[0], nn.Unflatten(1, (2, 2, 2)), layers[1], nn.Flatten(1))
    gaussian = GaussianBase(torch.zeros(16), torch.ones(16))
    base = GeneratorBase(gaussian, generator, torch.Size([2]))
    z = normal((3, 4, 2), 1, torch.float32)
    found = base.mean(z)
    assert found.shape == (3, 4, 16)
    torch.testing.assert_close(found[1], base.mean(z[1]))


class Broken(nn.Module):
    """A generator that is wrong in one way."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        with global_seed(0):
            self.linear, self.norm = nn.Linear(2, 3), nn.BatchNorm1d(3)

    def forward(self, z: Tensor) -> Any:
        out = self.linear(z)
        return {
            "shape": lambda: out[:, :2],
            "rows": lambda: out[:1],
            "three": lambda: (out, out, out),
            "list": lambda: [out],
            "nan": lambda: out / 0.0 * 0.0,
            "scale": lambda: (out, out / 0.0),
            "dropout": lambda: nn.functional.dropout(out, 0.5, self.training),
            "coupled": lambda: out - out.mean(0),
            "batch norm": lambda: self.norm(out),
            "double": lambda: out.double(),
            "numpy": lambda: torch.from_numpy(out.detach().numpy()),
        }[self.what]()


def build(generator: nn.Module, z_dim: int = 2, noise: Any = "diagonal") -> GeneratorBase:
    gaussian = GaussianBase(torch.zeros(3), torch.ones(3))
    return GeneratorBase(gaussian, generator, torch.Size([z_dim]), noise)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"each of shape \(4, 3\) for z of shape \(4, 2\); got \[\(4, 2\)\]"),
        ("rows", r"each of shape \(4, 3\)"),
        ("three", "a pair of it and a log factor"),
        ("list", r"got \['list'\]"),
        ("nan", "NaN or infinite"),
        ("scale", "NaN or infinite"),
        ("dropout", r"random: two calls differ.*\.eval\(\)"),
        ("coupled", "depends on the others in its batch"),
        ("batch norm", "BatchNorm1d 'norm' of the generator"),
        ("double", "returns torch.float64 for z of torch.float32"),
        ("numpy", "differentiated twice.*do not detach z"),
    ],
)
def test_generators_that_do_not_fit_are_refused(what: str, message: str) -> None:
    generator = Broken(what)
    if what != "batch norm":
        generator.norm.eval()
    with pytest.raises(ValueError, match=message):
        build(generator)


def test_what_is_meant_to_stay_may_stay() -> None:
    for what in ("dropout", "batch norm"):
        assert build(Broken(what).eval()).dim == 3


def test_other_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="the generator cannot be called with z of shape"):
        build(network(), 3)
    with pytest.raises(ValueError, match='noise must be "diagonal", "low-rank" or "full"'):
        build(network(), noise="none")
    x = normal((50, 3), 1)
    with pytest.raises(ValueError, match=r'generator must be an nn.Module or "linear"'):
        LVEBM.from_data(ZeroEnergy(3, 2), x, z_dim=2, generator="mlp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"in place of base='mixture'; give one of them"):
        LVEBM.from_data(ZeroEnergy(3, 2), x, z_dim=2, generator="linear", base="mixture")
    with pytest.raises(ValueError, match="is that of a generator, and there is none"):
        LVEBM.from_data(ZeroEnergy(3, 2), x, z_dim=2, noise="full")
    one = GaussianBase(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"takes z of shape \(2,\); base_z has \(1,\)"):
        LVEBM(ZeroEnergy(3, 1), build(Sheet()), one)
    with pytest.raises(ValueError, match="base_z must be a Gaussian; got a GeneratorBase"):
        LVEBM(ZeroEnergy(1, 3), one, build(Sheet()))
