"""WebDataset shards: written reproducibly, read against their index, dealt to workers by an epoch plan.

A shards artifact holds tars and the shard index, with the place and the sha256 of each sample's members.
Tars that were written here are parts like any other; adopted ones may lie beside the manifest under their original
names. Tars are read by that index: a short, cut or altered tar shows up sample by sample as `damaged` instead of ending
the stream early.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.facts import ShardsMeta
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.parquet import columns_of, table_of
from pipelines.artifacts.tables import SHARD_INDEX
from pipelines.artifacts.versions import open_current, open_known
from pipelines.errors import DamagedArtifact, InputError
from pipelines.shards.index import IndexedTar, ShardIndex, is_tar
from pipelines.shards.tar import MAX_MEMBER_BYTES, TarDamaged, read_tar
from pipelines.storage import ObjectStream, Store


@dataclass(frozen=True)
class Member:
    """One file of a sample inside its tar: name, byte offset of its content, size and sha256."""

    name: str
    offset: int
    size: int
    sha256: bytes


@dataclass(frozen=True)
class Record:
    """A sample in the shard index; `path` is its place in its source, `members[0]` the image."""

    key: str
    shard: str
    row: int
    path: str
    labels: tuple[int, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Sample:
    """A sample read from its tar: the bytes of its image, and of its JSON member if requested.

    `damage` says how the bytes differ from those in the index; `image` is empty then.
    """

    record: Record
    image: bytes
    metadata: bytes | None = None
    damage: str | None = None


# ------------------------------------------------------------------------------------------------------- writing


def write_tar(path: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Write samples (`__key__` and suffix -> bytes) as a WebDataset tar whose bytes depend on nothing else."""
    import webdataset  # imports torch, which readers of shards can do without

    with path.open("wb") as stream:
        # Fixed times, owners and modes: the same samples give the same bytes and digest.
        writer = webdataset.TarWriter(stream, encoder=False, mtime=0, user="hhnet", group="hhnet", mode=0o644)
        try:
            for sample in samples:
                writer.write(dict(sample))
        finally:
            writer.close()


def scan_tar(
    path: Path, shard: str, labels: Mapping[str, Sequence[int]], image_of: Mapping[str, str], paths: Mapping[str, str]
) -> pa.Table:
    """Read back a tar that was just written, and make its rows of the shard index.

    `labels`, `image_of` (the image's member name) and the source `paths` are by key. A sample's members stand together.
    """
    groups: dict[str, list[Member]] = {}
    last = None
    try:
        with path.open("rb") as stream:
            for entry, content in read_tar(stream):
                if content is None:
                    raise DamagedArtifact(f"{path.name} holds {entry.name}, which is not a plain file")
                key = entry.name[: key_end(entry.name)]
                if key != last and key in groups:
                    raise DamagedArtifact(f"{path.name} holds the members of {key} apart from each other")
                digest = hashlib.sha256(content).digest()
                groups.setdefault(key, []).append(Member(entry.name, entry.offset, entry.size, digest))
                last = key
    except TarDamaged as error:
        raise DamagedArtifact(f"{path.name}: {error}") from None
    records = [
        Record(key, shard, row, paths[key], tuple(labels[key]), _image_first(members, image_of[key]))
        for row, (key, members) in enumerate(groups.items())
    ]
    return index_table(records)


def key_end(name: str) -> int:
    """Return where a member's key ends: at its name's first dot after the last slash. ValueError if there is none."""
    return name.index(".", name.rfind("/") + 1)


def _image_first(members: list[Member], image: str) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda member: (member.name != image, member.name)))


def index_table(records: Sequence[Record]) -> pa.Table:
    """Return records as rows of the shard index."""
    columns = columns_of(records, "key", "shard", "row", "path", "labels")
    columns["members"] = [[vars(member) for member in record.members] for record in records]
    return table_of(SHARD_INDEX, columns)


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a shards artifact. Its rows of the index are read when they are needed."""

    name: str
    part: Part
    index: ShardIndex
    place: IndexedTar

    @property
    def stem(self) -> str:
        """The name without `.tar`, which names the shard's codes, rejects and receipt."""
        return self.name.removesuffix(".tar")

    @property
    def rows(self) -> int:
        """Samples in the tar."""
        return self.part.rows

    def table(self) -> pa.Table:
        """Read the tar's rows of the index, in tar order; raise DamagedArtifact if they cannot be rows of the tar."""
        table, where = self.index.read(self.place), self.index.where(self.place)
        if not pc.all(pc.equal(table["shard"].cast(pa.string()), self.name), min_count=0).as_py():
            raise DamagedArtifact(f"{where} does not hold the {self.rows} rows of {self.name} in order")
        if table["row"].to_pylist() != list(range(self.rows)):
            raise DamagedArtifact(f"{where} does not number the rows of {self.name} from 0")
        _require_places(table, where)
        return table

    def records(self) -> list[Record]:
        """Read the index rows as records."""
        return [
            Record(
                row["key"],
                row["shard"],
                row["row"],
                row["path"],
                tuple(row["labels"]),
                tuple(Member(**m) for m in row["members"]),
            )
            for row in self.table().to_pylist()
        ]


