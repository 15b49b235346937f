"""Verbs as Ray jobs: submit one to a cluster's Jobs API, attach to it if it runs already, follow it, stop it."""

import asyncio
import logging
import queue
import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from pipelines.cluster.access import is_loopback, refuse_credentials, refused_token_error, require_ray_token
from pipelines.cluster.records import RECORDS_METADATA, FollowedStages, Record, read_record
from pipelines.console import log_variables, relay, show_as_ours
from pipelines.errors import ClusterUnavailable, HHNetError, StoreRefused, WorkFailed
from pipelines.storage import sha256_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 30.0
"""Seconds that one answer of the Jobs API may take."""
LOOK_EVERY_S = 2.0
"""Seconds between two questions for the state of a job while its log is silent."""
RECONNECT_PAUSE_S = 1.0
"""Seconds before a broken log connection is opened again, and before a new head is asked again for an agent."""
LOG_END_WAIT_S = 10.0
"""Seconds that the log of an ended job may take to reach its end."""
GOES_ON = "what was committed stays, and the same command goes on from there"


def submit_verb(
    address: str, arguments: Sequence[str], *, wait_s: float = 60.0, labels: Mapping[str, str] | None = None
) -> Record:
    """Run `python -m pipelines ARGUMENTS` as a Ray job at the http(s) `address`, and return the verb's result.

    The job's id is made of its arguments and the attempt, so a job that runs already is attached to and not started
    twice. Its progress is shown here, and an interrupt stops it. The driver runs on a node with these `labels`, or on
    the head if there are none. The error of a failed job is raised here with its own exit code. Raises
    ClusterUnavailable if the cluster does not start the job, or does not answer, for `wait_s`.
    """
    require_ray_token(address)
    command = shlex.join(["python", "-m", "pipelines", *arguments])
    refuse_credentials("what is sent as a job", command)
    from ray.exceptions import AuthenticationError

    try:
        client = _client(address)
        submission = _start_or_attach(client, command, wait_s, labels or {})
        return _Followed(client, address, submission, wait_s, labels or {}).result()
    except AuthenticationError as error:
        raise refused_token_error(address) from error
    except (OSError, RuntimeError) as error:
        raise ClusterUnavailable(f"cannot submit to Ray at {address}: {_first_line(error)}") from error


def _client(address: str) -> "JobSubmissionClient":
    """Return Ray's client of the Jobs API, with a deadline for each answer and no proxy before this machine."""
    from ray.job_submission import JobSubmissionClient

    show_as_ours("ray")

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
        # Ray's client offers no deadline and no proxies; all its requests pass through this private method.
        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            options.setdefault("timeout", REQUEST_TIMEOUT_S)
            if is_loopback(address):
                options.setdefault("proxies", {"http": None, "https": None, "all": None})
            return super()._do_request(method, endpoint, **options)

    return Client(address)


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _start_or_attach(client: "JobSubmissionClient", command: str, wait_s: float, labels: Mapping[str, str]) -> str:
    """Return the submission id of the job that runs the command: a live one, else a new one."""
    from ray.job_submission import JobStatus

    prefix = f"hhnet-{sha256_of(command.encode())[:16]}"
    known = {job.submission_id: job for job in client.list_jobs()}

    def is_over(name: str) -> bool:
        job = known.get(name)
        if job is None:
            return False
        # Its submitter gave it up while it waited for a node: it was told to stop, and will once it finds one.
        given_up = job.status == JobStatus.PENDING and time.time() - (job.start_time or 0) / 1000 > wait_s
        return bool(job.status.is_terminal()) or given_up

    attempt = 1
    while is_over(f"{prefix}-{attempt}"):
        attempt += 1
    submission = f"{prefix}-{attempt}"
    if submission in known:
        _log.info("job %s runs already: follows it", submission, extra={"job": submission, "attempt": attempt})
    deadline = time.monotonic() + wait_s
    while submission not in known:
        options: dict[str, Any] = {"entrypoint_label_selector": dict(labels)} if labels else {}
        if variables := log_variables():  # not as flags: a job of another log level is still the same job
            options["runtime_env"] = {"env_vars": variables}
        try:
            client.submit_job(entrypoint=command, submission_id=submission, metadata={RECORDS_METADATA: "1"}, **options)
        except RuntimeError as error:  # a head that has just begun has no agent for its jobs yet, and says so
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            _log.info("the cluster has no agent for jobs yet; trying again", extra={"job": submission})
            time.sleep(RECONNECT_PAUSE_S)
        else:
            _log.info("job %s is submitted", submission, extra={"job": submission, "attempt": attempt})
            break
    return submission


class _Log:
    """The text of a job's log as it grows, followed in a thread; each character comes once, even over reconnects."""

    def __init__(self, client: "JobSubmissionClient", submission: str) -> None:
        self._client, self._submission = client, submission
        self._pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._taken = 0
        self._ended = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._follow()), name="job log", daemon=True).start()

    def next(self, timeout: float) -> str | None:
        """Return the next piece; "" if none comes for `timeout` seconds, None once the connection has ended."""
        try:
            piece = self._pieces.get(timeout=timeout)
        except queue.Empty:
            return ""
        self._taken += len(piece or "")
        return piece

    def rest(self) -> str:
        """Fetch the text that `next` has not returned yet."""
        return str(self._client.get_job_logs(self._submission))[self._taken :]

    def close(self) -> None:
        """Stop following the log."""
        self._ended.set()

    async def _follow(self) -> None:
        from aiohttp import ClientError

        seen = 0
        while not self._ended.is_set():
            passed = 0  # each connection tells the log from its beginning
            with suppress(ClientError, OSError, RuntimeError):
                async for text in self._client.tail_job_logs(self._submission):
                    if self._ended.is_set():
                        return
                    new = text[max(0, seen - passed) :]
                    passed += len(text)
                    seen = max(seen, passed)
                    if new:
                        self._pieces.put(new)
            self._pieces.put(None)
            if not self._ended.is_set():
                _log.debug("the log of job %s ended; asking on", self._submission, extra={"job": self._submission})
            await asyncio.sleep(RECONNECT_PAUSE_S)


