"""The index artifact: its tables and names, and a reader that searches it part by part.

For the shard of ordinal n there are `part-<n>.<suffix>` (the kind's own format) and `keys-<n>.parquet`, which makes
the index self-contained: rows, keys, codes and labels. `ordinals.parquet` says which tar an ordinal belongs to; what
the kind's parts share is `quantizer.faiss`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts import Artifact, Part, open_artifact, versions
from pipelines.codes import class_names
from pipelines.errors import DamagedArtifact, InputError
from pipelines.kinds import NO_ID, NOTHING_REMOVED, Codes, IndexKind, Neighbours, Searcher, index_kind
from pipelines.schema import read_parquet, require_schema
from pipelines.storage import Store, scratch_folder
from pipelines.versions import open_version

ORDINALS_NAME = "ordinals.parquet"
QUANTIZER_NAME = "quantizer.faiss"
KEY_TABLES_KEPT = 64

ORDINALS = pa.schema(
    [
        pa.field("ordinal", pa.int32(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("shard_sha256", pa.string(), nullable=False),
        pa.field("codes_digest", pa.string(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
    ]
)


def keys_schema(width: int) -> pa.Schema:
    """One row per code of a shard, in the order of its ids; `row` is the sample's place in the tar."""
    return pa.schema(
        [
            pa.field("row", pa.int32(), nullable=False),
            pa.field("key", pa.string(), nullable=False),
            pa.field("code", pa.binary(width), nullable=False),
            pa.field("labels", pa.list_(pa.int32()), nullable=False),
        ]
    )


def part_stem(ordinal: int) -> str:
    """Name of a shard's part, without its suffix."""
    return f"part-{ordinal:06d}"


def keys_name(ordinal: int) -> str:
    """Name of a shard's key table."""
    return f"keys-{ordinal:06d}.parquet"


def index_id(ordinal: int, row: int) -> int:
    """The 64-bit id of a sample."""
    return ordinal << 32 | row


@dataclass(frozen=True)
class IndexedShard:
    """A row of the ordinal table."""

    ordinal: int
    shard: str
    shard_sha256: str
    codes_digest: str
    rows: int


@dataclass(frozen=True)
class Item:
    """What the index knows of one id; `labels` are class names."""

    id: int
    key: str
    shard: str
    shard_sha256: str
    row: int
    labels: tuple[str, ...]


