"""Names and order of classes, by one rule for tables, folders and foreign tars."""

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")


def sort_class_names(labels: Iterable[str]) -> list[str]:
    """Sort class names; the place of a name is its class id.

    If all names are plain whole numbers (no leading zero, no fraction), the order is numeric, so 10 comes after 2.
    Otherwise all names are texts, so 007 and 7 are two classes.
    """
    found = set(labels)
    whole = all(_WHOLE.fullmatch(name) for name in found)
    return sorted(found, key=int) if whole else sorted(found)


def label_name(value: Any) -> str:
    """Return the class name for a label from a table or JSON, or "" for no label.

    A text is taken unchanged, a bool as `true` or `false`, a whole number without its fraction. Null, NaN and blank
    texts are no label. Raises ValueError, with the value, for anything else.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value if value.strip() else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    raise ValueError(f"{str(value)[:40]!r} is neither a text nor a whole number")
