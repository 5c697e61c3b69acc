# SPDX-License-Identifier: Apache-2.0
"""What is said where a fit is to go on with another command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.optim import Adam
from torch import Tensor

from pyro_lvebm import (
    LVEBM,
    AutoParticles,
    MLPEnergy,
    QuadraticEnergy,
    Saddle,
    TemperedPool,
    lvebm,
)
from pyro_lvebm.cli.resumed import load_fit
from pyro_lvebm.cli.settings import JobSettings

X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def parts(
    x: Tensor, z_dim: int = 1, *, generator: bool = False
) -> tuple[Any, AutoParticles, Adam, LVEBM]:
    pyro.clear_param_store()
    pool = TemperedPool(num_levels=2, num_chains=8)
    if generator:
        energy = MLPEnergy(x.shape[1], z_dim, (4,))
        ebm = LVEBM.from_data(energy, x, z_dim=z_dim, pool=pool, generator="linear")
    else:
        quadratic = QuadraticEnergy(x.shape[1], z_dim)
        ebm = LVEBM.from_data(quadratic, x, z_dim=z_dim, pool=pool, base="gaussian")

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            lvebm("observations", ebm, obs=x)

    return model, AutoParticles(model, 1), Adam({"lr": 1e-3}), ebm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fit") / "model.safetensors"
    model, guide, optim, _ = parts(X)
    saddle = Saddle(model, guide, optim, seed=3)
    saddle.fit(X, num_steps=2, checkpoint=path, progress=False)
    return path


@pytest.mark.parametrize(
    ("x", "z_dim", "steps", "seed", "stops", "said"),
    [
        (X, 1, 5, 3, False, ["--steps is 5, and was 2"]),
        (X, 1, 2, 4, False, ["--seed is 4, and was 3"]),
        (X, 2, 5, 3, False, ["--steps is 5, and was 2", "--z-dim is 2, and was 1"]),
        (X, 1, 2, 3, True, ["there are some rows for --validation, and were no"]),
        (X[:15], 1, 2, 3, False, ["15 rows are for training, and 20 were: other data, --held"]),
        (X[:, :2], 1, 2, 3, False, ["the data have 2 columns, and had 3"]),
        (X.flip(1), 1, 2, 3, False, ["the training rows have other values: other data, order"]),
        (X.double(), 1, 2, 3, False, ["the training rows have other values"]),
    ],
)
def test_what_differs_has_a_line_each(
    saved: Path, x: Tensor, z_dim: int, steps: int, seed: int, stops: bool, said: list[str]
) -> None:
    model, guide, optim, ebm = parts(x, z_dim)
    settings = JobSettings(z_dim=z_dim, num_steps=steps, seed=seed)
    with pytest.raises(ValueError, match="is another fit than this command's") as error:
        load_fit(saved, model, guide, optim, ebm, x, settings, stops)
    _, *lines, last = str(error.value).splitlines()
    assert len(lines) == len(said) and last.startswith("--resume takes the same data and options")
    assert all(line.startswith(f"  {text}") for line, text in zip(lines, said, strict=True))


def test_a_damaged_fit_says_what_to_do(saved: Path, tmp_path: Path) -> None:
    model, guide, optim, ebm = parts(X)
    settings, path = JobSettings(z_dim=1, num_steps=2, seed=3), tmp_path / "model.safetensors"
    for contents in (b"", b"hello", saved.read_bytes()[:-8]):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=r"model\.safetensors' is no.* --force starts anew$"):
            load_fit(path, model, guide, optim, ebm, X, settings, False)


def test_the_same_command_goes_on(saved: Path) -> None:
    model, guide, optim, ebm = parts(X)
    settings = JobSettings(z_dim=1, num_steps=2, seed=3)
    assert load_fit(saved, model, guide, optim, ebm, X, settings, False).step_count == 2


def test_a_list_of_what_does_not_fit_is_short(saved: Path) -> None:
    model, guide, optim, _ = parts(X[:, :2], 2)
    with pytest.raises(ValueError, match=r"does not fit this model and guide: .*; and \d+ more$"):
        Saddle.load(saved, model, guide, optim, X[:, :2])


def test_a_generator_that_has_been_trained_goes_on(tmp_path: Path) -> None:
    """Its parameters are no longer those that were fitted to the rows, and its buffers are."""
    path, settings = tmp_path / "model.safetensors", JobSettings(z_dim=1, num_steps=2, seed=3)
    model, guide, optim, ebm = parts(X, generator=True)
    start = ebm.base_x.linear.detach().clone()
    Saddle(model, guide, optim, seed=3).fit(X, num_steps=2, checkpoint=path, progress=False)
    assert not torch.equal(ebm.base_x.linear, start)
    model, guide, optim, ebm = parts(X, generator=True)
    assert load_fit(path, model, guide, optim, ebm, X, settings, False).step_count == 2
    model, guide, optim, ebm = parts(X.flip(1), generator=True)
    with pytest.raises(ValueError, match="the training rows have other values"):
        load_fit(path, model, guide, optim, ebm, X.flip(1), settings, False)
    model, guide, optim, ebm = parts(X)
    with pytest.raises(ValueError, match="of another kind: other data or another --base"):
        load_fit(path, model, guide, optim, ebm, X, settings, False)