class _Followed:
    """A submitted job that is followed to its end."""

    def __init__(
        self, client: "JobSubmissionClient", address: str, submission: str, wait_s: float, labels: Mapping[str, str]
    ) -> None:
        self._client, self._address, self._submission = client, address, submission
        self._wait_s, self._labels = wait_s, labels
        self._outcome: Record | None = None
        self._line, self._last = "", ""

    def result(self) -> Record:
        """Show the job's log and progress until it ends; return its result or raise its error."""
        log = _Log(self._client, self._submission)
        try:
            with FollowedStages() as stages:
                info = self._until_it_ends(log, stages.show)
        except (HHNetError, OSError, RuntimeError):  # the job may go on, and the same command attaches to it again
            raise
        except BaseException:
            with suppress(OSError, RuntimeError):
                self._client.stop_job(self._submission)
            _log.info("told job %s to stop", self._submission, extra={"job": self._submission})
            raise
        finally:
            log.close()
        if self._outcome is None:
            raise self._unsaid(info)
        if "result" in self._outcome:
            return cast(Record, self._outcome["result"])
        kind = StoreRefused if self._outcome.get("refused") else HHNetError
        failure = kind(f"job {self._submission}: {self._outcome['error']}")
        failure.exit_code = int(self._outcome["code"])
        raise failure

    def _until_it_ends(self, log: _Log, show: Callable[[Record], None]) -> "JobDetails":
        """Take pieces of the log, look at the job's state between them, and return the final state."""
        begun = answered = time.monotonic()
        looked = -LOOK_EVERY_S
        while True:
            piece = log.next(LOOK_EVERY_S)
            if piece:
                answered = time.monotonic()
                self._take(piece, show)
            now = time.monotonic()
            if piece is not None and now - looked < LOOK_EVERY_S:
                continue
            looked, info = now, self._look()
            if info is None:
                self._require_answer(now - answered)
                continue
            answered = time.monotonic()
            if info.status.is_terminal():
                self._take_rest(log, piece is None, show)
                return info
            self._require_start(info, now - begun)

    def _look(self) -> "JobDetails | None":
        """Return the state of the job, or None if the cluster does not answer."""
        try:
            return self._client.get_job_info(self._submission)
        except (OSError, RuntimeError) as error:
            if "404" in str(error) and "does not exist" in str(error):
                raise ClusterUnavailable(
                    f"Ray at {self._address} no longer knows job {self._submission}: its head was replaced; {GOES_ON}"
                ) from error
            text = "Ray at %s does not answer for job %s: %s; asking on"
            _log.info(text, self._address, self._submission, _first_line(error), extra={"job": self._submission})
            return None

    def _require_answer(self, silent_s: float) -> None:
        if silent_s > self._wait_s:
            raise ClusterUnavailable(
                f"Ray at {self._address} has not answered for {silent_s:.0f} s (ray.wait_s) while job "
                f"{self._submission} ran: {GOES_ON}, attaching to the job if that is alive"
            )

    def _require_start(self, info: "JobDetails", waited_s: float) -> None:
        if info.status.value == "PENDING" and waited_s > self._wait_s:
            with suppress(OSError, RuntimeError):
                self._client.stop_job(self._submission)
            where = f"a node with {dict(self._labels)} (ray.driver_labels)" if self._labels else "the head node"
            raise ClusterUnavailable(
                f"Ray at {self._address} has not started job {self._submission} on {where} within {self._wait_s:g} s "
                "(ray.wait_s): wait for what runs there, or raise ray.wait_s"
            )

    def _take(self, piece: str, show: Callable[[Record], None]) -> None:
        *lines, self._line = (self._line + piece).split("\n")
        for line in lines:
            text, record = read_record(line, self._submission)
            if text or record is None:
                self._last = text or self._last
                relay(text, _log, job=self._submission)
            if record is not None and "stage" in record:
                show(record)
            elif record is not None:
                self._outcome = record

    def _take_rest(self, log: _Log, at_end: bool, show: Callable[[Record], None]) -> None:
        """Take the log to its end, and fetch the missing rest if no record of the outcome has come."""
        deadline = time.monotonic() + LOG_END_WAIT_S
        while not at_end and time.monotonic() < deadline:
            piece = log.next(max(0.0, deadline - time.monotonic()))
            at_end = piece is None
            self._take(piece or "", show)
        if self._outcome is None:
            with suppress(OSError, RuntimeError):
                self._take(log.rest(), show)
        self._take("\n" if self._line else "", show)

    def _unsaid(self, info: "JobDetails") -> HHNetError:
        """Return the error of a job that ended without a record of its outcome."""
        job, code = f"job {self._submission}", info.driver_exit_code
        if info.status.value == "STOPPED":
            failure: HHNetError = HHNetError(f"{job} was stopped: {GOES_ON}")
            failure.exit_code = 143
            return failure
        if code is None:
            return ClusterUnavailable(
                f"{job} was lost ({_first_line(info.message or 'Ray does not say why')}): {GOES_ON}"
            )
        if code == 0:
            return ClusterUnavailable(f"{job} succeeded, but its log cannot be read: run the same command again")
        return WorkFailed(
            f"{job} ended with exit code {code} and no error message: see its log, whose last line is: {self._last}"
        )
