"""Rounds the figures of a report, so that they are equal wherever they are computed."""

from collections.abc import Iterable
from typing import Any

REPORT_DIGITS = 6


def rounded(value: Any) -> float:
    """Round to the digits of a report; -0.0 becomes 0.0, since its sign would be written."""
    return round(float(value), REPORT_DIGITS) + 0.0


def all_rounded(values: Iterable[Any]) -> list[float]:
    """Round each of several values."""
    return [rounded(value) for value in values]
