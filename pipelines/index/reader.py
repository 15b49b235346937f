"""Reads the index artifact: its tables and names, and a reader that searches it part by part.

The shard of ordinal n has `part-<n>.<suffix>` in the kind's own format, and `keys-<n>.parquet`, which makes the index
self-contained: rows, keys, source paths, codes, labels, and real codes where the codes have them. `ordinals.parquet`
maps ordinals to tars; `quantizer.faiss` is shared by all parts of a kind that has one.

In a later version `removed.parquet` names the rows of parts that must not be found any more. These may be all rows of a
part; it stays, so that the same tar is not taken for a new one. A shard that was removed as a whole has no parts, and
keeps its ordinal with 0 rows: an ordinal is given once, to one tar.
"""

import difflib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import IndexMeta, PartReceipt
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.parquet import schema_of, schema_of_rows
from pipelines.artifacts.tables import LABELS, read_table, real_codes_column
from pipelines.artifacts.versions import made_as, open_version
from pipelines.encode.codes import CodesSet, names_of_class_ids, real_codes_array
from pipelines.errors import DamagedArtifact
from pipelines.index.alias import open_published
from pipelines.index.kinds import (
    NO_ID,
    NOTHING_REMOVED,
    Codes,
    Ids,
    IndexKind,
    Neighbours,
    PartSearcher,
    by_distance,
    index_kind,
)
from pipelines.storage import Store, scratch_folder

ORDINALS_NAME = "ordinals.parquet"
QUANTIZER_NAME = "quantizer.faiss"
REMOVED_NAME = "removed.parquet"
KEY_ROWS_KEPT = 1 << 22
"""Rows of key tables that stay in memory between queries; at least one table stays."""
DIGESTS_AT_ONCE = 8
PARTS_KEPT = 128
"""Number of mapped parts that stay open between searches.

Each holds some file descriptors, and a mask where rows are removed.
"""
NAME_COLUMNS = ("key", "path")
"""Columns by which a user may name a sample."""
NEAR_KEYS_SHOWN = 3
MAX_KEYS_COMPARED = 20_000

REMOVED = schema_of(ordinal=pa.int32(), row=pa.int32())
"""Rows of parts that must not be found any more, by (ordinal, row)."""


