"""The tars whose codes take part in a search for duplicates: those of codes artifacts and those of an index."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipelines.dedupe.tables import PlacedShard
from pipelines.encode.codes import CodesSet, CodesShard, require_pair
from pipelines.errors import DamagedArtifact
from pipelines.index.layout import IndexedShard, index_id
from pipelines.index.reader import IndexReader

COLUMNS_READ = ("id", "key", "code")


@dataclass(frozen=True)
class SourceTar:
    """One tar that takes part: its place, and a function that reads its rows."""

    place: PlacedShard
    uri: str
    _read: Callable[[], pa.Table]

    def read(self) -> pa.Table:
        """Read the columns `COLUMNS_READ`, digest-checked; raise DamagedArtifact unless their ids ascend."""
        table = self._read().select(COLUMNS_READ)
        ids = table["id"].to_numpy()
        if len(table) != self.place.rows or (np.diff(ids) <= 0).any() or (ids >> 32 != self.place.ordinal).any():
            raise DamagedArtifact(f"{self.uri}: the rows of {self.place.shard} are not ascending, or not all there")
        return table


def list_source_tars(sets: Sequence[CodesSet], index: IndexReader | None = None) -> list[SourceTar]:
    """List the tars of an index, under its ordinals, then those tars of the codes that the index does not hold.

    The latter keep their order. Raises FingerprintMismatch, naming both, if their models or bits differ.
    """
    known = []
    if index is not None:
        # An index names its model in the same way as codes do.
        as_codes = CodesSet(index.artifact, index.bits, index.classes, index.real_codes)
        for entry in sets:
            require_pair(as_codes, entry)
        known = [_indexed(index, shard) for shard in index.held()]
    for entry in sets[1:]:
        require_pair(sets[0], entry)
    held = {source.place.shard_sha256 for source in known}
    new = [(entry, shard) for entry in sets for shard in entry.shards if shard.sha256 not in held]
    begin = 1 + max(index.shards, default=-1) if index is not None else 0
    return [*known, *(_encoded(begin + n, entry, shard) for n, (entry, shard) in enumerate(new))]


def _indexed(index: IndexReader, shard: IndexedShard) -> SourceTar:
    uri, digest = index.artifact.uri, index.artifact.digest
    place = PlacedShard(shard.ordinal, shard.shard, shard.shard_sha256, digest, True, index.live(shard))
    return SourceTar(place, uri, lambda: index.live_shard_keys(shard, COLUMNS_READ))


def _encoded(ordinal: int, entry: CodesSet, shard: CodesShard) -> SourceTar:
    place = PlacedShard(ordinal, shard.name, shard.sha256, entry.artifact.digest, False, shard.rows)
    return SourceTar(place, entry.artifact.uri, lambda: _with_ids(entry.read(shard), ordinal))


def _with_ids(codes: pa.Table, ordinal: int) -> pa.Table:
    ids = pa.array(index_id(ordinal, codes["row"].to_numpy().astype(np.int64)))
    return codes.append_column("id", ids)
