"""Shards to codes parts and receipts: one shard in a worker, and many on a pool that counts attempts.

`encode_shard` does one shard without Ray. `encode_shards` hands shards out and gives back what became of each; which
shards, and what their receipts add up to, is the business of the verb.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from pipelines.artifacts import Artifact, ArtifactInput, ArtifactWriter, Part, fingerprint, read_part
from pipelines.cluster.metrics import Meter
from pipelines.cluster.placement import need_of
from pipelines.cluster.pool import End, Outcome, map_items
from pipelines.cluster.progress import stage
from pipelines.cluster.session import ray_session, require_shared_store
from pipelines.codes import ENCODER_VERSION, codes_parts
from pipelines.config import Config, result_settings
from pipelines.errors import DamagedArtifact
from pipelines.images import ImageReject
from pipelines.lineage import MODEL, passed_on
from pipelines.lineage import carried as carried_split
from pipelines.runs import RunLog
from pipelines.schema import (
    REJECTS,
    Reason,
    as_written,
    codes_schema,
    column_of,
    column_type,
    parquet_bytes,
    read_parquet,
    table_of,
)
from pipelines.shards import Record, Shard, ShardSet, open_shards
from pipelines.storage import Entry, Store, in_order
from pipelines.versions import finished, lost, open_current

if TYPE_CHECKING:
    from pipelines.encoder import Encoded, Encoder  # imports torch, which only a worker needs


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
class ShardCodes:
    """One encoded shard as bytes: its codes part and, where there are rejects, their table and counts by reason."""

    codes: bytes
    rows: int
    rejects: bytes | None
    rejected: int
    seconds: Mapping[str, float]
    reasons: Mapping[str, int]
    animated: int = 0
    """Of the rows, those of pictures with several frames, of which the first was taken."""


@dataclass(frozen=True)
class ShardRun:
    """What became of a shard: the receipt that stands for it, None where nothing was put, and what it took."""

    task: ShardTask
    receipt: dict[str, Any] | None
    attempts: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class EncodeJob:
    """What every worker of one encoding needs to know; plain values that travel to other processes."""

    shards: str
    model: str
    out: str
    fingerprint: str
    inputs: tuple[ArtifactInput, ...]
    schema: pa.Schema
    splits: Mapping[str, Any]
    """For the manifest: the split of the shards and that of the model's training images, where there are any."""
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
    root = shards.manifest.meta.get("grown_from", shards.digest)  # shards that have grown keep the place of their codes
    mark = fingerprint("codes", {"shards": root, "model": model.digest}, settings)
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest=shards.digest),
        ArtifactInput(role="model", kind="model", digest=model.digest),
    )
    carried = carried_types(shards, config.encode.carry)
    try:
        bits, classes = int(model.manifest.meta["bits"]), [str(name) for name in shards.manifest.meta["classes"]]
    except (KeyError, TypeError, ValueError):
        raise DamagedArtifact(
            f"{model.uri} does not say its bits, or {shards.uri} its classes, in the manifest"
        ) from None
    schema = codes_schema(bits, mark, classes, carried, config.encode.logits)
    splits = carried_split(shards.manifest) | passed_on(model.manifest, MODEL)
    return EncodeJob(shards.uri, model.uri, Store(out).uri, mark, inputs, schema, splits, config)


def carried_types(shards: Artifact, names: Sequence[str]) -> dict[str, pa.DataType]:
    """Return the types of metadata columns: those that the table had, text where none is known."""
    known = shards.manifest.meta.get("columns", {})
    try:
        return {name: column_type(str(known.get(name, "string"))) for name in names}
    except (AttributeError, ValueError):
        raise DamagedArtifact(f"{shards.uri} says an unknown type of a column in the manifest") from None


def finished_codes(job: EncodeJob) -> Artifact | None:
    """The codes that a run of this job published, of this version of the shards, if all of it is still there."""
    found = finished(Store(job.out), "codes", job.fingerprint)
    return found if found is not None and found.manifest.input("shards").digest == job.shards_digest else None


def over_budget(totals: Mapping[str, int], config: Config) -> bool:
    """More was rejected than `encode.reject_budget` allows."""
    return totals["rejects"] > config.encode.reject_budget * totals["samples"]


