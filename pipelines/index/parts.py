"""Turns the codes of many shards into a part of an index, its key table and its receipt, without Ray."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import PartReceipt
from pipelines.artifacts.manifest import PART_DIGEST_CHARS, Part
from pipelines.artifacts.tables import read_table
from pipelines.encode.codes import code_array, read_codes, renumber_labels
from pipelines.errors import DamagedArtifact
from pipelines.index.keys import keys_bytes, keys_of_codes
from pipelines.index.kinds import Codes, Ids, IndexKind
from pipelines.index.layout import NO_PART, IndexedShard, keys_name, keys_schema, part_stem
from pipelines.storage import Store, canonical_json, map_in_order, sha256_of


@dataclass(frozen=True)
class ShardSource:
    """One shard to index: its ordinal and the place of its codes.

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
    class_ids: tuple[int, ...] | None = None

    @property
    def rows(self) -> int:
        """Number of codes of the shard."""
        return sum(part.rows for part in self.parts)

    def placed(self, part: int) -> IndexedShard:
        """Return the row of the ordinal table for the shard in this part."""
        place, rows = part if self.rows else NO_PART, self.rows
        return IndexedShard(self.ordinal, self.shard, self.shard_sha256, self.codes_digest, place, rows, held=rows > 0)

    def inputs(self) -> list[object]:
        """Return what the shard's rows follow from, as plain JSON values."""
        return [self.ordinal, self.shard_sha256, [part.sha256 for part in self.parts], self.class_ids]

    def keys(self) -> pa.Table:
        """Return the codes as rows of a key table, digest-checked; raise DamagedArtifact unless their rows ascend."""
        table = read_codes(Store(self.codes_uri), self.parts, self.bits, self.real_codes)
        rows = table["row"].to_numpy()
        if len(rows) and ((np.diff(rows) <= 0).any() or rows[0] < 0):
            raise DamagedArtifact(f"{self.codes_uri}/{self.parts[0].path}: rows do not ascend")
        table = renumber_labels(table, self.class_ids, self.codes_uri)
        return keys_of_codes(table, self.ordinal, self.bits, self.real_codes)


@dataclass(frozen=True, eq=False)
class KeptRows:
    """The rows of a part that another one takes over, from its key table in the index at `uri`: all but `left_out`."""

    uri: str
    part: Part
    left_out: Ids
    """Ids that are left out, ascending."""
    bits: int
    real_codes: bool

    @property
    def rows(self) -> int:
        """Number of codes that are taken over."""
        return self.part.rows - len(self.left_out)

    def inputs(self) -> list[object]:
        """Return what the rows follow from, as plain JSON values."""
        return [self.part.sha256, sha256_of(self.left_out.tobytes())]

    def keys(self) -> pa.Table:
        """Return the rows, digest-checked; raise DamagedArtifact where the key table lacks a row to leave out."""
        table = read_table(Store(self.uri), self.part, keys_schema(self.bits, self.real_codes))
        kept = table.filter(pa.array(~np.isin(table["id"].to_numpy(), self.left_out)))
        if len(kept) != self.rows:
            raise DamagedArtifact(f"{self.uri}/{self.part.path} lacks rows that were removed from it")
        return kept.cast(keys_schema(self.bits, self.real_codes))


