"""Rounds the figures of a report, so that they are equal wherever they are computed."""

from collections.abc import Iterable
from typing import Any

REPORT_DIGITS = 6


def round_figure(value: Any) -> float:
    """Round to the digits of a report; -0.0 becomes 0.0, since its sign would be written."""
    return round(float(value), REPORT_DIGITS) + 0.0


def round_figures(values: Iterable[Any]) -> list[float]:
    """Round each of several values."""
    return [round_figure(value) for value in values]
