"""Plans one encode: its name, its inputs, and the shards that still have to be encoded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter, require_identity
from pipelines.artifacts.facts import ModelMeta, Receipt, ShardsMeta, SplitPart
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part, fingerprint, inputs_of
from pipelines.artifacts.tables import codes_schema, parse_column_type
from pipelines.artifacts.versions import find_finished, list_lost, open_current
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.encode.codes import ENCODER_VERSION
from pipelines.encode.receipts import read_whole_receipts
from pipelines.errors import DamagedArtifact, UsageError
from pipelines.shards.shards import ShardSet
from pipelines.storage import Store


@dataclass(frozen=True)
class ShardTask:
    """A shard to encode: its tar, the name of its receipt and, on a retry, its rejects so far, row -> reason.

    `kept` are the parts with codes that the shard has already. Their rows are not put again, so that a reader of all
    parts of the folder sees each sample once.
    """

    shard: str
    receipt: str
    rejected: Mapping[int, str] = field(default_factory=dict)
    kept: tuple[Part, ...] = ()


@dataclass(frozen=True)
class EncodeJob:
    """The description of one encode that every worker gets, as plain values that can be sent to other processes."""

    shards: str
    model: str
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    schema: pa.Schema
    split: SplitPart | None
    """Split part that the shards are, for the manifest."""
    trained_on: SplitPart | None
    """Split part that the model was trained on, for the manifest."""
    config: Config

    @property
    def shards_digest(self) -> str:
        """Digest of the version of the shards that is encoded."""
        return next(entry.digest for entry in self.inputs if entry.role == "shards")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that change the codes, by dotted name."""
        return result_settings(self.config, "codes")

    @property
    def origin(self) -> dict[str, str]:
        """Place of each input by role."""
        return {"shards": self.shards, "model": self.model}

    def require_root(self) -> None:
        """Raise FingerprintMismatch where another run began the codes' root."""
        require_identity(Store(self.out), "codes", self.fingerprint, self.settings, self.inputs, self.origin)

    def writer(self) -> ArtifactWriter:
        """Return the writer at the job's root."""
        return ArtifactWriter(Store(self.out), "codes", self.fingerprint, self.inputs, self.origin, self.settings)


def plan_encode(shards: Artifact, model: Artifact, out: str, config: Config) -> EncodeJob:
    """Return the job of an encode, with its fingerprint, inputs and schema.

    Raises UsageError while `encode.batch_size` is auto, which `encode` itself turns into a number first.
    """
    if config.encode.batch_size == "auto":
        raise UsageError("encode.batch_size=auto is for encode, its --dry-run and run: write a number")
    settings = {**result_settings(config, "codes"), "encoder": ENCODER_VERSION}
    source, network = shards.facts(ShardsMeta), model.facts(ModelMeta)
    root = source.grown_from or shards.digest  # the same for all versions: grown shards keep their codes in place
    mark = fingerprint("codes", {"shards": root, "model": model.digest}, settings)
    inputs = inputs_of({"shards": shards, "model": model})
    carried = carried_types(shards, config.encode.carry)
    schema = codes_schema(network.bits, mark, source.classes, carried, config.encode.real_codes)
    splits = source.split_part, network.protocol
    return EncodeJob(shards.uri, model.uri, Store(out).uri, mark, inputs, schema, *splits, config)


def carried_types(shards: Artifact, names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the Arrow types of metadata columns: the type in the source table, or text where none is known."""
    known = shards.facts(ShardsMeta).columns
    try:
        return {name: parse_column_type(known.get(name, "string")) for name in names}
    except ValueError:
        raise DamagedArtifact(f"{shards.uri} says an unknown type of a column in the manifest") from None


def find_finished_codes(job: EncodeJob) -> Artifact | None:
    """Return the codes of this job and this version of the shards, if they are published and complete; else None."""
    found = find_finished(Store(job.out), "codes", job.fingerprint)
    return found if found is not None and found.manifest.input("shards").digest == job.shards_digest else None


def exceeds_reject_budget(totals: Mapping[str, int], config: Config) -> bool:
    """Tell whether more samples were rejected than `encode.reject_budget` allows."""
    return totals["rejects"] > config.encode.reject_budget * totals["samples"]


def find_missing_work(store: Store, opened: ShardSet) -> tuple[Artifact | None, dict[str, Receipt], list[ShardTask]]:
    """Return the published codes or None, the receipts that still hold, and the tasks of all other shards.

    After a publication the tasks are the shards with missing objects and the shards added since.
    """
    published, known, lost_tasks = None, set[str](), list[ShardTask]()
    if store.size("manifest.json") is not None:
        published = open_current(store, "codes")
        lists = {ref.path for ref in published.manifest.lists}
        if (gone := lists & list_lost(published)) and published.manifest.to_bytes() != store.read("manifest.json"):
            raise DamagedArtifact(f"{store.uri}/{min(gone)} is gone, and only it names codes: encode to another --out")
        if gone:
            published = None  # its first version: the receipts tell what it held, and it is published as it was
    if published is not None:
        known, lost_tasks = {ref.shard for ref in published.manifest.each_receipt()}, _lost_shards(published, opened)
    new = [shard for shard in opened.shards if shard.stem not in known]
    receipts = read_whole_receipts(store, [shard.stem for shard in new]) if new else {}
    new_tasks = [ShardTask(shard.name, shard.stem) for shard in new if shard.stem not in receipts]
    return published, receipts, [*lost_tasks, *new_tasks]


def _lost_shards(published: Artifact, opened: ShardSet) -> list[ShardTask]:
    """Return tasks for shards with a missing part or receipt; each keeps the receipt name of the manifest."""
    if not (gone := list_lost(published)):
        return []
    manifest = published.manifest
    stems = {PurePosixPath(part.name).stem for part in manifest.parts if part.path in gone}
    stems |= {ref.shard for ref in manifest.each_receipt() if ref.path in gone}
    paths = {ref.shard: ref.path for ref in manifest.each_receipt() if ref.shard in stems}
    names = {stem: path.removeprefix("receipts/").removesuffix(".json") for stem, path in paths.items()}
    kept = codes_by_stem(part for part in manifest.parts if part.path not in gone)
    return [
        ShardTask(shard.name, names[shard.stem], kept=kept.get(shard.stem, ()))
        for shard in opened.shards
        if shard.stem in stems
    ]


def codes_by_stem(parts: Iterable[Part]) -> dict[str, tuple[Part, ...]]:
    """Group the parts that hold codes by the name of their shard without `.tar`, in the order of their paths."""
    found: dict[str, tuple[Part, ...]] = {}
    for part in sorted(parts, key=lambda part: part.path):
        if part.path.startswith("parts/"):
            stem = PurePosixPath(part.name).stem
            found[stem] = (*found.get(stem, ()), part)
    return found
