"""The encoding of one shard as bytes: its codes and its rejects as Parquet."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.parquet import columns_of, parquet_bytes, table_of
from pipelines.artifacts.tables import REJECTS, column_of
from pipelines.config.settings import Config
from pipelines.errors import DamagedArtifact
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.shards import Record, Shard

_log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from pipelines.encode.encoder import Encoded  # imports torch, which only a worker needs


@dataclass(frozen=True)
class ShardCodes:
    """One encoded shard as bytes: its codes part and, if there are rejects, their table and counts by reason."""

    codes: bytes
    rows: int
    rejects: bytes | None
    rejected: int
    seconds: Mapping[str, float]
    reasons: Mapping[str, int]
    animated: int = 0
    """Rows whose picture has several frames; only the first frame is encoded."""


def shard_codes(encoded: "Encoded", shard: Shard, schema: pa.Schema, config: Config) -> ShardCodes:
    """Return the encoding of a shard as the bytes to put. Always samples = rows + rejected."""
    carried = list(dict.fromkeys(config.encode.carry))
    for record, reject in encoded.rejects:
        fields = {"shard": shard.name, "key": record.key, "reason": str(reject.reason)}
        _log.debug("rejected: %(key)s of %(shard)s (%(reason)s)", fields, extra={**fields, "detail": reject.detail})
    return ShardCodes(
        parquet_bytes(table_of(schema, _codes_columns(encoded, {name: schema.field(name).type for name in carried}))),
        len(encoded.kept),
        rejects_bytes(encoded.rejects) if encoded.rejects else None,
        len(encoded.rejects),
        encoded.seconds,
        Counter(str(reject.reason) for _, reject in encoded.rejects),
        encoded.animated,
    )


def _codes_columns(encoded: "Encoded", carried: Mapping[str, pa.DataType]) -> dict[str, Any]:
    records = [sample.record for sample in encoded.kept]
    metadata = [_metadata_fields(sample.metadata) for sample in encoded.kept] if carried else []
    return {
        **columns_of(records, "key", "shard", "row", "path", "labels"),
        "code": [row.tobytes() for row in np.ascontiguousarray(encoded.codes)],
        "real_codes": [row.tobytes() for row in encoded.real_codes],
        **{
            name: _carried_column(name, [fields.get(name) for fields in metadata], kind)
            for name, kind in carried.items()
        },
    }


def _carried_column(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Return a metadata column of its type; in a column of texts, other values become JSON."""
    try:
        return column_of([_metadata_text(value) for value in values] if pa.types.is_string(kind) else values, kind)
    except pa.ArrowException as error:
        raise DamagedArtifact(f"the metadata column {name!r} is not {kind}, as its shards say: {error}") from None


def _metadata_fields(metadata: bytes | None) -> dict[str, Any]:
    """Return the fields of a sample's JSON; {} where it is no object, which only an adopted tar can hold."""
    try:
        value = json.loads(metadata or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _metadata_text(value: Any) -> str | None:
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if text is None else text.encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8


def rejects_bytes(rejects: Sequence[tuple[Record, ImageReject]]) -> bytes:
    """Return the rejects table of one shard as Parquet."""
    columns = {
        **columns_of([record for record, _ in rejects], "key", "shard", "row"),
        "stage": ["encode"] * len(rejects),
        "reason": [str(reject.reason) for _, reject in rejects],
        "detail": [reject.detail for _, reject in rejects],
    }
    return parquet_bytes(table_of(REJECTS, columns))
