"""Opens the version of an index that the next one is made from, and compares its shards with codes of the same tars."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.versions import VersionsRead
from pipelines.encode.codes import CodesSet, CodesShard, open_codes_used, renumber_labels
from pipelines.errors import DamagedArtifact, InputError
from pipelines.index.keys import keys_of_codes
from pipelines.index.layout import NO_PART, ROW_MASK, IndexedShard, read_ordinals
from pipelines.index.reader import IndexReader, find_newest_made, open_index

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Base:
    """The current version, which the next one is made from."""

    number: int
    reader: IndexReader
    shards: Mapping[int, IndexedShard]
    """Every shard that was ever given an ordinal; one that this version does not know has no part and is not held."""
    built_from: dict[tuple[str, str], dict[str, tuple[CodesSet, CodesShard]]] = field(default_factory=dict)
    """Codes that were looked up, by their digest and place: the codes of each tar by its sha256.

    {} marks codes that no longer exist.
    """
    versions_read: VersionsRead = field(default_factory=VersionsRead)

    @property
    def artifact(self) -> Artifact:
        """The version's artifact."""
        return self.reader.artifact


@contextmanager
def open_base(index: str) -> Iterator[Base]:
    """Open the current version of an index, by its root or an alias, to make the next one from it."""
    with open_index(index) as reader:
        assert reader.version is not None, "a published index has a version"
        _, newest = find_newest_made(reader.artifact.store)
        given = read_ordinals(newest)
        for ordinal, shard in reader.shards.items():
            if given.get(ordinal, shard).shard_sha256 != shard.shard_sha256:
                raise DamagedArtifact(f"{reader.artifact.uri}: two versions give ordinal {ordinal} to different tars")
        unknown = {n: replace(shard, part=NO_PART, rows=0, compacted=0, held=False) for n, shard in given.items()}
        shards = unknown | reader.shards
        yield Base(reader.version, reader, shards)


def same_rows(
    base: Base, held: IndexedShard, entry: CodesSet, shard: CodesShard, class_ids: Sequence[int] | None
) -> bool:
    """Tell whether a held tar has the same codes in this artifact, apart from rows that compactions left out."""
    if held.codes_digest == entry.artifact.digest:
        return True
    if (before := _codes_of(base, held, entry)) is not None and before[1].parts == shard.parts:
        return True
    theirs = renumber_labels(entry.read(shard), class_ids, entry.artifact.uri)
    theirs = keys_of_codes(theirs, held.ordinal, entry.bits, entry.real_codes)
    mine = base.reader.read_shard_keys(held)
    in_both = np.isin(theirs["id"].to_numpy(), mine["id"].to_numpy())
    more = theirs["id"].to_numpy()[~in_both] & ROW_MASK
    left_out = _left_out(base, held, before)
    explained = len(more) == held.compacted if left_out is None else np.array_equal(more, left_out)
    return explained and bool(theirs.filter(pa.array(in_both)).cast(mine.schema).equals(mine))


def _codes_of(base: Base, held: IndexedShard, entry: CodesSet) -> tuple[CodesSet, CodesShard] | None:
    """Return the codes that a shard's rows come from, or None if they no longer exist."""
    name = held.codes_digest, entry.artifact.uri
    if name not in base.built_from:
        codes = open_codes_used(base.artifact, *name, base.versions_read)
        base.built_from[name] = {shard.sha256: (codes, shard) for shard in codes.shards} if codes else {}
    return base.built_from[name].get(held.shard_sha256)


def _left_out(base: Base, held: IndexedShard, before: tuple[CodesSet, CodesShard] | None) -> Rows | None:
    """Return the rows of a shard that compactions left out; None if the codes that could tell no longer exist."""
    if not held.compacted:
        return np.empty(0, np.int64)
    if before is None:
        return None
    codes, shard = before
    built = base.reader.read_shard_keys(held, ["id"])["id"].to_numpy() & ROW_MASK
    return np.setdiff1d(codes.read(shard)["row"].to_numpy(), built)


def require_left_out(base: Base, held: IndexedShard, entry: CodesSet) -> Rows:
    """Return the rows of a shard that compactions left out; raises InputError where nothing can tell any more."""
    left_out = _left_out(base, held, _codes_of(base, held, entry))
    if left_out is None:
        raise InputError(
            f"{base.artifact.uri}: cannot keep {held.compacted} earlier removals of {held.shard}: "
            f"its part was compacted, and the old codes {held.codes_digest[:12]} are gone: remove the shard, add it "
            "again, then repeat the removals"
        )
    return left_out
