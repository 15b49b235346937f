"""`hhnet encode --dry-run`: predicts the cost of an encode from two of its shards.

One worker encodes them on the Ray that the encode would use, and their codes are thrown away: nothing is put at --out.
The second shard gives the rates, since the first one also pays for loading libraries. The rest is arithmetic under
three assumptions: workers side by side are as fast as one alone until their hosts have no CPU left, all hosts are like
the tried one, and the store serves all workers as well as it served one.
"""

import heapq
import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import psutil

from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.manifest import Artifact, open_artifact
from pipelines.artifacts.result import Result
from pipelines.artifacts.runs import RunLog
from pipelines.artifacts.versions import open_current
from pipelines.cluster.attempts import Outcome
from pipelines.cluster.placement import await_need, room_on_nodes
from pipelines.cluster.session import kept_ray, ray_session
from pipelines.cluster.submit import on_cluster
from pipelines.config.settings import Config
from pipelines.encode.batch_size import resolve_batch_size
from pipelines.encode.job import EncodeJob, ShardTask, find_finished_codes, find_missing_work, plan_encode
from pipelines.encode.workers import ShardEncoder, ShardRun, encode_shards
from pipelines.errors import WorkFailed, format_count
from pipelines.shards.index import DIRECTORY_NAME
from pipelines.shards.shards import Shard, ShardSet, open_shards
from pipelines.storage import Store, canonical_json, scratch_folder

STEPS = ("read", "decode", "forward", "write")
MILLION = 1_000_000
MIN_RATE_TIME_S = 1e-6
"""Shortest time in seconds that a rate is computed from; shorter ones count as this."""


@dataclass(frozen=True, kw_only=True)
class PreflightResult(Result):
    """Predicted cost of an encode; only the counts are set if nothing is left to encode."""

    TABLES = ("by_step",)

    verb: str = "encode"
    status: str = "dry-run"
    digest: str | None = None
    shards: int
    shards_left: int
    images_left: int
    time: str
    binds: str | None = None
    tried: str | None = None
    rejects_tried: int | None = None
    workers: int | None = None
    seconds: float
    startup_seconds: float | None = None
    images_per_second: float | None = None
    by_step: list[dict[str, Any]] | None = None
    bytes_read: int | None = None
    bytes_written: int | None = None
    requests: dict[str, int] | None = None
    gpu_hours: float | None = None
    cpu_hours: float | None = None
    cost: float | None = None
    million_images: dict[str, float] | None = None


@on_cluster("encode --dry-run")
def preflight(shards: str, model: str, out: str, config: Config, price: float | None = None) -> PreflightResult:
    """Predict the cost of encoding the shards that are missing at `out`, without putting anything there.

    `price` is the price of one hour of a worker. Raises the errors that `encode` would raise before its first shard.
    """
    source, network = open_current(shards, "shards"), open_artifact(model, "model")
    with kept_ray() if config.encode.batch_size == "auto" else nullcontext():
        job = plan_encode(source, network, out, resolve_batch_size(source, network, out, config))
        return _preflight(job, network, price)


def _preflight(job: EncodeJob, network: Artifact, price: float | None) -> PreflightResult:
    store, opened = Store(job.out), open_shards(job.shards, job.shards_digest)
    job.require_root()
    named = {shard.name: shard for shard in opened.shards}
    tasks = [] if find_finished_codes(job) else find_missing_work(store, opened)[2]
    left = [named[task.shard] for task in tasks]
    images = sum(shard.rows for shard in left)
    result = PreflightResult(
        uri=store.uri,
        shards=len(opened.shards),
        shards_left=len(left),
        images_left=images,
        time="nothing is left to encode",
        seconds=0.0,
    )
    if not images:
        return result
    trial, fleet = _try(job, opened, [task for task in tasks if named[task.shard].rows], len(tasks))
    estimate = Estimate(trial, fleet, [shard.rows for shard in left])
    traffic = _traffic(job, opened, network, left, trial, fleet)
    return replace(result, **estimate.figures(), **traffic, **estimate.cost(price))


# ---------------------------------------------------------------------------------------------------------- trial


class TrialReceipt(Receipt):
    """A receipt with the host that encoded its shard and the bytes that would be put at --out."""

    host: str
    device: str
    cpus: float
    lanes: int
    """Threads that decoded, in all processes."""
    chunk_samples: int
    """Samples that an object store is asked for at a time; 0 = whole blocks, whatever is in them."""
    bytes: int
    puts: int


