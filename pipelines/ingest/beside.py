"""Files beside a picture in img2dataset's output format `files`: metadata in .json, the caption in .txt."""

import json
import math
import os
from collections.abc import Callable, Container
from typing import Any

from pipelines.errors import InputError

MAX_BESIDE_BYTES = 1 << 20
"""Largest size of such a file in bytes; larger ones are skipped."""


def read_beside_picture(
    path: str, beside: Container[str], used: set[str], read: Callable[[str], bytes]
) -> dict[str, Any] | None:
    """Return the metadata of a picture or None, and add the files that belong to it to `used`.

    `beside` are the files beside pictures. One that cannot be read or is no JSON object adds no metadata; the picture
    is kept.
    """
    stem = os.path.splitext(path)[0]  # noqa: PTH122 - a Path per file is slow
    facts: dict[str, Any] = {}
    for suffix, parse in ((".json", _parse_json), (".txt", lambda data: {"caption": data.decode("utf-8")})):
        if (name := stem + suffix) in beside:
            used.add(name)
            try:
                found = parse(read(name))
            except (InputError, ValueError, RecursionError):  # costs the metadata, not the picture
                continue
            facts |= {key: value for key, value in found.items() if facts.get(key) is None}
    return facts or None


def _parse_json(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    value.pop("labels", None)  # the name that a sample's own labels have
    # Tried as a shard will write it: lone surrogates fail here and cost the metadata, not the shard.
    json.dumps(cleaned := _finite(value), ensure_ascii=False, allow_nan=False).encode()
    return dict(cleaned)


def _finite(value: Any) -> Any:
    """Return the value with None in place of NaN and infinities, which JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
