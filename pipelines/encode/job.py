"""What one encode has to do: its name and inputs, and the shards that are left of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import ModelMeta, Receipt, ShardsMeta, SplitPart
from pipelines.artifacts.manifest import Artifact, ArtifactInput, Part, fingerprint
from pipelines.artifacts.tables import (
    codes_schema,
    column_type,
)
from pipelines.artifacts.versions import finished, lost, open_current
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.encode.codes import ENCODER_VERSION
from pipelines.encode.receipts import read_whole_receipts
from pipelines.errors import DamagedArtifact
from pipelines.shards.shards import ShardSet
from pipelines.storage import Store

if TYPE_CHECKING:
    pass  # imports torch, which only a worker needs


@dataclass(frozen=True)
class ShardTask:
    """A shard to encode: its tar, the name its receipt gets, and in another go its rejects so far, row -> reason.

    `kept` are the parts of codes that it has already: no row of them is put again, so that who reads all parts of the
    folder reads each sample once.
    """

    shard: str
    receipt: str
    rejected: Mapping[int, str] = field(default_factory=dict)
    kept: tuple[Part, ...] = ()


@dataclass(frozen=True)
class EncodeJob:
    """What every worker of one encoding needs to know; plain values that travel to other processes."""

    shards: str
    model: str
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    schema: pa.Schema
    split: SplitPart | None
    """The split of the shards, for the manifest."""
    trained_on: SplitPart | None
    """The split of the model's training images, likewise."""
    config: Config

    @property
    def shards_digest(self) -> str:
        """Which version of the shards it is."""
        return next(entry.digest for entry in self.inputs if entry.role == "shards")

    def writer(self) -> ArtifactWriter:
        """The writer at the job's root."""
        origin = {"shards": self.shards, "model": self.model}
        return ArtifactWriter(Store(self.out), "codes", self.fingerprint, self.inputs, origin)


def plan_job(shards: Artifact, model: Artifact, out: str, config: Config) -> EncodeJob:
    """Name the result: its fingerprint, inputs and schema."""
    settings = {**result_settings(config, "codes"), "encoder": ENCODER_VERSION}
    source, network = shards.facts(ShardsMeta), model.facts(ModelMeta)
    root = source.grown_from or shards.digest  # shards that have grown keep the place of their codes
    mark = fingerprint("codes", {"shards": root, "model": model.digest}, settings)
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest=shards.digest),
        ArtifactInput(role="model", kind="model", digest=model.digest),
    )
    carried = carried_types(shards, config.encode.carry)
    schema = codes_schema(network.bits, mark, source.classes, carried, config.encode.logits)
    splits = source.split_part, network.protocol
    return EncodeJob(shards.uri, model.uri, Store(out).uri, mark, inputs, schema, *splits, config)


def carried_types(shards: Artifact, names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the types of metadata columns: those that the table had, text where none is known."""
    known = shards.facts(ShardsMeta).columns
    try:
        return {name: column_type(known.get(name, "string")) for name in names}
    except ValueError:
        raise DamagedArtifact(f"{shards.uri} says an unknown type of a column in the manifest") from None


def finished_codes(job: EncodeJob) -> Artifact | None:
    """The codes that a run of this job published, of this version of the shards, if all of it is still there."""
    found = finished(Store(job.out), "codes", job.fingerprint)
    return found if found is not None and found.manifest.input("shards").digest == job.shards_digest else None


def over_budget(totals: Mapping[str, int], config: Config) -> bool:
    """More was rejected than `encode.reject_budget` allows."""
    return totals["rejects"] > config.encode.reject_budget * totals["samples"]


def what_is_left(store: Store, opened: ShardSet) -> tuple[Artifact | None, dict[str, Receipt], list[ShardTask]]:
    """The codes, if they were published, the receipts that need not be made again, and the tasks of the other shards.

    Of published codes those shards are done again of which something is gone, and those done that the shards have got
    since.
    """
    published, known, lost_tasks = None, set[str](), list[ShardTask]()
    if store.size("manifest.json") is not None:
        published = open_current(store, "codes")
        known, lost_tasks = {ref.shard for ref in published.manifest.receipts}, _lost_shards(published, opened)
    new = [shard for shard in opened.shards if shard.stem not in known]
    receipts = read_whole_receipts(store, [shard.stem for shard in new]) if new else {}
    return (
        published,
        receipts,
        [
            *lost_tasks,
            *(ShardTask(shard.name, shard.stem) for shard in new if shard.stem not in receipts),
        ],
    )


def _lost_shards(published: Artifact, opened: ShardSet) -> list[ShardTask]:
    """The shards of which a published part or receipt is gone; they get the receipts that the manifest names."""
    gone = lost(published)
    manifest = published.manifest
    stems = {PurePosixPath(part.name).stem for part in manifest.parts if part.path in gone}
    stems |= {ref.shard for ref in manifest.receipts if ref.path in gone}
    names = {ref.shard: ref.path.removeprefix("receipts/").removesuffix(".json") for ref in manifest.receipts}
    kept = codes_by_stem(part for part in manifest.parts if part.path not in gone)
    return [
        ShardTask(shard.name, names[shard.stem], kept=kept.get(shard.stem, ()))
        for shard in opened.shards
        if shard.stem in stems
    ]


def codes_by_stem(parts: Iterable[Part]) -> dict[str, tuple[Part, ...]]:
    """Those of the parts that hold codes, by the name of their shard without `.tar`, in the order of their paths."""
    found: dict[str, tuple[Part, ...]] = {}
    for part in sorted(parts, key=lambda part: part.path):
        if part.path.startswith("parts/"):
            stem = PurePosixPath(part.name).stem
            found[stem] = (*found.get(stem, ()), part)
    return found
