# SPDX-License-Identifier: Apache-2.0
"""Dotted names from before the package had folders go on working."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

import pytest

import pyro_lvebm

OLD = {
    "bases": ["GaussianBase"],
    "energies": ["MLPEnergy", "WhitenedEnergy", "check_energy"],
    "model": ["LVEBM", "JointEnergy"],
    "sites": ["lvebm"],
    "guides": ["AutoParticles", "AutoAmortisedNormal", "AutoPerDatumMultivariateNormal"],
    "export": ["to_arviz"],
    "plots": ["plot_energy", "history_figure"],
    "cli": ["main", "build_parser"],
}


@pytest.mark.parametrize("module", OLD)
def test_old_dotted_names(module: str) -> None:
    package = import_module(f"pyro_lvebm.{module}")
    for name in OLD[module]:
        found = getattr(package, name)
        assert getattr(pyro_lvebm, name, found) is found


def test_the_entry_point_is_the_command_line() -> None:
    (script,) = (e for e in entry_points(group="console_scripts") if e.name == "pyro-lvebm")
    assert script.load() is pyro_lvebm.cli.main
