# SPDX-License-Identifier: Apache-2.0
"""What README and documentation say is true: examples run, and commands, files and names exist."""

from __future__ import annotations

import argparse
import doctest
import re
import runpy
import shlex
from pathlib import Path

import jupytext
import pytest

import pyro_lvebm
from pyro_lvebm.cli.main import build_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def python_examples(text: str) -> str:
    """All interactive examples of a page, which share their names."""
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(block for block in blocks if block.startswith(">>>"))


def failures(examples: str) -> str:
    """Run examples as a doctest; return the report of those that fail."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(examples, {}, "page", None, None)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    return "".join(report)


def missing_targets(text: str) -> set[str]:
    """Names after `make` in commands that are no target of the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    return set(re.findall(r"(?:^ +|`)make ([a-z]+)", text, flags=re.MULTILINE)) - targets


def commands(text: str) -> list[str]:
    """Arguments of every `python -m pyro_lvebm ...`, up to the end of line or quotation."""
    return re.findall(r"python -m pyro_lvebm ([^`\n#]+)", text)


def missing_files(text: str, folder: Path) -> set[str]:
    """Relative links of a page, outside comments, that lead to no file."""
    visible = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", visible)
    paths = {link.split("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)}
    return {path for path in paths if not (folder / path).exists()}


@pytest.mark.parametrize(
    "page",
    [
        pytest.param("README.md", marks=pytest.mark.slow),
        "docs/index.md",
        "docs/pyro.md",
        pytest.param("docs/diagnostics.md", marks=pytest.mark.slow),
    ],
)
def test_examples_run(page: str) -> None:
    """Slow: README and diagnostics fit at sizes that show what their text says."""
    examples = python_examples((ROOT / page).read_text(encoding="utf-8"))
    assert examples.count(">>>") > 10
    assert failures(examples) == ""


def test_a_wrong_example_fails() -> None:
    assert failures(">>> 1 + 1\n3\n") != ""
    assert python_examples("text\n```python\n>>> 1 + 1\n3\n```\n") == ">>> 1 + 1\n3\n"


def test_readme_has_the_two_commands_and_fit() -> None:
    assert {"demo", "test"} <= set(re.findall(r"^ +make ([a-z]+)", README, flags=re.MULTILINE))
    assert any(command.startswith("fit DATA") for command in commands(README))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_targets(text) == set()
    for command in commands(text):
        parsed = build_parser().parse_args(shlex.split(command))
        assert isinstance(parsed, argparse.Namespace)


def test_a_wrong_command_is_found() -> None:
    assert missing_targets("    make coffee\n and `make test`") == {"coffee"}
    (command,) = commands("`python -m pyro_lvebm fit DATA --sugar 2`")
    with pytest.raises(SystemExit):
        build_parser().parse_args(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page: Path) -> None:
    assert missing_files(page.read_text(encoding="utf-8"), page.parent) == set()


def test_a_broken_link_is_found() -> None:
    text = "[a](LICENSE) [b](no.md#there) [c](https://pyro.ai) [d](#here) <!-- [e](gone.md) -->"
    assert missing_files(text, ROOT) == {"no.md"}


def test_every_public_name_is_in_the_api_page() -> None:
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", api, flags=re.MULTILINE)
    assert sorted(listed) == sorted(pyro_lvebm.__all__)


def test_the_tutorial_page_has_every_cell() -> None:
    convert = runpy.run_path(str(ROOT / "docs" / "conf.py"))["percent_to_markdown"]
    path = ROOT / "tutorials" / "quickstart.py"
    page = convert(path.read_text(encoding="utf-8"))
    notebook = jupytext.read(path)
    assert notebook.cells[0].source == "# SPDX-License-Identifier: Apache-2.0"
    for cell in notebook.cells[1:]:
        fenced = f"```python\n{cell.source}\n```\n"
        assert (fenced if cell.cell_type == "code" else f"{cell.source}\n") in page
