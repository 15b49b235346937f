"""What a class is called and how classes are ordered: one rule for tables, folders and tars of others."""

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,99}")


def class_names(labels: Iterable[str]) -> list[str]:
    """Sort class names; the place of a name is its class id.

    Where all names are whole numbers as one writes them (no leading zero, no fraction) they are in numeric order, so
    10 follows 2. Otherwise all of them are texts, so 007 and 7 are two classes.
    """
    found = set(labels)
    whole = all(_WHOLE.fullmatch(name) for name in found)
    return sorted(found, key=int) if whole else sorted(found)


def label_name(value: Any) -> str:
    """Return the class name that a label of a table or of JSON stands for; "" where it stands for none.

    A text is taken as it is, a bool as true or false, a whole number without its fraction; null, NaN and blank texts
    are no label. Raises ValueError, which says the value, for anything else.
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
