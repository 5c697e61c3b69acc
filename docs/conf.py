# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

import re
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "pyro_lvebm"
author = "The pyro_lvebm authors"
project_copyright = author
release = version = installed_version("pyro-lvebm")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
math_numfig = False

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"pyro_lvebm {release}"


def plain_to_rst(lines: list[str]) -> list[str]:
    """Translate a docstring of plain text to reStructuredText.

    Text in single backticks becomes literal, an indented block after a blank line becomes a literal
    block (equations), and characters with a meaning in reStructuredText are escaped elsewhere.
    """
    result: list[str] = []
    text_indent, block_indent, in_doctest = 0, None, False
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            in_doctest = False
            result.append(line)
            continue
        if block_indent is not None and indent < block_indent:
            block_indent = None
        in_doctest = in_doctest or line.lstrip().startswith(">>>")
        after_blank = bool(result) and not result[-1].strip()
        if block_indent is None and after_blank and indent > text_indent and not in_doctest:
            block_indent = indent
            result += [" " * text_indent + "::", ""]
        if block_indent is None:
            text_indent = indent
        result.append(line if in_doctest or block_indent is not None else _escape(line))
    return result


def _escape(line: str) -> str:
    parts = re.split(r"(``[^`]+``|`[^`]+`)", line)
    for k, part in enumerate(parts):
        if k % 2:
            # A plural s may follow a name; reStructuredText wants an escaped space between them.
            space = r"\ " if re.match(r"\w", parts[k + 1]) else ""
            parts[k] = (part if part.startswith("``") else f"`{part}`") + space
        else:
            parts[k] = re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part)
    return "".join(parts)


def percent_to_markdown(text: str) -> str:
    """Translate a notebook in the percent format to Markdown, without running it.

    What stands before the first cell, such as the licence line, is left out.
    """
    pages = []
    for cell in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = cell.partition("\n")
        if head.strip() == "[markdown]":
            pages.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            pages.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(pages) + "\n"


def setup(app: Any) -> None:
    """Put tutorials into their pages, and translate every docstring before napoleon reads it."""

    def include_tutorial(app: Any, docname: str, source: list[str]) -> None:
        if found := re.search(r"<!-- tutorial: (\w+) -->", source[0]):
            path = ROOT / "tutorials" / f"{found[1]}.py"
            app.env.note_dependency(path)
            page = percent_to_markdown(path.read_text(encoding="utf-8"))
            source[0] = source[0].replace(found[0], page)

    def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = plain_to_rst(lines)

    app.connect("source-read", include_tutorial)
    app.connect("autodoc-process-docstring", process, priority=400)
