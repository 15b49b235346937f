"""Codes artifacts with known codes, and real shards of small pictures to go with them.

random_codes(count, bits, seed)       packed codes, uint8 (N, bytes)
class_codes(labels, bits, flip, seed)  codes near a centre per class, as a trained network would give
with_real_codes(rows, bits, seed)          rows that have real codes beside their codes
write_codes(out, shards, ...)         commits an artifact from {tar name: Rows}
write_many_codes(out, shards)          the manifest and receipts of thousands of shards
write_shards(root, ...)               shards of drawn pictures, made by ingest
codes_of_shards(out, shards_uri, ...)  codes for every sample of such shards
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet import pack_bits, unpack_bits
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part, fingerprint
from pipelines.artifacts.parquet import parquet_bytes, table_of
from pipelines.artifacts.tables import REAL_CODES, codes_schema
from pipelines.config.settings import Config, IngestSettings
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json, sha256_of

from .pictures import write_folder

MODEL = "a" * 64


@dataclass
class Rows:
    """The codes of one tar. `sha256` and `row` default to what a name and a count give; an artifact of which a tar has
    real codes, int8 (N, bits), has them in all."""

    keys: Sequence[str]
    codes: npt.NDArray[np.uint8]
    labels: Sequence[Sequence[int]]
    sha256: str = ""
    row: Sequence[int] = field(default_factory=list)
    real_codes: npt.NDArray[np.int8] | None = None


def random_codes(count: int, bits: int = 64, seed: int = 0) -> npt.NDArray[np.uint8]:
    return pack_bits(np.random.default_rng(seed).random((count, bits)) < 0.5)


def class_codes(labels: Sequence[int], bits: int = 64, flip: float = 0.15, seed: int = 0) -> npt.NDArray[np.uint8]:
    centres = unpack_bits(random_codes(max(labels) + 1, bits, seed=1234), bits)
    noise = np.random.default_rng(seed).random((len(labels), bits)) < flip
    return pack_bits(centres[np.asarray(labels)] ^ noise)


def simple_rows(name: str, count: int, bits: int = 64, classes: int = 3, seed: int = 0, flip: float = 0.15) -> Rows:
    labels = [number % classes for number in range(count)]
    keys = [f"{name}/{number:05d}" for number in range(count)]
    return Rows(keys, class_codes(labels, bits, flip, seed), [[label] for label in labels])


def with_real_codes(rows: Rows, bits: int = 64, seed: int = 0) -> Rows:
    """The same rows with random real codes on the sides of zero that their bits say."""
    sizes = np.random.default_rng(seed).integers(1, 128, (len(rows.keys), bits))
    return replace(rows, real_codes=np.where(unpack_bits(rows.codes, bits), sizes, -sizes).astype(np.int8))


def write_codes(
    out: str | Path,
    shards: Mapping[str, Rows],
    bits: int = 64,
    classes: Sequence[str] = ("cat", "dog", "owl"),
    model: str = MODEL,
    shards_digest: str = "b" * 64,
    origin: Mapping[str, str] | None = None,
) -> Artifact:
    """Commit a codes artifact in the form that `encode` gives it."""
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest=shards_digest),
        ArtifactInput(role="model", kind="model", digest=model),
    )
    contents = {name: hashlib.sha256(rows.codes.tobytes()).hexdigest() for name, rows in shards.items()}
    real_codes = any(rows.real_codes is not None for rows in shards.values())
    settings = {"bits": bits, "contents": contents, **({"real_codes": True} if real_codes else {})}
    mark = fingerprint("codes", {"model": model, "shards": shards_digest}, settings)
    writer = ArtifactWriter(Store(out), "codes", mark, inputs, origin or {})
    parts, receipts = [], {}
    for name, rows in shards.items():
        stem = name.removesuffix(".tar")
        count = len(rows.keys)
        columns: dict[str, Any] = {
            "key": rows.keys,
            "shard": [name] * count,
            "row": list(rows.row) or list(range(count)),
            "path": [f"{key}.png" for key in rows.keys],
            "code": [code.tobytes() for code in rows.codes],
            "labels": [list(labels) for labels in rows.labels],
            "real_codes": [] if rows.real_codes is None else [row.tobytes() for row in rows.real_codes],
        }
        data = parquet_bytes(table_of(codes_schema(bits, mark, classes, real_codes=real_codes), columns))
        part = writer.put_part(f"{stem}.parquet", data, count)
        parts.append(part)
        sha256 = rows.sha256 or sha256_of(f"{out} {name}".encode())
        receipt = Receipt(shard=name, shard_sha256=sha256, samples=count, part=part, rejects=None)
        receipts[stem] = writer.put_receipt(stem, receipt)
    meta = {"bits": bits, "classes": list(classes), "carried": {}, "settings": {"encode.carry": []}}
    meta |= {"real_codes": REAL_CODES} if real_codes else {}
    return writer.commit(parts, {"samples": sum(part.rows for part in parts)}, meta, receipts)


def write_shards(root: Path, name: str, classes: int = 3, per_class: int = 8, seed: int = 0, size: int = 32) -> str:
    """Shards of drawn pictures, ten to a tar; returns their URI."""
    from pipelines.ingest.ingest import ingest

    write_folder(root / f"{name}-images", classes, per_class, size, seed, first=1000 * seed)
    config = Config(ingest=IngestSettings(samples_per_shard=10, name=name))
    return str(ingest(str(root / f"{name}-images"), str(root / name), config).uri)


def codes_of_shards(out: str | Path, shards_uri: str, bits: int = 64, flip: float = 0.15, seed: int = 0) -> Artifact:
    """Codes near their class's centre for every sample of real shards."""
    opened = open_shards(shards_uri)
    contents = {}
    for number, shard in enumerate(opened.shards):
        records = shard.records()
        codes = class_codes([record.labels[0] for record in records], bits, flip, seed + number)
        keys = [record.key for record in records]
        contents[shard.name] = Rows(keys, codes, [record.labels for record in records], shard.part.sha256)
    return write_codes(
        out, contents, bits, opened.classes, shards_digest=opened.artifact.digest, origin={"shards": shards_uri}
    )


def write_many_codes(out: Path, shards: int, bits: int = 64) -> str:
    """A committed codes artifact of so many shards without its parts, which opening does not read; written fast."""
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest="b" * 64),
        ArtifactInput(role="model", kind="model", digest=MODEL),
    )
    writer = ArtifactWriter(Store(out), "codes", fingerprint("codes", {}, {"shards": shards}), inputs, {})
    parts, receipts = [], {}
    (out / "receipts").mkdir()
    for number in range(shards):
        stem, sha256 = f"many-{number:06d}", f"{number:064x}"
        part = Part(path=f"parts/{stem}-{sha256[:16]}.parquet", bytes=1000, sha256=sha256, rows=10)
        receipts[stem] = Receipt(shard=f"{stem}.tar", shard_sha256=sha256, samples=10, part=part, rejects=None)
        parts.append(part)
        (out / "receipts" / f"{stem}.json").write_bytes(canonical_json(receipts[stem]))
    meta = {"bits": bits, "classes": ["cat"], "carried": {}, "settings": {"encode.carry": []}}
    totals = {"samples": 10 * shards, "codes": 10 * shards, "rejects": 0}
    return writer.commit(parts, totals, meta, receipts).uri
