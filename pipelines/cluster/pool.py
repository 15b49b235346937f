"""A bounded pool of Ray actors: one item in flight per worker, attempts counted, deaths and standstills survived.

A worker that wants to be watched has an integer `progress` that changes as it works. It is asked for in a thread
beside the work, so a worker that is stopped, or stuck in code that never lets another thread run, does not answer,
which is no progress either.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pipelines.cluster.session import require_node

T = TypeVar("T")

BUILD_S = 600.0
"""How long a worker may take to be built (imports, the model) before that counts as standing still."""
ASK_EVERY_S = 5.0
BESIDE = "beside"
"""The concurrency group in which an actor answers while it works."""


@dataclass(frozen=True)
class Attempt:
    """One worker's go at an item: when it was given the item and when that ended, where, and how."""

    began: float
    """Unix time, as is `ended`."""
    ended: float
    host: str
    pid: int
    """Of the worker process; 0 where it died before it could say."""
    gpu: str | None
    """The GPU ids of the worker, "0" or "0,1"; None without."""
    end: str
    """`done`, `died`, `out of memory`, `stuck`, `node lost` or `preempted`."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an item: its result, or the error after every worker that held it died or got stuck."""

    item: T
    result: Any
    attempts: int
    error: str | None = None
    stuck: bool = False
    tries: tuple[Attempt, ...] = ()


class _Worker:
    """Lives in an actor; builds the real worker at first use, so that its errors are errors and not a death."""

    def __init__(self, kind: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = lambda: kind(*args)
        self._worker: Any = None

    def build(self) -> int | None:
        """Build the worker; its first progress."""
        self._worker = self._make()
        return self.progress()

    def where(self) -> tuple[str, int, str | None]:
        """Host, process id and GPU ids of this worker."""
        import ray

        return socket.gethostname(), os.getpid(), ",".join(map(str, ray.get_gpu_ids())) or None

    def run(self, item: Any) -> Any:
        """Do one item."""
        if self._worker is None:  # it could not be built: say why
            self._worker = self._make()
        return self._worker.run(item)

    def progress(self) -> int | None:
        """A number that changes as the work goes on; None while the worker is being built."""
        return None if self._worker is None else getattr(self._worker, "progress", 0)


@dataclass
class _Flight(Generic[T]):
    """An item on a worker. `moved` is when progress was last seen; None until the actor first answers."""

    actor: Any
    where: Any
    item: T
    tries: tuple[Attempt, ...]
    began: float = field(default_factory=time.time)
    moved: float | None = None
    progress: int | None = None
    beat: Any = None
    pending: list[Any] = field(default_factory=list)

    def hear(self, progress: int | None) -> None:
        """Take an answer; one that was given before the worker was built may come late."""
        if self.moved is None or progress not in (None, self.progress):
            self.moved, self.progress = time.monotonic(), progress

    def ended(self, end: str) -> tuple[Attempt, ...]:
        """All attempts at the item, with this one."""
        import ray
        from ray.exceptions import RayError

        host, pid, gpu = "", 0, None
        with suppress(RayError):
            if ray.wait([self.where], timeout=0)[0]:
                host, pid, gpu = ray.get(self.where)
        return (*self.tries, Attempt(self.began, time.time(), host, pid, gpu, end))

    def stands_still(self, limit_s: float) -> bool:
        """No progress for longer than allowed."""
        allowed = limit_s if self.progress is not None else max(limit_s, BUILD_S)
        return self.moved is not None and time.monotonic() - self.moved > allowed


def map_items(
    worker: Callable[..., Any],
    worker_args: tuple[Any, ...],
    items: Sequence[T],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_attempts: int = 3,
    stuck_s: float | None = None,
    label: Callable[[T], str] = str,
) -> Iterator[Outcome[T]]:
    """Run `worker(*worker_args).run(item)` for every item on a pool of actors; outcomes in order of completion.

    An actor holds one item at a time. When it dies, or makes no progress for `stuck_s` and is killed for that, this
    item counts one attempt and goes to a fresh actor, up to `max_attempts`; then its outcome carries the error.
    Exceptions of the worker itself are raised here, and ClusterUnavailable where this process's own node is lost.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

    remote = ray.remote(
        num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0, concurrency_groups={BESIDE: 1}
    )(_Worker)
    waiting: deque[tuple[T, tuple[Attempt, ...]]] = deque((item, ()) for item in items)
    running: dict[Any, _Flight[T]] = {}
    idle: list[tuple[Any, Any]] = []

    def start() -> None:
        while waiting and len(running) < workers:
            item, tries = waiting.popleft()
            if idle:  # it is placed, built and alive: the clock runs at once
                flight = _Flight(*idle.pop(), item, tries, moved=time.monotonic(), progress=-1)
            else:
                actor = remote.remote(worker, worker_args)
                flight = _Flight(actor, actor.where.options(concurrency_group=BESIDE).remote(), item, tries)
                flight.pending.append(flight.actor.build.remote())
            running[flight.actor.run.remote(item)] = flight

    def failed(flight: _Flight[T], reason: str, end: str) -> list[Outcome[T]]:
        tries = flight.ended(end)
        ray.kill(flight.actor)
        if len(tries) < max_attempts:
            waiting.append((flight.item, tries))
            return []
        text = f"{label(flight.item)}: {reason}, at the last of {len(tries)} attempts"
        return [Outcome(flight.item, None, len(tries), text, end == "stuck", tries)]

    def landed(ref: Any) -> list[Outcome[T]]:
        flight = running.pop(ref)
        try:
            result = ray.get(ref)
        except (RayActorError, OutOfMemoryError) as death:
            end = "out of memory" if isinstance(death, OutOfMemoryError) else "died"
            return failed(flight, f"the worker died ({str(death).splitlines()[0]})", end)
        except RayTaskError as error:
            ray.kill(flight.actor)
            raise (error.cause or error) from None
        idle.append((flight.actor, flight.where))
        tries = flight.ended("done")
        return [Outcome(flight.item, result, len(tries), tries=tries)]

    try:
        start()
        while running:
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_watch(running, stuck_s))
            if not ready:
                require_node()
            outcomes = [outcome for ref in ready for outcome in landed(ref)]
            if stuck_s is not None:
                for ref in [ref for ref, flight in running.items() if flight.stands_still(stuck_s)]:
                    outcomes += failed(running.pop(ref), f"no progress for {stuck_s:g} s", "stuck")
            start()
            yield from outcomes
    finally:
        for actor in [*(actor for actor, _ in idle), *(flight.actor for flight in running.values())]:
            ray.kill(actor)


def _watch(running: dict[Any, _Flight[T]], stuck_s: float | None) -> float:
    """Hear what actors have answered, ask them again, and say how long to wait until the next time."""
    import ray
    from ray.exceptions import RayError

    if stuck_s is None:
        return ASK_EVERY_S
    asked = {ref: flight for flight in running.values() for ref in flight.pending}
    answers, _ = ray.wait(list(asked), num_returns=len(asked), timeout=0) if asked else ([], None)
    for ref in answers:
        asked[ref].pending.remove(ref)
        with suppress(RayError):  # it died or could not be built: its run says so
            asked[ref].hear(ray.get(ref))
    for flight in running.values():
        if flight.beat not in flight.pending:
            flight.beat = flight.actor.progress.options(concurrency_group=BESIDE).remote()
            flight.pending.append(flight.beat)
    return min(ASK_EVERY_S, stuck_s / 4)