def what_is_left(store: Store, opened: ShardSet) -> tuple[Artifact | None, dict[str, dict[str, Any]], list[ShardTask]]:
    """The codes, if they were published, the receipts that need not be made again, and the tasks of the other shards.

    Of published codes those shards are done again of which something is gone, and those done that the shards have got
    since.
    """
    published, known, lost_tasks = None, set[str](), list[ShardTask]()
    if store.size("manifest.json") is not None:
        published = open_current(store, "codes")
        known, lost_tasks = {ref.shard for ref in published.manifest.receipts}, _lost_shards(published, opened)
    new = [shard for shard in opened.shards if shard.stem not in known]
    receipts = claimed_receipts(store, [shard.stem for shard in new]) if new else {}
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


# ------------------------------------------------------------------------------------------------------ one shard


def encode_shard(
    encoder: "Encoder",
    shards: ShardSet,
    shard: Shard,
    schema: pa.Schema,
    config: Config,
    advance: Callable[[], None] = lambda: None,
) -> ShardCodes:
    """Encode one shard; samples = rows + rejected, always. `advance` is called as images and batches are done."""
    carried = list(dict.fromkeys(config.encode.carry))
    samples = shards.read(shard, metadata=bool(carried))
    settings = config.encode
    encoded = encoder.encode_samples(samples, settings.batch_size, config.data.workers, advance, settings.logits)
    return ShardCodes(
        parquet_bytes(table_of(schema, _columns(encoded, {name: schema.field(name).type for name in carried}))),
        len(encoded.kept),
        rejects_bytes(encoded.rejects) if encoded.rejects else None,
        len(encoded.rejects),
        encoded.seconds,
        Counter(str(reject.reason) for _, reject in encoded.rejects),
        encoded.animated,
    )


def _columns(encoded: "Encoded", carried: Mapping[str, pa.DataType]) -> dict[str, Any]:
    records = [sample.record for sample in encoded.kept]
    metadata = [_fields(sample.metadata) for sample in encoded.kept] if carried else []
    return {
        "key": [record.key for record in records],
        "shard": [record.shard for record in records],
        "row": [record.row for record in records],
        "path": [record.path for record in records],
        "code": [row.tobytes() for row in np.ascontiguousarray(encoded.codes)],
        "labels": [list(record.labels) for record in records],
        "logits": [row.tobytes() for row in encoded.logits],
        **{name: _carried(name, [fields.get(name) for fields in metadata], kind) for name, kind in carried.items()},
    }


