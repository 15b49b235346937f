"""Run records: what a run did, where and when, below `runs/` of an artifact's root and outside every digest.

    runs/<UTC time>-<id>/begin.json             verb, host, versions, settings, and the amount of work
    runs/<UTC time>-<id>/progress-000001.json   work done so far, and the attempts that ended since the one before
    runs/<UTC time>-<id>/end.json               how it ended, and the figures of the whole run

The names sort by time. Each object is put once, and the newest one of a run is its last sign of life: a working run
puts one at least every 30 seconds. A run that died cannot close its record; the next run at the root does it.
"""

import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import psutil

from pipelines.config.settings import Config
from pipelines.errors import HHNetError, StoreUnavailable
from pipelines.storage import ObjectInfo, Store, canonical_json, map_in_order

FREQUENT_PROGRESS_UNTIL_S = 3600.0
DEAD_AFTER_S = 90.0
"""Seconds of silence after which a run counts as dead: three missing heartbeats."""
PACKAGES = (
    "hhnet",
    "torch",
    "torchvision",
    "timm",
    "ray",
    "numpy",
    "pyarrow",
    "pillow",
    "simplejpeg",
    "faiss-cpu",
    "faiss-gpu",
)
BEGIN, END, PROGRESS = "begin.json", "end.json", "progress-"

DIED = "died"

Record = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ write


