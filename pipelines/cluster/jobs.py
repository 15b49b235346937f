"""Verbs as Ray jobs: submit one to a cluster's Jobs API, attach to it if it runs already, follow it, stop it."""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from pipelines.cluster.access import refuse_credentials, require_ray_token, token_refused
from pipelines.errors import ClusterUnavailable, HHNetError
from pipelines.storage import sha256_of

START_WAIT_S = 60.0


def submit_verb(address: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run `python -m pipelines ARGUMENTS` as a Ray job at the http(s) `address`; returns the verb's result.

    The job's id is made of its arguments and the attempt: one that runs already is attached to instead of being
    started twice. An interrupt stops the job. The error of a failed job is raised here with its own exit code.
    """
    require_ray_token(address)
    command = shlex.join(["python", "-m", "pipelines", *arguments, "--json"])
    refuse_credentials("what is sent as a job", command)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        submission = _start_or_attach(client, command)
        code, lines = _follow(client, submission)
    except AuthenticationError as error:
        raise token_refused(address) from error
    except (OSError, RuntimeError) as error:
        raise ClusterUnavailable(f"cannot submit to Ray at {address}: {str(error).splitlines()[0]}") from error
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
    """Copy the job's log to stderr until it ends; its exit code and the log's lines. An interrupt stops the job."""
    shown = 0
    try:
        while True:
            ended = client.get_job_status(submission).is_terminal()
            log = client.get_job_logs(submission)
            sys.stderr.write(log[shown:])
            shown = len(log)
            if ended:
                break
            time.sleep(1)
    except (OSError, RuntimeError):  # out of reach: the job goes on, and the same command attaches to it again
        raise
    except BaseException:
        with suppress(OSError, RuntimeError):
            client.stop_job(submission)
        raise
    return client.get_job_info(submission).driver_exit_code or 0, log.splitlines()
