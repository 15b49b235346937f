"""Turns one shard's codes into its index part, its key table and its receipt, without Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import PartReceipt
from pipelines.artifacts.manifest import PART_DIGEST_CHARS, Part
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.encode.codes import code_array, read_codes, renumber_labels
from pipelines.errors import DamagedArtifact
from pipelines.index.kinds import Codes, IndexKind
from pipelines.index.reader import index_id, keys_name, keys_schema, part_stem, read_key_table
from pipelines.storage import Store, canonical_json, sha256_of


@dataclass(frozen=True)
class PartTask:
    """One shard to index: its ordinal and the place of its codes. `later` is set when it changes an existing index.

    `class_ids[n]` is the index's id of the codes' class n, None if the ids are the same.
    """

    ordinal: int
    shard: str
    shard_sha256: str
    codes_uri: str
    codes_digest: str
    parts: tuple[Part, ...]
    bits: int
    real_codes: bool
    later: bool = False
    class_ids: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of codes that the part will hold."""
        return sum(part.rows for part in self.parts)

    @property
    def where(self) -> str:
        """URI of the Parquet with the codes, or of the first such file, for messages."""
        return f"{self.codes_uri}/{self.parts[0].path}"

    def receipt(self, quantizer: str | None) -> str:
        """Return the name of the shard's receipt.

        After the first version it holds a digest of the part's inputs, since other runs may try to build other parts.
        `quantizer` is the sha256 of the bytes that the parts share.
        """
        if not self.later:
            return part_stem(self.ordinal)
        digests = [part.sha256 for part in self.parts]
        inputs = [self.shard_sha256, digests if len(digests) > 1 else digests[0], quantizer, self.facts()]
        mark = canonical_json([*inputs, *([] if self.class_ids is None else [self.class_ids])])
        return f"{part_stem(self.ordinal)}-{sha256_of(mark)[:PART_DIGEST_CHARS]}"

    def table(self) -> pa.Table:
        """Return the rows to index, with the columns of a key table among others; digest-checked."""
        table = read_codes(Store(self.codes_uri), self.parts, self.bits, self.real_codes)
        return renumber_labels(table, self.class_ids, self.codes_uri)

    def facts(self) -> dict[str, Any]:
        """Return further fields of the receipt, beside the shard and its parts."""
        return {}


@dataclass(frozen=True)
class CompactTask(PartTask):
    """A shard of an index whose part is rebuilt without the rows `left_out`, ascending.

    Codes come from its own key table, which is the only one of `parts` and is in the index at `codes_uri`. `compacted`
    counts the rows that earlier compactions left out.
    """

    left_out: tuple[int, ...] = ()
    compacted: int = 0

    @property
    def rows(self) -> int:
        """Number of codes that the part will hold."""
        return super().rows - len(self.left_out)

    def table(self) -> pa.Table:
        """Return the rows that stay; raises DamagedArtifact where the key table lacks a row to leave out."""
        table = read_key_table(Store(self.codes_uri), self.parts[0], self.bits, self.real_codes)
        kept = table.filter(pa.array(~np.isin(table["row"].to_numpy(), self.left_out)))
        if len(kept) != self.rows:
            raise DamagedArtifact(f"{self.where} lacks rows that were removed from it")
        return kept

    def facts(self) -> dict[str, Any]:
        """Return the number of rows left out so far, and a digest of those left out now.

        They tell later whether other codes differ from the part's own only by these rows.
        """
        rows = sha256_of(canonical_json(list(self.left_out)))
        return {"compacted": self.compacted + len(self.left_out), "left_out": rows}


def build_part(
    task: PartTask, writer: ArtifactWriter, kind: IndexKind, shared: bytes | None, parameters: Mapping[str, int]
) -> PartReceipt:
    """Read a shard's codes, build and put its part and its key table, then claim them with its receipt."""
    table = task.table()
    rows = table["row"].to_numpy().astype(np.int64)
    if (np.diff(rows) <= 0).any() or rows[0] < 0:
        raise DamagedArtifact(f"{task.where}: rows do not ascend")
    data = kind.build(code_array(table["code"]), index_id(task.ordinal, rows), shared, parameters)
    schema = keys_schema(task.bits, task.real_codes)
    keys = table.select(schema.names).cast(schema)
    part = writer.put_part(part_stem(task.ordinal) + kind.suffix, data, len(rows))
    keys_part = writer.put_part(keys_name(task.ordinal), parquet_bytes(keys), len(rows))
    quantizer = sha256_of(shared) if shared else None
    receipt = PartReceipt(
        ordinal=task.ordinal,
        shard=task.shard,
        shard_sha256=task.shard_sha256,
        rows=len(rows),
        quantizer_sha256=quantizer,
        part=part,
        keys=keys_part,
        **task.facts(),
    )
    return writer.put_receipt(task.receipt(quantizer), receipt)


def sample_rows(tasks: Sequence[PartTask], size: int, seed: int) -> list[tuple[PartTask, npt.NDArray[np.int64]]]:
    """Draw seeded rows of about `size` codes, a proportional share from each shard; empty shares are left out."""
    drawn = sample_places([(task.ordinal, task.rows) for task in tasks], size, seed)
    return [(task, places) for task, places in zip(tasks, drawn, strict=True) if len(places)]


def sample_places(shards: Sequence[tuple[int, int]], size: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Draw `size` seeded places, ascending, from the shards (ordinal, rows): from each its proportional share."""
    total = sum(rows for _, rows in shards)
    size, start = min(size, total), 0
    drawn = []
    for ordinal, rows in shards:
        stop = start + rows
        share = (stop * size // total - start * size // total) if rows else 0
        # One generator per shard, so that places do not depend on the draws of other shards.
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, ordinal))))
        drawn.append(np.sort(random.choice(rows, share, replace=False)) if share else np.empty(0, np.int64))
        start = stop
    return drawn


def read_shard_codes(task: PartTask) -> Codes:
    """Return the codes of a shard, digest-checked."""
    return code_array(task.table()["code"])