@dataclass(frozen=True)
class ShardSet:
    """An opened shards artifact. Its index is read piece by piece; its rows are checked tar by tar."""

    artifact: Artifact
    classes: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        """Samples in all tars."""
        return sum(shard.rows for shard in self.shards)

    def shard(self, name: str) -> Shard:
        """Return the shard of this name."""
        if name not in self._by_name:
            raise InputError(f"{self.artifact.uri} has no shard {name}")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in reversed(self.shards)}

    def read(self, shard: Shard, rows: Sequence[int] | None = None, metadata: bool = False) -> Iterator[Sample]:
        """Stream a tar's samples in order, each checked against its digest; `rows` picks some of them."""
        records = shard.records()
        if rows is not None:
            records = [records[row] for row in rows]
        return read_samples(self.artifact.store, shard.part, records, metadata)


def open_shards(source: str | Artifact, digest: str | None = None) -> ShardSet:
    """Open a shards artifact given by its URI, in its current version or that of `digest`, or as an open artifact.

    The pieces of the index are read later. Raises DamagedArtifact where its directory is of other tars.
    """
    if isinstance(source, Artifact):
        artifact = source
    else:
        artifact = open_known(source, "shards", digest) if digest else open_current(source, "shards")
    index, shards = ShardIndex(artifact), list[Shard]()
    for part in sorted(filter(is_tar, artifact.manifest.parts), key=tar_name):
        name = tar_name(part)
        place = index.tars.get(name)
        if place is None or place.rows != part.rows:
            raise DamagedArtifact(f"{artifact.uri}: the directory of the index has not the {part.rows} rows of {name}")
        shards.append(Shard(place.shard, part, index, place))
    if len(shards) != len(index.tars):
        raise DamagedArtifact(f"{artifact.uri}: the directory of the index has {len(index.tars)} tars of {len(shards)}")
    return ShardSet(artifact, artifact.facts(ShardsMeta).classes, tuple(shards))


def tar_name(part: Part) -> str:
    """Return the name of a tar: a part's own, or the original file name of an adopted tar."""
    path = PurePosixPath(part.path)
    return part.name if path.parent.name == "parts" else path.name


def _require_places(table: pa.Table, where: str) -> None:
    """Raise DamagedArtifact unless no cell is empty and each sample has members with offsets and sizes from 0 on."""
    if not table.num_rows:
        return
    members = table["members"].combine_chunks()
    fields = members.flatten()
    lengths = pc.list_value_length(members)
    whole = not any(column.null_count for column in (*table.columns, fields, *fields.flatten()))
    if not whole or pc.min(lengths).as_py() < 1:
        raise DamagedArtifact(f"{where} has samples without a member, or empty cells")
    for name in ("offset", "size"):
        if pc.min(fields.field(name)).as_py() < 0:
            raise DamagedArtifact(f"{where} has a member with a negative {name}")


def read_samples(
    store: Store, part: Part, records: Sequence[Record], metadata: bool = False, block: int | None = None
) -> Iterator[Sample]:
    """Stream `records` of one tar in the order given; missing or altered ones come as damaged samples.

    An object store is asked for `block` bytes at a time.
    """
    if not records:
        return
    try:
        stream = store.open(part.path, block, records[0].members[0].offset)
    except FileNotFoundError:
        yield from (Sample(record, b"", damage=f"{part.path} is missing") for record in records)
        return
    with stream:
        for record in records:
            image, damage = _read_member(stream, record.members[0])
            extra = None
            json_member = next((m for m in record.members if m.name.endswith(".json")), None) if metadata else None
            if json_member is not None and damage is None:
                extra, damage = _read_member(stream, json_member)
            yield Sample(record, b"" if damage else image, extra, damage)


def span_bytes(records: Sequence[Record]) -> int:
    """Return the bytes of a tar from the first member of these records to the end of their last one."""
    members = [member for record in records for member in record.members]
    return max(member.offset + member.size for member in members) - min(member.offset for member in members)


def _read_member(stream: ObjectStream, member: Member) -> tuple[bytes, str | None]:
    if member.size > MAX_MEMBER_BYTES:
        return b"", f"{member.name} has {member.size} bytes, the limit is {MAX_MEMBER_BYTES}"
    stream.seek(member.offset)
    data = stream.read(member.size)
    if len(data) != member.size:
        return b"", f"the tar ends inside {member.name}"
    if hashlib.sha256(data).digest() != member.sha256:
        return b"", f"{member.name} does not match its sha256"
    return data, None
