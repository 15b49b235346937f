"""How the figures of a report are rounded, so that they are equal wherever they are computed."""

from collections.abc import Iterable
from typing import Any

DIGITS = 6


def rounded(value: Any) -> float:
    """To the digits of a report; never -0.0, which would be written with its sign."""
    return round(float(value), DIGITS) + 0.0


def all_rounded(values: Iterable[Any]) -> list[float]:
    """The same for each of several."""
    return [rounded(value) for value in values]
