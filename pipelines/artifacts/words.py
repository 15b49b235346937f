"""Words for people: figures with units and separators, tables with numbers on the right, short places."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ByteSize

DIGEST_CHARS = 12
TEXT_CHARS = 80
"""Longest line of a fact that is wrapped, in characters; with its name it fits 100 columns."""
SCORES = {"map", "map_before", "val_map", "chance", "deviation"}
"""Fields that are shown with four decimals, so that rows compare at a glance."""
SIZES = {"bytes", "bytes_read", "bytes_written"}
"""Fields that count bytes."""


def format_label(name: str) -> str:
    """Return a field's name for people: `images_per_second` -> `images per second`, `val_map` -> `val mAP`."""
    return re.sub(r"\bmap\b", "mAP", name.replace("_", " "))


def format_value(value: Any, name: str = "") -> str:
    """Return a value of a result in plain words; `name` is that of its field and decides on its unit."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        inner = "share" if name == "shares" else ""
        return ", ".join(f"{format_label(str(key))} {_nested(one, inner or str(key))}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_nested(one) for one in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _format_number(value, name)
    text = str(value).replace("\n", "\\n")
    return text[:DIGEST_CHARS] if re.fullmatch(r"[0-9a-f]{64}", text) and name != "digest" else text


def _nested(value: Any, name: str = "") -> str:
    text = format_value(value, name)
    return f"({text})" if isinstance(value, Mapping | list | tuple) and value else text


def _format_number(value: float, name: str) -> str:
    if name == "share":
        return f"{100 * value:.0f}%"
    if name == "seconds" or name.endswith("_seconds"):
        return format_seconds(value)
    if name in SIZES:
        return format_bytes(int(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if name in SCORES else format_float(value)


def format_float(value: float) -> str:
    """Return a number with four digits, whole thousands with separators; 0.99997 is not rounded to 1."""
    if math.isfinite(value) and abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return f"{value:.6g}" if text == "1" else text


def format_seconds(seconds: float) -> str:
    """Format a measured time: `0.35 s`, `4.6 s`, `12 s`, `3 min 20 s`."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    return format_span(round(seconds))


def format_span(seconds: float) -> str:
    """Format a span of time: `12 s`, `3 min 20 s`, `2 h 5 min`, `1 d 3 h`."""
    whole = int(seconds)
    for (unit, size), (below, part) in pairwise((("d", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {below}" if rest else "")
    return f"{whole} s"


def format_bytes(count: int) -> str:
    """Format a size in binary units: `17 B`, `1.5 KiB`, `20.0 MiB`."""
    return ByteSize(count).human_readable(separator=" ")


def short_place(uri: str) -> str:
    """Return a local path relative to this folder if it lies below it, as a shell takes it; other URIs as they are."""
    path = Path(uri)
    if "://" in uri or not path.is_absolute() or not path.is_relative_to(Path.cwd()):
        return uri
    return str(path.relative_to(Path.cwd()))


def last_part(uri: str) -> str:
    """Return the last part of a URI, by which a bar is told from others: `out/codes/train` -> `train`."""
    return uri.rstrip("/").rpartition("/")[2]


def align_facts(facts: Iterable[tuple[str, str]]) -> list[str]:
    """Lay out names and texts, one pair a line, the texts below each other."""
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in pairs]


def wrap_text(text: str) -> list[str]:
    """Break a text between words into lines of at most TEXT_CHARS characters; a longer word stays whole."""
    return textwrap.wrap(text, TEXT_CHARS, break_long_words=False, break_on_hyphens=False)


def format_table(rows: Sequence[Mapping[str, Any]], most: int | None = None) -> list[str]:
    """Lay out rows under a heading: numbers right, text left, empty columns left out, and how many rows are more."""
    shown = rows[:most]
    known = dict.fromkeys(name for row in shown for name in row)
    names = [name for name in known if any(row.get(name) not in (None, "", [], {}) for row in shown)]
    columns = [[format_label(name), *(_cell(row.get(name), name) for row in shown)] for name in names]
    right = [all(_is_number(row.get(name)) for row in shown) for name in names]
    padded = [_pad(column, to_right) for column, to_right in zip(columns, right, strict=True)]
    lines = ["  " + "  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    return [*lines, *more_rows(len(rows) - len(shown), indent="  ")]


def list_first(names: Sequence[str], most: int) -> str:
    """List the first `most` names, and say how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def more_rows(count: int, indent: str = "") -> list[str]:
    """Return the line that says how many rows are left out, or none where that is 0."""
    return [f"{indent}and {count:,} more: --json has all"] if count > 0 else []


def _cell(value: Any, name: str) -> str:
    if value in ("", [], {}):
        return "-"
    return format_value(value, "" if name == "digest" else name)


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _pad(column: Iterable[str], to_right: bool) -> list[str]:
    cells = list(column)
    width = max(map(len, cells))
    return [cell.rjust(width) if to_right else cell.ljust(width) for cell in cells]
