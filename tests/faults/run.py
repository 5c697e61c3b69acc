# SPDX-License-Identifier: Apache-2.0
"""Check that the tests notice deliberate faults: `make mutants`, or with ONLY=pattern some of them.

Each patch beside this file puts one fault into the package. Lines before its diff say what is
wrong, and which tests must fail:

    Fault: one sentence.
    Tests: pytest node ids or files, separated by spaces.

The tests run in a copy of the tracked files, with the package of that copy. A fault is caught
where a test fails. One that only breaks the import or the collection of the tests is none that
the tests have noticed, nor is one whose patch no longer fits: both count as broken. First of all
the named tests must pass without a fault, as a test that always fails notices nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[1]

TIME_LIMIT = 600.0
"""Seconds that the tests of one fault may take; a fault may be an endless loop."""


@dataclass(frozen=True)
class Fault:
    """A patch and what its header says."""

    path: Path
    what: str
    tests: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Fault:
        """Read the header of a patch.

        Raises:
            ValueError: If a line of it is missing.
        """
        header = dict(
            line.split(": ", 1)
            for line in path.read_text(encoding="utf-8").split("\ndiff --git ", 1)[0].splitlines()
            if ": " in line
        )
        if not header.get("Fault") or not header.get("Tests", "").split():
            raise ValueError(f"{path.name} needs lines 'Fault: ...' and 'Tests: ...'")
        return cls(path, header["Fault"], tuple(header["Tests"].split()))


@dataclass(frozen=True)
class Outcome:
    """What became of the tests in one copy."""

    code: int  # exit status of pytest; -1 where the patch does not fit, -2 after too long a time
    failed: tuple[str, ...]  # tests that failed, with the first line of why
    text: str
    seconds: float

    @property
    def verdict(self) -> str:
        """One word: whether the tests have noticed the fault."""
        if self.code == 1 and self.failed:
            return "caught"
        return "MISSED" if self.code == 0 else "BROKEN"


def copy_tracked(folder: Path) -> None:
    """Copy the tracked files, as they are in the work tree, to an empty folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(tests: Iterable[str], patch: Path | None = None) -> Outcome:
    """Run tests in a copy of the tracked files, with a patch applied to it if one is given."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fault-") as name:
        folder = Path(name).resolve()
        copy_tracked(folder)
        # Without a ceiling git would look for a repository around the copy.
        env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        if patch is not None:
            applied = subprocess.run(
                ["git", "apply", str(patch)], cwd=folder, env=env, capture_output=True, text=True
            )
            if applied.returncode:
                return Outcome(-1, (), applied.stderr, time.monotonic() - start)
        env |= {
            "PYTHONPATH": str(folder),  # goes before an installed package
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
            )
        except subprocess.TimeoutExpired:
            text = f"the tests took more than {TIME_LIMIT:.0f} seconds"
            return Outcome(-2, (), text, time.monotonic() - start)
    lines = done.stdout.splitlines()
    failed = tuple(line[len("FAILED ") :] for line in lines if line.startswith("FAILED "))
    return Outcome(done.returncode, failed, done.stdout + done.stderr, time.monotonic() - start)


def pass_without_a_fault(faults: list[Fault], jobs: int) -> bool:
    """Run all named tests once on an unpatched copy, and say whether they pass."""
    by_file: dict[str, dict[str, None]] = {}
    for fault in faults:
        for test in fault.tests:
            by_file.setdefault(test.split("::")[0], {})[test] = None
    # Tests of one file stay together, for they share what its fixtures have trained.
    files = list(by_file.values())
    parts = [[test for tests in files[k::jobs] for test in tests] for k in range(jobs)]
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(run_tests, filter(None, parts)))
    bad = [outcome for outcome in outcomes if outcome.code != 0]
    for outcome in bad:
        print("\n".join(outcome.failed) or outcome.text[-3000:], flush=True)
    seconds = max(outcome.seconds for outcome in outcomes)
    print(
        f"without a fault: {sum(map(len, parts))} tests and files "
        f"{'FAIL' if bad else 'pass'} ({seconds:.0f} s)",
        flush=True,
    )
    return not bad


def main(arguments: list[str] | None = None) -> int:
    """Run the faults; return 0 if the tests have caught all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="*", metavar="PATTERN", help="as in '*scale*' or '01*'")
    parser.add_argument("--jobs", type=int, default=1, help="faults side by side; default 1")
    options = parser.parse_args(arguments)
    patterns = (options.only, f"*{options.only}*")
    paths = sorted(HERE.glob("*.patch"))
    faults = [Fault.read(p) for p in paths if any(fnmatch.fnmatch(p.stem, one) for one in patterns)]
    if not faults or options.jobs < 1:
        parser.error(f"no fault is called {options.only!r}" if not faults else "--jobs is below 1")
    start = time.monotonic()
    if not pass_without_a_fault(faults, options.jobs):
        return 1
    verdicts: dict[str, list[str]] = {"caught": [], "MISSED": [], "BROKEN": []}
    with ThreadPoolExecutor(options.jobs) as pool:
        running = {pool.submit(run_tests, fault.tests, fault.path): fault for fault in faults}
        for future in as_completed(running):
            fault, outcome = running[future], future.result()
            name = fault.path.stem
            verdicts[outcome.verdict].append(name)
            print(f"{outcome.verdict} {name} ({outcome.seconds:.0f} s): {fault.what}", flush=True)
            if outcome.verdict == "caught":
                print(f"    {outcome.failed[0][:160]}", flush=True)
            elif outcome.verdict == "BROKEN":
                print("    " + outcome.text[-2000:].replace("\n", "\n    "), flush=True)
    counts = [f"{len(verdicts[word])} {word}" for word in verdicts]
    print(f"{len(faults)} faults in {time.monotonic() - start:.0f} s: {', '.join(counts)}")
    for word in ("MISSED", "BROKEN"):
        if verdicts[word]:
            print(f"{word}: {' '.join(sorted(verdicts[word]))}")
    return int(len(verdicts["caught"]) < len(faults))


if __name__ == "__main__":
    sys.exit(main())
