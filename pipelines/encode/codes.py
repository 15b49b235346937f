"""Opens codes artifacts: lists the encoded tars, and reads their rows as arrays, digest-checked before parsing."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hhnet import unpack_bits
from pipelines.artifacts.facts import CodesMeta, Receipt
from pipelines.artifacts.manifest import Artifact, Part
from pipelines.artifacts.tables import codes_schema, read_table
from pipelines.artifacts.versions import VersionsRead, open_current, open_input_version
from pipelines.errors import DamagedArtifact, FingerprintMismatch, InputError
from pipelines.storage import Store, map_in_order

TABLES_AT_ONCE = 4
"""Parts read at a time when all are read in turn; twice as many are in memory."""
ENCODER_VERSION = 5
"""Version of the encoder, part of every codes fingerprint. Bump it when the same model and images give other codes."""


@dataclass(frozen=True, slots=True)
class CodesShard:
    """The codes of one tar: its name, its sha256 and the Parquet parts with its rows. Each row is in one part.

    Samples that a retry recovered are in a part of their own.
    """

    name: str
    sha256: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of codes in the parts."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class CodesSet:
    """An opened codes artifact."""

    artifact: Artifact
    bits: int
    classes: tuple[str, ...]
    real_codes: bool
    """Whether the artifact has real codes beside the codes."""

    @cached_property
    def shards(self) -> tuple[CodesShard, ...]:
        """The shards in the order of their names, from the receipts in the manifest."""
        artifact, manifest = self.artifact, self.artifact.manifest
        listed, shards = {part: part for part in manifest.parts}, []
        for reference in manifest.each_receipt():
            receipt = reference.parse(Receipt, artifact.uri, "encode to another --out")
            for part in receipt.codes:
                if part not in listed:
                    raise DamagedArtifact(
                        f"{artifact.uri}/{reference.path} names {part.path}, which the manifest does not list"
                    )
            # The parts of the manifest, not the equal ones of the receipt: hundreds of thousands are held once.
            own = tuple(listed[part] for part in receipt.codes)
            shards.append(CodesShard(receipt.shard, receipt.shard_sha256, own))
        return tuple(sorted(shards, key=lambda shard: shard.name))

    @property
    def rows(self) -> int:
        """Number of codes in all shards."""
        return sum(part.rows for part in self.artifact.manifest.parts if part.path.startswith("parts/"))

    @property
    def model(self) -> str:
        """Digest of the model that made the codes."""
        return self.artifact.manifest.input("model").digest

    def read(self, shard: CodesShard) -> pa.Table:
        """Return the contract's columns of one shard, checked; further columns are left out."""
        return read_codes(self.artifact.store, shard.parts, self.bits, self.real_codes)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows of every shard, one table at a time."""
        return map_in_order(self.read, self.shards, TABLES_AT_ONCE)


def open_codes(source: str | Artifact) -> CodesSet:
    """Open the current version of a codes artifact by URI, or wrap an open artifact."""
    artifact = open_current(source, "codes") if isinstance(source, str) else source
    meta = artifact.facts(CodesMeta)
    return CodesSet(artifact, meta.bits, meta.classes, meta.has_real_codes)


def open_codes_used(index: Artifact, digest: str, near: str, read: VersionsRead) -> CodesSet | None:
    """Return the codes with this digest that parts of an index come from, or None if they no longer exist.

    Looks among the versions at `near` and at the place that the index remembers.
    """
    role = next((entry.role for entry in index.manifest.inputs if entry.digest == digest), None)
    for where in (near, None) if role else ():
        with suppress(InputError, FingerprintMismatch):
            return open_codes(open_input_version(index, str(role), where, read))
    return None


def read_codes(store: Store, parts: Sequence[Part], bits: int, real_codes: bool = False) -> pa.Table:
    """Return a shard's codes as a table of the contract's columns, ordered by row.

    Digest, schema and number of rows of each part are checked.
    """
    schema = codes_schema(bits, "", (), real_codes=real_codes)
    tables = [read_table(store, part, schema, schema.names) for part in parts]
    return tables[0] if len(tables) == 1 else pa.concat_tables(tables).unify_dictionaries().sort_by("row")


def code_array(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return a fixed_size_binary column as uint8 (N, bytes)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # combine_chunks leaves an empty column chunked
        return np.empty((0, column.type.byte_width), np.uint8)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data.reshape(-1, column.type.byte_width)[array.offset : array.offset + len(array)]


def require_real_codes(uri: str, real_codes: bool) -> None:
    """Raise InputError unless the codes at `uri`, or the index built from them, hold real codes."""
    if not real_codes:
        raise InputError(f"{uri} has no real codes to re-rank by: encode with encode.real_codes=true to have them")


def real_codes_array(column: pa.ChunkedArray) -> npt.NDArray[np.int8]:
    """Return a column of real codes as int8 (N, bits)."""
    return code_array(column).view(np.int8)


def require_signs(table: pa.Table, bits: int, where: str) -> None:
    """Raise DamagedArtifact unless each real code of a table with codes lies on its bit's side of zero."""
    real_codes, ones = real_codes_array(table["real_codes"]), unpack_bits(code_array(table["code"]), bits)
    if not ((real_codes > 0) == ones).all() or (real_codes == np.iinfo(np.int8).min).any():
        raise DamagedArtifact(f"{where} has real codes that are not those of its codes")


