# SPDX-License-Identifier: Apache-2.0
"""The header of a checkpoint: plain JSON, of which nothing is taken that was not looked at."""

from __future__ import annotations

import math
from typing import Any

FORMAT = "pyro_lvebm saddle 2"

SETTINGS = ("step_count", "num_moves", "max_kl", "average_decay", "seed")


def settings_of(value: Any) -> dict[str, Any]:
    """Return the settings of a Saddle, checked.

    Raises:
        ValueError: If one is missing or cannot be the setting of a Saddle.
    """
    found = {name: member(value, name) for name in SETTINGS}
    integer(found["step_count"], "step_count", 0)
    integer(found["num_moves"], "num_moves", 1)
    integer(found["seed"], "seed", 0)
    if found["max_kl"] is not None and not number(found["max_kl"], "max_kl") > 0:
        raise ValueError(f"max_kl is {found['max_kl']}; expected a positive number")
    if not 0.0 <= number(found["average_decay"], "average_decay") < 1.0:
        raise ValueError(f"average_decay is {found['average_decay']}; expected one in [0, 1)")
    return found


def pools_of(value: Any) -> list[dict[str, Any]]:
    """Return what the header says of every pool, checked.

    Raises:
        ValueError: If an entry is missing or of another type.
    """
    # Files from before pools had sites, or x supports, lack the two.
    return [
        {
            "seed": integer(member(pool, "seed"), "the seed of a pool", 0),
            "site": text(pool.get("site", ""), "the site of a pool"),
            "fresh": truth(member(pool, "fresh"), "whether a pool is fresh"),
            "support": text(pool.get("support", "Real()"), "the support of x"),
        }
        for pool in array(value, "the pools")
    ]


def columns_of(value: Any) -> list[str]:
    """Return the names of the columns of the history, checked.

    Raises:
        ValueError: If they are no names, or not all different.
    """
    columns = [text(name, "a column of the history") for name in array(value, "the history")]
    if len(set(columns)) < len(columns) or (columns and columns[0] != "step"):
        raise ValueError(
            f"the history has columns {columns}; expected 'step' and others, each once"
        )
    return columns


def member(value: Any, name: str) -> Any:
    """Return an entry of an object of JSON."""
    if not isinstance(value, dict) or name not in value:
        raise ValueError(f"'{name}' is missing")
    return value[name]


def array(value: Any, what: str) -> list[Any]:
    """Return an array of JSON."""
    if not isinstance(value, list):
        raise ValueError(f"{what} are {type(value).__name__}; expected a list")
    return value


def integer(value: Any, what: str, least: int) -> int:
    """Return an integer of JSON that is at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{what} is {value!r:.50}; expected an integer, at least {least}")
    return value


def number(value: Any, what: str) -> float:
    """Return a number of JSON other than NaN."""
    if type(value) not in (int, float) or math.isnan(value):
        raise ValueError(f"{what} is {value!r:.50}; expected a number")
    return float(value)


def text(value: Any, what: str) -> str:
    """Return a string of JSON."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.50}; expected a string")
    return value


def truth(value: Any, what: str) -> bool:
    """Return a truth value of JSON."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} is {value!r:.50}; expected true or false")
    return value
