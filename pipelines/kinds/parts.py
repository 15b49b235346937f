"""The core of an index build, without Ray: one shard's codes become its part, its key table and its receipt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.artifacts import ArtifactInput, ArtifactWriter, Part, open_artifact
from pipelines.codes import code_array, read_codes
from pipelines.errors import DamagedArtifact
from pipelines.kinds import Codes, IndexKind, index_kind
from pipelines.kinds.artifact import index_id, keys_name, keys_schema, part_stem
from pipelines.schema import parquet_bytes
from pipelines.storage import Store, sha256_of


@dataclass(frozen=True)
class PartTask:
    """One shard to index: its ordinal, and where its codes lie."""

    ordinal: int
    shard: str
    shard_sha256: str
    codes_uri: str
    codes_digest: str
    part: Part
    bits: int


class PartBuilder:
    """Lives in a Ray worker and builds one part after another."""

    def __init__(self, out: str, name: str, inputs: tuple[ArtifactInput, ...], kind: str, shared: bytes | None) -> None:
        self._writer = ArtifactWriter(Store(out), "index", name, inputs, {})
        self._kind, self._shared = index_kind(kind), shared

    def run(self, task: PartTask) -> dict[str, Any]:
        """Build and claim the part of one shard; the receipt that won is returned."""
        return build_part(task, self._writer, self._kind, self._shared)


def build_part(task: PartTask, writer: ArtifactWriter, kind: IndexKind, shared: bytes | None) -> dict[str, Any]:
    """Read a shard's codes, build and put its part and its key table, then its receipt."""
    table = read_codes(open_artifact(task.codes_uri, "codes"), task.part, task.bits)
    rows = table["row"].to_numpy().astype(np.int64)
    if (np.diff(rows) <= 0).any() or rows[0] < 0:
        raise DamagedArtifact(f"{task.codes_uri}/{task.part.path}: rows do not ascend")
    data = kind.build(code_array(table["code"]), index_id(task.ordinal, 0) + rows, shared)
    width = (task.bits + 7) // 8
    keys = table.select(keys_schema(width).names).cast(keys_schema(width))
    part = writer.put_part(part_stem(task.ordinal) + kind.suffix, data, len(rows))
    keys_part = writer.put_part(keys_name(task.ordinal), parquet_bytes(keys), len(rows))
    receipt = {
        "ordinal": task.ordinal,
        "shard": task.shard,
        "shard_sha256": task.shard_sha256,
        "rows": len(rows),
        "quantizer_sha256": sha256_of(shared) if shared else None,
        "part": part.model_dump(),
        "keys": keys_part.model_dump(),
    }
    return writer.put_receipt(part_stem(task.ordinal), receipt)


def sample_rows(tasks: Sequence[PartTask], size: int, seed: int) -> list[tuple[PartTask, npt.NDArray[np.int64]]]:
    """Seeded rows of about `size` codes, from each shard its proportional share; shards that give none are left out."""
    total = sum(task.part.rows for task in tasks)
    size, start = min(size, total), 0
    drawn = []
    for task in tasks:
        stop = start + task.part.rows
        share = stop * size // total - start * size // total
        if share:
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, task.ordinal))))
            drawn.append((task, np.sort(random.choice(task.part.rows, share, replace=False))))
        start = stop
    return drawn


def codes_of(task: PartTask) -> Codes:
    """The codes of a shard, digest-checked."""
    artifact = open_artifact(task.codes_uri, "codes")
    return code_array(read_codes(artifact, task.part, task.bits)["code"])
