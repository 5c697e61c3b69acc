# SPDX-License-Identifier: Apache-2.0
"""Every tutorial runs from top to bottom in its smoke mode, and one of them as a notebook."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pyro
import pytest
import torch

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))
QUICK = {"when_training_goes_wrong"}
SCRIPTS = [
    pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow)
    for path in TUTORIALS
    if path.stem != "quickstart"  # that one as a notebook
]


def run(tutorial: Path, out: Path) -> subprocess.CompletedProcess[str]:
    settings = {"PYRO_LVEBM_SMOKE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "run_notebook.py", tutorial, out],
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
        "energy_prior",
        "latents_that_carry_the_data",
        "lorenz63",
        "when_training_goes_wrong",
    ],
)
def test_a_tutorial_has_a_page(name: str) -> None:
    assert name in [path.stem for path in TUTORIALS]
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"<!-- tutorial: {name} -->\n")


@pytest.mark.parametrize("path", SCRIPTS)
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script in this process, which spares each tutorial a kernel and its imports.

    Slow: most are whole fits, of which nothing is new to the tests but the text around them.
    """
    kinds = [cell.cell_type for cell in jupytext.read(path).cells]
    assert kinds.count("markdown") >= 3 and kinds.count("code") >= 3
    shown: list[int] = []

    def show() -> None:
        shown.extend(plt.get_fignums())
        plt.close("all")

    monkeypatch.setenv("PYRO_LVEBM_SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", show)
    scope = pyro.get_param_store().scope()
    with torch.random.fork_rng(), warnings.catch_warnings(), scope, matplotlib.rc_context():
        # As in a kernel: warnings of the tutorial or the package are errors, others are not.
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="pyro_lvebm|__main__")
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor")
        runpy.run_path(str(path), run_name="__main__")
        show()
    assert shown
    assert list(tmp_path.iterdir()) == []  # a tutorial leaves nothing behind


SMALL = """\
# %% [markdown]
# Text.

# %%
import warnings

import matplotlib.pyplot as plt

import pyro_lvebm

warnings.simplefilter("ignore")

# %%
plt.plot([1.0, 2.0])
plt.show()
"""


@pytest.mark.parametrize("name", ["small", pytest.param("quickstart", marks=pytest.mark.slow)])
def test_a_tutorial_runs_as_a_notebook(name: str, tmp_path: Path) -> None:
    """Slow: the whole quickstart; a small one goes the same way."""
    path = ROOT / "tutorials" / "quickstart.py"
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "out.ipynb"
    if name == "small":
        path = tmp_path / "small.py"
        path.write_text(SMALL, encoding="utf-8")
    done = run(path, out)
    assert done.returncode == 0, done.stderr
    cells = [cell for cell in nbformat.read(out, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert list(folder.iterdir()) == [out]  # a tutorial leaves nothing behind


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
