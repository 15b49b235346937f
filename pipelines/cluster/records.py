"""Records in a submitted job's log: progress, and the result or error, each on one line for whoever follows the log.

A record is `@hhnet SUBMISSION {...}` up to the end of its line. The job and its libraries print other text too; only
records carry this mark. A record may stand behind text that somebody printed without ending the line.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from pipelines.cluster.progress import Advance, displayed_by, stage
from pipelines.cluster.ray_private import job_config

RECORDS_METADATA = "hhnet_records"
"""Key of a job's metadata by which its submitter asks for records."""
PROGRESS_EVERY_S = 2.0
"""Least seconds between two records of one stage's progress."""

Record = dict[str, Any]


def record_mark(submission: str) -> str:
    """Return the text that begins each record of this submission."""
    return f"@hhnet {submission} "


def read_record(line: str, submission: str) -> tuple[str, Record | None]:
    """Split a line of the log into its text for people and its record, or None."""
    text, found, rest = line.partition(record_mark(submission))
    if found:
        with suppress(ValueError):  # a line that was cut, or that somebody printed with this mark
            record = json.loads(rest)
            if isinstance(record, dict):
                return text, record
    return line, None


class JobRecords:
    """Writes the records of this process's job."""

    def __init__(self, submission: str) -> None:
        self._mark = record_mark(submission)

    def write(self, **record: Any) -> None:
        """Write one record to stdout, which is the job's log."""
        if sys.stdout is not None:
            sys.stdout.write(f"{self._mark}{json.dumps(record)}\n")
            sys.stdout.flush()

    @contextmanager
    def display(self, name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
        """Show a stage's progress as records: its start and end, and between them at most one in PROGRESS_EVERY_S."""
        last = 0.0

        def draw(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PROGRESS_EVERY_S or done >= total:
                last = now
                self.write(stage=name, done=done, total=total, unit=unit, note=note)

        yield draw


@contextmanager
def job_records() -> Iterator[JobRecords | None]:
    """Yield the records of this process's job and show progress by them, or yield None if nobody asked for records."""
    submission = find_asking_job()
    if submission is None:
        yield None
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # Ray reads the log as strict UTF-8
    records = JobRecords(submission)
    with displayed_by(records.display):
        yield records


def find_asking_job() -> str | None:
    """Return the submission id of this process's job if its submitter asked for records, else None."""
    metadata = job_config().get("metadata", {})
    return metadata.get("job_submission_id") if RECORDS_METADATA in metadata else None


class FollowedStages(ExitStack):
    """Draws the progress in a job's records as if its stages ran in this process; the stack holds the present one."""

    _name, _done = "", 0
    _advance: Advance | None = None

    def show(self, record: Record) -> None:
        """Draw a record of progress."""
        name, done, total = str(record["stage"]), int(record["done"]), int(record["total"])
        if self._advance is None or name != self._name or done < self._done:
            self.close()
            self._name, self._done = name, done
            self._advance = self.enter_context(stage(name, total, str(record["unit"]), done))
        self._advance(done - self._done, str(record["note"]))
        self._done = done
