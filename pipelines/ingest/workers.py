"""Writes many tars side by side: in threads of this process, or on a pool of Ray workers for many images."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import TarReceipt
from pipelines.artifacts.host import allowed_cpus
from pipelines.artifacts.runs import RunLog
from pipelines.cluster.metrics import Meter
from pipelines.cluster.ray_pool import Pool
from pipelines.cluster.session import ray_address, require_shared_source
from pipelines.cluster.submit import job_address
from pipelines.config.settings import Config
from pipelines.errors import WorkFailed
from pipelines.ingest.fetch import UrlReader
from pipelines.ingest.parts import PartWork
from pipelines.ingest.shard import TarTask, ingest_tar
from pipelines.storage import Store, scratch_folder

IMAGES_FOR_RAY = 100_000
"""Number of images from which on Ray writes the tars if `ingest.workers` is unset; it takes seconds to start."""
TARS_IN_PROCESS = 2
"""Number of tars that this process writes side by side without Ray."""

Done = Iterator[tuple[TarTask, TarReceipt]]


def ingest_tars(
    tasks: Sequence[TarTask],
    parts: Mapping[str, tuple[PartWork, ArtifactWriter, RunLog]],
    source: str,
    config: Config,
    advance: Callable[[int], None],
    pool: Pool,
) -> Done:
    """Write the tars of these tasks and yield each with its receipt; `advance` is told the images that are done.

    Raises WorkFailed if a tar ended `max_attempts` workers; a rerun goes on from the tars that are done.
    """
    if not tasks:
        return
    workers = config.ingest.workers
    reader = tasks[0].read
    if isinstance(reader, UrlReader):
        tasks, workers = _polite(tasks, reader, config)
    if not _wants_ray(tasks, config):
        yield from _in_threads(tasks, parts, advance, min(workers or TARS_IN_PROCESS, TARS_IN_PROCESS))
        return
    work, _, _ = parts[tasks[0].part]
    roots = {name: (one.store.uri, one.mark) for name, (one, _, _) in parts.items()}
    with pool(work.store, config, config.ingest) as map_items:
        if not isinstance(reader, UrlReader):
            require_shared_source(source, config)
        outcomes = map_items(
            TarIngester,
            (roots,),
            tasks,
            verb="ingest",
            workers=workers,
            label=lambda task: task.tar,
            failed=lambda task, attempt: parts[task.part][2].record_attempts(task.tar, (attempt,), {}),
        )
        for outcome in outcomes:
            task = outcome.item
            if outcome.error is not None:
                raise WorkFailed(f"{work.store.uri}: {outcome.error}; what was written is kept, run again to resume")
            parts[task.part][2].record_attempts(task.tar, outcome.tries[-1:], {"samples": len(task.samples)})
            advance(len(task.samples))
            yield task, outcome.result


def _wants_ray(tasks: Sequence[TarTask], config: Config) -> bool:
    """Tell whether Ray writes the tars: never if its workers cannot read the source, as in a scratch file."""
    if config.ingest.workers == 0 or job_address(config) is not None or any(task.remote is None for task in tasks):
        return False
    if config.ingest.workers is not None:
        return True
    return sum(len(task.samples) for task in tasks) >= IMAGES_FOR_RAY and find_spec("ray") is not None


def _polite(tasks: Sequence[TarTask], reader: UrlReader, config: Config) -> tuple[list[TarTask], int]:
    """Return the tasks with readers that together ask a host as often at once as is allowed, and the most workers."""
    settings = config.ingest
    workers = TARS_IN_PROCESS
    if _wants_ray(tasks, config):
        cpus = (config.ray.cpus or allowed_cpus()) if ray_address(config) == "local" else settings.per_host
        workers = settings.workers or cpus
    workers = min(workers, settings.per_host)
    share = settings.per_host // workers
    how = UrlReader(reader.file_bytes, share, settings.url_attempts, settings.url_timeout_s, settings.private_hosts)
    return [replace(task, read=how, remote=lambda _: how) for task in tasks], workers


def _in_threads(
    tasks: Sequence[TarTask],
    parts: Mapping[str, tuple[PartWork, ArtifactWriter, RunLog]],
    advance: Callable[[int], None],
    at_once: int,
) -> Done:
    moving, ended = threading.Lock(), threading.Event()

    def step() -> None:
        if ended.is_set():  # an error or an interrupt elsewhere: what is under way need not be waited for
            raise WorkFailed("the ingest ended")
        with moving:
            advance(1)

    with scratch_folder() as scratch, ThreadPoolExecutor(at_once, "ingest") as pool:

        def make(task: TarTask) -> TarReceipt:
            folder = scratch / f"part-{task.part}"
            folder.mkdir(exist_ok=True)
            return ingest_tar(task, parts[task.part][1], folder, step)

        under_way: deque[tuple[TarTask, Future[TarReceipt]]] = deque()
        try:
            for task in tasks:
                under_way.append((task, pool.submit(make, task)))
                if len(under_way) > at_once:
                    done, future = under_way.popleft()
                    yield done, future.result()
            for done, future in under_way:
                yield done, future.result()
        except BaseException:
            ended.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class TarIngester:
    """A Ray worker that writes one tar after another below `roots`: URI and fingerprint of each part of the split."""

    def __init__(self, roots: Mapping[str, tuple[str, str]]) -> None:
        self.progress, self._roots = 0, roots
        self._writers: dict[str, ArtifactWriter] = {}

    def run(self, task: TarTask) -> TarReceipt:
        """Write and claim a tar; return the receipt that won."""
        meter, begun = Meter("ingest"), time.perf_counter()
        if task.part not in self._writers:
            uri, mark = self._roots[task.part]
            self._writers[task.part] = ArtifactWriter(Store(uri), "shards", mark, (), {})
        with scratch_folder() as folder:
            receipt = ingest_tar(task, self._writers[task.part], Path(folder), self._advance)
        size = receipt.part.bytes if receipt.part else 0
        meter.count_seconds({"write": time.perf_counter() - begun})
        meter.count_images(len(task.samples))
        meter.count_bytes(read=size, written=size)
        return receipt

    def _advance(self) -> None:
        self.progress += 1
