"""Reports a run to Prefect's page and log: a bar and log lines for each stage, tables, links.

A thread of its own sends them. The work never waits for a slow or lost server; then only the display is missing.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import Any, ClassVar

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.context import FlowRunContext, TaskRunContext
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from pipelines.cluster.progress import reporting
from pipelines.storage import sha256_of

UPDATE_EVERY_S = 2.0
"""Seconds between two updates of a progress bar."""
LOG_EVERY_S = 10.0
"""Seconds between two progress lines of a stage in Prefect's log."""
END_WAIT_S = 10.0
"""Seconds that a stage waits at its end for its last update to be sent."""

OUT_OF_REACH = (httpx.HTTPError, PrefectException)
"""Exceptions of Prefect's client if the server is gone or refuses."""


def artifact_key(name: str) -> str:
    """Return `hhnet-<name>` in the characters that Prefect allows. Names that could become the same get a digest."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    plain = name.replace(" ", "-").replace("/", "-") == slug
    return f"hhnet-{slug}" if plain else f"hhnet-{slug}-{sha256_of(name.encode())[:6]}".replace("--", "-")


def show_artifact(key: str, kind: str, data: Any, description: str) -> None:
    """Show an artifact in the current flow run. A later call with the same key, also in a retry, changes it."""
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    run = task.task_run.flow_run_id if task else flow.flow_run.id if flow and flow.flow_run else None
    if run is None:
        return
    with get_client(sync_client=True) as client:
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=[key]))
        known = client.read_artifacts(artifact_filter=mine, limit=1)
        if known:
            client.update_artifact(known[0].id, ArtifactUpdate(data=data, description=description))
            return
        runs = {"flow_run_id": run, "task_run_id": task.task_run.id if task else None}
        client.create_artifact(ArtifactCreate(key=key, type=kind, data=data, description=description, **runs))


@contextmanager
def best_effort() -> Iterator[None]:
    """Let calls to Prefect's server in the block retry only once, and suppress their errors."""
    with suppress(*OUT_OF_REACH), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}):
        yield


def await_prefect(seconds: float) -> None:
    """Wait up to `seconds` until Prefect's server answers, so that a restarting one still hears how the run ended."""
    deadline = time.monotonic() + seconds
    while not prefect_answers() and time.monotonic() < deadline:
        time.sleep(UPDATE_EVERY_S)


def prefect_answers() -> bool:
    """Tell whether Prefect's server answers now."""
    with best_effort(), get_client(sync_client=True) as client:
        return client.api_healthcheck() is None
    return False


def show_if_reachable(key: str, kind: str, data: Any, description: str) -> bool:
    """Call `show_artifact`; return False if the server does not take it."""
    with best_effort():
        show_artifact(key, kind, data, description)
        return True
    return False


@contextmanager
def report_progress(name: str) -> Iterator[None]:
    """Show the stages of a verb in the block as one progress bar in Prefect, and as lines in the run's log."""
    following = _Following(name)
    with reporting(following.hear):
        following.start()
        try:
            yield
        except BaseException as error:
            following.end("failed", str(error) or type(error).__name__)
            raise
        following.end("done")


class _Following:
    """Holds a verb's last report of progress; a thread sends it to Prefect."""

    reached: ClassVar[bool] = True
    """Whether the server took the last report of any stage. If not, the ends of stages do not wait for it."""

    def __init__(self, name: str) -> None:
        self._name, self._key = name, artifact_key(name)
        self._log: Any = get_run_logger()
        self._share, self._text = 0.0, name
        self._ended = threading.Event()
        context = copy_context()  # holds the flow run, which a new thread would not know
        self._thread = threading.Thread(target=lambda: context.run(self._follow), daemon=True)
        self._begun = self._logged = time.monotonic()

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def hear(self, stage: str, done: int, total: int, note: str) -> None:
        """Take a report of the verb; any of its threads may call this."""
        share = min(done, total) / total if total else 0.0
        seconds = time.monotonic() - self._begun
        left = f", about {seconds / share * (1 - share):.0f} s left" if 0 < share < 1 else ""
        self._share, self._text = 100.0 * share, f"{stage}: {done} of {total}{left}  {note}".rstrip()

    def end(self, how: str, why: str = "") -> None:
        """Send the last report, and wait a while for that. The bar of a failed stage stays short of its end."""
        seconds = time.monotonic() - self._begun
        self._share = 100.0 if not why else min(self._share, 99.0)
        self._text = f"{self._name}: {how} after {seconds:.0f} s{': ' if why else ''}{why}"
        self._ended.set()
        if _Following.reached:
            self._thread.join(END_WAIT_S)

    def _follow(self) -> None:
        sent: tuple[float, str] | None = None
        ended = False
        while not ended:
            now = self._share, self._text
            if now != sent:
                self._write(now[1])
                self._send(*now)
                sent = now
            ended = self._ended.wait(UPDATE_EVERY_S)
        if (self._share, self._text) != sent:
            self._log.info(self._text)
            self._send(self._share, self._text)

    def _send(self, share: float, text: str) -> None:
        _Following.reached = show_if_reachable(self._key, "progress", share, text)

    def _write(self, text: str) -> None:
        """Log a line, unless the last one is less than LOG_EVERY_S old."""
        if time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            self._log.info(text)
