# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

import re
from importlib.metadata import version as installed_version
from typing import Any

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
            parts[k] = part if part.startswith("``") else f"`{part}`"
        else:
            parts[k] = re.sub(r"([\\*|]|(?<=\w)_(?!\w))", r"\\\1", part)
    return "".join(parts)


def setup(app: Any) -> None:
    """Translate every docstring before napoleon reads its sections."""

    def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
        lines[:] = plain_to_rst(lines)

    app.connect("autodoc-process-docstring", process, priority=400)
