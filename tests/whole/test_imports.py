# SPDX-License-Identifier: Apache-2.0
"""What importing the package loads: names come from their folders when they are asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pyro_lvebm

HEAVY = ("scipy", "matplotlib", "pandas", "sklearn", "arviz", "xarray", "h5netcdf")


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after some code."""
    shown = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('\\n' + ' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return {name.split(".")[0] for name in shown.stdout.splitlines()[-1].split()}


def test_every_name_loads_no_more_than_pyro_and_torch() -> None:
    """All public names at once, which is what `from pyro_lvebm import *` costs at most."""
    loaded = loaded_by("from pyro_lvebm import *\nassert Saddle and plot_energy")
    assert "pyro" in loaded and not loaded & set(HEAVY)


def test_the_bare_package_and_help_do_without_torch() -> None:
    parse = (
        "import pyro_lvebm, contextlib, io\n"
        "from pyro_lvebm.cli import build_parser\n"
        "build_parser().format_help()\n"
        "try:\n    build_parser().parse_args(['fit', '--help'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0"
    )
    loaded = loaded_by(parse)
    assert not loaded & {"torch", "pyro", "numpy", *HEAVY}


def declared() -> dict[str, str]:
    """Public names by folder, as type checkers see them."""
    tree = ast.parse(Path(pyro_lvebm.__file__).read_text(encoding="utf-8"))
    return {
        name.name: str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pyro_lvebm.")
        for name in node.names
    }


def test_type_checkers_see_the_same_names() -> None:
    names = declared()
    assert sorted(names) == sorted(pyro_lvebm.__all__)
    for name, folder in names.items():
        assert getattr(pyro_lvebm, name) is getattr(import_module(folder), name)
    assert set(pyro_lvebm.__all__) <= set(dir(pyro_lvebm))


def test_folders_and_unknown_names() -> None:
    folders = {p.name for p in Path(pyro_lvebm.__file__).parent.iterdir() if p.is_dir()}
    for folder in folders - {"__pycache__"}:
        assert getattr(pyro_lvebm, folder) is import_module(f"pyro_lvebm.{folder}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyro_lvebm.nothing  # type: ignore[attr-defined]  # noqa: B018
