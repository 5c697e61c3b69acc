# SPDX-License-Identifier: Apache-2.0
"""An executor for tests of benchmarks, which otherwise start processes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any


class Inline:
    """An executor that does the work when it is submitted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def submit(self, work: Any, *args: Any) -> Future:
        future: Future = Future()
        future.set_result(work(*args))
        return future
