"""Small indexes of known codes, and the answers that they give."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.config.settings import Config, IndexSettings
from pipelines.index.reader import open_index
from tests.support.codes import Rows, random_codes, simple_rows, write_codes

FLAT = Config(index=IndexSettings(workers=1, part_codes=1))
"""One part for each tar, so that small indexes have several."""
IVF = Config(index=IndexSettings(kind="ivf", nlist=6, nprobe=6, workers=1, part_codes=1))
HNSW = Config(index=IndexSettings(kind="hnsw", ef_search=400, workers=1, part_codes=1))
KINDS = pytest.mark.parametrize("config", [FLAT, IVF, HNSW], ids=["flat", "ivf", "hnsw"])


def tars(name: str, shards: int = 2, count: int = 20, bits: int = 64) -> dict[str, Rows]:
    return {
        f"{name}-{n:06d}.tar": simple_rows(f"{name}/{n}", count, bits, seed=hash_of(name) + n, flip=0.3)
        for n in range(shards)
    }


def hash_of(name: str) -> int:
    return sum(name.encode())


def codes_at(root: Path, name: str, **options: Any) -> str:
    contents = tars(name, **{key: options.pop(key) for key in ("shards", "count", "bits") if key in options})
    bits = 8 * next(iter(contents.values())).codes.shape[1]
    return write_codes(root / name, contents, bits, **options).uri


def ask(index: str, count: int = 12, k: int = 9, version: int | None = None) -> list[Any]:
    """Distances and ids of seeded queries."""
    with open_index(index, version) as reader:
        distances, ids = reader.search(random_codes(count, reader.bits, seed=77), k)
    return [distances.tolist(), ids.tolist()]


def keys_of(index: str) -> list[str]:
    with open_index(index) as reader:
        return list(reader.all_keys())
