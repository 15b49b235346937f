"""Counters of the work, recorded through Ray: the agent of each node serves them to Prometheus as `ray_hhnet_...`.

A process that is not connected to Ray records nothing, and a count that cannot be recorded is dropped: metrics never
make the work fail. Workers count a shard or a step at its end, which costs microseconds.
"""

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, cached_property
from typing import Any, Protocol

SHOW_EVERY_S = 1.0
"""Seconds after which a gauge is set again: Ray drops it after two report intervals, of one second at least."""

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "hhnet_images": ("Images encoded or rejected, images learnt from, or codes put into an index.", ""),
    "hhnet_rejects": ("Images that were rejected.", "reason"),
    "hhnet_step_seconds": ("Seconds that workers spent in a step; read and decode run beside forward.", "step"),
    "hhnet_bytes": ("Bytes of tars and codes that were read, bytes of parts that were written.", "direction"),
    "hhnet_gpu_seconds": ("Seconds that workers kept their GPUs while they worked, times the GPUs of each.", ""),
}
"""Description of each counter, and its tag beside the verb."""

_QUEUE = ("hhnet_queue", "Shards that wait, and shards that a worker has.", "state")


class Show(Protocol):
    """A function that takes the number of shards that wait, and of those that a worker has."""

    def __call__(self, waiting: int, running: int) -> None:
        """Show these numbers from now on."""


class Meter:
    """Counts what this process does for one verb."""

    def __init__(self, verb: str) -> None:
        self._verb = verb

    def count_images(self, number: int) -> None:
        """Count images that are done."""
        self._add("hhnet_images", number)

    def count_rejects(self, numbers: Mapping[str, int]) -> None:
        """Count rejected images by their reason."""
        for reason, number in numbers.items():
            self._add("hhnet_rejects", number, reason)

    def count_seconds(self, steps: Mapping[str, float]) -> None:
        """Count seconds by step."""
        for step, seconds in steps.items():
            self._add("hhnet_step_seconds", seconds, step)

    def count_bytes(self, read: int, written: int) -> None:
        """Count bytes that were read and written."""
        self._add("hhnet_bytes", read, "read")
        self._add("hhnet_bytes", written, "written")

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Count the block's seconds, times the GPUs that Ray gave to this worker."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._add("hhnet_gpu_seconds", (time.perf_counter() - begun) * self._gpus)

    @contextmanager
    def queue(self) -> Iterator[Show]:
        """Yield a function that sets the numbers of waiting and running shards; show the last ones during the block."""
        shown = (0, 0)
        ended = threading.Event()

        def show(waiting: int, running: int) -> None:
            nonlocal shown
            shown = (waiting, running)
            self._set(*shown)

        def keep() -> None:
            while not ended.wait(SHOW_EVERY_S):
                self._set(*shown)

        thread = threading.Thread(target=keep, name="metrics", daemon=True)
        thread.start()
        try:
            yield show
        finally:
            ended.set()
            thread.join()
            self._set(0, 0)

    @cached_property
    def _gpus(self) -> float:
        """GPUs that this worker holds, a fraction where it shares one; 0 outside of a worker."""
        with suppress(Exception):
            if _connected():
                import ray

                return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0))
        return 0.0

    def _add(self, name: str, value: float, tag: str = "") -> None:
        if value > 0 and _connected():
            # Any exception: Ray's metrics fail in many ways while a node goes, and a lost count must not end the work.
            with suppress(Exception):
                description, key = _COUNTERS[name]
                tags = {"verb": self._verb, **({key: tag} if key else {})}
                _metric("Counter", name, description, key).inc(value, tags)

    def _set(self, waiting: int, running: int) -> None:
        if _connected():
            with suppress(Exception):
                for state, number in (("waiting", waiting), ("running", running)):
                    _metric("Gauge", *_QUEUE).set(number, {"verb": self._verb, "state": state})


@cache
def _metric(kind: str, name: str, description: str, tag: str) -> Any:
    from ray.util import metrics

    return getattr(metrics, kind)(name, description, ("verb", tag) if tag else ("verb",))


def _connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