class TrialEncoder(ShardEncoder):
    """Encodes shards as any worker does, but puts them into a scratch folder that is deleted."""

    verb = "dry-run"

    def __init__(self, job: EncodeJob) -> None:
        with scratch_folder() as folder:
            super().__init__(replace(job, out=str(folder)))
        self._target = Store(job.out)

    def run(self, task: ShardTask) -> tuple[TrialReceipt, dict[str, float]]:
        """Encode a shard; return its trial receipt and the figures of its time."""
        with scratch_folder() as folder:
            self.writer = replace(self.job, out=str(folder)).writer()
            begun, cpu_begun = time.perf_counter(), _cpu_seconds()
            receipt, figures = super().run(task)
            wall, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu_begun
        assert receipt is not None, "an empty folder holds no better result"
        puts = 1 + len(receipt.parts)
        # The scratch folder is local: add the time of the requests that --out would get.
        far = 0.0 if self._target.is_local else (1 + puts) * self._round_trip()
        figures |= {"write": figures["write"] + far, "wall": wall + far, "cpu": cpu}
        written = sum(part.bytes for part in receipt.parts) + len(canonical_json(receipt))
        where = {"host": platform.node(), "device": _device(), "cpus": float(allowed_cpus())}
        how = {"lanes": self.feed.lanes, "chunk_samples": self.feed.chunk_samples}
        return TrialReceipt.model_validate({**dict(receipt), **where, **how, "bytes": written, "puts": puts}), figures

    def _round_trip(self) -> float:
        """Return the seconds of a request to the store at --out, the least of three; a small put takes as long."""
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            self._target.size("manifest.json")
            seconds.append(time.perf_counter() - begun)
        return min(seconds)


def _cpu_seconds() -> float:
    """Return the CPU-seconds of this process and its decode processes so far."""
    times = [psutil.Process().cpu_times()]
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it ended
            times.append(child.cpu_times())
    return sum(one.user + one.system for one in times)


def _device() -> str:
    import torch  # the worker has it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


@dataclass(frozen=True)
class TrialFigures:
    """Measurements of the tried shards. `rows`, `wall`, `cpu`, `rates` and `last` come from the last one.

    `startup` is the time before the first image; `rates` are images per second as if a worker did only that step.
    """

    shards: int
    images: int
    rejects: int
    seconds: float
    startup: float
    rows: int
    wall: float
    cpu: float
    rates: dict[str, float]
    bytes_per_image: float
    puts_per_shard: float
    last: TrialReceipt


@dataclass(frozen=True)
class Fleet:
    """The workers that an encode would have: their number, the GPUs of each, and their shared hosts."""

    workers: int
    gpus: float
    hosts: int


