# SPDX-License-Identifier: Apache-2.0
"""Every tutorial runs as a notebook, from top to bottom, in its smoke mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


def run(tutorial: Path, out: Path) -> subprocess.CompletedProcess[str]:
    settings = {"PYRO_LVEBM_SMOKE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "run_notebook.py", tutorial, out],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "name",
    [
        "quickstart",
        "comparing_guides",
        "posterior_analysis",
        "particle_maximum_likelihood",
        "regression_with_missing_inputs",
        "lorenz63",
        "when_training_goes_wrong",
    ],
)
def test_a_tutorial_has_a_page(name: str) -> None:
    assert name in [path.stem for path in TUTORIALS]
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"<!-- tutorial: {name} -->\n")


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path, tmp_path: Path) -> None:
    kinds = [cell.cell_type for cell in jupytext.read(path).cells]
    assert kinds.count("markdown") >= 3 and kinds.count("code") >= 3
    out = tmp_path / "out.ipynb"
    done = run(path, out)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert list(tmp_path.iterdir()) == [out]  # a tutorial leaves nothing behind


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('careless')", "UserWarning"),
    ],
)
def test_a_broken_tutorial_fails(source: str, error: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(f"# %% [markdown]\n# Text.\n\n# %%\n{source}\n", encoding="utf-8")
    done = run(broken, tmp_path / "out.ipynb")
    assert done.returncode != 0 and error in done.stderr
