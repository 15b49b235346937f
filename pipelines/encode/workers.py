"""Encodes many shards on a pool of Ray workers; each attempt is counted and each shard settled."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.tables import Reason
from pipelines.artifacts.words import last_part
from pipelines.cluster.attempts import End, Outcome
from pipelines.cluster.metrics import Meter
from pipelines.cluster.placement import share_of_cpus
from pipelines.cluster.progress import stage
from pipelines.cluster.ray_pool import Pool, ray_pool
from pipelines.encode.job import EncodeJob, ShardTask
from pipelines.encode.receipts import publish_shard, read_whole_receipt
from pipelines.encode.shard import ShardCodes, rejects_bytes, shard_codes
from pipelines.shards.containers.limits import ImageReject
from pipelines.shards.shards import Shard, ShardSet, open_shards
from pipelines.storage import Store

if TYPE_CHECKING:  # they import torch, which only a worker needs
    from pipelines.encode.encoder import Encoded, Encoding
    from pipelines.encode.feed import Feed

_log = logging.getLogger(__name__)

LOOK_AHEAD_S = 0.005
"""Seconds between two looks for a batch of the next shard while the present one is put."""


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
        self.feed = self._open_feed()
        self.writer = job.writer()
        self._upcoming: ShardTask | None = None
        self._ahead: tuple[str, Encoding] | None = None
        """The expected shard and its encoding, begun while the shard before is being put."""

    def _open_feed(self) -> "Feed":
        from pipelines.encode.encoder import pin
        from pipelines.encode.feed import Shaping, ThreadFeed, count_processes
        from pipelines.encode.process_feed import ProcessFeed
        from pipelines.encode.remote_decoder import place_decoders

        config, on_gpu = self.job.config, self.encoder.device.type == "cuda"
        settings = config.encode
        how = Shaping(self.encoder.preprocess, settings.images_per_pass, config.data.workers, bool(settings.carry))
        processes = count_processes(config, share_of_cpus(settings) if on_gpu else None)
        remote = place_decoders(config, how)
        if not processes and remote is None:
            return ThreadFeed(self.shards, how, self._advance)
        # At least one process: what a decoder elsewhere fails to do is done again here.
        feed = ProcessFeed(self.shards, how, max(1, processes), self._advance, settings.max_attempts, remote)
        if on_gpu:
            pin(feed.ring)
        return feed

    def expect(self, task: ShardTask) -> None:
        """Make the shard ready that is likely to follow the next one."""
        self._upcoming = task

    def run(self, task: ShardTask) -> tuple[Receipt | None, dict[str, float]]:
        """Encode a shard and put its part and receipt; return the receipt that won, and the figures of its time.

        A shard is not encoded again if it was claimed since it was handed out, by a worker that died right after or by
        another run.
        """
        shard, upcoming = self.shards.shard(task.shard), self._upcoming
        self._upcoming = None
        claimed = read_whole_receipt(self.writer.store, task.receipt)
        if claimed is not None:
            return claimed, {"samples": shard.rows, "rejects": shard.rows - sum(part.rows for part in claimed.codes)}
        cpu = time.process_time()
        with self.meter.busy():
            encoding = self._encoding(shard)
            if upcoming is not None:
                self.feed.expect(self.shards.shard(upcoming.shard))
            encoded = encoding.finish(self._advance, partial(self._begin_ahead, upcoming))
            with ThreadPoolExecutor(1, thread_name_prefix="put") as beside:
                putting = beside.submit(self._put, task, shard, encoded)
                self._work_ahead(putting)
                done, receipt, write_s = putting.result()
            figures = {**done.seconds, "write": write_s}
        count_shard(self.meter, shard, done)
        self.meter.count_seconds(figures)
        fields = {"samples": shard.rows, "rejects": done.rejected, "seconds": figures}
        _log.debug("%s: %d images encoded, %d of them rejected", shard.name, shard.rows, done.rejected, extra=fields)
        counts = {"samples": shard.rows, "rejects": done.rejected, "animated": done.animated}
        return receipt, {**figures, "cpu": time.process_time() - cpu, **counts}

    def _encoding(self, shard: Shard) -> "Encoding":
        """Return the encoding of a shard: the one that was begun, or a new one."""
        from pipelines.encode.encoder import Encoding

        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if ahead[0] == shard.name:
                return ahead[1]
            ahead[1].close()
        settings = self.job.config.encode
        return Encoding(self.encoder, self.feed.batches(shard), settings.images_per_pass, settings.real_codes)

    def _begin_ahead(self, upcoming: ShardTask | None) -> None:
        """Begin the next shard while the last batch of the present one runs, so that a GPU does not wait."""
        if upcoming is not None and self.feed.apart:
            shard = self.shards.shard(upcoming.shard)
            self._ahead = shard.name, self._encoding(shard)
            self._step_ahead()

    def _step_ahead(self) -> bool:
        """Encode a batch of the next shard if one is ready; tell whether it was."""
        if self._ahead is None or not self.feed.is_ready(self.shards.shard(self._ahead[0])):
            return False
        return self._ahead[1].step()

    def _work_ahead(self, putting: "Future[Any]") -> None:
        """Encode batches of the next shard that are ready, until the present one is put."""
        while not putting.done():
            if not self._step_ahead():
                wait([putting], LOOK_AHEAD_S)

    def _put(self, task: ShardTask, shard: Shard, encoded: "Encoded") -> tuple[ShardCodes, Receipt | None, float]:
        """Put an encoded shard; return what was put, the receipt and the seconds of putting."""
        done = shard_codes(encoded, shard, self.job.schema, self.job.config)
        begun = time.perf_counter()
        receipt = self.publish(task, shard, done)
        return done, receipt, time.perf_counter() - begun

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
    with stage(name, total, "images") as advance, pool(Store(job.out), job.config, settings) as map_items:
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
