"""Splits of the field in tests: ingest a small data set by a protocol, and look at what each part holds."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.cli.main import app
from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from pipelines.ingest.protocols.base import Protocol
from pipelines.shards.shards import Sample, open_shards
from tests.support.pictures import jpeg


def write_pictures(root: Path, paths: Iterable[str]) -> None:
    """A JPEG of noise at each path below `root`, no two alike."""
    random = np.random.default_rng(0)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(jpeg(random.integers(0, 256, (8, 8, 3), np.uint8)))


def ingested(folder: Path, out: Path, protocol: Protocol, *sets: str) -> dict[str, Any]:
    """The result of `ingest`."""
    return ingest(str(folder), str(out), load_config(sets=sets), protocol=protocol).as_json()


def samples_of(out: Path, part: str) -> Iterator[Sample]:
    """All samples of a part, read from its tars."""
    shards = open_shards(str(out / part))
    for shard in shards.shards:
        yield from shards.read(shard)


def keys_of(out: Path, part: str) -> list[str]:
    """The keys of a part, sorted."""
    return sorted(sample.record.key for sample in samples_of(out, part))


def labels_of(out: Path, part: str) -> dict[str, list[str]]:
    """The class names of each key of a part."""
    classes = open_shards(str(out / part)).classes
    return {s.record.key: [classes[label] for label in s.record.labels] for s in samples_of(out, part)}


def warnings_in(text: str) -> list[str]:
    """The warnings on stderr."""
    return [line.removeprefix("hhnet: warning: ") for line in text.splitlines() if line.startswith("hhnet: warning: ")]


def hhnet(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr of the command line."""
    with pytest.raises(SystemExit) as end:
        app(words)
    return (end.value.code, *capsys.readouterr())
