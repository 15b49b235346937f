"""Opens an index for search: a reader that searches it part by part, and looks up keys, places and names.

`layout` says what the parts and tables are.
"""

import difflib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import IndexMeta
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.tables import read_table
from pipelines.artifacts.versions import made_as, open_version
from pipelines.encode.codes import CodesSet, names_of_class_ids, real_codes_array
from pipelines.errors import DamagedArtifact
from pipelines.index.alias import open_published
from pipelines.index.keys import KEY_GROUP_ROWS, KeyTable
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
from pipelines.index.layout import (
    NAME_COLUMNS,
    ORDINALS_NAME,
    QUANTIZER_NAME,
    REMOVED,
    REMOVED_NAME,
    ROW_MASK,
    IndexedPart,
    IndexedShard,
    index_id,
    keys_name,
    keys_schema,
    part_stem,
    parts_of,
    read_ordinals,
)
from pipelines.storage import Store, scratch_folder

KEY_ROWS_KEPT = 1 << 22
"""Rows of key tables whose names stay in memory between queries; at least those of one part stay."""
KEY_TABLES_OPEN = 64
"""Number of key tables that stay open; each holds a file descriptor."""
DIGESTS_AT_ONCE = 8
PARTS_KEPT = 128
"""Number of mapped parts that stay open between searches.

Each holds some file descriptors, and a mask where rows are removed.
"""
NEAR_KEYS_SHOWN = 3
MAX_KEYS_COMPARED = 20_000
ITEM_COLUMNS = ("id", *NAME_COLUMNS, "code", "labels")


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
    largest. Of a key table only the row groups with the wanted rows are read; digests are checked at the first touch.
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
        self.parts = parts_of(self.shards.values())
        self.removed = self._read_removed()
        self._live = {number: sum(map(self.live, part.shards)) for number, part in self.parts.items()}
        self.shared = self._read_shared()
        self._files: dict[str, Path] = {}
        self._fetching = threading.Lock()
        self._opened: dict[int, PartSearcher] = {}
        largest = max((part.rows for part in self.parts.values()), default=0)
        self._key_table = functools.lru_cache(KEY_TABLES_OPEN)(self._open_key_table)
        self._key_group = functools.lru_cache(max(1, KEY_ROWS_KEPT // KEY_GROUP_ROWS // 2))(self._read_key_group)
        cached = functools.lru_cache(max(1, KEY_ROWS_KEPT // max(1, largest)))
        self._names = cached(lambda number: self.live_keys(self.parts[number], ["id", *NAME_COLUMNS]))

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
        return sum(self._live.values())

    def live(self, shard: IndexedShard) -> int:
        """Return the number of codes of a shard that can be found."""
        return shard.rows - len(self.removed.get(shard.ordinal, ()))

    @property
    def removed_samples(self) -> int:
        """Number of removed codes of held shards that are still in a part."""
        return sum(len(rows) for ordinal, rows in self.removed.items() if self.shards[ordinal].held)

    def live_in(self, part: IndexedPart) -> int:
        """Return the number of codes of a part that can be found."""
        return self._live[part.number]

    def removed_in(self, part: IndexedPart) -> Ids:
        """Return the ids of the removed rows of a part, ascending."""
        ordinals = [shard.ordinal for shard in part.shards if shard.ordinal in self.removed]
        return np.concatenate([NOTHING_REMOVED, *(index_id(n, self.removed[n]) for n in ordinals)])

    def held(self) -> list[IndexedShard]:
        """Return the shards that the index holds, by ordinal; all rows of some may be removed."""
        return [shard for _, shard in sorted(self.shards.items()) if shard.held]

    def searched(self) -> list[IndexedPart]:
        """Return the parts with codes that can be found, by number."""
        return [part for part in self.parts.values() if self.live_in(part)]

    def search(self, queries: Codes, k: int, among: Sequence[IndexedPart] | None = None) -> Neighbours:
        """Return the k nearest over all parts, or over the parts `among`.

        Distances int32 and ids int64 are (Q, min(k, count)), ordered by (distance, id).
        """
        from hhnet.search.kernels import run_blocks  # compiles on import; only a search needs it

        if k < 1:
            raise ValueError(f"k must be at least 1: got {k}")
        parts = self.searched() if among is None else [part for part in among if self.live_in(part)]
        self._fetch([self._part_name(part) for part in parts])
        nothing: Neighbours = np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)

        def nearest(share: slice) -> Neighbours:
            best = nothing
            for part in parts[share]:
                # A later part need not find codes farther than the k-th neighbour so far.
                radius = best[0][:, -1] if best[0].shape[1] == k else None
                best = merge_nearest(best, self._kept_part(part).search(queries, k, radius), k)
            return best

        if not self.kind.mapped:
            return nearest(slice(None))
        cost = len(queries) * sum(part.rows for part in parts)
        found = run_blocks(nearest, len(parts), cost, block=len(parts))
        return functools.reduce(lambda first, second: merge_nearest(first, second, k), found, nothing)

    def _part_name(self, part: IndexedPart) -> str:
        return part_stem(part.number) + self.kind.suffix

    def _fetch(self, names: Sequence[str]) -> None:
        """Check the digests of parts that were never opened, in threads: a digest costs more than a search.

        A lock lets one caller at a time in, since a part from an object store is copied to a file that others may have
        mapped.
        """
        with self._fetching:
            missing = [name for name in names if name not in self._files]
            parts = [self.part(name) for name in missing]
            if parts:
                with ThreadPoolExecutor(min(len(parts), DIGESTS_AT_ONCE)) as pool:
                    paths = pool.map(lambda part: self.artifact.fetch(part, self._folder), parts)
                    self._files.update(zip(missing, paths, strict=True))

    def _kept_part(self, part: IndexedPart) -> PartSearcher:
        """Return the part's searcher.

        The first `parts_kept` mapped parts stay open; an LRU would evict each part just before its next use, since
        every search passes over all parts.
        """
        if (searcher := self._opened.get(part.number)) is None:
            searcher = self.open_part(part)
            if self.kind.mapped and len(self._opened) < self._parts_kept:
                self._opened[part.number] = searcher
        return searcher

    def open_part(self, part: IndexedPart) -> PartSearcher:
        """Open a part; its digest is checked the first time."""
        name = self._part_name(part)
        self._fetch([name])
        path, removed = self._files[name], self.removed_in(part)
        searcher = self.kind.open(path, self.width, part.rows, self.shared, self.parameters, removed)
        if searcher.count != self.live_in(part):
            raise DamagedArtifact(f"{self.artifact.uri}: {REMOVED_NAME} names rows that are not in {path.name}")
        return searcher

    # ---------------------------------------------------------------------------------------------------- key tables

    def _open_key_table(self, number: int) -> KeyTable:
        name = keys_name(number)
        self._fetch([name])
        where = f"{self.artifact.uri}/{self.part(name).path}"
        return KeyTable(self._files[name], self.bits, self.real_codes, self.parts[number].rows, where)

    def _read_key_group(self, number: int, group: int, columns: tuple[str, ...]) -> pa.Table:
        return self._key_table(number).read_group(group, columns)

    def read_keys(self, part: IndexedPart, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a part's key table as stored, or some of its columns; removed rows are included."""
        return self._key_table(part.number).read(columns)

    def live_keys(self, part: IndexedPart, columns: Sequence[str]) -> pa.Table:
        """Return columns of a part's key table without the removed rows; `id` must be among them."""
        table, removed = self.read_keys(part, columns), self.removed_in(part)
        return self._without(table, removed, self.live_in(part), keys_name(part.number)) if len(removed) else table

    def read_shard_keys(self, shard: IndexedShard, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a shard's rows of its part's key table, or some columns; removed rows are included."""
        if not shard.rows:
            names = columns or keys_schema(self.bits, self.real_codes).names
            schema = keys_schema(self.bits, self.real_codes)
            return pa.schema([schema.field(name) for name in names]).empty_table()
        table = self._key_table(shard.part).read_shard(shard.ordinal, columns)
        if len(table) != shard.rows:
            where = f"{self.artifact.uri}/{keys_name(shard.part)}"
            raise DamagedArtifact(f"{where} has {len(table)} rows of {shard.shard}, expected {shard.rows}")
        return table

    def live_shard_keys(self, shard: IndexedShard, columns: Sequence[str]) -> pa.Table:
        """Return columns of a shard's rows without the removed ones; `id` must be among them."""
        table, rows = self.read_shard_keys(shard, columns), self.removed.get(shard.ordinal)
        if rows is None:
            return table
        return self._without(table, index_id(shard.ordinal, rows), self.live(shard), keys_name(shard.part))

    def _without(self, table: pa.Table, removed: Ids, left: int, name: str) -> pa.Table:
        kept = table.filter(pa.array(~np.isin(table["id"].to_numpy(), removed)))
        if len(kept) != left:
            raise DamagedArtifact(f"{self.artifact.uri}: {REMOVED_NAME} names rows that {name} lacks")
        return kept

    def _rows_of(self, ids: Ids, columns: tuple[str, ...]) -> Iterator[pa.Table]:
        """Yield the rows of ascending ids, in their order, from the row groups that hold them."""
        ordinals, places = np.unique(ids >> 32, return_inverse=True)
        for ordinal in ordinals.tolist():
            if ordinal not in self.shards or not self.shards[ordinal].rows:
                raise DamagedArtifact(f"{self.artifact.uri}: the ordinal table does not know shard ordinal {ordinal}")
        parts = np.array([self.shards[ordinal].part for ordinal in ordinals.tolist()], np.int64)
        self._fetch([keys_name(number) for number in np.unique(parts).tolist()])
        # A tar that came again may lie in a later part than its neighbours, so a part may have several runs of ids.
        starts = np.flatnonzero(np.diff(parts[places])) + 1
        for run in np.split(ids, starts) if len(ids) else ():
            number = self.shards[int(run[0]) >> 32].part
            for group, wanted in self._key_table(number).locate(run):
                table = self._key_group(number, group, columns)
                known = table["id"].to_numpy()
                rows = np.searchsorted(known, wanted)
                if rows.max() >= len(known) or (known[rows] != wanted).any():
                    name = keys_name(number)
                    raise DamagedArtifact(f"{self.artifact.uri}: {name} lacks rows that the part returned")
                yield table.take(rows)

    def items(self, ids: Sequence[int]) -> dict[int, Item]:
        """Return key, place and labels of these ids; NO_ID is left out."""
        numbers = np.array(sorted({int(number) for number in ids} - {NO_ID}), np.int64)
        return {item.id: item for item, _ in self._items(numbers)}

    def _items(self, ids: Ids) -> Iterator[tuple[Item, bytes]]:
        """Yield the items of ascending ids, each with its code."""
        for table in self._rows_of(ids, ITEM_COLUMNS):
            for entry in table.to_pylist():
                shard, row = self.shards[entry["id"] >> 32], entry["id"] & ROW_MASK
                names = tuple(names_of_class_ids(entry["labels"], self.classes, self.artifact.uri))
                place = shard.shard, shard.shard_sha256, row
                yield Item(entry["id"], entry["key"], entry["path"], *place, names), entry["code"]

    def real_codes_of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Return the real codes of ascending ids, int8 (N, bits); the index must have real codes."""
        found = [real_codes_array(table["real_codes"]) for table in self._rows_of(ids, ("id", "real_codes"))]
        return np.concatenate([np.empty((0, self.bits), np.int8), *found])

    # --------------------------------------------------------------------------------------------------------- names

    def find(self, keys: Sequence[str]) -> tuple[list[tuple[Item, bytes]], list[str]]:
        """Return the samples with these keys or paths and their codes, in the order given, and the names not found."""
        found: dict[str, list[tuple[Item, bytes]]] = {key: [] for key in keys}
        wanted = pa.array(filter(_is_encodable, found), pa.string())
        ids = [NOTHING_REMOVED]
        self._fetch([keys_name(part.number) for part in self.searched()])
        for part in self.searched():
            table = self._names(part.number)
            ids.append(table.filter(_mark_named(table, wanted))["id"].to_numpy())
        for item, code in self._items(np.sort(np.concatenate(ids))):
            for name in {item.key, item.path} & found.keys():
                found[name].append((item, code))
        return [entry for key in keys for entry in found[key]], [key for key in found if not found[key]]

    def find_ids(self, keys: Sequence[str]) -> tuple[Ids, list[str]]:
        """Return the ids of samples with these keys or paths, even millions, ascending, and the names not found."""
        distinct = dict.fromkeys(keys)
        wanted = pa.array(filter(_is_encodable, distinct), pa.string())
        known, found = np.zeros(len(wanted), np.bool_), [NOTHING_REMOVED]
        for parts in _by_rows(self.searched(), KEY_ROWS_KEPT) if len(wanted) else ():
            # Many tables in one call, since each call hashes all wanted names again.
            names = pa.concat_tables(self.live_keys(part, ["id", *NAME_COLUMNS]) for part in parts)
            ids = names["id"].to_numpy()
            for name in NAME_COLUMNS:
                places = pc.index_in(names[name], value_set=wanted)
                known[places.drop_null().to_numpy()] = True
                found.append(ids[places.is_valid().to_numpy()])
        lacking = [key for key in distinct if not _is_encodable(key)] + wanted.filter(pa.array(~known)).to_pylist()
        return np.unique(np.concatenate(found)), lacking

    def all_keys(self) -> Iterator[str]:
        """Yield every key, part by part."""
        for part in self.searched():
            yield from self._names(part.number)["key"].to_pylist()

    def removed_keys(self, keys: Sequence[str]) -> set[str]:
        """Return which of these keys or paths were removed from held shards since their parts were built.

        Call it only with names that `find` or `find_ids` did not find.
        """
        wanted, gone = pa.array(filter(_is_encodable, keys), pa.string()), set()
        for part in self.parts.values() if keys else ():
            shards = [shard for shard in part.shards if shard.held and shard.ordinal in self.removed]
            if not shards:
                continue
            removed = np.concatenate([index_id(shard.ordinal, self.removed[shard.ordinal]) for shard in shards])
            table = self.read_keys(part, ["id", *NAME_COLUMNS])
            table = table.filter(pa.array(np.isin(table["id"].to_numpy(), removed)))
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
        found: dict[int, npt.NDArray[np.int64]] = {}
        if part is not None:
            table = read_table(self.artifact.store, part, REMOVED)
            ordinals, rows = (table[name].to_numpy().astype(np.int64) for name in ("ordinal", "row"))
            ids = index_id(ordinals, rows)
            if (np.diff(ids) <= 0).any() or (rows < 0).any():
                raise DamagedArtifact(f"{where} is not sorted")
            found = dict(_by_ordinal(ids))
        for ordinal, chunk in found.items():
            if ordinal not in self.shards or len(chunk) > self.shards[ordinal].rows:
                raise DamagedArtifact(f"{where} names more rows of shard ordinal {ordinal} than the index holds")
        for shard in self.shards.values():
            if not shard.held and shard.rows != len(found.get(shard.ordinal, ())):
                raise DamagedArtifact(f"{where} lacks rows of shard ordinal {shard.ordinal}, which is not held")
        return found


def _by_ordinal(ids: npt.NDArray[np.int64]) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    """Split ascending ids into ordinals and their rows."""
    ordinals = ids >> 32
    starts = np.flatnonzero(np.diff(ordinals, prepend=-1))
    for chunk in np.split(ids, starts[1:]) if len(ids) else ():
        yield int(chunk[0] >> 32), chunk & ROW_MASK


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


def _by_rows(parts: Sequence[IndexedPart], most: int) -> Iterator[list[IndexedPart]]:
    """Group the parts in their order, at most `most` rows together but at least one part."""
    group: list[IndexedPart] = []
    for part in parts:
        if group and sum(one.rows for one in group) + part.rows > most:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


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
