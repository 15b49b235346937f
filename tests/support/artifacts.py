"""One small artifact of each kind, made by hand, and ways to damage it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part
from pipelines.artifacts.parquet import parquet_bytes, table_of
from pipelines.artifacts.tables import REJECTS, codes_schema
from pipelines.encode.codes import code_array, open_codes
from pipelines.index.keys import keys_bytes, keys_of_codes
from pipelines.index.kinds import index_kind
from pipelines.index.layout import ORDINALS, ORDINALS_NAME, keys_name, part_stem
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json

MARK = "f" * 64
BITS = 12
CLASSES = ["class_00", "class_01", "class_02"]
METRICS = {"map": 0.5, "epoch": 1, "steps": 1, "skipped": 0}
MODEL_CARD = {
    **{"format": 1, "backbone": "resnet18", "bits": BITS, "head": "linear", "stem_stride": 4, "preprocess": {}},
    **{"classes": CLASSES, "precision": "fp32", "loss": "csq", "metrics": METRICS, "history": [], "settings": {}},
}

Columns = dict[str, list[Any]]


def make_model(root: Path, shards: Artifact, card: Any = MODEL_CARD, weights: bytes | None = None) -> Artifact:
    inputs = (ArtifactInput(role="shards", kind="shards", digest=shards.digest),)
    writer = ArtifactWriter(Store(root), "model", MARK, inputs, {"shards": shards.uri})
    data = safetensors.numpy.save({"w": np.ones(3, np.float32)}) if weights is None else weights
    parts = [
        writer.put_part("model.safetensors", data, 1),
        writer.put_part("model.json", canonical_json(card), 1),
    ]
    return writer.commit(parts, {"parameters": 3}, {"bits": BITS, "classes": CLASSES, "metrics": METRICS})


def make_codes(
    root: Path,
    shards: Artifact,
    model: Artifact,
    change: Callable[[str, Columns, Columns], None] | None = None,
    totals: dict[str, int] | None = None,
    mark: str = MARK,
    leave_out: str = "",
) -> Artifact:
    """Codes in which row 3 of each shard is a reject; `change` alters the columns of codes and rejects by shard."""
    inputs = tuple(ArtifactInput(role=a.manifest.kind, kind=a.manifest.kind, digest=a.digest) for a in (shards, model))
    origin = {"shards": shards.uri, "model": model.uri}
    writer = ArtifactWriter(Store(root), "codes", MARK, inputs, origin)
    parts, receipts = [], {}
    for shard in open_shards(shards).shards:
        if shard.stem == leave_out:
            continue
        records = shard.records()
        codes = [record for record in records if record.row != 3]
        columns: Columns = {
            "key": [record.key for record in codes],
            "shard": [shard.name] * len(codes),
            "row": [record.row for record in codes],
            "path": [record.path for record in codes],
            "code": [bytes([record.row, 1]) for record in codes],
            "labels": [list(record.labels) for record in codes],
        }
        rejects: Columns = {
            "key": [records[3].key],
            "shard": [shard.name],
            "row": [3],
            "stage": ["decode"],
            "reason": ["truncated"],
            "detail": ["x"],
        }
        if change:
            change(shard.stem, columns, rejects)
        table = table_of(codes_schema(BITS, mark, CLASSES), columns)
        part = writer.put_part(f"{shard.stem}.parquet", parquet_bytes(table), table.num_rows)
        lost = table_of(REJECTS, rejects)
        reject = writer.put_part(f"{shard.stem}.parquet", parquet_bytes(lost), lost.num_rows, folder="rejects")
        parts += [part, reject]
        sha256 = shard.part.sha256
        receipt = Receipt(shard=shard.name, shard_sha256=sha256, samples=shard.rows, part=part, rejects=reject)
        receipts[shard.stem] = writer.put_receipt(shard.stem, receipt)
    counts = {"samples": 24, "codes": 21, "rejects": 3}
    meta = {"bits": BITS, "classes": CLASSES, "carried": {}, "settings": {"encode.carry": []}}
    return writer.commit(parts, totals or counts, meta, receipts)


def make_index(root: Path, codes: Artifact) -> Artifact:
    opened = open_codes(codes)
    inputs = (ArtifactInput(role="codes-0", kind="codes", digest=codes.digest),)
    writer = ArtifactWriter(Store(root), "index", MARK, inputs, {"codes-0": codes.uri})
    kind = index_kind("flat")
    parts: list[Part] = []
    ordinals: Columns = {name: [] for name in ORDINALS.names}
    for ordinal, shard in enumerate(opened.shards):
        table = opened.read(shard)
        keys = keys_of_codes(table, ordinal, BITS, False)
        data = kind.build(code_array(keys["code"]), keys["id"].to_numpy(), None, {})
        parts.append(writer.put_part(part_stem(ordinal) + kind.suffix, data, len(keys)))
        parts.append(writer.put_part(keys_name(ordinal), keys_bytes(keys), len(keys)))
        row = (ordinal, shard.name, shard.sha256, codes.digest, ordinal, len(keys), 0, True)
        for name, value in zip(ORDINALS.names, row, strict=True):
            ordinals[name].append(value)
    parts.append(writer.put_part(ORDINALS_NAME, parquet_bytes(table_of(ORDINALS, ordinals)), 3))
    card = {"count": opened.rows, "bytes_per_code": 1.0}
    meta = {"kind": "flat", "parameters": {}, "part_codes": 1, "quantizer_sha256": None, "card": card}
    meta |= {"bits": BITS, "classes": CLASSES}
    return writer.commit(parts, {"codes": opened.rows, "shards": 3, "held": 3}, meta)
