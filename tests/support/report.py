"""How much a chaos or fuzz test does, and what it has to say afterwards.

`HHNET_SCALE=full` runs the counts of a release instead of those of every change. `HHNET_REPORT=FILE` collects one
line of JSON per test: what was tried, with which seed, and what was lost.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

SEED = int(os.environ.get("HHNET_SEED", "20261124"))
"""Where every random choice of these tests starts; set HHNET_SEED to repeat or vary a run."""


def scaled(every_change: T, release: T) -> T:
    """The first value, or the second under HHNET_SCALE=full."""
    return release if os.environ.get("HHNET_SCALE") == "full" else every_change


def report(test: str, **figures: Any) -> None:
    """Say what a test tried and found: a line on stdout, and in the report file if one is collected."""
    line = json.dumps({"test": test, "seed": SEED, **figures}, sort_keys=True)
    sys.stdout.write(line + "\n")
    if path := os.environ.get("HHNET_REPORT"):
        with Path(path).open("a") as stream:
            stream.write(line + "\n")
