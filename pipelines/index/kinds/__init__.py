"""Index kinds: how the codes of one shard become a searchable part, and how such a part is searched.

A kind is one module in this package with a class that satisfies `IndexKind`, and one line in `KINDS`.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from pipelines.config.settings import IndexSettings
from pipelines.errors import ConfigError

Codes = npt.NDArray[np.uint8]
"""Packed codes, uint8 (N, bytes)."""
Ids = npt.NDArray[np.int64]
"""Index ids, int64: shard ordinal << 32 | row."""
Radii = npt.NDArray[np.int32]
"""A distance in bits for each query (Q,), inclusive."""
Neighbours = tuple[npt.NDArray[np.int32], Ids]
"""Distances in bits (Q, k) and ids (Q, k), each row ordered by (distance, id)."""
Hits = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], Ids]
"""Offsets (Q + 1,), and distances and ids of all hits: those of query q lie at offsets[q]:offsets[q + 1], by (distance,
id)."""

NOTHING_REMOVED: Ids = np.empty(0, np.int64)
NO_ID = -1
NO_DISTANCE = np.iinfo(np.int32).max
"""What fills a row that has fewer than k neighbours."""

KINDS: Mapping[str, str] = {
    "flat": "pipelines.index.kinds.flat:FlatKind",
    "hnsw": "pipelines.index.kinds.hnsw:HnswKind",
    "ivf": "pipelines.index.kinds.ivf:IvfKind",
    "multihash": "pipelines.index.kinds.multihash:MultiHashKind",
}


class Searcher(Protocol):
    """One part, opened."""

    count: int
    """Codes that can be found: those of the part less the removed."""

    def search(self, queries: Codes, k: int, radius: Radii | None = None) -> Neighbours:
        """The k nearest codes of the part; k is cut to `count`, and what was not found is NO_ID, NO_DISTANCE.

        What is farther than the `radius` of its query need not be found.
        """

    def range_search(self, queries: Codes, radius: int) -> Hits:
        """The codes of the part within `radius` bits, inclusive."""


class IndexKind(Protocol):
    """One way to lay out and search codes."""

    suffix: str
    """Of the parts' file names."""
    exact: bool
    """Whether a search returns just what a brute-force scan does."""
    mapped: bool
    """Whether an opened part leaves its bytes in the file, so that it may stay open."""

    def parameters(self, settings: IndexSettings, count: int) -> dict[str, int]:
        """The settings this kind uses, with the unset ones resolved for `count` codes."""

    def sample_size(self, parameters: Mapping[str, int]) -> int:
        """Codes that `train` wants to see; 0 where the kind learns nothing."""

    def train(self, sample: Codes, parameters: Mapping[str, int], seed: int) -> bytes:
        """What all parts share, learnt once from a sample of the codes; called only if `sample_size` is above 0."""

    def build(self, codes: Codes, ids: Ids, shared: bytes | None, parameters: Mapping[str, int]) -> bytes:
        """One part from at least one code; `ids` ascend."""

    def part_bytes(self, rows: int, width: int, parameters: Mapping[str, int]) -> int:
        """About how many bytes `build` makes of `rows` codes of `width` bytes."""

    def open(
        self, path: Path, width: int, rows: int, shared: bytes | None, parameters: Mapping[str, int], removed: Ids
    ) -> Searcher:
        """Open a part whose digest was checked; DamagedArtifact unless it holds `rows` codes of `width` bytes.

        The ids in `removed`, which ascend, are never found.
        """


class Untrained:
    """What a kind inherits whose parts share nothing that is learnt."""

    def sample_size(self, parameters: Mapping[str, int]) -> int:
        """No codes are wanted."""
        return 0

    def train(self, sample: Codes, parameters: Mapping[str, int], seed: int) -> bytes:
        """Never called, since no codes are wanted."""
        raise AssertionError("a kind that wants no sample is not trained")


def index_kind(name: str) -> IndexKind:
    """The kind of this name; its module, and so Faiss where it needs it, is imported now."""
    if name not in KINDS:
        raise ConfigError(f"index kind {name!r} is unknown: choose one of {', '.join(sorted(KINDS))}")
    module, _, attribute = KINDS[name].partition(":")
    return cast(IndexKind, getattr(importlib.import_module(module), attribute)())
