"""Codes artifacts, opened: which tars they encode, and their rows as arrays, digest-checked before parsing."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from pipelines.artifacts import Artifact, Part, ReceiptRef
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.schema import codes_schema, read_parquet, require_schema
from pipelines.versions import open_current

ENCODER_VERSION = 2
"""Raised by hand when the same model and images would give other codes; part of every codes fingerprint."""

COLUMNS = ("key", "shard", "row", "code", "labels")


@dataclass(frozen=True)
class CodesShard:
    """The codes of one tar: its name and sha256, and the Parquet part that holds its rows."""

    name: str
    sha256: str
    part: Part

    @property
    def rows(self) -> int:
        """Codes in the part."""
        return self.part.rows


@dataclass(frozen=True)
class CodesSet:
    """An opened codes artifact."""

    artifact: Artifact
    bits: int
    classes: tuple[str, ...]

    @cached_property
    def shards(self) -> tuple[CodesShard, ...]:
        """The shards in the order of their names; their receipts are read when this is first asked for."""
        shards = [_shard_of(self.artifact, receipt) for receipt in self.artifact.manifest.receipts]
        return tuple(sorted(shards, key=lambda shard: shard.name))

    @property
    def rows(self) -> int:
        """Codes in all shards."""
        return sum(part.rows for part in self.artifact.manifest.parts if part.path.startswith("parts/"))

    @property
    def model(self) -> str:
        """Digest of the model that made the codes."""
        return self.artifact.manifest.input("model").digest

    def read(self, shard: CodesShard) -> pa.Table:
        """The contract's columns of one shard, checked; further columns are left out."""
        return read_codes(self.artifact, shard.part, self.bits)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of every shard, one table at a time."""
        return (self.read(shard) for shard in self.shards)


def open_codes(source: str | Artifact) -> CodesSet:
    """Open the current version of a codes artifact by URI, or take one that is open."""
    artifact = open_current(source, "codes") if isinstance(source, str) else source
    meta = artifact.manifest.meta
    try:
        bits, classes = int(meta["bits"]), tuple(str(name) for name in meta["classes"])
    except (KeyError, TypeError, ValueError):
        raise DamagedArtifact(f"{artifact.uri}: the codes manifest does not say its bits and classes") from None
    return CodesSet(artifact, bits, classes)


def _shard_of(artifact: Artifact, reference: ReceiptRef) -> CodesShard:
    try:
        receipt = json.loads(artifact.read(reference))
        part = Part.model_validate(receipt["part"])
        shard = CodesShard(str(receipt["shard"]), str(receipt["shard_sha256"]), part)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DamagedArtifact(f"{artifact.uri}/{reference.path} is not a receipt of codes") from None
    if part not in artifact.manifest.parts:
        raise DamagedArtifact(f"{artifact.uri}/{reference.path} names {part.path}, which the manifest does not list")
    return shard


def read_codes(artifact: Artifact, part: Part, bits: int) -> pa.Table:
    """One codes part as a table of the contract's columns, digest, schema and number of rows checked."""
    where = f"{artifact.uri}/{part.path}"
    table = read_parquet(artifact.read(part), where, COLUMNS)
    require_schema(table, codes_schema(bits, "", ()), where)
    if table.num_rows != part.rows:
        raise DamagedArtifact(f"{where} has {table.num_rows} rows, the manifest says {part.rows}")
    return table


def code_array(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """A fixed_size_binary column as uint8 (N, bytes)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what an empty column stays
        return np.empty((0, column.type.byte_width), np.uint8)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data.reshape(-1, column.type.byte_width)[array.offset : array.offset + len(array)]


def class_names(labels: Sequence[int], classes: Sequence[str], where: str) -> list[str]:
    """The names of class ids; DamagedArtifact for an id that has none."""
    for label in labels:
        if not 0 <= label < len(classes):
            raise DamagedArtifact(f"{where}: class id {label} is outside the {len(classes)} classes of the manifest")
    return [classes[label] for label in labels]


def require_pair(first: CodesSet, other: CodesSet, classes: bool = False) -> None:
    """FingerprintMismatch, naming both, unless they have one code length, one model and (if asked) one class list."""
    facts: list[tuple[str, Any, Any, bool]] = [
        ("bits", first.bits, other.bits, first.bits == other.bits),
        ("model", first.model[:12], other.model[:12], first.model == other.model),
    ]
    if classes:
        facts.append(("classes", len(first.classes), len(other.classes), first.classes == other.classes))
    for name, mine, theirs, same in facts:
        if not same:
            raise FingerprintMismatch(
                f"{first.artifact.uri} has {name} {mine}, {other.artifact.uri} has {name} {theirs}"
                f"{' with other names' if mine == theirs else ''}: name codes that one model made of one class list"
            )


def require_distinct(sets: Sequence[CodesSet]) -> None:
    """InputError where two of them encode the same tar, whose samples would count twice."""
    owners: dict[str, str] = {}
    for entry in sets:
        for shard in entry.shards:
            name = f"{entry.artifact.uri} ({shard.name})"
            if shard.sha256 in owners:
                raise InputError(f"{owners[shard.sha256]} and {name} are codes of the same tar: name it once")
            owners[shard.sha256] = name