def _carried(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """A metadata column of its type; what is no text comes into a column of texts as JSON."""
    try:
        return column_of([_text(value) for value in values] if pa.types.is_string(kind) else values, kind)
    except pa.ArrowException as error:
        raise DamagedArtifact(f"the metadata column {name!r} is not {kind}, as its shards say: {error}") from None


def _fields(metadata: bytes | None) -> dict[str, Any]:
    """The fields of a sample's JSON. One that is no object, which only an adopted tar can hold, has none."""
    try:
        value = json.loads(metadata or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    text = value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if text is None else text.encode("utf-8", "replace").decode()  # half an emoji is no text


def rejects_bytes(rejects: Sequence[tuple[Record, ImageReject]]) -> bytes:
    """The rejects table of one shard as Parquet."""
    columns = {
        "key": [record.key for record, _ in rejects],
        "shard": [record.shard for record, _ in rejects],
        "row": [record.row for record, _ in rejects],
        "stage": ["encode"] * len(rejects),
        "reason": [str(reject.reason) for _, reject in rejects],
        "detail": [reject.detail for _, reject in rejects],
    }
    return parquet_bytes(table_of(REJECTS, columns))


def given_up(schema: pa.Schema, shard: Shard, outcome: Outcome[ShardTask]) -> ShardCodes:
    """Reject every sample of a shard that all workers died of or stood still on."""
    reasons = {End.STUCK: Reason.STUCK, End.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY}
    reject = ImageReject(reasons.get(outcome.end, Reason.WORKER_DIED), str(outcome.error))
    empty = parquet_bytes(schema.empty_table())
    rejects = rejects_bytes([(record, reject) for record in shard.records()])
    return ShardCodes(empty, 0, rejects, shard.rows, {}, {str(reject.reason): shard.rows})


def publish_shard(
    writer: ArtifactWriter, shard: Shard, receipt: str, done: ShardCodes, kept: Sequence[Part] = ()
) -> dict[str, Any]:
    """Put a shard's part and rejects, then claim it with the receipt of that name; the first receipt wins.

    Rows that are in parts of codes that are `kept` are left out. Returns the winner. DamagedArtifact where another
    attempt won and what its receipt promises is gone.
    """
    codes, rows = _without_rows(writer.store, kept, done) if kept else (done.codes, done.rows)
    new = [writer.put_part(f"{shard.stem}.parquet", codes, rows)] if rows or not kept else []
    part, *more = sorted([*kept, *new], key=lambda part: part.path)
    rejects = (
        writer.put_part(f"{shard.stem}.parquet", done.rejects, done.rejected, folder="rejects")
        if done.rejects
        else None
    )
    claim = {
        "shard": shard.name,
        "shard_sha256": shard.part.sha256,
        "samples": shard.rows,
        "part": part.model_dump(),
        **({"more": [later.model_dump() for later in more]} if more else {}),
        "rejects": rejects.model_dump() if rejects else None,
        **({"animated": done.animated} if done.animated else {}),
    }
    winner = writer.put_receipt(receipt, claim)
    if winner != claim:
        for lost in receipt_parts(winner):
            if writer.store.size(lost.path) != lost.bytes:
                raise DamagedArtifact(
                    f"{writer.store.uri}/{lost.path} is gone and encoding {shard.name} again gave other bytes: "
                    f"delete receipts/{receipt}.json, or encode to another --out"
                )
    return winner


def _without_rows(store: Store, kept: Sequence[Part], done: ShardCodes) -> tuple[bytes, int]:
    """The codes of a shard less the rows that parts hold which are there, and how many that are."""
    table = read_parquet(done.codes, "what was encoded")
    held = [read_parquet(read_part(store, part), f"{store.uri}/{part.path}", ["row"])["row"] for part in kept]
    rows = np.concatenate([column.to_numpy() for column in held])
    left = table.filter(pa.array(~np.isin(table["row"].to_numpy(), rows)))
    return parquet_bytes(left.cast(as_written(left.schema))), left.num_rows


def count_shard(meter: Meter, shard: Shard, done: ShardCodes) -> None:
    """Count what became of a shard's images, and its bytes."""
    meter.images(shard.rows)
    meter.rejects(done.reasons)
    meter.bytes(read=shard.part.bytes if done.seconds else 0, written=len(done.codes) + len(done.rejects or b""))


def receipt_parts(receipt: Mapping[str, Any]) -> list[Part]:
    """The parts a receipt claims: the codes and, where there are any, the rejects."""
    return [*codes_parts(receipt), *([Part.model_validate(receipt["rejects"])] if receipt["rejects"] else [])]


def claimed_receipt(store: Store, name: str, there: Mapping[str, Entry] | None = None) -> dict[str, Any] | None:
    """The receipt of this name, if it was put and the bytes it promises are there: by `there`, a listing, if given."""

    def size(path: str) -> int | None:
        return store.size(path) if there is None else there[path].size if path in there else None

    path = f"receipts/{name}.json"
    if size(path) is None:
        return None
    try:
        receipt = json.loads(store.read(path))
        parts = receipt_parts(receipt)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise DamagedArtifact(f"{store.uri}/{path} is not a receipt of codes: delete it and run again") from None
    return receipt if all(size(part.path) == part.bytes for part in parts) else None


def claimed_receipts(store: Store, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of these receipts, those whose shards need not be encoded again."""
    there = store.entries()
    found = in_order(lambda name: claimed_receipt(store, name, there), names)
    return {name: receipt for name, receipt in zip(names, found, strict=True) if receipt is not None}


def animated_of(receipts: Iterable[Mapping[str, Any]]) -> int:
    """Pictures of several frames in the shards of these receipts."""
    return sum(int(receipt.get("animated", 0)) for receipt in receipts)


class ShardEncoder:
    """One Ray worker: a model in memory, shards in, receipts out. `progress` counts images and batches."""

    verb = "encode"

    def __init__(self, job: EncodeJob) -> None:
        from pipelines.encoder import Encoder

        self.job, self.progress, self.meter = job, 0, Meter(self.verb)
        self.shards = open_shards(job.shards, job.shards_digest)
        self.encoder = Encoder.open(job.model)
        self.writer = job.writer()

    def run(self, task: ShardTask) -> tuple[dict[str, Any] | None, dict[str, float]]:
        """Encode a shard and put its part and receipt; returns the receipt that won, and what it took.

        A shard that was claimed since it was handed out, by a worker that died right after or by another run, is
        not encoded again.
        """
        shard = self.shards.shard(task.shard)
        claimed = claimed_receipt(self.writer.store, task.receipt)
        if claimed is not None:
            return claimed, {
                "samples": shard.rows,
                "rejects": shard.rows - sum(part.rows for part in codes_parts(claimed)),
            }
        with self.meter.busy():
            done = encode_shard(self.encoder, self.shards, shard, self.job.schema, self.job.config, self._advance)
            begun = time.perf_counter()
            receipt = self.publish(task, shard, done)
            figures = {**done.seconds, "write": time.perf_counter() - begun}
        count_shard(self.meter, shard, done)
        self.meter.seconds(figures)
        return receipt, {**figures, "samples": shard.rows, "rejects": done.rejected, "animated": done.animated}

    def publish(self, task: ShardTask, shard: Shard, done: ShardCodes) -> dict[str, Any] | None:
        """Put what was encoded; None where it is not worth it."""
        return publish_shard(self.writer, shard, task.receipt, done, task.kept)

    def _advance(self) -> None:
        self.progress += 1


# ------------------------------------------------------------------------------------------------------ many shards


def encode_shards(
    job: EncodeJob,
    shards: ShardSet,
    tasks: Sequence[ShardTask],
    worker: type[ShardEncoder],
    give_up: Callable[[Outcome[ShardTask]], dict[str, Any] | None],
    log: RunLog,
) -> list[ShardRun]:
    """Run the tasks on a pool of Ray workers. `give_up` settles a shard that no worker survived; `log` follows."""
    if not tasks:
        return []
    rows = {shard.name: shard.rows for shard in shards.shards}
    runs: list[ShardRun] = []
    with ray_session(job.config):
        settings = job.config.encode
        require_shared_store(Store(job.out), job.config)
        need = need_of(settings, job.config)
        with stage("encode", sum(rows[task.shard] for task in tasks), "images") as advance:
            begun = time.monotonic()
            done = 0
            pool = map_items(
                worker,
                (job,),
                tasks,
                verb=worker.verb,
                need=need,
                workers=settings.workers,
                wait_s=job.config.ray.wait_s,
                max_attempts=settings.max_attempts,
                stuck_s=settings.stuck_s,
                label=lambda task: task.shard,
                failed=lambda task, attempt: log.tried(task.shard, (attempt,), {}),
            )
            for outcome in pool:
                task = outcome.item
                if outcome.error is None:
                    receipt, figures = outcome.result
                else:
                    receipt, figures = give_up(outcome), {"samples": rows[task.shard], "rejects": rows[task.shard]}
                runs.append(ShardRun(task, receipt, outcome.attempts, figures))
                if outcome.error is None:
                    log.tried(task.shard, outcome.tries[-1:], figures)
                log.advance(rows[task.shard])
                done += rows[task.shard]
                advance(rows[task.shard], f"{done / (time.monotonic() - begun):.0f} images/s")
    return runs


def run_figures(runs: Sequence[ShardRun], wall: float) -> dict[str, Any]:
    """Images per second, and how the workers' time was shared out; decode and read run beside forward."""
    spent = {name: sum(run.figures.get(name, 0.0) for run in runs) for name in ("read", "decode", "forward", "write")}
    total = sum(spent.values()) or 1.0
    samples = sum(int(run.figures["samples"]) for run in runs)
    animated = sum(int(run.figures.get("animated", 0)) for run in runs)
    return {
        "images": samples,
        "images_per_second": round(samples / wall, 1),
        **({"animated": animated} if animated else {}),
        "shares": {name: round(value / total, 4) for name, value in spent.items()},
    }
