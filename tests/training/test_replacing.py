# SPDX-License-Identifier: Apache-2.0
"""Files that are replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pyro_lvebm.training.replacing import replacing


def write(path: Path, value: float, size: int = 3) -> None:
    with replacing(path) as file:
        file.write(np.full(size, value).tobytes())


def read(path: Path) -> float:
    return float(np.fromfile(path)[0])


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["run", "new"])
def test_a_full_disk_is_an_os_error_that_names_the_file(name: str, tmp_path: Path) -> None:
    write(tmp_path / "run", 1.0)
    with pytest.raises(OSError) as caught, small_disk(10_000):
        write(tmp_path / name, 2.0, size=100_000)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and read(tmp_path / "run") == 1.0


def test_a_folder_that_cannot_be_made_is_an_os_error_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError, match="file/run"):
        write(tmp_path / "file" / "run", 1.0)
    with pytest.raises(IsADirectoryError):
        write(tmp_path, 1.0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="neither a file nor a name for a new one"):
        write(tmp_path / "pipe", 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe"]


def test_leftovers_of_killed_writes_go_and_other_files_stay(tmp_path: Path) -> None:
    mine = ["run.0123abcd.partial", "runab_defgh.partial"]
    others = ["run2.0123abcd.partial", "runs.partial", "run.npz.0123abcd.partial", "run.bak"]
    for name in mine + others:
        (tmp_path / name).write_text("x")
    write(tmp_path / "run", 1.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "run"])


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_are_those_of_the_umask_or_of_the_file_replaced(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        write(tmp_path / "run", 1.0)
        assert stat.S_IMODE(os.stat(tmp_path / "run").st_mode) == 0o666 & ~mask
        os.chmod(tmp_path / "run", 0o640)
        write(tmp_path / "run", 2.0)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "run").st_mode) == 0o640 and read(tmp_path / "run") == 2


def test_links_are_written_through(tmp_path: Path) -> None:
    """Also over two links, and to a file that is not there yet; a circle is refused."""
    for folder in ("store", "work"):
        (tmp_path / folder).mkdir()
    target, link, twice = tmp_path / "store" / "run", tmp_path / "work" / "a", tmp_path / "b"
    link.symlink_to(Path("..") / "store" / "run")
    twice.symlink_to(link)
    for value, path in enumerate((link, twice, target)):
        write(path, float(value))
        assert link.is_symlink() and twice.is_symlink() and not target.is_symlink()
        assert read(target) == value and [p.name for p in target.parent.iterdir()] == ["run"]
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    with pytest.raises(OSError) as caught:
        write(circle, 1.0)
    assert caught.value.errno == errno.ELOOP and circle.is_symlink()


def test_file_and_folder_are_flushed_around_the_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    flush, replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        order.append("folder" if stat.S_ISDIR(mode) else "file")
        flush(descriptor)

    def renamed(a: Path, b: Path) -> None:
        order.append("replace")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / "run", 1.0)
    assert order == ["file", "replace", "folder"]
