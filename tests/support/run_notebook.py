# SPDX-License-Identifier: Apache-2.0
"""Run a tutorial as a notebook: `python run_notebook.py TUTORIAL.py OUT.ipynb`.

A process of its own, because clients of kernels leave sockets behind, which the warnings of the
test run would report as errors.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

# Warnings that the tutorial or the package raises are errors.
STRICT = r"""
import warnings
warnings.filterwarnings("error", module="pyro_lvebm|__main__")
warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing a major refactor")
"""


def main(source: Path, out: Path) -> None:
    """Execute all cells in a fresh kernel and write the notebook with its outputs."""
    notebook = jupytext.read(source)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
    # Without folders to look in there is one kernel: that of this interpreter.
    manager = KernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    with tempfile.TemporaryDirectory() as sockets:
        # Files instead of ports, on which two test processes could meet.
        manager.transport, manager.ip = "ipc", f"{sockets}/k"
        resources = {"metadata": {"path": str(out.parent)}}
        NotebookClient(notebook, km=manager, timeout=120, resources=resources).execute()
    nbformat.write(notebook, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
