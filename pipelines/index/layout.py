"""Layout of the index artifact: the names of its parts, its tables, and what they say of its shards.

A part, `part-<number>.<suffix>` in the kind's own format, holds the codes of many shards. Its `keys-<number>.parquet`
makes the index self-contained: ids, keys, source paths, codes, labels, and real codes where the codes have them.
`ordinals.parquet` maps ordinals to tars, and tars to parts; `quantizer.faiss` is shared by all parts of a kind that has
one.

In a later version `removed.parquet` names the rows of parts that must not be found any more, until they are compacted.
These may be all rows of a shard, which stays held, so that the same tar is not taken for a new one. A shard that was
removed as a whole is not held, and keeps its ordinal: an ordinal is given once, to one tar.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from pipelines.artifacts.manifest import Artifact
from pipelines.artifacts.parquet import rows_of, schema_of, schema_of_rows
from pipelines.artifacts.tables import LABELS, read_table, real_codes_column
from pipelines.errors import DamagedArtifact

ORDINALS_NAME = "ordinals.parquet"
QUANTIZER_NAME = "quantizer.faiss"
REMOVED_NAME = "removed.parquet"
NAME_COLUMNS = ("key", "path")
"""Columns by which a user may name a sample."""
ROW_MASK = (1 << 32) - 1
"""The bits of a sample's id that hold its row; the ordinal of its tar stands above them."""
NO_PART = -1
"""Part of a shard whose codes are in none."""

REMOVED = schema_of(ordinal=pa.int32(), row=pa.int32())
"""Rows of parts that must not be found any more, by (ordinal, row)."""


def keys_schema(bits: int, real_codes: bool = False) -> pa.Schema:
    """Return the schema of a key table: one row per code, by id, which holds ordinal and row."""
    names = {"id": pa.int64(), "key": pa.string(), "path": pa.string()}
    return schema_of(**names, code=pa.binary((bits + 7) // 8), labels=LABELS, **real_codes_column(bits, real_codes))


def part_stem(number: int) -> str:
    """Return the name of a part, without its suffix."""
    return f"part-{number:06d}"


def keys_name(number: int) -> str:
    """Return the name of a part's key table."""
    return f"keys-{number:06d}.parquet"


def index_id(ordinal: Any, row: Any) -> Any:
    """Return the 64-bit id of a sample, or int64 ids of several."""
    return ordinal << 32 | row


@dataclass(frozen=True)
class IndexedShard:
    """A row of the ordinal table."""

    ordinal: int
    shard: str
    shard_sha256: str
    codes_digest: str
    part: int
    """Number of the part that holds its codes; NO_PART where there are none."""
    rows: int
    """Number of codes that the part holds, removed ones included."""
    compacted: int = 0
    """Number of removed codes that the part was rebuilt without."""
    held: bool = True
    """False for a tar without codes, and for one that was removed as a whole."""


ORDINALS = schema_of_rows(IndexedShard)


@dataclass(frozen=True)
class IndexedPart:
    """A part of an index, and the shards whose codes it holds, by ordinal."""

    number: int
    shards: tuple[IndexedShard, ...]

    @cached_property
    def rows(self) -> int:
        """Number of codes that the part holds, removed ones included."""
        return sum(shard.rows for shard in self.shards)


def parts_of(shards: Iterable[IndexedShard]) -> dict[int, IndexedPart]:
    """Return the parts that hold these shards, by number, ascending."""
    found: dict[int, list[IndexedShard]] = {}
    for shard in sorted(shards, key=lambda shard: (shard.part, shard.ordinal)):
        if shard.rows:
            found.setdefault(shard.part, []).append(shard)
    return {number: IndexedPart(number, tuple(inside)) for number, inside in found.items()}


def read_ordinals(artifact: Artifact) -> dict[int, IndexedShard]:
    """Read the ordinal table of an index; raises DamagedArtifact where an ordinal or a tar comes twice."""
    where = f"{artifact.uri}/{ORDINALS_NAME}"
    table = read_table(artifact.store, artifact.manifest.part(ORDINALS_NAME), ORDINALS)
    shards = {shard.ordinal: shard for shard in rows_of(table, IndexedShard, where)}
    if len(shards) != len(table) or len({shard.shard_sha256 for shard in shards.values()}) != len(table):
        raise DamagedArtifact(f"{where} gives an ordinal twice, or a tar two of them")
    return shards
