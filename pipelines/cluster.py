"""Ray: start or join it, keep a bounded pool of workers fed, count attempts, report progress.

Ray itself is imported only where it is used, so that a verb without Ray can report progress without paying for it.
"""

import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from pipelines.config import Config
from pipelines.errors import ClusterUnavailable, HHNetError, UsageError
from pipelines.storage import Store, sha256_of

T = TypeVar("T")
LINE_EVERY_S = 10.0
LOCAL_OBJECT_STORE_BYTES = 256 << 20
START_WAIT_S = 60.0

# ------------------------------------------------------------------------------------------------------ progress

Reporter = Callable[[str, int, int, str], None]
"""Receives (stage, done, total, note)."""

_kept: ContextVar[bool] = ContextVar("kept", default=False)
_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


class Advance(Protocol):
    """Moves a stage on by `steps`; `note` is shown beside the count."""

    def __call__(self, steps: int = 1, note: str = "") -> None:
        """Move on."""


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send the progress of all stages begun inside to `reporter` as well."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextmanager
def stage(name: str, total: int, unit: str = "items") -> Iterator[Advance]:
    """Show a stage's progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""
    show = _bar(name, total, unit) if sys.stderr.isatty() else _lines(name, total, unit)
    reporter = _reporter.get()
    done = 0
    with show as draw:

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done
            done += steps
            draw(done, note)
            if reporter is not None:
                reporter(name, done, total, note)

        advance(0)
        yield advance


@contextmanager
def _bar(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"{name:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[note]}}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(name, total=total, note="")
        yield lambda done, note: bars.update(task, completed=done, note=note)


@contextmanager
def _lines(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    begun = time.monotonic()
    last = begun

    def draw(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_EVERY_S and done < total:
            return
        last = now
        seconds = now - begun
        rest = f", about {seconds / done * (total - done):.0f} s left" if 0 < done < total else ""
        sys.stderr.write(f"{name}: {done}/{total} {unit} in {seconds:.0f} s{rest}{'  ' + note if note else ''}\n")
        sys.stderr.flush()

    yield draw


# ----------------------------------------------------------------------------------------------------------- ray


def ray_address(config: Config) -> str:
    """Where Ray runs: the setting, else RAY_ADDRESS, else `local`; never whatever cluster happens to be about."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray for the length of the block: the one that is connected already, else started or joined by address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # OpenMP threads that spin while they wait take the cores away from whatever else runs on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    address = ray_address(config)
    if address == "local":
        # Ray's switch for platforms without clusters: its ports are then bound to the loopback address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        yield
        return
    on_term = signal.getsignal(signal.SIGTERM)
    local = {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if address == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ClusterUnavailable(f"cannot reach Ray at {address}: {str(error).splitlines()[0]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # ray.init leaves a handler of its own there
    try:
        yield
    finally:
        if not _kept.get():
            ray.shutdown()


@contextmanager
def kept_ray() -> Iterator[None]:
    """Let the sessions begun inside share one Ray, started by the first that needs it and ended with the block."""
    token = _kept.set(True)
    try:
        yield
    finally:
        _kept.reset(token)
        if "ray" in sys.modules:
            import ray

            ray.shutdown()


def require_shared_store(store: Store, config: Config) -> None:
    """UsageError for a local --out on a cluster of several nodes that was not declared to be shared."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if store.is_local and nodes > 1 and not config.store.shared:
        raise UsageError(
            f"{store.uri} is a local path and the Ray cluster has {nodes} nodes: write to s3://, or set "
            "store.shared=true if it is a network file system"
        )


def pool_size(wanted: int | None) -> tuple[int, int]:
    """(workers, GPUs of each): what was asked for, else one per GPU, else one per CPU of the cluster."""
    import ray

    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    return wanted or gpus or max(1, int(total.get("CPU", 1))), 1 if gpus else 0


def wait_for(resources: dict[str, float], config: Config) -> None:
    """Wait up to `ray.wait_s` until the cluster has `resources` in all; ClusterUnavailable after that."""
    import ray

    deadline = time.monotonic() + config.ray.wait_s
    while True:
        total = ray.cluster_resources()
        lacking = {name: need for name, need in resources.items() if total.get(name, 0) < need}
        if not lacking:
            return
        if time.monotonic() >= deadline:
            have = ", ".join(f"{name} {total.get(name, 0):g} of {need:g}" for name, need in lacking.items())
            raise ClusterUnavailable(
                f"the Ray cluster has too little ({have}) after {config.ray.wait_s:g} s: ask for fewer workers "
                "or add nodes"
            )
        time.sleep(min(1.0, config.ray.wait_s))


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an item: its result, or the error after all workers that held it died."""

    item: T
    result: Any
    attempts: int
    error: str | None = None


class _Worker:
    """Lives in an actor; builds the real worker at first use, so that its errors are errors and not a death."""

    def __init__(self, kind: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = lambda: kind(*args)
        self._worker: Any = None

    def run(self, item: Any) -> Any:
        """Do one item."""
        if self._worker is None:
            self._worker = self._make()
        return self._worker.run(item)


def map_items(
    worker: Callable[..., Any],
    worker_args: tuple[Any, ...],
    items: Sequence[T],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_attempts: int = 3,
    label: Callable[[T], str] = str,
) -> Iterator[Outcome[T]]:
    """Run `worker(*worker_args).run(item)` for every item on a pool of actors; outcomes in order of completion.

    An actor holds one item at a time. When it dies, the item counts one attempt and goes to a fresh actor, up to
    `max_attempts`; then its outcome carries the error. Exceptions of the worker itself are raised here.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(_Worker)
    waiting = deque((item, 0) for item in items)
    running: dict[Any, tuple[Any, T, int]] = {}
    idle: list[Any] = []

    def start() -> None:
        while waiting and len(running) < workers:
            actor = idle.pop() if idle else remote.remote(worker, worker_args)
            item, attempts = waiting.popleft()
            running[actor.run.remote(item)] = (actor, item, attempts)

    try:
        start()
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, item, attempts = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except RayActorError as death:
                if attempts + 1 < max_attempts:
                    waiting.append((item, attempts + 1))
                else:
                    reason = f"{label(item)}: {max_attempts} workers died: {str(death).splitlines()[0]}"
                    yield Outcome(item, None, attempts + 1, reason)
            except RayTaskError as error:
                raise (error.cause or error) from None
            else:
                idle.append(actor)
                yield Outcome(item, result, attempts + 1)
            start()
    finally:
        for actor in [*idle, *(entry[0] for entry in running.values())]:
            ray.kill(actor)


class Board:
    """Where the workers post progress and the error that ends a run; lives in a Ray actor."""

    def __init__(self) -> None:
        self._step, self._note = 0, ""
        self._failure: HHNetError | None = None

    def post(self, step: int, note: str) -> None:
        """Steps done, and what to show beside them."""
        self._step, self._note = step, note

    def fail(self, error: HHNetError) -> None:
        """An error that a restart would only repeat."""
        self._failure = self._failure or error

    def read(self) -> tuple[int, str]:
        """What was posted last."""
        return self._step, self._note

    def failure(self) -> HHNetError | None:
        """The error that ended the run, if one did."""
        return self._failure


class BoardView:
    """Draws a stage from what a board in an actor says, as long as the block lasts."""

    def __init__(self, board: Any, name: str, done: int, total: int, unit: str) -> None:
        self._board, self._name, self._done, self._total, self._unit = board, name, done, total, unit
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        import ray

        with stage(self._name, self._total, self._unit) as advance:
            advance(self._done)
            shown = self._done
            ended = False
            while not ended:
                ended = self._ended.wait(1.0)
                step, note = ray.get(self._board.read.remote())
                if step > shown:
                    advance(step - shown, note)
                    shown = step


# ---------------------------------------------------------------------------------------------------------- jobs


def submit_verb(address: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m pipelines ARGUMENTS` as a Ray job at the http(s) `address`; returns the verb's result.

    The job's id is made of its arguments and the attempt: one that runs already is attached to instead of being
    started twice. An interrupt stops the job. The error of a failed job is raised here with its own exit code.
    """
    from ray.job_submission import JobSubmissionClient

    command = shlex.join(["python", "-m", "pipelines", *arguments, "--json"])
    try:
        client = JobSubmissionClient(address)
        submission = _start_or_attach(client, command)
    except (ConnectionError, RuntimeError) as error:
        raise ClusterUnavailable(f"cannot submit to Ray at {address}: {str(error).splitlines()[0]}") from error
    try:
        code, lines = _follow(client, submission)
    except BaseException:
        client.stop_job(submission)
        raise
    result = next((line for line in reversed(lines) if line.startswith("{")), None)
    if result is not None:
        return cast("dict[str, Any]", json.loads(result))
    reason = next((line for line in reversed(lines) if line.startswith("hhnet: ")), f"it ended with {code}")
    failure = HHNetError(f"job {submission}: {reason.removeprefix('hhnet: ')}")
    failure.exit_code = code or 1
    raise failure


def _start_or_attach(client: Any, command: str) -> str:
    prefix = f"hhnet-{sha256_of(command.encode())[:16]}"
    known = {job.submission_id: job.status for job in client.list_jobs()}
    attempt = 1
    while f"{prefix}-{attempt}" in known and known[f"{prefix}-{attempt}"].is_terminal():
        attempt += 1
    submission = f"{prefix}-{attempt}"
    deadline = time.monotonic() + START_WAIT_S
    while submission not in known:
        try:
            client.submit_job(entrypoint=command, submission_id=submission)
        except RuntimeError as error:  # a head that has just begun has no agent for its jobs yet, and says so
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            break
    return submission


def _follow(client: Any, submission: str) -> tuple[int, list[str]]:
    """Copy the job's log to stderr until it ends; its exit code and the log's lines."""
    shown = 0
    while True:
        ended = client.get_job_status(submission).is_terminal()
        log = client.get_job_logs(submission)
        sys.stderr.write(log[shown:])
        shown = len(log)
        if ended:
            break
        time.sleep(1)
    return client.get_job_info(submission).driver_exit_code or 0, log.splitlines()
