# SPDX-License-Identifier: Apache-2.0
"""The folder of results, and how far a job is."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pyro_lvebm.cli.output import OutputFolder, whole
from pyro_lvebm.cli.progress import Progress
from pyro_lvebm.data import Table
from pyro_lvebm.data.transforms import apply, dequantisation, logit_of_levels, undo
from pyro_lvebm.training.progress import step_bar


def test_taken_names_are_refused_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("old")
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")  # a broken link is there, too
    with pytest.raises(ValueError, match=r"holds a\.csv, b already; --resume goes on"):
        OutputFolder(tmp_path, ["a.csv", "b", "c"])
    OutputFolder(tmp_path, ["c"])
    with pytest.raises(ValueError, match="is not a folder"):
        OutputFolder(tmp_path / "a.csv", ["c"])
    assert (tmp_path / "a.csv").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "message"), [("a.csv", "is a folder; a file"), ("b", "is a file; a folder")]
)
@pytest.mark.parametrize("how", ["force", "resume"])
def test_a_file_where_a_folder_is_to_be_is_told_before_the_fit(
    tmp_path: Path, name: str, message: str, how: str
) -> None:
    (tmp_path / name).mkdir() if name == "a.csv" else (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name} {message} of that name"):
        OutputFolder(tmp_path, ["a.csv", "b"], **{how: True})
    (tmp_path / name).rename(tmp_path / "away")
    OutputFolder(tmp_path, ["a.csv", "b"], **{how: True})


def test_links_are_replaced_and_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    (out / "a.csv").symlink_to(elsewhere / "kept")
    (out / "model").symlink_to(elsewhere)
    folder = OutputFolder(out, ["a.csv", "model"], force=True)
    with folder.writing("a.csv") as path:
        path.write_text("new")
    inside = folder.folder("model")
    (inside / "kept").write_text("new")
    assert (out / "a.csv").read_text() == (out / "model" / "kept").read_text() == "new"
    assert (elsewhere / "kept").read_text() == "kept"
    (out / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        folder.folder("file")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="stop"), whole(target) as path:
        path.write_text("half")
        raise RuntimeError("stop")
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_progress_says_phase_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream, clock = io.StringIO(), iter(np.arange(0.0, 1e4, 20.0))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    progress = Progress({"base": 10.0, "fit": 60.0, "export": 30.0}, stream=stream, every=1e3)
    for name in progress.shares:
        with progress.phase(name):
            pass
    assert stream.getvalue().splitlines() == [
        "[1/3] base",
        "[2/3] fit, about 3 min left in all",
        "[3/3] export, about 17 s left in all",
    ]
    assert progress.seconds == {"base": 20.0, "fit": 20.0, "export": 20.0}
    progress = Progress({"base": 2.0, "fit": 60.0}, stream=stream)
    progress.seconds = {"base": 10.0}
    assert progress.left("fit", 1.0) is None  # too little is done to tell
    progress = Progress({"base": 10.0, "fit": 60.0}, stream=stream)
    progress.seconds = {"base": 10.0}
    assert progress.left("fit", 20.0) == 40.0 and progress.left("fit", 100.0) == 10.0


def test_a_long_phase_says_so_every_few_seconds() -> None:
    stream = io.StringIO()
    with Progress({"fit": 1.0}, stream=stream, every=0.02).phase("fit"):
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3 and all(line.startswith("[1/1] fit") for line in lines)
    quiet = io.StringIO()
    with Progress({"fit": 1.0}, stream=quiet, quiet=True).phase("fit"):
        pass
    assert quiet.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for kind in (io.StringIO, Terminal):
        stream = kind()
        monkeypatch.setattr(sys, "stderr", stream)
        for _ in step_bar(3, True, "fit"):
            time.sleep(0.12)
        shown[kind] = stream.getvalue()
    assert "fit: 3/3 steps" in shown[io.StringIO] and "|" not in shown[io.StringIO]
    assert shown[io.StringIO].count("steps") == 2  # the first and the last, not one for each step
    assert "|" in shown[Terminal] and shown[Terminal].count("\r") > 2


def test_transforms_there_and_back() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.integers(0, 9, 50) / 4, rng.normal(size=50)], 1)
    table = Table(values, ("a", "b"), np.arange(50))
    found = dequantisation(table, ["all"])
    assert found == {"name": "dequantise", "steps": {"a": 0.25}} == dequantisation(table, ["a"])
    x = apply([found], values, table.names, seed=1)
    assert not np.array_equal(x[:, 0], values[:, 0])
    np.testing.assert_array_equal(x[:, 1], values[:, 1])
    np.testing.assert_allclose(undo([found], x, table.names), values)
    levels = rng.integers(0, 4, (20, 2)).astype(float)
    logit = [logit_of_levels(4)]
    back = undo(logit, apply(logit, levels, table.names, 0), table.names)
    np.testing.assert_array_equal(back, levels)
    with pytest.raises(ValueError, match="--dequantise b: its values lie on no grid"):
        dequantisation(table, ["b"])
    with pytest.raises(ValueError, match="no column c"):
        dequantisation(table, ["c"])
    for do in (lambda t: apply(t, values, "ab", 0), lambda t: undo(t, values, "ab")):
        with pytest.raises(ValueError, match="no transform is called 'x'"):
            do([{"name": "x"}])
