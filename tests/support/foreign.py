"""Tars as others write them, and what adopting them skipped."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.shards.shards import Sample, open_shards
from tests.support import pictures

IMAGES = [pictures.jpeg(pictures.picture(number % 3, number)) for number in range(12)]


def write_foreign(path: Path, members: Mapping[str, bytes], end: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        size = archive.offset
    path.write_bytes(sink.getvalue() if end else sink.getvalue()[:size])
    return path


def numbered(first: int, count: int) -> dict[str, bytes]:
    """Samples with an image and a class number."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        members |= {f"{number:05d}.jpg": IMAGES[number % 12], f"{number:05d}.cls": b"%d\n" % (number % 3)}
    return members


def read_all(uri: str | Path) -> list[Sample]:
    opened = open_shards(str(uri))
    return [sample for shard in opened.shards for sample in opened.read(shard, metadata=True)]


def skipped(result: Mapping[str, Any]) -> dict[str, str]:
    return {entry["path"]: entry["reason"] for entry in result["skipped_files"]}
