"""Tables as Parquet: written in one byte form, and read from bytes or files whose digest was checked before."""

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import DamagedArtifact
from pipelines.storage import sha256_of

T = TypeVar("T")

_ARROW = {bool: pa.bool_(), int: pa.int32(), str: pa.string()}


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """Return a schema of columns without empty cells."""
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def schema_of_rows(row: type) -> pa.Schema:
    """Return the schema of a table whose rows are of the dataclass `row`: its fields are bool, int32 or string."""
    return schema_of(**{name: _ARROW[kind] for name, kind in get_type_hints(row).items()})


def as_written(schema: pa.Schema) -> pa.Schema:
    """Return the schema that a table had before it was written: Parquet renames the items of lists."""
    types = [pa.list_(field.type.value_type) if pa.types.is_list(field.type) else field.type for field in schema]
    fields = [field.with_type(kind) for field, kind in zip(schema, types, strict=True)]
    return pa.schema(fields, metadata=schema.metadata)


def table_of(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """Return a table of exactly `schema` from plain columns; a mismatch is a programmer's error."""
    arrays = [pa.array(columns[field.name], type=field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def table_of_rows(schema: pa.Schema, rows: Sequence[object]) -> pa.Table:
    """Return a table of exactly `schema` from objects that have its columns as attributes."""
    return table_of(schema, columns_of(rows, *schema.names))


def columns_of(rows: Sequence[object], *names: str) -> dict[str, list[Any]]:
    """Return columns from the attributes of these names."""
    return {name: [getattr(row, name) for row in rows] for name in names}


def rows_of(table: pa.Table, row: type[T], where: str) -> list[T]:
    """Return the rows of a table as objects of the dataclass `row`; further columns are left out.

    Raises DamagedArtifact for an empty cell.
    """
    names = schema_of_rows(row).names
    table = table.select(names)
    if any(column.null_count for column in table.columns):
        raise DamagedArtifact(f"{where} has empty cells")
    return [row(**cells) for cells in table.to_pylist()]


def parquet_bytes(table: pa.Table) -> bytes:
    """Return the table as Parquet, with fixed options, so that equal tables give equal bytes."""
    return parquet_groups(table.schema, [table], 1 << 17)  # part of the format: other row groups are other bytes


def parquet_groups(schema: pa.Schema, tables: Iterable[pa.Table], rows: int) -> bytes:
    """Write tables, taken one by one, as one Parquet; a row group has at most `rows` rows, all from one table."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", version="2.6", data_page_version="1.0") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=rows)
    return sink.getvalue()


def read_parquet(data: bytes, where: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Parse Parquet bytes whose digest was checked; raises DamagedArtifact where they are not a valid table."""
    try:
        # Without Arrow's threads: one that releases the bytes while the interpreter ends aborts the process.
        with pq.ParquetFile(pa.BufferReader(data), pre_buffer=False) as source:
            table = source.read(list(columns) if columns else None, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(where, error) from None
    return table


def table_digest(table: pa.Table) -> str:
    """Return the hex sha256 of a table's schema and cells, as one Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table.combine_chunks())
    return sha256_of(sink.getvalue().to_pybytes())


class ParquetRows:
    """A Parquet file, or its bytes, read by ranges of rows, through the row groups that hold them.

    The file stays open, so its name may be deleted; several threads may read. Its digest was checked before. Raises
    DamagedArtifact, at once or when rows are read, where it is not a valid table that begins with the fields of
    `schema`.
    """

    def __init__(self, source: Path | bytes, schema: pa.Schema, where: str) -> None:
        self.where = where
        try:
            self._source = pa.BufferReader(source) if isinstance(source, bytes) else pa.OSFile(str(source))
            opened = pq.ParquetFile(self._source)
            self.schema = opened.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(where, error) from None
        require_schema(self, schema, where)
        self._metadata = opened.metadata
        sizes = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        if min(sizes, default=0) < 0 or sum(sizes) != self.rows:
            raise DamagedArtifact(f"{where} has {self.rows} rows, its row groups {sizes}")

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return int(self._metadata.num_rows)

    def read(self, start: int, stop: int) -> pa.Table:
        """Return the rows [start, stop), which must be in the file."""
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, stop)
        groups = range(first, last + 1) if start < stop else range(0)
        before = self._ends[first - 1] if first else 0
        rows = self.read_groups(groups).slice(start - before, stop - start)
        if len(rows) != stop - start:
            raise DamagedArtifact(f"{self.where} holds fewer rows than it says")
        return rows

    def read_groups(self, groups: Sequence[int], columns: Sequence[str] | None = None) -> pa.Table:
        """Return the rows of some row groups, or some of their columns in their stored order."""
        try:
            file = pq.ParquetFile(self._source, metadata=self._metadata)
            named = list(columns) if columns else None
            table = file.read_row_groups(list(groups), named, use_threads=False)
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _unreadable(self.where, error) from None
        return table

    def least(self, column: str) -> list[int]:
        """Return the smallest value of an integer column in each row group, by the file's statistics."""
        leaves = [self._metadata.schema.column(place).path for place in range(self._metadata.num_columns)]
        found = []
        for number in range(len(self._ends)):
            statistics = self._metadata.row_group(number).column(leaves.index(column)).statistics
            if statistics is None or not statistics.has_min_max or not isinstance(statistics.min, int):
                raise DamagedArtifact(f"{self.where} has no statistics of {column}")
            found.append(statistics.min)
        return found


def _unreadable(where: str, error: Exception) -> DamagedArtifact:
    return DamagedArtifact(f"{where} is not readable as Parquet: {error}")


def require_schema(table: pa.Table | ParquetRows, schema: pa.Schema, where: str) -> None:
    """Raise DamagedArtifact unless `table` begins with the fields of `schema`, in order and type."""
    for position, field in enumerate(schema):
        found = table.schema.field(position) if position < len(table.schema) else None
        if found is None or found.name != field.name or found.type != field.type:
            raise DamagedArtifact(f"{where}: column {position} is {found}, expected {field.name}: {field.type}")
