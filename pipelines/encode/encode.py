"""`hhnet encode`: shards and a model to packed codes in Parquet, one part per shard, on a pool of Ray workers.

A finished run is recognised from its manifest and one listing, before Ray or torch is imported. Otherwise the receipts
tell which shards are done. The others are encoded, and the manifest is put when every shard has its receipt.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pipelines.artifacts.commit import ArtifactWriter, list_versions
from pipelines.artifacts.facts import CodesMeta, Receipt
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.tables import REAL_CODES
from pipelines.artifacts.versions import list_lost, open_current, publish_next
from pipelines.cluster.attempts import Outcome
from pipelines.cluster.metrics import Meter
from pipelines.cluster.progress import say_resumed
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.session import kept_ray
from pipelines.cluster.submit import on_cluster
from pipelines.config.fingerprint import result_settings
from pipelines.config.settings import Config
from pipelines.encode.batch_size import resolve_batch_size
from pipelines.encode.job import (
    EncodeJob,
    ShardTask,
    exceeds_reject_budget,
    find_finished_codes,
    find_missing_work,
    plan_encode,
)
from pipelines.encode.receipts import count_animated, publish_shard
from pipelines.encode.workers import ShardEncoder, count_shard, encode_shards, reject_whole_shard, run_figures
from pipelines.errors import DamagedArtifact, Degraded, InputError
from pipelines.shards.shards import ShardSet, open_shards


@dataclass(frozen=True, kw_only=True)
class EncodeResult(Result):
    """Result of an encode. `animated` counts pictures of several frames; only their first frame is encoded.

    `images_per_second`, and `shares` of the time by step, describe this run and are unset if it did nothing.
    """

    verb: str = "encode"
    samples: int
    codes: int
    rejects: int
    animated: int | None = None
    images_per_second: float | None = None
    shares: dict[str, float] | None = None


@on_cluster("encode")
def encode(
    shards: str, model: str, out: str, config: Config, allow_degraded: bool = False, pool: Pool = ray_pool
) -> EncodeResult:
    """Encode all samples of a shards artifact; a rerun encodes only missing shards.

    Raises Degraded when more than `encode.reject_budget` was rejected, unless `allow_degraded` is set.
    """
    source, network = open_current(shards, "shards"), open_artifact(model, "model")
    with kept_ray() if config.encode.batch_size == "auto" else nullcontext():  # its trial and the work share one
        config = resolve_batch_size(source, network, out, config, pool)
        return _encode(plan_encode(source, network, out, config), allow_degraded, pool)


def _encode(job: EncodeJob, allow_degraded: bool, pool: Pool) -> EncodeResult:
    artifact = find_finished_codes(job)
    status = "done" if artifact is None else "unchanged"
    measured: dict[str, Any] = {}
    if artifact is None:
        artifact, measured = _encode_missing(job, allow_degraded, pool)
    totals = artifact.manifest.totals
    return EncodeResult.of(
        artifact,
        "degraded" if exceeds_reject_budget(totals, job.config) else status,
        **totals,
        animated=artifact.facts(CodesMeta).animated or None,
        **{name: measured[name] for name in ("images_per_second", "shares") if name in measured},
    )


def _encode_missing(job: EncodeJob, allow_degraded: bool, pool: Pool) -> tuple[Artifact, dict[str, Any]]:
    """Encode the missing shards and publish; shards that were published and lost since are encoded again."""
    begun = time.monotonic()
    writer = job.writer()
    opened = open_shards(job.shards, job.shards_digest)
    published, receipts, tasks = find_missing_work(writer.store, opened)

    def reject_all(outcome: Outcome[ShardTask]) -> Receipt:
        shard = opened.shard(outcome.item.shard)
        rejects = reject_whole_shard(job.schema, shard, outcome)
        receipt = publish_shard(writer, shard, outcome.item.receipt, rejects, outcome.item.kept)
        count_shard(Meter("encode"), shard, rejects)
        return receipt

    done = opened.samples - sum(opened.shard(task.shard).rows for task in tasks)
    say_resumed("encode", done, opened.samples, "images")
    facts = {"fingerprint": job.fingerprint, "shards": len(opened.shards)}
    with RunLog(writer.store, "encode", job.config, done=done, total=opened.samples, unit="images", **facts) as log:
        runs = encode_shards(job, opened, tasks, ShardEncoder, reject_all, log, pool)
        if runs:
            log.record_figures(**run_figures(runs, time.monotonic() - begun))
        if published is None or published.manifest.input("shards").digest != job.shards_digest:
            receipts |= {run.task.receipt: run.receipt for run in runs if run.receipt is not None}
            published = _commit_codes(job, writer, opened, receipts, allow_degraded, published)
        gone = list_lost(published)
        if gone:
            raise DamagedArtifact(
                f"{published.uri}/{min(gone)} is gone and did not come back with the bytes that were published: "
                "encode to another --out"
            )
    return published, log.figures


def _commit_codes(
    job: EncodeJob,
    writer: ArtifactWriter,
    opened: ShardSet,
    receipts: Mapping[str, Receipt],
    allow_degraded: bool,
    before: Artifact | None,
) -> Artifact:
    """Publish the codes: a first version, or a next one with the shards of `before` and the new ones."""
    manifest = before.manifest if before else None
    held = {ref.shard for ref in manifest.each_receipt()} if manifest else set()
    receipts = {name: receipt for name, receipt in receipts.items() if PurePosixPath(name).name not in held}
    if lacking := held - {shard.stem for shard in opened.shards}:
        raise InputError(
            f"{writer.store.uri} has codes of {min(lacking)}.tar, which {job.shards} lacks: name the newer shards, or "
            "another --out"
        )
    assert {*receipts, *held} == {shard.stem for shard in opened.shards}, "every shard has its receipt"
    parts = [part for receipt in receipts.values() for part in receipt.parts]
    parts += manifest.parts if manifest else ()
    rejected = sum(part.rows for part in parts if part.path.startswith("rejects/"))
    totals = {"samples": opened.samples, "codes": sum(part.rows for part in parts) - rejected, "rejects": rejected}
    if exceeds_reject_budget(totals, job.config) and not allow_degraded:
        raise Degraded(
            f"{rejected} of {opened.samples} samples were rejected, more than encode.reject_budget = "
            f"{job.config.encode.reject_budget:g}: `hhnet rejects {writer.store.uri}` names them; to publish without "
            "them pass --allow-degraded to encode, or raise the budget with --set encode.reject_budget=SHARE"
        )
    meta = CodesMeta(
        bits=int(job.schema.metadata[b"hhnet.bits"]),
        classes=opened.classes,
        carried={name: str(job.schema.field(name).type) for name in job.config.encode.carry},
        settings=result_settings(job.config, "codes"),
        real_codes=REAL_CODES if job.config.encode.real_codes else None,
        animated=count_animated(receipts.values()) + (before.facts(CodesMeta).animated if before else 0),
        protocol=job.split,
        trained_on=job.trained_on,
    )
    if before is None:
        writer.commit(parts, totals, meta, receipts)
        return open_current(writer.store, "codes")
    drafted = writer.draft(parts, totals, meta, receipts).manifest
    inputs = [entry.model_dump() for entry in job.inputs]
    known = list_versions(writer.store)
    number = (known[-1] if known else 1) + 1
    refs = [*before.manifest.each_receipt(), *drafted.receipts]
    return publish_next(before, number, parts, refs, totals, inputs=inputs, meta=meta)