def unite_classes(first: Sequence[str], *others: Sequence[str]) -> tuple[str, ...]:
    """Return the class list `first`, and behind it the names that only `others` have, in their order."""
    known = frozenset(first)
    return (*first, *(name for name in dict.fromkeys(chain(*others)) if name not in known))


def renumbering(united: Sequence[str], classes: Sequence[str]) -> tuple[int, ...] | None:
    """Return the id in `united`, which has all these names, of each class; None if all ids stay the same."""
    if tuple(classes) == tuple(united[: len(classes)]):
        return None
    ids = {name: number for number, name in enumerate(united)}
    return tuple(ids[name] for name in classes)


def renumber_labels(table: pa.Table, class_ids: Sequence[int] | None, where: str) -> pa.Table:
    """Return the table with `class_ids[n]` in place of each class id n in `labels`; None leaves it as it is.

    Raises DamagedArtifact for an id that is not among the classes.
    """
    if class_ids is None:
        return table
    column, field = table["labels"], table.schema.field("labels")
    ids = pc.list_flatten(column).to_numpy()
    if len(ids):
        require_class_ids([int(ids.min()), int(ids.max())], len(class_ids), where)
    ends = np.cumsum(pc.list_value_length(column).to_numpy(), dtype=np.int32)
    labels = pa.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), ends]), np.array(class_ids, np.int32)[ids])
    return table.set_column(table.schema.get_field_index("labels"), field, labels.cast(field.type))


def require_class_ids(labels: Iterable[int], classes: int, where: str) -> None:
    """Raise DamagedArtifact for a class id that is not among so many classes."""
    for label in labels:
        if not 0 <= label < classes:
            raise DamagedArtifact(f"{where}: class id {label} is outside the {classes} classes of the manifest")


def names_of_class_ids(labels: Sequence[int], classes: Sequence[str], where: str) -> list[str]:
    """Return the names of class ids; raises DamagedArtifact for an id without a name."""
    require_class_ids(labels, len(classes), where)
    return [classes[label] for label in labels]


def require_pair(first: CodesSet, other: CodesSet, one_index: bool = False, advice: str | None = None) -> None:
    """Raise FingerprintMismatch, naming both, unless they have one code length and one model.

    With `one_index` either both must have real codes or neither. `advice` ends the message, by default for two codes.
    """
    facts = {"bits": (first.bits, other.bits), "model": (first.model, other.model)}
    if one_index:
        facts["encode.real_codes"] = first.real_codes, other.real_codes
    for name, (mine, theirs) in facts.items():
        if mine != theirs:
            usual = f"name codes that one model made{' with the same setting' if name == 'encode.real_codes' else ''}"
            raise FingerprintMismatch(
                f"{first.artifact.uri} has {name} {str(mine)[:12]}, {other.artifact.uri} has {name} "
                f"{str(theirs)[:12]}: {advice or usual}"
            )


def require_distinct_tars(sets: Sequence[CodesSet]) -> None:
    """Raise InputError where two of the artifacts encode the same tar: its samples would count twice."""
    owners: dict[str, str] = {}
    for entry in sets:
        for shard in entry.shards:
            name = f"{entry.artifact.uri} ({shard.name})"
            if shard.sha256 in owners:
                raise InputError(f"{owners[shard.sha256]} and {name} are codes of the same tar: name it once")
            owners[shard.sha256] = name
