# SPDX-License-Identifier: Apache-2.0
"""Medians and quantiles of per-datum guides, against closed forms and Pyro's own guide."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from referee import normal
from torch import Tensor

from pyro_lvebm import (
    AutoPerDatumIAFNormal,
    AutoPerDatumLowRankMultivariateNormal,
    AutoPerDatumMultivariateNormal,
)

FAMILIES = {
    "full": AutoPerDatumMultivariateNormal,
    "low rank": partial(AutoPerDatumLowRankMultivariateNormal, rank=2),
}
LEVELS = [0.05, 0.5, 0.8]
X = torch.zeros(4, dtype=torch.float64)


class Below(dist.TransformedDistribution):
    """Numbers below 1, whose unconstrained coordinate falls where they rise."""

    support = constraints.less_than(1.0)


FLIP = torch.distributions.transforms.AffineTransform(1.0, -1.0)


def model(x: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(x.new_tensor(2.0), 2.0))
    with pyro.plate("data", len(x), subsample_size=2) as i:
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        r = pyro.sample("r", dist.LogNormal(x.new_zeros(2, 2), 1.0).to_event(2))
        p = pyro.sample("p", dist.Beta(x.new_tensor(2.0), 2.0))
        t = pyro.sample("t", Below(dist.LogNormal(x.new_zeros(()), 1.0), [FLIP]))
        pyro.sample("x", dist.Normal(z.sum(-1) + r.sum((-1, -2)) + p + t, scale), obs=x[i])


def scattered(family: Any, model: Any = model) -> Any:
    pyro.clear_param_store()
    guide = family(model)
    guide(X)
    with torch.no_grad():
        for k, param in enumerate(guide.parameters()):
            param.add_(0.4 * normal(tuple(param.shape), k))
    return guide


@pytest.mark.parametrize("family", FAMILIES)
def test_quantiles_are_those_of_every_entry(family: str) -> None:
    guide = scattered(FAMILIES[family])
    found, medians = guide.quantiles(LEVELS), guide.median()
    shapes = {"scale": (), "z": (4, 3), "r": (4, 2, 2), "p": (4,), "t": (4,)}
    assert {name: tuple(v.shape) for name, v in medians.items()} == shapes
    maps = {"z": lambda u: u, "r": torch.exp, "scale": torch.exp, "p": torch.sigmoid}
    maps["t"] = lambda u: 1.0 - u.exp()
    for name, shape in shapes.items():
        law = guide._law(name)
        cov = law.covariance_matrix
        assert found[name].shape == (3, *shape) and not found[name].requires_grad
        for level, value in zip(LEVELS, found[name], strict=True):
            level = 1.0 - level if name == "t" else level
            width = dist.Normal(X.new_zeros(()), 1.0).icdf(X.new_tensor(level))
            u = law.mean + width * cov.diagonal(dim1=-2, dim2=-1).sqrt()
            torch.testing.assert_close(value, maps[name](u).reshape(shape))
        torch.testing.assert_close(found[name][1], medians[name])
        assert (found[name].diff(dim=0) > 0).all()


def test_they_share_no_memory_with_parameters() -> None:
    guide = scattered(FAMILIES["full"])
    guide.median()["z"].fill_(7.0)
    assert not (guide.locs.z == 7.0).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_they_agree_with_draws(family: str) -> None:
    guide = scattered(FAMILIES[family])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        drawn = guide._law("z").sample((4000,))
    share = (drawn <= guide.quantiles([0.3])["z"]).double().mean(0)
    assert (share - 0.3).abs().max() < 5.0 * (0.21 / 4000) ** 0.5


def test_they_are_those_of_pyro_where_entries_are_independent() -> None:
    """The same locations and scales in Pyro's guide, in a list of guides too."""

    def one(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    pyro.clear_param_store()
    ours, theirs, both = FAMILIES["full"](one), AutoNormal(one), AutoGuideList(one)
    both.append(ours)
    both(X)
    theirs(X)
    with torch.no_grad():
        ours.locs.z.add_(0.4 * normal((4, 1), 1))
        theirs.locs.z.copy_(ours.locs.z[..., 0])
        theirs.scales.z = ours.scale_trils.z[..., 0, 0].detach()
    expected = theirs.quantiles(LEVELS)["z"]
    torch.testing.assert_close(ours.quantiles(torch.tensor(LEVELS).double())["z"], expected)
    torch.testing.assert_close(both.median(X)["z"], theirs.median(X)["z"])
    torch.testing.assert_close(both.quantiles(LEVELS, X)["z"], expected)


def test_what_has_no_quantiles_says_so() -> None:
    with pytest.raises(ValueError, match="no parameters before its first call"):
        AutoPerDatumMultivariateNormal(model).median()
    guide = scattered(FAMILIES["full"])
    for levels in ([0.5, 1.5], [-0.1], 0.5, [float("nan")]):
        with pytest.raises(ValueError, match="levels between 0 and 1"):
            guide.quantiles(levels)

    def simplex(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("w", dist.Dirichlet(x.new_ones(3)))

    guide = scattered(FAMILIES["full"], simplex)
    torch.testing.assert_close(guide.median()["w"].sum(-1), torch.ones_like(X))
    with pytest.raises(ValueError, match=r"'w' on the support Simplex.* of draws"):
        guide.quantiles([0.5])

    def plane(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    flow = scattered(partial(AutoPerDatumIAFNormal, hidden=(4,)), plane)
    for ask in (flow.median, partial(flow.quantiles, [0.5])):
        with pytest.raises(NotImplementedError, match="AutoPerDatumIAFNormal have no closed form"):
            ask()