class RunLog:
    """Keeps the record of one run: begun on entry, updated by a thread while it works, closed on exit.

    If the store refuses a progress object, the work goes on: the attempts in it go into the next one.
    """

    progress_every_s = 10.0
    """Seconds between two progress objects of a run that makes progress, for its first hour."""
    heartbeat_s = 30.0
    """Seconds between two heartbeats.

    These are the progress objects of a run without progress, and of every run after its first hour.
    """

    def __init__(
        self, store: Store, verb: str, config: Config | None = None, *, total: int = 0, unit: str = "", **facts: Any
    ) -> None:
        self.store, self.total, self.unit = store, total, unit
        self.name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}"
        self.done = int(facts.pop("done", 0))
        self._first: Record = _recordable({"verb": verb, **facts})
        self._config = config
        self.figures: Record = {}
        self.cpu_share = 1.0
        """Share of the CPU seconds of this process that this run records: runs side by side share them."""
        self._note = ""
        self._attempts: list[Record] = []
        self._fresh = False
        self._number = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-log", daemon=True)

    def __enter__(self) -> "RunLog":
        close_dead(self.store, self.name)
        self._began = self._put_at = time.time()
        self._cpu_before = time.process_time()
        begin = {
            **self._first,
            "began": self._began,
            "host": socket.gethostname(),
            "process": process_identity(),
            "versions": _versions(),
            "settings": _recordable(self._config.model_dump(mode="json")) if self._config else {},
            "command": _recordable(sys.argv[1:]),
            **self._state(),
        }
        self.store.put(f"runs/{self.name}/{BEGIN}", canonical_json(begin))
        self._thread.start()
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Record that `steps` more of the work are done."""
        self.reach(self.done + steps, note)

    def reach(self, done: int, note: str = "") -> None:
        """Record that `done` of the work is done."""
        with self._lock:
            self.done, self._note, self._fresh = done, note, True

    def record_attempts(self, item: str, tries: Sequence[Any], figures: Mapping[str, float]) -> None:
        """Record the attempts at an item as dataclasses (such as the pool's), the last one with its figures."""
        made: list[Record] = [{"item": item, **asdict(attempt)} for attempt in tries] or [{"item": item}]
        made[-1] |= {name: round(value, 3) for name, value in figures.items()}
        with self._lock:
            self._attempts += made
            self._fresh = True

    def record_figures(self, **figures: Any) -> None:
        """Record figures of the whole run, for its end."""
        self.figures |= figures

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(error, StoreUnavailable):  # the put of end.json would only wait for the store again
            return
        ended = time.time()
        end = {
            **self._first,
            "end": _end_of(error),
            "ended": ended,
            "seconds": round(ended - self._began, 3),
            "cpu_seconds": round((time.process_time() - self._cpu_before) * self.cpu_share, 3),
            **self._state(),
            **({"error": _recordable(str(error))} if error is not None else {}),
            "attempts": self._attempts,
            **self.figures,
        }
        try:
            self.store.put(f"runs/{self.name}/{END}", canonical_json(end))
        except HHNetError:
            if error is None:  # otherwise the work's own error says more than the lost record
                raise

    def _state(self) -> Record:
        return {"done": self.done, "total": self.total, "unit": self.unit, "note": self._note}

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(self.progress_every_s):
            now = time.time()
            often = self._fresh and now - self._began < FREQUENT_PROGRESS_UNTIL_S
            # A second less, since this loop wakes a little early at times; the next turn would come 10 s too late.
            if often or now - self._put_at >= self.heartbeat_s - 1:
                with suppress(HHNetError):
                    self._put(now)

    def _put(self, now: float) -> None:
        with self._lock:
            attempts, self._attempts, self._fresh = self._attempts, [], False
            progress = {"at": now, **self._state(), "attempts": attempts}
        self._number += 1
        self._put_at = now
        try:
            self.store.put(f"runs/{self.name}/{PROGRESS}{self._number:06d}.json", canonical_json(progress))
        except HHNetError:
            with self._lock:
                self._attempts[:0] = attempts
                self._fresh = True
            raise


def write_run_record(store: Store, verb: str, figures: Mapping[str, Any], config: Config | None = None) -> None:
    """Write the record of a run that has figures only at its end."""
    with RunLog(store, verb, config) as log:
        log.record_figures(**figures)


def close_dead(store: Store, by: str) -> None:
    """Close the records of runs that died before they could; `by` is the run that found them."""
    there = store.entries("runs")
    for name in _names(there):
        if f"runs/{name}/{END}" not in there:
            run = _read(store, name, there, only=BEGIN)
            if run.state() == DIED:
                end: Record = {key: run.begin[key] for key in ("verb", "fingerprint") if key in run.begin}
                end |= {"end": DIED, "ended": run.sign, "closed_by": by, "attempts": []}
                store.put(f"runs/{name}/{END}", canonical_json(end))


def process_identity() -> Record:
    """Return the facts that identify this process on its machine, and on no other."""
    process = psutil.Process()
    return {"machine": _machine(), "pid": process.pid, "started": process.create_time()}


def _machine() -> str | None:
    """Return the boot id of this machine and its namespace of process ids; each container has its own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - the link names no path
    except OSError:
        return None


def _end_of(error: BaseException | None) -> str:
    if error is None:
        return "done"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _recordable(value: Any) -> Any:
    """Return the value without the credentials that a URL may carry, and with non-Unicode text escaped."""
    if isinstance(value, str):
        return re.sub(r"//[^/@\s]*@", "//", value).encode(errors="backslashreplace").decode()
    if isinstance(value, Mapping):
        return {name: _recordable(one) for name, one in value.items()}
    return [_recordable(one) for one in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class Run:
    """A run as its record describes it; `sign` is the time of its last object."""

    name: str
    begin: Record
    end: Record | None
    sign: float
    heartbeats: Sequence[Record] = field(default_factory=list)
    """Contents of its progress objects, oldest first."""
    back: bool = False
    """Whether it moved on after it was taken for dead."""

    @property
    def attempts(self) -> list[Record]:
        """Every ended attempt, in the order of their ends."""
        return [one for entry in (*self.heartbeats, self.end or {}) for one in entry.get("attempts", [])]

    @property
    def last(self) -> Record:
        """The run's last statement of its progress."""
        said = [self.begin, *self.heartbeats, *([self.end] if self.end and "done" in self.end else [])]
        return said[-1]

    def state(self) -> str:
        """Return `working`, `died`, or the end that it recorded: `done`, `failed`, `interrupted`."""
        if self.end is not None and not self.back:
            return str(self.end.get("end"))
        return DIED if self._is_gone() or time.time() - self.sign > DEAD_AFTER_S else "working"

    def _is_gone(self) -> bool:
        """Tell whether its process ran on this machine and has ended.

        For a run on another machine only its silence tells, so the answer is False.
        """
        process = self.begin.get("process") or {}
        if process.get("machine") is None or process["machine"] != _machine():
            return False
        try:
            found = psutil.Process(int(process["pid"]))
            # A later process may have the same id. Start times are computed from the clock and vary by less than 1 s.
            return found.status() == psutil.STATUS_ZOMBIE or abs(found.create_time() - process["started"]) > 1
        except psutil.Error:
            return True


def read_runs(store: Store, last: int = 1) -> list[Run]:
    """Return the `last` runs at a root, oldest first, with their whole records."""
    names = [name for name in store.folders("runs") if _is_run(name)][-last:]
    return [_read(store, name, store.entries(f"runs/{name}")) for name in names]


def read_first_begins(store: Store, most: int = 20) -> list[Record]:
    """Return what the first runs at a root recorded when they began, oldest first; at most `most` of them."""
    names = [name for name in store.folders("runs") if _is_run(name)][:most]
    found = map_in_order(lambda name: _read_record(store, f"runs/{name}/{BEGIN}"), names)
    return [record for record in found if record]


def closed_records(store: Store) -> list[Record]:
    """Return the records that the runs at a root wrote at their end, oldest first."""
    names = [name for name in store.names("runs") if name.endswith(f"/{END}")]
    return [record for record in map_in_order(lambda name: _read_record(store, name), names) if record]


def _names(there: Mapping[str, ObjectInfo]) -> Iterable[str]:
    """Yield the begun runs of a listing."""
    for name in there:
        path = PurePosixPath(name)
        if path.name == BEGIN and len(path.parts) == 3 and _is_run(path.parts[1]):
            yield path.parts[1]


def _is_run(name: str) -> bool:
    return re.fullmatch(r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8}", name) is not None


def _read(store: Store, name: str, there: Mapping[str, ObjectInfo], only: str = "") -> Run:
    """Read a run from a listing of its objects; with `only`, read no object but its begin."""
    put_at = {path: entry.modified for path, entry in there.items() if path.startswith(f"runs/{name}/")}
    heartbeats = [path for path in put_at if PurePosixPath(path).name.startswith(PROGRESS)]
    begin, end = f"runs/{name}/{BEGIN}", f"runs/{name}/{END}"
    wanted = [begin] if only else [begin, *heartbeats, *([end] if end in put_at else [])]
    found = dict(zip(wanted, map_in_order(lambda path: _read_record(store, path), wanted), strict=True))
    signs = [put_at[path] for path in (begin, *heartbeats) if path in put_at] or [0.0]
    back = end in put_at and max(signs) > put_at[end] and found.get(end, {}).get("end") == DIED
    said = [found[path] for path in heartbeats if found.get(path)]
    closed = found.get(end) or {"end": DIED} if end in put_at else None
    return Run(name, found.get(begin) or {}, closed, max(signs), said, back)


def _read_record(store: Store, name: str) -> Record:
    """Read a record; {} where it is not readable, since no record is worth a failure."""
    try:
        found = json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
