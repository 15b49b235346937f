"""Encodes many shards on a pool of Ray workers; each attempt is counted and each shard settled."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.tables import Reason, parquet_bytes
from pipelines.artifacts.words import last_part
from pipelines.cluster.metrics import Meter
from pipelines.cluster.pool import End, Outcome
from pipelines.cluster.progress import stage
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.encode.job import EncodeJob, ShardTask
from pipelines.encode.receipts import publish_shard, read_whole_receipt
from pipelines.encode.shard import ShardCodes, encode_shard, rejects_bytes
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.shards import Shard, ShardSet, open_shards
from pipelines.storage import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardRun:
    """The outcome of a shard: the receipt that stands for it (None if nothing was put) and the figures of its time."""

    task: ShardTask
    receipt: Receipt | None
    attempts: int
    figures: Mapping[str, float]


def reject_whole_shard(schema: pa.Schema, shard: Shard, outcome: Outcome[ShardTask]) -> ShardCodes:
    """Reject every sample of a shard that killed or hung all workers that tried it."""
    reasons = {End.STUCK: Reason.STUCK, End.OUT_OF_MEMORY: Reason.OUT_OF_MEMORY}
    reject = ImageReject(reasons.get(outcome.end, Reason.WORKER_DIED), str(outcome.error))
    empty = parquet_bytes(schema.empty_table())
    rejects = rejects_bytes([(record, reject) for record in shard.records()])
    return ShardCodes(empty, 0, rejects, shard.rows, {}, {str(reject.reason): shard.rows})


def count_shard(meter: Meter, shard: Shard, done: ShardCodes) -> None:
    """Count a shard's images by outcome, and its bytes."""
    meter.count_images(shard.rows)
    meter.count_rejects(done.reasons)
    meter.count_bytes(read=shard.part.bytes if done.seconds else 0, written=len(done.codes) + len(done.rejects or b""))


class ShardEncoder:
    """One Ray worker that holds a model and turns shards into receipts. `progress` counts images and batches."""

    verb = "encode"

    def __init__(self, job: EncodeJob) -> None:
        from pipelines.encode.encoder import Encoder

        self.job, self.progress, self.meter = job, 0, Meter(self.verb)
        self.shards = open_shards(job.shards, job.shards_digest)
        self.encoder = Encoder.open(job.model)
        self.writer = job.writer()

    def run(self, task: ShardTask) -> tuple[Receipt | None, dict[str, float]]:
        """Encode a shard and put its part and receipt; return the receipt that won, and the figures of its time.

        A shard is not encoded again if it was claimed since it was handed out, by a worker that died right after or by
        another run.
        """
        shard = self.shards.shard(task.shard)
        claimed = read_whole_receipt(self.writer.store, task.receipt)
        if claimed is not None:
            return claimed, {"samples": shard.rows, "rejects": shard.rows - sum(part.rows for part in claimed.codes)}
        with self.meter.busy():
            done = encode_shard(self.encoder, self.shards, shard, self.job.schema, self.job.config, self._advance)
            begun = time.perf_counter()
            receipt = self.publish(task, shard, done)
            figures = {**done.seconds, "write": time.perf_counter() - begun}
        count_shard(self.meter, shard, done)
        self.meter.count_seconds(figures)
        fields = {"samples": shard.rows, "rejects": done.rejected, "seconds": figures}
        _log.debug("%s: %d images encoded, %d of them rejected", shard.name, shard.rows, done.rejected, extra=fields)
        return receipt, {**figures, "samples": shard.rows, "rejects": done.rejected, "animated": done.animated}

    def publish(self, task: ShardTask, shard: Shard, done: ShardCodes) -> Receipt | None:
        """Put the encoded shard and return its receipt; a subclass may return None to put nothing."""
        return publish_shard(self.writer, shard, task.receipt, done, task.kept)

    def _advance(self) -> None:
        self.progress += 1


def encode_shards(
    job: EncodeJob,
    shards: ShardSet,
    tasks: Sequence[ShardTask],
    worker: type[ShardEncoder],
    give_up: Callable[[Outcome[ShardTask]], Receipt | None],
    log: RunLog,
    pool: Pool = ray_pool,
) -> list[ShardRun]:
    """Run the tasks on the workers of a pool, recorded in `log`; `give_up` settles a shard that no worker survived."""
    if not tasks:
        return []
    rows = {shard.name: shard.rows for shard in shards.shards}
    runs: list[ShardRun] = []
    settings = job.config.encode
    total = sum(rows[task.shard] for task in tasks)
    name = f"{worker.verb}: {last_part(job.out)}"
    with pool(Store(job.out), job.config, settings) as map_items, stage(name, total, "images") as advance:
        begun = time.monotonic()
        done = 0
        outcomes = map_items(
            worker,
            (job,),
            tasks,
            verb=worker.verb,
            workers=settings.workers,
            max_attempts=settings.max_attempts,
            stuck_s=settings.stuck_s,
            label=lambda task: task.shard,
            failed=lambda task, attempt: log.record_attempts(task.shard, (attempt,), {}),
        )
        for outcome in outcomes:
            task = outcome.item
            if outcome.error is None:
                receipt, figures = outcome.result
            else:
                receipt, figures = give_up(outcome), {"samples": rows[task.shard], "rejects": rows[task.shard]}
            runs.append(ShardRun(task, receipt, outcome.attempts, figures))
            if outcome.error is None:
                log.record_attempts(task.shard, outcome.tries[-1:], figures)
            log.advance(rows[task.shard])
            done += rows[task.shard]
            advance(rows[task.shard], f"{done / (time.monotonic() - begun):,.0f} images/s")
    return runs


def run_figures(runs: Sequence[ShardRun], wall: float) -> dict[str, Any]:
    """Return images per second and the shares of the workers' time; decode and read run beside forward."""
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
