# SPDX-License-Identifier: Apache-2.0
"""The deliberate faults still fit the code, and name tests that exist; `make mutants` runs them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "tests" / "faults").glob("*.patch"))


def test_there_are_thirty_at_least() -> None:
    assert len(PATCHES) >= 30


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_fault_fits_and_names_its_tests(patch: Path) -> None:
    command = ["git", "apply", "--check", str(patch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^Tests: (.+?)\n\n", patch.read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    for node in found[1].split():
        file, _, name = node.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text
