# SPDX-License-Identifier: Apache-2.0
"""The folder of results: nothing is overwritten unasked, and each file is whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class OutputFolder:
    """A folder that results are written into, each as soon as it exists.

    Args:
        path: The folder; made at the first result.
        names: What will be written there: files, those with a suffix, and folders.
        force: Whether results of another run are replaced. A link among them is replaced itself,
            and not what it points to.
        resume: Whether these results are those of the run that goes on, and so replaced.

    Raises:
        ValueError: If the path is a file, or holds one of the names and `force` is not given, or
            a file where a folder is to be, or the other way round.
    """

    def __init__(
        self, path: Path, names: Sequence[str], *, force: bool = False, resume: bool = False
    ) -> None:
        self.path = path
        if os.path.lexists(path) and not path.is_dir():
            raise ValueError(f"{path} is not a folder; give another --out")
        taken = [name for name in names if os.path.lexists(path / name)]
        if taken and not (force or resume):
            raise ValueError(
                f"{path} holds {', '.join(taken)} already; --resume goes on, --force replaces "
                "them, or give another --out"
            )
        for name in taken:  # told before a fit, and not after it
            found = path / name
            if not found.is_symlink() and found.is_dir() == bool(found.suffix):
                there, wanted = ("folder", "file") if found.is_dir() else ("file", "folder")
                raise ValueError(
                    f"{found} is a {there}; a {wanted} of that name is to be written. Move it away"
                )

    def make(self) -> None:
        """Make the folder, so that a fit does not end at a place that cannot be written to."""
        self.path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str, *, keep: bool) -> Path:
        """Return the path of a file that is written more than once, and is no link to elsewhere.

        Args:
            name: Its name.
            keep: Whether what is there already stays.
        """
        found = self.path / name
        if os.path.lexists(found) and (found.is_symlink() or not keep):
            found.unlink()
        return found

    def folder(self, name: str) -> Path:
        """Return a folder inside, which is no link to elsewhere.

        Raises:
            ValueError: If there is a file of that name.
        """
        found = self.path / name
        if found.is_symlink():
            found.unlink()
        if found.exists() and not found.is_dir():
            raise ValueError(f"{found} is a file; a folder of that name is to be written")
        found.mkdir(parents=True, exist_ok=True)
        return found

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Give a path to write to, whose file takes its name when the block has ended."""
        self.make()
        with whole(self.path / name) as path:
            yield path


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Give a path to write to, and put it in the place of `target` when the block has ended."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        path = Path(folder) / target.name
        yield path
        os.replace(path, target)
