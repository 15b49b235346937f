"""Key tables of an index, one for each part; a reader takes only the row groups and columns that it needs."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.artifacts.parquet import ParquetRows, parquet_groups
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import Ids
from pipelines.index.layout import ROW_MASK, index_id, keys_schema

KEY_GROUP_ROWS = 1 << 12
"""Rows of a row group, which is read for one hit; part of the format: other row groups are other bytes."""


def keys_of_codes(table: pa.Table, ordinal: int, bits: int, real_codes: bool) -> pa.Table:
    """Return the rows of a shard's codes as rows of a key table."""
    schema = keys_schema(bits, real_codes)
    ids = pa.array(index_id(ordinal, table["row"].to_numpy().astype(np.int64)))
    columns = [ids if name == "id" else table[name] for name in schema.names]
    return pa.table(columns, names=schema.names).cast(schema)


def keys_bytes(keys: pa.Table) -> bytes:
    """Return a key table as Parquet; equal rows give equal bytes, however the table is chunked."""
    return parquet_groups(keys.schema, [keys.combine_chunks()], KEY_GROUP_ROWS)


class KeyTable:
    """A key table in a file whose digest was checked."""

    def __init__(self, path: Path, bits: int, real_codes: bool, rows: int, where: str) -> None:
        self._schema = keys_schema(bits, real_codes)
        self._rows = ParquetRows(path, self._schema, where)
        if self._rows.rows != rows:
            raise DamagedArtifact(f"{where} has {self._rows.rows} rows, expected {rows}")
        # Shards are read one after another, and several share a row group.
        self._latest = lru_cache(1)(self.read_group)
        self._least = np.array(self._rows.least("id"), np.int64)
        if (np.diff(self._least) <= 0).any():
            raise DamagedArtifact(f"{where} is not sorted by id")

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return all rows, or some columns of them."""
        return self._read(range(len(self._least)), columns)

    def read_group(self, group: int, columns: tuple[str, ...]) -> pa.Table:
        """Return some columns of the rows of one row group."""
        return self._read([group], columns)

    def read_shard(self, ordinal: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of one shard, or some columns of them."""
        low, high = index_id(ordinal, 0), index_id(ordinal, ROW_MASK)
        first = max(0, int(np.searchsorted(self._least, low, "right")) - 1)
        groups = range(first, max(first + 1, int(np.searchsorted(self._least, high, "right"))))
        names = tuple(dict.fromkeys(["id", *(self._schema.names if columns is None else columns)]))
        table = pa.concat_tables(self._latest(group, names) for group in groups)
        start, stop = np.searchsorted(table["id"].to_numpy(), [low, high])
        found = table.slice(start, stop - start)
        return found.select(self._schema.names if columns is None else list(columns))

    def locate(self, ids: Ids) -> Iterator[tuple[int, Ids]]:
        """Split ascending ids by the row groups that can hold them."""
        groups = np.searchsorted(self._least, ids, "right") - 1
        starts = np.flatnonzero(np.diff(groups, prepend=-2))
        for chunk in np.split(np.arange(len(ids)), starts[1:]) if len(ids) else ():
            yield max(0, int(groups[chunk[0]])), ids[chunk]

    def _read(self, groups: Sequence[int], columns: Sequence[str] | None) -> pa.Table:
        return self._rows.read_groups(groups, columns).select(self._schema.names if columns is None else list(columns))
