"""Values of settings that can be written in several ways: durations, paths of weights, a number or `auto`."""

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value: Any) -> Any:
    """Parse a text such as 5ms or 24h into seconds; return a value that is no text unchanged.

    Raises ValueError for other text.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)", value.strip())
    if match is None:
        raise ValueError("write a number and ms, s, m, h or d, as in 24h")
    return float(match[1]) * _UNITS[match[2]]


Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""A duration: a number of seconds, or a text such as 5ms."""


WeightsPath = Annotated[str, AfterValidator(os.path.expanduser)]
"""`timm`, or the path of a safetensors file."""


def number_or_auto(least: int, most: int) -> BeforeValidator:
    """Return the check of a setting that is a number from `least` to `most`, or `auto`."""

    def check(value: Any) -> Any:
        number = int(value) if isinstance(value, str) and value.isdigit() else value
        if number != "auto" and not (type(number) is int and least <= number <= most):
            raise ValueError(f"write a number from {least} to {most}, or auto")
        return value

    return BeforeValidator(check)
