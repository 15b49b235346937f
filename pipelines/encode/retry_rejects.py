"""`hhnet retry-rejects`: encodes the rejects of published codes again, after their cause is gone.

A shard with rejects is encoded again as a whole. Its batches then have the same images as in an undisturbed run, and so
the recovered samples get the same codes. The result counts only if no code is lost by it. Recovered codes become a part
of their own beside the shard's part, so that a reader of all parts of the folder sees each sample once. The next
version names a new manifest, with new receipts for those shards.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from pipelines.artifacts.commit import list_versions
from pipelines.artifacts.facts import CodesMeta, Receipt
from pipelines.artifacts.manifest import Artifact, ReceiptRef, open_artifact
from pipelines.artifacts.parquet import read_parquet, require_schema
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.tables import REJECTS
from pipelines.artifacts.versions import open_input_version, open_version, publish_next
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.cluster.submit import on_cluster
from pipelines.config.settings import Config, EncodeSettings
from pipelines.encode.job import EncodeJob, ShardTask, codes_by_stem, exceeds_reject_budget, plan_encode
from pipelines.encode.receipts import count_animated, read_receipt, read_whole_receipts
from pipelines.encode.shard import ShardCodes
from pipelines.encode.workers import ShardEncoder, encode_shards, run_figures
from pipelines.errors import FingerprintMismatch
from pipelines.shards.shards import Shard, open_shards
from pipelines.storage import Store


class ShardRetrier(ShardEncoder):
    """A shard encoder that puts new codes only where they are better than those that the shard has."""

    verb = "retry-rejects"

    def publish(self, task: ShardTask, shard: Shard, done: ShardCodes) -> Receipt | None:
        """Claim the shard for the next version if it has fewer rejects, or other reasons for the same rows."""
        now = _reasons(done.rejects, shard.name) if done.rejects else {}
        if now == task.rejected or not now.keys() <= task.rejected.keys():
            return None
        return super().publish(task, shard, done)


@dataclass(frozen=True, kw_only=True)
class RetryResult(Result):
    """The codes and their version after a retry; `recovered` counts the samples that have codes now."""

    verb: str = "retry-rejects"
    version: int
    samples: int
    codes: int
    rejects: int
    recovered: int


@on_cluster("retry-rejects")
def retry_rejects(
    codes: str, config: Config, shards: str | None = None, model: str | None = None, pool: Pool = ray_pool
) -> RetryResult:
    """Encode the rejects of the current version of `codes` again, and publish the outcome.

    The status is `degraded` while more than `encode.reject_budget` is still rejected, `unchanged` where no shard
    improved. Shards and model are found at their remembered places unless named. Raises FingerprintMismatch where this
    encoder would give other codes.
    """
    store = Store(codes)
    known = list_versions(store)
    number = known[-1] if known else 1
    base = open_version(store, number, "codes") if known else open_artifact(store, "codes")
    tasks = _list_tasks(base, number + 1)
    artifact = base
    if tasks:
        job = _plan_retry(base, config, shards, model)
        artifact = _encode_again(job, base, number + 1, tasks, pool)
    changed = artifact.digest != base.digest
    totals = artifact.manifest.totals
    return RetryResult.of(
        artifact,
        "unchanged" if not changed else "degraded" if exceeds_reject_budget(totals, config) else "done",
        version=number + changed,
        **totals,
        recovered=base.manifest.totals["rejects"] - totals["rejects"],
    )


def _list_tasks(base: Artifact, number: int) -> list[ShardTask]:
    """Return tasks for the shards with rejects. Their receipts are kept apart from those of other versions."""
    found, kept = [], codes_by_stem(base.manifest.parts)
    for part in base.manifest.parts:
        if part.path.startswith("rejects/"):
            stem = PurePosixPath(part.name).stem
            reasons = _reasons(base.read(part), f"{base.uri}/{part.path}")
            found.append(ShardTask(f"{stem}.tar", f"v{number}/{stem}", reasons, kept[stem]))
    return found


def _reasons(rejects: bytes, where: str) -> dict[int, str]:
    """Return the rows of a rejects table with their reasons."""
    table = read_parquet(rejects, where)
    require_schema(table, REJECTS, where)
    return dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))


def _plan_retry(base: Artifact, config: Config, shards: str | None, model: str | None) -> EncodeJob:
    """Return the job that made the codes, with the settings that they were made with."""
    made = {name.removeprefix("encode."): value for name, value in base.facts(CodesMeta).settings.items()}
    encode = EncodeSettings.model_validate({**config.encode.model_dump(), **made})
    source, network = open_input_version(base, "shards", shards), open_input_version(base, "model", model)
    job = plan_encode(source, network, base.uri, config.model_copy(update={"encode": encode}))
    if job.fingerprint != base.manifest.fingerprint:
        raise FingerprintMismatch(
            f"{base.uri} is codes {base.manifest.fingerprint[:12]}, this hhnet would make {job.fingerprint[:12]} of "
            "the same inputs: retry with the version that encoded them, or encode anew to another --out"
        )
    return job


def _encode_again(job: EncodeJob, base: Artifact, number: int, tasks: list[ShardTask], pool: Pool) -> Artifact:
    begun = time.monotonic()
    put = read_whole_receipts(base.store, [task.receipt for task in tasks])
    missing = [task for task in tasks if task.receipt not in put]
    if missing:
        opened, facts = open_shards(job.shards), {"fingerprint": job.fingerprint, "shards": len(missing)}
        total = sum(opened.shard(task.shard).rows for task in missing)
        with RunLog(base.store, "retry-rejects", job.config, total=total, unit="images", **facts) as log:
            runs = encode_shards(job, opened, missing, ShardRetrier, lambda outcome: None, log, pool)
            log.record_figures(**run_figures(runs, time.monotonic() - begun))
        put |= {run.task.receipt: run.receipt for run in runs if run.receipt is not None}
    return _publish_retried(base, number, put) if put else base


def _publish_retried(base: Artifact, number: int, put: Mapping[str, Receipt]) -> Artifact:
    """Publish the next version: new receipts for the shards in `put`, the old ones for all others."""
    replaced = {PurePosixPath(name).name for name in put}
    manifest = base.manifest
    refs = [ref for ref in manifest.receipts if ref.shard not in replaced]
    parts = [part for part in manifest.parts if PurePosixPath(part.name).stem not in replaced]
    for name, receipt in put.items():
        refs.append(ReceiptRef.of(PurePosixPath(name).name, receipt, name))
        parts += receipt.parts
    rejected = sum(part.rows for part in parts if part.path.startswith("rejects/"))
    samples = manifest.totals["samples"]
    totals = {"samples": samples, "codes": samples - rejected, "rejects": rejected}
    meta, animated = base.facts(CodesMeta), count_animated(put.values())
    if meta.animated:
        animated += meta.animated
        animated -= count_animated(read_receipt(base, ref) for ref in manifest.receipts if ref.shard in replaced)
    return publish_next(base, number, parts, refs, totals, meta=meta.model_copy(update={"animated": animated}))