def _try(job: EncodeJob, opened: ShardSet, tasks: Sequence[ShardTask], most: int) -> tuple[TrialFigures, Fleet]:
    """Encode the first shard and one from the middle with one worker; at most `most` workers would find work."""
    picked = [tasks[0], *([tasks[len(tasks) // 2]] if len(tasks) > 1 else [])]
    alone = job.config.encode.model_copy(update={"workers": 1})
    begun = time.perf_counter()
    with ray_session(job.config), scratch_folder() as folder, RunLog(Store(folder), "dry-run") as log:
        need = await_need(job.config.encode, job.config)
        wanted = min(most, job.config.encode.workers or most)
        rooms = room_on_nodes(wanted, need)
        workers = max(1, min(wanted, sum(rooms)))
        one = replace(job, config=job.config.model_copy(update={"encode": alone}))
        runs = encode_shards(one, opened, picked, TrialEncoder, _failed, log)
        seconds = time.perf_counter() - begun
    fleet = Fleet(workers, need.gpus, max(1, min(len(rooms), workers)))
    return _measured(runs, seconds), fleet


def _failed(outcome: Outcome[ShardTask]) -> Receipt:
    raise WorkFailed(f"the trial failed, as the encode would: {outcome.error}")


def _measured(runs: Sequence[ShardRun], seconds: float) -> TrialFigures:
    last, receipts = runs[-1].figures, [run.receipt for run in runs if isinstance(run.receipt, TrialReceipt)]
    rows = int(last["samples"])
    images = sum(int(run.figures["samples"]) for run in runs)
    spent = {**{step: last[step] for step in STEPS}, "decode": last["decode"] / receipts[-1].lanes}
    return TrialFigures(
        shards=len(runs),
        images=images,
        rejects=sum(int(run.figures["rejects"]) for run in runs),
        seconds=sum(run.figures["wall"] for run in runs),
        # All seconds of the trial but those that its images take at the rate of the last shard.
        startup=max(0.0, seconds - images * last["wall"] / rows),
        rows=rows,
        wall=last["wall"],
        cpu=last["cpu"],
        rates={step: rows / max(taken, MIN_RATE_TIME_S) for step, taken in spent.items()},
        bytes_per_image=sum(receipt.bytes for receipt in receipts) / images,
        puts_per_shard=sum(receipt.puts for receipt in receipts) / len(runs),
        last=receipts[-1],
    )


# ----------------------------------------------------------------------------------------------------- arithmetic


@dataclass(frozen=True)
class Estimate:
    """Time and cost of encoding shards of `rows` images with the workers of `fleet`, computed from the trial."""

    trial: TrialFigures
    fleet: Fleet
    rows: Sequence[int]

    @property
    def apart(self) -> float:
        """Images per second if each worker were as fast as one alone."""
        return self.fleet.workers * self.trial.rows / self.trial.wall

    @property
    def rate(self) -> float:
        """Images per second of all workers together, limited by the CPUs of their hosts."""
        cpus = self.fleet.hosts * self.trial.last.cpus
        return min(self.apart, cpus * self.trial.rows / max(self.trial.cpu, MIN_RATE_TIME_S))

    @property
    def seconds(self) -> float:
        """Seconds until the last worker is done; each worker takes the next shard when it is free."""
        free = [0.0] * self.fleet.workers
        for rows in self.rows:
            heapq.heapreplace(free, free[0] + rows * self.fleet.workers / self.rate)
        return self.trial.startup + max(free)

    def figures(self) -> dict[str, Any]:
        """Return the time, the limiting step, and the rates of the steps."""
        trial, workers = self.trial, self.fleet.workers
        one = {**trial.rates, "together": trial.rows / trial.wall}
        among = {**{step: each * workers for step, each in trial.rates.items()}, "together": self.rate}
        return {
            "time": f"{format_duration(self.seconds)} with {format_count(workers, 'worker')}, of which "
            f"{format_duration(trial.startup)} before the first image",
            "binds": self.binding(),
            "tried": f"{trial.images:,} images of {format_count(trial.shards, 'shard')} in "
            f"{format_duration(trial.seconds)} by one worker on {trial.last.host} ({trial.last.device}); the last "
            f"{trial.rows:,} give the rates",
            "rejects_tried": trial.rejects,
            "workers": workers,
            "seconds": round(self.seconds, 1),
            "startup_seconds": round(trial.startup, 1),
            "images_per_second": round(self.rate, 1),
            "by_step": [
                {"step": step, "one_worker": round(one[step], 1), "all_workers": round(among[step], 1)} for step in one
            ],
        }

    def binding(self) -> str:
        """Describe the step that limits the rate, and the rate without that limit."""
        trial, workers, rate = self.trial, self.fleet.workers, f"{self.rate:,.0f}"
        if self.rate < self.apart:
            each, cpus = 1000 * trial.cpu / trial.rows, self.fleet.hosts * trial.last.cpus
            return (
                f"cpu-bound: {rate} of {self.apart:,.0f} images/s: {format_count(workers, 'worker')} share "
                f"{cpus:g} CPUs, and an image takes {each:.1f} ms of CPU"
            )
        slowest = min(trial.rates, key=lambda step: trial.rates[step])
        others = ("read", "decode") if slowest == "forward" else ("forward",)
        limit = min(others, key=lambda step: trial.rates[step])
        return f"{slowest}-bound: {rate} of {trial.rates[limit] * workers:,.0f} images/s, which {limit} could do"

    def cost(self, price: float | None) -> dict[str, Any]:
        """Return hours of GPUs or CPUs and the money, for these images and for each million after the start."""
        hours, million = self.seconds / 3600, MILLION / self.rate / 3600
        unit, units = ("gpu_hours", self.fleet.gpus) if self.fleet.gpus else ("cpu_hours", 1)

        def priced(hours: float) -> dict[str, float]:
            money = {} if price is None else {"cost": round(price * hours * self.fleet.workers, 4)}
            return {unit: round(units * hours * self.fleet.workers, 4), **money}

        return {**priced(hours), "million_images": {"hours": round(million, 4), **priced(million)}}


def _traffic(
    job: EncodeJob, opened: ShardSet, network: Artifact, left: Sequence[Shard], trial: TrialFigures, fleet: Fleet
) -> dict[str, Any]:
    """Return the bytes to move and the requests to S3 stores: those of each shard and those of each worker's start."""
    directory, weights = opened.artifact.manifest.part(DIRECTORY_NAME), network.manifest.parts
    # Tars are dealt in order, so that a worker has a tar or more of each piece of the index until the tars run out.
    pieces = {shard.place.piece: shard.index.pieces[shard.place.piece].bytes for shard in left}
    copies = min(fleet.workers, len(left) / max(1, len(pieces)))
    tars = [shard.part.bytes for shard in left]
    get = head = put = 0.0
    if not opened.artifact.store.is_local:
        size = trial.last.chunk_samples
        chunks = [-(-shard.rows // size) for shard in left] if size else []
        get += (sum(chunks) if size else sum(map(_blocks, tars))) + 2 * fleet.workers + copies * len(pieces)
    if not network.store.is_local:
        get += (1 + len(weights)) * fleet.workers
    if not Store(job.out).is_local:
        head += len(left) + 2 * fleet.workers
        get += fleet.workers
        put += trial.puts_per_shard * len(left) + 2 * fleet.workers
    begun = directory.bytes + sum(part.bytes for part in weights)
    return {
        "bytes_read": round(sum(tars) + copies * sum(pieces.values()) + begun * fleet.workers),
        "bytes_written": round(trial.bytes_per_image * sum(shard.rows for shard in left)),
        "requests": {name: round(asked) for name, asked in (("GET", get), ("HEAD", head), ("PUT", put)) if asked},
    }


def _blocks(size: int) -> int:
    """Return the number of requests that read an object of an S3 store from start to end."""
    from pipelines.storage.blocks import BLOCK_BYTES

    return -(-size // BLOCK_BYTES)


def format_duration(seconds: float) -> str:
    """Format seconds for people: 4.2 s, 42 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"