@dataclass(frozen=True, eq=False)
class PartTask:
    """A part to build: from the codes of shards, and from rows of older parts.

    `later` is set when it changes an existing index.
    """

    number: int
    sources: tuple[ShardSource, ...]
    kept: tuple[KeptRows, ...] = ()
    later: bool = False

    @property
    def origins(self) -> tuple[ShardSource | KeptRows, ...]:
        """What the part is made from."""
        return (*self.sources, *self.kept)

    @property
    def stem(self) -> str:
        """Name of the part, without its suffix."""
        return part_stem(self.number)

    @property
    def rows(self) -> int:
        """Number of codes that the part will hold."""
        return sum(one.rows for one in self.origins)

    @property
    def bytes(self) -> int:
        """Number of bytes that are read to build the part."""
        codes = sum(part.bytes for source in self.sources for part in source.parts)
        return codes + sum(kept.part.bytes for kept in self.kept)

    def receipt(self, quantizer: str | None) -> str:
        """Return the name of the part's receipt.

        After the first version it holds a digest of the part's inputs, since other runs may try to build other parts.
        `quantizer` is the sha256 of the bytes that the parts share.
        """
        if not self.later:
            return self.stem
        mark = canonical_json([quantizer, *(one.inputs() for one in self.origins)])
        return f"{self.stem}-{sha256_of(mark)[:PART_DIGEST_CHARS]}"

    def keys(self) -> pa.Table:
        """Return the part's key table, by id."""
        table = pa.concat_tables(map_in_order(lambda one: one.keys(), self.origins))
        if (np.diff(table["id"].to_numpy()) <= 0).any():
            table = table.sort_by("id")
        if (np.diff(table["id"].to_numpy()) <= 0).any():
            raise DamagedArtifact(f"{self.stem} would hold an id twice: build the index anew")
        return table


def pack(sizes: Iterable[int], most: int, begun: int = 0) -> list[int]:
    """Return the number of the part for each of these sizes, in their order, counted from 0.

    A part is filled until the next size would exceed `most` codes; a larger one has a part of its own. The first part
    holds `begun` codes already.
    """
    number, filled, found = 0, begun, list[int]()
    for size in sizes:
        if filled and size and filled + size > most:
            number, filled = number + 1, 0
        filled += size
        found.append(number)
    return found


def gather_parts(sources: Sequence[ShardSource], most: int) -> list[PartTask]:
    """Return the parts of a new index with these shards, by ordinal; shards without codes are in none."""
    filled = [source for source in sources if source.rows]
    found: dict[int, list[ShardSource]] = {}
    for source, number in zip(filled, pack((source.rows for source in filled), most), strict=True):
        found.setdefault(number, []).append(source)
    return [PartTask(number, tuple(inside)) for number, inside in found.items()]


def build_part(
    task: PartTask, writer: ArtifactWriter, kind: IndexKind, shared: bytes | None, parameters: Mapping[str, int]
) -> PartReceipt:
    """Read the codes of a part's shards, build and put the part and its key table, then claim them with its receipt."""
    keys = task.keys()
    data = kind.build(code_array(keys["code"]), keys["id"].to_numpy(), shared, parameters)
    part = writer.put_part(task.stem + kind.suffix, data, len(keys))
    keys_part = writer.put_part(keys_name(task.number), keys_bytes(keys), len(keys))
    quantizer = sha256_of(shared) if shared else None
    receipt = PartReceipt(number=task.number, rows=len(keys), quantizer_sha256=quantizer, part=part, keys=keys_part)
    return writer.put_receipt(task.receipt(quantizer), receipt)


def sample_rows(sources: Sequence[ShardSource], size: int, seed: int) -> list[tuple[ShardSource, Ids]]:
    """Draw seeded rows of about `size` codes, a proportional share from each shard; empty shares are left out."""
    drawn = sample_places([(source.ordinal, source.rows) for source in sources], size, seed)
    return [(source, places) for source, places in zip(sources, drawn, strict=True) if len(places)]


def sample_places(groups: Sequence[tuple[int, int]], size: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Draw `size` seeded places, ascending, from groups (number, rows): from each its proportional share."""
    total = sum(rows for _, rows in groups)
    size, start = min(size, total), 0
    drawn = []
    for number, rows in groups:
        stop = start + rows
        share = (stop * size // total - start * size // total) if rows else 0
        # One generator per group, so that places do not depend on the draws of other groups.
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, number))))
        drawn.append(np.sort(random.choice(rows, share, replace=False)) if share else np.empty(0, np.int64))
        start = stop
    return drawn


def read_shard_codes(source: ShardSource) -> Codes:
    """Return the codes of a shard, digest-checked."""
    return code_array(source.keys()["code"])