def keys_schema(bits: int, real_codes: bool = False) -> pa.Schema:
    """Return the schema of a key table: one row per code, by id; `row` is the sample's place in the tar."""
    names = {"row": pa.int32(), "key": pa.string(), "path": pa.string()}
    return schema_of(**names, code=pa.binary((bits + 7) // 8), labels=LABELS, **real_codes_column(bits, real_codes))


def part_stem(ordinal: int) -> str:
    """Return the name of a shard's part, without its suffix."""
    return f"part-{ordinal:06d}"


def keys_name(ordinal: int) -> str:
    """Return the name of a shard's key table."""
    return f"keys-{ordinal:06d}.parquet"


def index_id(ordinal: Any, row: Any) -> Any:
    """Return the 64-bit id of a sample, or int64 ids of several."""
    return ordinal << 32 | row


@dataclass(frozen=True)
class IndexedShard:
    """A row of the ordinal table; `rows` counts the codes of its part, removed ones included."""

    ordinal: int
    shard: str
    shard_sha256: str
    codes_digest: str
    rows: int


ORDINALS = schema_of_rows(IndexedShard)


@dataclass(frozen=True)
class Item:
    """The facts that the index holds about one id; `labels` are class names."""

    id: int
    key: str
    path: str
    shard: str
    shard_sha256: str
    row: int
    labels: tuple[str, ...]


class IndexReader:
    """A committed index, opened for search.

    Mapped parts may stay open. All others are opened one at a time, for each search anew, so memory is bounded by the
    largest.
    """

    def __init__(
        self, artifact: Artifact, folder: Path, version: int | None = None, parts_kept: int = PARTS_KEPT
    ) -> None:
        self.artifact, self.version, self._folder, self._parts_kept = artifact, version, folder, parts_kept
        self.meta = meta = artifact.facts(IndexMeta)
        self.bits, self.classes, self.real_codes = meta.bits, meta.classes, meta.has_real_codes
        self.parameters = meta.parameters
        self.kind: IndexKind = index_kind(meta.kind)
        self._parts = artifact.parts
        self.shards = read_ordinals(artifact)
        self.removed = self._read_removed()
        self.shared = self._read_shared()
        self._files: dict[int, Path] = {}
        self._fetching = threading.Lock()
        self._opened: dict[int, PartSearcher] = {}
        plain, largest = keys_schema(self.bits).names, max((shard.rows for shard in self.shards.values()), default=0)
        cached = functools.lru_cache(max(1, KEY_ROWS_KEPT // max(1, largest)))
        self._keys = cached(lambda ordinal: self.live_keys(ordinal, plain))
        self._real_codes = cached(lambda ordinal: self.live_keys(ordinal, ["row", "real_codes"]))

    @property
    def as_codes(self) -> CodesSet:
        """The index in place of codes of its model, to be compared with others."""
        return CodesSet(self.artifact, self.bits, self.classes, self.real_codes)

    @property
    def width(self) -> int:
        """Length of a code in bytes."""
        return (self.bits + 7) // 8

    @property
    def count(self) -> int:
        """Number of codes that can be found."""
        return sum(self.live(shard) for shard in self.shards.values())

    def live(self, shard: IndexedShard) -> int:
        """Return the number of codes of a shard that can be found."""
        return shard.rows - len(self.removed.get(shard.ordinal, ()))

    def filled(self) -> list[IndexedShard]:
        """Return the shards that have a part, by ordinal."""
        return [shard for _, shard in sorted(self.shards.items()) if shard.rows]

    def search(self, queries: Codes, k: int, among: Sequence[IndexedShard] | None = None) -> Neighbours:
        """Return the k nearest over all parts, or over the parts of the shards `among`.

        Distances int32 and ids int64 are (Q, min(k, count)), ordered by (distance, id).
        """
        from hhnet.search.kernels import run_blocks  # compiles on import; only a search needs it

        if k < 1:
            raise ValueError(f"k must be at least 1: got {k}")
        shards = [shard for shard in (self.filled() if among is None else among) if self.live(shard)]
        self._fetch(shards)
        nothing: Neighbours = np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)

        def nearest(share: slice) -> Neighbours:
            best = nothing
            for shard in shards[share]:
                # A later part need not find codes farther than the k-th neighbour so far.
                radius = best[0][:, -1] if best[0].shape[1] == k else None
                best = merge_nearest(best, self._kept_part(shard).search(queries, k, radius), k)
            return best

        if not self.kind.mapped:
            return nearest(slice(None))
        cost = len(queries) * sum(shard.rows for shard in shards)
        found = run_blocks(nearest, len(shards), cost, block=len(shards))
        return functools.reduce(lambda first, second: merge_nearest(first, second, k), found, nothing)

    def _fetch(self, shards: Sequence[IndexedShard]) -> None:
        """Check the digests of parts that were never opened, in threads: a digest costs more than a search.

        A lock lets one caller at a time in, since a part from an object store is copied to a file that others may have
        mapped.
        """
        with self._fetching:
            missing = [shard.ordinal for shard in shards if shard.ordinal not in self._files]
            parts = [self.part(part_stem(ordinal) + self.kind.suffix) for ordinal in missing]
            if parts:
                with ThreadPoolExecutor(min(len(parts), DIGESTS_AT_ONCE)) as pool:
                    paths = pool.map(lambda part: self.artifact.fetch(part, self._folder), parts)
                    self._files.update(zip(missing, paths, strict=True))

    def _kept_part(self, shard: IndexedShard) -> PartSearcher:
        """Return the shard's searcher.

        The first `parts_kept` mapped parts stay open; an LRU would evict each part just before its next use, since
        every search passes over all parts.
        """
        if (searcher := self._opened.get(shard.ordinal)) is None:
            searcher = self.open_part(shard)
            if self.kind.mapped and len(self._opened) < self._parts_kept:
                self._opened[shard.ordinal] = searcher
        return searcher

    def open_part(self, shard: IndexedShard) -> PartSearcher:
        """Open the shard's part; its digest is checked the first time."""
        self._fetch([shard])
        path, rows = self._files[shard.ordinal], self.removed.get(shard.ordinal)
        removed = NOTHING_REMOVED if rows is None else index_id(shard.ordinal, rows)
        searcher = self.kind.open(path, self.width, shard.rows, self.shared, self.parameters, removed)
        if searcher.count != self.live(shard):
            raise DamagedArtifact(f"{self.artifact.uri}: {REMOVED_NAME} names rows that are not in {path.name}")
        return searcher

    def read_keys(self, ordinal: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a shard's key table as stored, or some of its columns, checked; removed rows are included."""
        table = read_key_table(self.artifact.store, self.part(keys_name(ordinal)), self.bits, self.real_codes, columns)
        if table.num_rows != self.shards[ordinal].rows:
            where = f"{self.artifact.uri}/{keys_name(ordinal)}"
            raise DamagedArtifact(f"{where} has {table.num_rows} rows, expected {self.shards[ordinal].rows}")
        return table

    def live_keys(self, ordinal: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a shard's key table without the removed rows, or some of its columns; `row` must be among them."""
        table, removed = self.read_keys(ordinal, columns), self.removed.get(ordinal)
        if removed is None:
            return table
        kept = table.filter(pa.array(~np.isin(table["row"].to_numpy(), removed)))
        if len(kept) != self.live(self.shards[ordinal]):
            raise DamagedArtifact(f"{self.artifact.uri}: {REMOVED_NAME} names rows that {keys_name(ordinal)} lacks")
        return kept

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """Return key, place and labels of these ids; NO_ID is left out."""
        numbers = np.array(sorted({int(number) for number in ids} - {NO_ID}), np.int64)
        return {item.id: item for ordinal, rows in _by_ordinal(numbers) for item in self._items_of(ordinal, rows)}

    def real_codes_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Return the real codes of ascending ids, int8 (N, bits); the index must have real codes."""
        found = [np.empty((0, self.bits), np.int8)]
        for ordinal, rows in _by_ordinal(ids):
            table = self._real_codes(ordinal)
            found.append(real_codes_array(table["real_codes"])[self._places(ordinal, table, rows)])
        return np.concatenate(found)

    def find(self, keys: Sequence[str]) -> tuple[list[tuple[Item, bytes]], list[str]]:
        """Return the samples with these keys or paths and their codes, in the order given, and the names not found."""
        found: dict[str, list[tuple[Item, bytes]]] = {key: [] for key in keys}
        wanted = pa.array(filter(_is_encodable, found), pa.string())
        for shard in self.filled():
            table = self._keys(shard.ordinal)
            hits = table.filter(_mark_named(table, wanted))
            items = {item.row: item for item in self._items_of(shard.ordinal, hits["row"].to_numpy())}
            for row, code in zip(hits["row"].to_pylist(), hits["code"].to_pylist(), strict=True):
                item = items[row]
                for name in {item.key, item.path} & found.keys():
                    found[name].append((item, code))
        return [entry for key in keys for entry in found[key]], [key for key in found if not found[key]]

    def find_ids(self, keys: Sequence[str]) -> tuple[Ids, list[str]]:
        """Return the ids of samples with these keys or paths, even millions, ascending, and the names not found."""
        distinct = dict.fromkeys(keys)
        wanted = pa.array(filter(_is_encodable, distinct), pa.string())
        known, found = np.zeros(len(wanted), np.bool_), [NOTHING_REMOVED]
        for shards in _by_rows(self.filled(), KEY_ROWS_KEPT) if len(wanted) else ():
            tables = {shard.ordinal: self.live_keys(shard.ordinal, ["row", *NAME_COLUMNS]) for shard in shards}
            ids = [index_id(ordinal, table["row"].to_numpy().astype(np.int64)) for ordinal, table in tables.items()]
            # Many tables in one call, since each call hashes all wanted names again.
            names = pa.concat_tables(tables.values())
            for name in NAME_COLUMNS:
                places = pc.index_in(names[name], value_set=wanted)
                known[places.drop_null().to_numpy()] = True
                found.append(np.concatenate(ids)[places.is_valid().to_numpy()])
        lacking = [key for key in distinct if not _is_encodable(key)] + wanted.filter(pa.array(~known)).to_pylist()
        return np.unique(np.concatenate(found)), lacking

    def all_keys(self) -> Iterator[str]:
        """Yield every key, shard by shard."""
        for shard in self.filled():
            yield from self._keys(shard.ordinal)["key"].to_pylist()

    def removed_keys(self, keys: Sequence[str]) -> set[str]:
        """Return which of these keys or paths were removed since the parts were built.

        Call it only with names that `find` or `find_ids` did not find.
        """
        wanted, gone = pa.array(filter(_is_encodable, keys), pa.string()), set()
        for ordinal, rows in self.removed.items() if keys else ():
            table = self.read_keys(ordinal)
            table = table.filter(pa.array(np.isin(table["row"].to_numpy(), rows)))
            table = table.filter(_mark_named(table, wanted))
            gone |= {name for column in NAME_COLUMNS for name in table[column].to_pylist()}
        return gone & set(keys)

    def near_keys(self, key: str) -> list[str]:
        """Return up to NEAR_KEYS_SHOWN keys that resemble `key`.

        First come keys that begin with it, end with its last component, or are contained in it; then similar spellings.
        """
        tail = key.rsplit("/", 1)[-1]
        near: list[str] = []
        pool: list[str] = []
        for known in self.all_keys():
            if known.startswith(key) or known.endswith(f"/{tail}") or known in key:
                near.append(known)
            elif len(pool) < MAX_KEYS_COMPARED:
                pool.append(known)
            if len(near) == NEAR_KEYS_SHOWN:
                return near
        return near + difflib.get_close_matches(key, pool, NEAR_KEYS_SHOWN - len(near))

    def _items_of(self, ordinal: int, rows: npt.NDArray[np.int64]) -> Iterator[Item]:
        shard = self.shards.get(ordinal)
        if shard is None:
            raise DamagedArtifact(f"{self.artifact.uri}: the ordinal table does not know shard ordinal {ordinal}")
        table = self._keys(ordinal)
        places = self._places(ordinal, table, rows)
        for entry in table.select(["row", *NAME_COLUMNS, "labels"]).take(places).to_pylist():
            names = names_of_class_ids(entry["labels"], self.classes, self.artifact.uri)
            number = index_id(ordinal, entry["row"])
            place = shard.shard, shard.shard_sha256, entry["row"]
            yield Item(number, entry["key"], entry["path"], *place, tuple(names))

    def _places(self, ordinal: int, table: pa.Table, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the places of a shard's rows in its key table."""
        known = table["row"].to_numpy()
        places = np.searchsorted(known, rows)
        if len(rows) and (places.max() >= len(known) or (known[places] != rows).any()):
            raise DamagedArtifact(f"{self.artifact.uri}: {keys_name(ordinal)} lacks rows that the part returned")
        return places

    def part(self, name: str) -> Part:
        """Return the part of this logical name; raises DamagedArtifact where there is none."""
        if name not in self._parts:
            raise DamagedArtifact(f"{self.artifact.uri}: the manifest lists no part {name}")
        return self._parts[name]

    def _read_shared(self) -> bytes | None:
        part, named = self._parts.get(QUANTIZER_NAME), self.meta.quantizer_sha256
        if named != (part.sha256 if part else None):
            raise DamagedArtifact(
                f"{self.artifact.uri} was built with quantizer {str(named)[:12]}, but the manifest lists "
                f"{part.sha256[:12] if part else 'none'}"
            )
        return self.artifact.read(part) if part else None

    def _read_removed(self) -> dict[int, npt.NDArray[np.int64]]:
        """Read the removed rows of each ordinal, ascending."""
        part, where = self._parts.get(REMOVED_NAME), f"{self.artifact.uri}/{REMOVED_NAME}"
        if part is None:
            return {}
        table = read_table(self.artifact.store, part, REMOVED)
        ordinals, rows = (table[name].to_numpy().astype(np.int64) for name in ("ordinal", "row"))
        ids = index_id(ordinals, rows)
        if (np.diff(ids) <= 0).any() or (rows < 0).any():
            raise DamagedArtifact(f"{where} is not sorted")
        found = dict(_by_ordinal(ids))
        for ordinal, chunk in found.items():
            if ordinal not in self.shards or len(chunk) > self.shards[ordinal].rows:
                raise DamagedArtifact(f"{where} names more rows of shard ordinal {ordinal} than the index holds")
        return found


def _by_ordinal(ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Split ascending ids into ordinals and their rows."""
    ordinals = ids >> 32
    starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
    for chunk in np.split(ids, starts[1:]) if len(ids) else ():
        yield int(chunk[0] >> 32), chunk & 0xFFFFFFFF


def _mark_named(table: pa.Table, wanted: pa.Array) -> pa.ChunkedArray:
    """Mark the rows whose key or source path is among the `wanted` texts."""
    return pc.or_(*(pc.is_in(table[name], value_set=wanted) for name in NAME_COLUMNS))


def _is_encodable(key: str) -> bool:
    """Tell whether the text can be a key at all: a shell may hand on bytes that are not UTF-8."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True


def _by_rows(shards: Sequence[IndexedShard], most: int) -> Iterator[list[IndexedShard]]:
    """Group the shards in their order, at most `most` rows together but at least one shard."""
    group: list[IndexedShard] = []
    for shard in shards:
        if group and sum(one.rows for one in group) + shard.rows > most:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def read_key_table(
    store: Store, part: Part, bits: int, real_codes: bool, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return a key table, or some columns in their stored order; digest, schema and number of rows are checked."""
    return read_table(store, part, keys_schema(bits, real_codes), columns)


def read_ordinals(artifact: Artifact) -> dict[int, IndexedShard]:
    """Read the ordinal table of an index; raises DamagedArtifact where an ordinal or a tar comes twice."""
    where = f"{artifact.uri}/{ORDINALS_NAME}"
    table = read_table(artifact.store, artifact.manifest.part(ORDINALS_NAME), ORDINALS)
    shards = {row["ordinal"]: IndexedShard(**row) for row in table.to_pylist()}
    if len(shards) != len(table) or len({shard.shard_sha256 for shard in shards.values()}) != len(table):
        raise DamagedArtifact(f"{where} gives an ordinal twice, or a tar two of them")
    return shards


def part_receipt(artifact: Artifact, ordinal: int) -> PartReceipt:
    """Return the receipt of an index's part for a shard, checked."""
    reference = artifact.receipts.get(part_stem(ordinal))
    if reference is None:
        raise DamagedArtifact(f"{artifact.uri}: the manifest names no receipt of {part_stem(ordinal)}")
    return reference.parse(PartReceipt, artifact.uri, "build the index again")


def find_newest_made(store: Store) -> tuple[int, Artifact]:
    """Return the newest version that is no rollback, and its number.

    Its ordinal table holds every ordinal ever given, since each version is made from the newest one. A version whose
    table is gone is skipped: it could never be opened, so none of its ids was ever given out.
    """
    for number in reversed(list_versions(store)):
        artifact = open_version(store, number, "index")
        if made_as(artifact) == number and store.size(artifact.manifest.part(ORDINALS_NAME).path) is not None:
            return number, artifact
    raise DamagedArtifact(f"{store.uri}: no version was made as the number that it has")


def merge_nearest(first: Neighbours, second: Neighbours, k: int) -> Neighbours:
    """Return the k best of two results, by (distance, id)."""
    distances = np.concatenate([first[0], second[0]], axis=1)
    ids = np.concatenate([first[1], second[1]], axis=1)
    # By id after distance, so that the answer does not depend on the order in which parts are merged.
    return by_distance(distances, ids, k)


@contextmanager
def open_index(uri: str, version: int | None = None) -> Iterator[IndexReader]:
    """Open a published index: by default its highest version, or the index that the alias at `uri` names now.

    An open index stays the same when others are published. Raises InputError where nothing is published.
    """
    number, artifact = open_published(uri, version)
    with scratch_folder() as folder:
        yield IndexReader(artifact, folder, number)
