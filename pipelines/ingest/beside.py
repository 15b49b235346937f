"""What stands beside a picture in img2dataset's output format `files`: its metadata in .json, its caption in .txt."""

import json
import math
import os
from collections.abc import Callable, Container
from typing import Any

from pipelines.errors import InputError

MAX_BESIDE_BYTES = 1 << 20


def beside_picture(
    path: str, beside: Container[str], used: set[str], read: Callable[[str], bytes]
) -> dict[str, Any] | None:
    """Return the metadata of a picture, None where it has none, and add to `used` what of `beside` it was in.

    What cannot be read or is no JSON object costs the metadata, never the picture.
    """
    stem = os.path.splitext(path)[0]  # noqa: PTH122 - a Path per file is slow
    facts: dict[str, Any] = {}
    for suffix, parse in ((".json", _parse_json), (".txt", _parse_caption)):
        if (name := stem + suffix) in beside:
            used.add(name)
            try:
                found = parse(read(name))
            except (InputError, ValueError, RecursionError):
                continue
            facts |= {key: value for key, value in found.items() if facts.get(key) is None}
    return facts or None


def _parse_json(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    value.pop("labels", None)  # the name that a sample's own labels have
    json.dumps(cleaned := _finite(value), ensure_ascii=False, allow_nan=False).encode()  # as a shard will hold it
    return dict(cleaned)


def _finite(value: Any) -> Any:
    """The same value with null in the place of numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse_caption(data: bytes) -> dict[str, Any]:
    return {"caption": data.decode("utf-8")}