class IndexReader:
    """A committed index, opened for search. Parts are opened one at a time, so memory is bounded by the largest."""

    def __init__(self, artifact: Artifact, folder: Path, version: int | None = None) -> None:
        self.artifact, self.version, self._folder = artifact, version, folder
        meta = artifact.manifest.meta
        try:
            self.bits, self.classes = int(meta["bits"]), tuple(str(name) for name in meta["classes"])
            self.kind: IndexKind = index_kind(str(meta["kind"]))
            self.parameters = {str(name): int(value) for name, value in meta["parameters"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DamagedArtifact(
                f"{artifact.uri}: the index manifest lacks bits, classes, kind or parameters"
            ) from None
        self._parts = {part.name: part for part in artifact.manifest.parts}
        self.shards = self._read_ordinals()
        shared = self._parts.get(QUANTIZER_NAME)
        self._shared = artifact.read(shared) if shared else None
        self._files: dict[int, Path] = {}
        self._keys = lru_cache(KEY_TABLES_KEPT)(self.read_keys)

    @property
    def width(self) -> int:
        """Bytes of a code."""
        return (self.bits + 7) // 8

    @property
    def count(self) -> int:
        """Codes in the index."""
        return sum(shard.rows for shard in self.shards.values())

    def filled(self) -> list[IndexedShard]:
        """The shards that hold any code, by ordinal."""
        return [shard for _, shard in sorted(self.shards.items()) if shard.rows]

    def search(self, queries: Codes, k: int) -> Neighbours:
        """The k nearest over all parts: distances int32 and ids int64, (Q, min(k, count)), by (distance, id)."""
        shape = len(queries), 0
        best: Neighbours = np.empty(shape, np.int32), np.empty(shape, np.int64)
        for shard in self.filled():
            best = merge(best, self.open_part(shard).search(queries, k), k)
        return best

    def open_part(self, shard: IndexedShard) -> Searcher:
        """The shard's part; its digest is checked when it is first opened."""
        if shard.ordinal not in self._files:
            part = self._part(part_stem(shard.ordinal) + self.kind.suffix)
            self._files[shard.ordinal] = self.artifact.fetch(part, self._folder)
        path = self._files[shard.ordinal]
        return self.kind.open(path, self.width, shard.rows, self._shared, self.parameters, NOTHING_REMOVED)

    def read_keys(self, ordinal: int) -> pa.Table:
        """A shard's key table, checked."""
        part, where = self._part(keys_name(ordinal)), f"{self.artifact.uri}/{keys_name(ordinal)}"
        table = read_parquet(self.artifact.read(part), where)
        require_schema(table, keys_schema(self.width), where)
        if table.num_rows != self.shards[ordinal].rows:
            raise DamagedArtifact(f"{where} has {table.num_rows} rows, expected {self.shards[ordinal].rows}")
        return table

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """Key, place and labels of ids; NO_ID is left out."""
        groups: dict[int, list[int]] = {}
        for number in sorted({int(number) for number in ids} - {NO_ID}):
            groups.setdefault(number >> 32, []).append(number & 0xFFFFFFFF)
        return {item.id: item for ordinal, rows in groups.items() for item in self._items_of(ordinal, rows)}

    def find(self, keys: Sequence[str]) -> tuple[list[tuple[Item, bytes]], list[str]]:
        """The samples of these keys with their codes, in the order given, and the keys that are nowhere."""
        found: dict[str, list[tuple[Item, bytes]]] = {key: [] for key in keys}
        wanted = pa.array(list(found), pa.string())
        for shard in self.filled():
            table = self._keys(shard.ordinal)
            hits = table.filter(pc.is_in(table["key"], value_set=wanted))
            items = {item.row: item for item in self._items_of(shard.ordinal, hits["row"].to_pylist())}
            for row, code in zip(hits["row"].to_pylist(), hits["code"].to_pylist(), strict=True):
                found[items[row].key].append((items[row], code))
        return [entry for key in keys for entry in found[key]], [key for key in found if not found[key]]

    def all_keys(self) -> Iterator[str]:
        """Every key, shard by shard."""
        for shard in self.filled():
            yield from self._keys(shard.ordinal)["key"].to_pylist()

    def _items_of(self, ordinal: int, rows: Sequence[int]) -> Iterator[Item]:
        shard = self.shards.get(ordinal)
        if shard is None:
            raise DamagedArtifact(f"{self.artifact.uri}: the ordinal table does not know shard ordinal {ordinal}")
        table = self._keys(ordinal)
        places = np.searchsorted(table["row"].to_numpy(), rows)
        if len(rows) and (places.max() >= len(table) or (table["row"].to_numpy()[places] != rows).any()):
            raise DamagedArtifact(f"{self.artifact.uri}: {keys_name(ordinal)} lacks rows that the part returned")
        for entry in table.select(["row", "key", "labels"]).take(places).to_pylist():
            names = class_names(entry["labels"], self.classes, self.artifact.uri)
            number = index_id(ordinal, entry["row"])
            yield Item(number, entry["key"], shard.shard, shard.shard_sha256, entry["row"], tuple(names))

    def _part(self, name: str) -> Part:
        if name not in self._parts:
            raise DamagedArtifact(f"{self.artifact.uri}: the manifest lists no part {name}")
        return self._parts[name]

    def _read_ordinals(self) -> dict[int, IndexedShard]:
        where = f"{self.artifact.uri}/{ORDINALS_NAME}"
        table = read_parquet(self.artifact.read(self._part(ORDINALS_NAME)), where)
        require_schema(table, ORDINALS, where)
        return {row["ordinal"]: IndexedShard(**row) for row in table.to_pylist()}


def merge(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """The k best of two results by (distance, id)."""
    distances = np.concatenate([first[0], second[0]], axis=1)
    ids = np.concatenate([first[1], second[1]], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def code_bytes(codes: Sequence[bytes], width: int) -> Codes:
    """Codes of `width` bytes as uint8 (N, width)."""
    return np.frombuffer(b"".join(codes), np.uint8).reshape(-1, width)


@contextmanager
def open_index(uri: str, version: int | None = None) -> Iterator[IndexReader]:
    """Open a published index, by default its highest version. InputError where none is published."""
    store = Store(uri)
    known = versions(store)
    if not known:
        open_artifact(store, "index")  # says so if there is no index at all
        raise InputError(f"{store.uri} holds an index that was never published: build it without --no-publish")
    number = known[-1] if version is None else version
    if number not in known:
        raise InputError(f"{store.uri} has no version {number}: its versions are {', '.join(map(str, known))}")
    with scratch_folder() as folder:
        yield IndexReader(open_version(store, number, "index"), folder, number)
