"""The Parquet tables of the contract: shard index, codes and rejects, in plain Arrow types that any reader knows."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.manifest import Part, read_part
from pipelines.artifacts.parquet import read_parquet, require_schema, schema_of
from pipelines.errors import DamagedArtifact
from pipelines.storage import Store

BIT_ORDER = "little"
REAL_CODES = "int8: 127 x output / largest |output| of the row, away from 0"
"""Formula by which the bytes of a column `real_codes` come from the network's outputs."""


class Reason(StrEnum):
    """Reasons why a sample becomes a reject. A closed list: readers may switch on it."""

    DAMAGED = "damaged"
    """The tar is short, or the sample's bytes do not match the shard index."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are in none of the supported formats."""
    TRUNCATED = "truncated"
    """The image ends before its last row."""
    TOO_LARGE = "too_large"
    """More bytes, pixels or frames, or a longer side ratio, than the decoder accepts."""
    UNDECODABLE = "undecodable"
    """The decoder refused the bytes for another reason."""
    WORKER_DIED = "worker_died"
    """Every worker that held the sample's shard died, while its node lives on."""
    OUT_OF_MEMORY = "out_of_memory"
    """The last worker that held the sample's shard was killed because its node ran out of memory."""
    STUCK = "stuck"
    """Every worker that held the sample's shard made no progress for `encode.stuck_s`, or died."""


MEMBER = pa.struct([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("sha256", pa.binary(32))])

LABELS = pa.list_(pa.int32())
_SAMPLE = {"key": pa.string(), "shard": pa.dictionary(pa.int32(), pa.string()), "row": pa.int32()}


SHARD_INDEX = schema_of(**_SAMPLE, path=pa.string(), labels=LABELS, members=pa.list_(MEMBER))
"""One row per sample, in tar order.

`path` is the sample's place in its source, `members[0]` the image; offsets count bytes from the start of the tar.
"""

REJECTS = schema_of(**_SAMPLE, stage=pa.string(), reason=pa.string(), detail=pa.string())


def codes_schema(
    bits: int,
    fingerprint: str,
    classes: Sequence[str],
    carried: Mapping[str, pa.DataType] | None = None,
    real_codes: bool = False,
) -> pa.Schema:
    """Return the schema of a codes part for `bits` bits, with the facts in its metadata that a lone file needs."""
    width = {"code": pa.binary((bits + 7) // 8)}
    own = schema_of(**_SAMPLE, path=pa.string(), **width, labels=LABELS, **real_codes_column(bits, real_codes))
    return pa.schema(
        [*own, *(pa.field(name, kind) for name, kind in (carried or {}).items())],
        metadata={
            "hhnet.fingerprint": fingerprint,
            "hhnet.bits": str(bits),
            "hhnet.bit_order": BIT_ORDER,
            "hhnet.classes": json.dumps(list(classes), ensure_ascii=False),
            **({"hhnet.real_codes": REAL_CODES} if real_codes else {}),
        },
    )


def parse_column_type(text: str) -> pa.DataType:
    """Return the Arrow type that has `text` as its `str`; raises ValueError for types that metadata cannot have."""
    if found := re.fullmatch(r"timestamp\[(s|ms|us|ns), tz=([^\]]+)\]", text):
        return pa.timestamp(found[1], found[2])
    if found := re.fullmatch(r"decimal(32|64|128|256)\((\d{1,2}), (-?\d{1,2})\)", text):
        return getattr(pa, f"decimal{found[1]}")(int(found[2]), int(found[3]))
    return pa.type_for_alias(text)


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Return JSON values as a column of a metadata type; values of another type raise Arrow's own errors."""
    if pa.types.is_time(kind):  # Arrow parses timestamps, but no times of day
        days = [None if value is None else f"1970-01-01 {value}" for value in values]
        return pa.array(days, pa.string()).cast(pa.timestamp(kind.unit)).cast(kind)
    if pa.types.is_duration(kind):
        return pa.array(values, pa.string()).cast(pa.int64()).cast(kind)
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        return pa.array(values, pa.string()).cast(kind)
    return pa.array(values, pa.float64()).cast(kind) if pa.types.is_floating(kind) else pa.array(values, kind)


def real_codes_column(bits: int, there: bool) -> dict[str, pa.DataType]:
    """Return the column of real codes, if it is there: one int8 for each bit, as the bytes of a fixed-size binary."""
    return {"real_codes": pa.binary(bits)} if there else {}


def read_table(store: Store, part: Part, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a part with the columns of `schema`, or some in their stored order; digest, schema and rows are checked."""
    where = f"{store.uri}/{part.path}"
    table = read_parquet(read_part(store, part), where, columns)
    require_schema(table, pa.schema([schema.field(name) for name in columns]) if columns else schema, where)
    if table.num_rows != part.rows:
        raise DamagedArtifact(f"{where} has {table.num_rows} rows, the manifest says {part.rows}")
    return table


def class_ids_in(columns: Iterable[pa.ChunkedArray]) -> set[int]:
    """Return the class ids that occur in columns of labels."""
    return {number for column in columns for number in pc.unique(pc.list_flatten(column)).to_pylist()}
