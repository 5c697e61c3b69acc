# SPDX-License-Identifier: Apache-2.0
"""A saved LVEBM says what it is, and comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_lvebm import (
    LVEBM,
    MALA,
    ConjugateEnergy,
    ContextPool,
    MLPEnergy,
    PersistentPool,
    QuadraticEnergy,
    TemperedPool,
)
from pyro_lvebm.model import read_lvebm

X = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
TWO = X + 9.0 * (torch.arange(60) < 20)[:, None]
HOLES = torch.where(torch.arange(120).reshape(60, 2) % 9 == 0, torch.nan, X)


def mlp(**settings: Any) -> MLPEnergy:
    energy = MLPEnergy(2, 1, hidden=(4, 3), seed=3, **settings)
    nn.init.normal_(energy.out.weight, generator=torch.Generator().manual_seed(1))
    return energy


def fit(energy: nn.Module, x: Tensor, **options: Any) -> LVEBM:
    options = {"z_dim": 1, "pool": TemperedPool(3, 8, num_moves=2, seed=4)} | options
    return LVEBM.from_data(energy, x, **options)


by_column = constraints.cat([constraints.positive, constraints.interval(-2.0, 3.0)], dim=-1)
bounds = constraints.interval(torch.tensor([-9.0, -8.0]), torch.tensor([9.0, 8.0]))

CASES: dict[str, Callable[[], LVEBM]] = {
    "mixture": lambda: fit(mlp(fourier_features=5), TWO, base="mixture"),
    "double": lambda: fit(mlp(kl_penalty=0.0), X.double()),
    "quadratic": lambda: fit(QuadraticEnergy(2, 1), X, pool=PersistentPool(8, kernel=MALA(0.7))),
    "conjugate": lambda: fit(
        ConjugateEnergy(2, 1, hidden=(5, 4), fourier_features=3, kl_penalty=1.0), TWO
    ),
    "without z": lambda: fit(MLPEnergy(2, hidden=(4,)), X, z_dim=0),
    "missing": lambda: fit(mlp(), HOLES, base="gaussian"),
    "positive": lambda: fit(mlp(), X.exp(), support=constraints.positive),
    "by column": lambda: fit(mlp(), X.sigmoid(), support=by_column),
    "tensor bounds": lambda: fit(mlp(), X, support=bounds, base="mixture"),
    "simplex": lambda: fit(
        mlp(), torch.softmax(torch.cat([X, 0 * X[:, :1]], 1), 1), support=constraints.simplex
    ),
    "of Pyro": lambda: fit(
        mlp(), X.exp().cumsum(1), support=pyro_constraints.positive_ordered_vector
    ),
    "contexts": lambda: fit(
        mlp(context_dim=2), X, context=3.0 * X + 1.0, pool=ContextPool(2, 8, num_moves=2)
    ),
    "one context": lambda: CASES["contexts"]().at(torch.tensor([1.0, 2.0])),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    ebm = CASES[name]()
    if ebm.context_shape is None:
        ebm.follow()
    else:
        ebm.follow(3.0 * X + 1.0)
    ebm.save(tmp_path / "m", columns=[f"c{i}" for i in range(ebm.x_shape.numel())])
    again = LVEBM.load(tmp_path / "m")
    assert type(again.f) is type(ebm.f) and type(again.pool) is type(ebm.pool)
    saved, found = ebm.state_dict(), again.state_dict()
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    assert str(again.base_x.support) == str(ebm.base_x.support)
    assert again.context_shape == ebm.context_shape and again.pool_is_fresh()
    u = torch.linspace(-1, 1, 4 * ebm.dim).reshape(4, ebm.dim).to(ebm.base_x.loc)
    x, z = ebm.unwhiten(u)
    given = () if ebm.context_shape is None else (X[:4],)
    assert torch.equal(again.energy(x, z, *given), ebm.energy(x, z, *given))
    for both in (ebm, again):  # they go on alike
        with torch.no_grad():
            for p in both.f.parameters():
                p.add_(0.01)
        both.follow(*given)
    assert torch.equal(again.pool.u, ebm.pool.u)
    assert torch.equal(again.log_partition, ebm.log_partition)


class Own(nn.Module):
    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.0 * x.sum(-1) * z.sum(-1)


class OwnMLP(MLPEnergy):
    """Its methods may be others."""


@pytest.mark.parametrize("energy", [Own(), OwnMLP(2, 1, hidden=(4,))], ids=["module", "subclass"])
def test_own_energies_are_refused_by_name(energy: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"\.{type(energy).__name__}, whose code.*Saddle\.save"):
        fit(energy, X).save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_own_constraints_are_refused_by_name(tmp_path: Path) -> None:
    ebm = fit(mlp(), X.exp(), support=constraints.positive)

    class OwnSupport(constraints.Constraint):
        pass

    ebm.base_x.support.core = OwnSupport()
    with pytest.raises(ValueError, match=r"OwnSupport, which a model file cannot hold"):
        ebm.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    ebm = fit(mlp(), X)
    ebm.save(tmp_path)
    with pytest.raises(ValueError, match=r"model\.json' exists; give overwrite=True"):
        ebm.save(tmp_path)
    ebm.save(tmp_path, overwrite=True, transforms=[{"name": "logit"}])
    _, description = read_lvebm(tmp_path)
    assert description.transforms == ({"name": "logit"},)
    assert {p.name for p in tmp_path.iterdir()} == {"model.json", "model.safetensors"}
    with pytest.raises(ValueError, match="3 columns are named; x has 2"):
        ebm.save(tmp_path / "new", columns=["a", "b", "c"])
    assert not (tmp_path / "new").exists()


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    other, folder = tmp_path / "other.json", tmp_path / "m"
    other.write_text("kept")
    folder.mkdir()
    (folder / "model.json").symlink_to(other)
    with pytest.raises(ValueError, match="exists"):
        fit(mlp(), X).save(folder)
    fit(mlp(), X).save(folder, overwrite=True)
    assert other.read_text() == "kept" and not (folder / "model.json").is_symlink()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda p: [f.unlink() for f in p.iterdir()], "no model in"),
    "no numbers": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is not there"),
    "not JSON": (lambda p: (p / "model.json").write_text("{"), "no readable model"),
    "other JSON": (lambda p: (p / "model.json").write_text("[1]"), "has format None"),
    "not tensors": (lambda p: (p / "model.safetensors").write_bytes(b"x" * 9), "no readable model"),
    "other class": (lambda p: edit(p, "energy", {"class": "os", "settings": {}}), "no model that"),
    "bad settings": (
        lambda p: edit(p, "energy", {"class": "MLPEnergy", "settings": {"x_dim": -1}}),
        "no model that",
    ),
    "other size": (
        lambda p: edit(
            p,
            "energy",
            {"class": "MLPEnergy", "settings": {"x_dim": 2, "z_dim": 1, "hidden": [5]}},
        ),
        "no model that",
    ),
    "private name": (
        lambda p: edit(
            p,
            "base_x",
            {
                "class": "GaussianBase",
                "event_shape": [2],
                "diagonal": False,
                "support": {"constraint": "__builtins__"},
            },
        ),
        "no model that",
    ),
    "a tensor less": (lambda p: drop(p, "f.out.weight"), "f.out.weight.* are missing"),
    "no loc": (lambda p: drop(p, "base_x.loc"), "no model that"),
}


def edit(folder: Path, key: str, value: Any) -> None:
    described = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(described | {key: value}))


def drop(folder: Path, key: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", DAMAGES)
def test_wrong_files_are_value_errors(name: str, tmp_path: Path) -> None:
    fit(mlp(), X, base="gaussian").save(tmp_path)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        LVEBM.load(tmp_path)
