# SPDX-License-Identifier: Apache-2.0
"""A saved model and a table that has more columns than it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_lvebm import LVEBM, QuadraticEnergy, TemperedPool
from pyro_lvebm.cli.main import main

X = np.random.default_rng(0).normal(size=(12, 2))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x = torch.as_tensor(X, dtype=torch.float32)
    pool = TemperedPool(num_levels=2, num_chains=16)
    ebm = LVEBM.from_data(QuadraticEnergy(2, 1), x, z_dim=1, pool=pool, base="gaussian")
    folder = tmp_path_factory.mktemp("model")
    ebm.save(folder / "model", columns=("left", "right"))
    return folder


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], ""),
        (["up"], "warning: column 'up' is not in the model, and ignored"),
        (["up", "down"], "warning: columns 'up', 'down' are not in the model, and ignored"),
    ],
)
def test_columns_that_the_model_does_not_know_are_said(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    extra: list[str],
    said: str,
    quiet: tuple[str, ...],
) -> None:
    table = pd.DataFrame(X, columns=["right", "left"]).assign(**dict.fromkeys(extra, 0.5))
    table.iloc[3, 0] = np.nan
    table.to_csv(tmp_path / "x.csv", index=False)
    out = str(tmp_path / "filled.csv")
    assert main(["impute", str(model), str(tmp_path / "x.csv"), "--out", out, *quiet]) == 0
    stderr = capsys.readouterr().err
    assert [line for line in stderr.splitlines() if "warning" in line] == ([said] if said else [])
    assert list(pd.read_csv(out)) == ["row", "draw", "left", "right"]
    # Who names the columns to take has said it already.
    named = ["--columns", "left,right", "--out", out, "--force"]
    assert main(["impute", str(model), str(tmp_path / "x.csv"), *named]) == 0
    assert "warning" not in capsys.readouterr().err
