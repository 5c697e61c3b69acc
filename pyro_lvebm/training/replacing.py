# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole or not at all, whatever happens to the process or the machine."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write to, which takes the place of another at the end of the block.

    After a crash the old contents are there, or the new. A symbolic link stays one, and the file
    that it names is replaced. A file keeps its mode, and a new one has that of the umask. What
    earlier writes that were killed have left beside it goes first; two processes must not write to
    one path at the same time.

    Args:
        path: The file; folders that are missing are made.

    Raises:
        OSError: If it cannot be written, such as to a full disk, with the name of the file.
    """
    try:
        target = Path(os.path.realpath(path))
        mode = _mode_of(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                if mode is not None:
                    os.chmod(temporary, mode)
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _flush_folder(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _mode_of(target: Path) -> int | None:
    """Return the mode of the file that is to be replaced, None where there is none."""
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode):  # what is left of a circle of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "neither a file nor a name for a new one")
    return stat.S_IMODE(found.st_mode)


def _clear_leftovers(target: Path) -> None:
    # Earlier versions named them without the dot in between.
    name = re.compile(re.escape(target.name) + r"\.?\w{8}\.partial")
    for entry in target.parent.iterdir():
        if name.fullmatch(entry.name):
            with suppress(FileNotFoundError):
                entry.unlink()


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)
