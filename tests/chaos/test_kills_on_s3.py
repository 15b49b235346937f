"""The kills of test_commit_kills.py on a real S3 server, with each object as one request and as a multipart upload.

`during` is there just before the one request that makes the object appear: of an upload all parts are sent by then.
"""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest

from pipelines.storage import s3
from pipelines.storage.bucket import BucketLimits
from tests.support.checker import PENDING, stored_on_s3, violations
from tests.support.drivers import verb
from tests.support.jobs import Jobs, assert_nothing_half, assert_whole, cases
from tests.support.report import SEED, report, scaled
from tests.support.seaweed import Seaweed, seaweed

pytestmark = pytest.mark.timeout(scaled(300, 3600))


def verb_that_uploads(*words: str) -> None:
    """The command line, which sends every object as a multipart upload, however small it is."""
    s3.Bucket = partial(s3.Bucket, limits=BucketLimits(single_bytes=0))  # type: ignore[assignment, misc]
    verb(*words)


SENDERS = {"request": verb, "upload": verb_that_uploads}


@dataclass(frozen=True)
class Bucket:
    """The jobs, and a server that they are done on."""

    jobs: Jobs
    server: Seaweed


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with seaweed(tmp_path_factory.mktemp("weed")) as server:
        yield Bucket(Jobs(tmp_path_factory.mktemp("jobs")), server)


def senders() -> list[tuple[str, str, str]]:
    """(verb, failpoint, sender); records of runs are small, and an upload of theirs has a name that none has again."""
    points = cases(["ingest", "index"], every_moment=())
    return [
        (*case, sender)
        for case in points
        for sender in SENDERS
        if sender == "request" or not case[1].startswith("put.")
    ]


@pytest.mark.parametrize(("name", "point", "sender"), senders(), ids=lambda value: value)
def test_a_driver_killed_at_a_step_converges(bucket: Bucket, name: str, point: str, sender: str) -> None:
    job, server, work = bucket.jobs[name], bucket.server, SENDERS[sender]
    draw, rounds, pending = random.Random(f"{SEED} {name} {point} {sender}"), scaled(1, 5), 0
    for round_ in range(rounds):
        prefix, hit = f"{name}-{point}-{sender}-{round_}", draw.randint(1, job.hits[point])
        out = server.uri(prefix)
        done = job.run(out, work, failpoints=f"{point}=kill@{hit}", variables=server.variables)
        assert done.code == -signal.SIGKILL, f"{point} was not passed {hit} times: {done.err}"
        left = stored_on_s3(server, prefix)
        assert_nothing_half(job, left)
        uploads = [key for key in left if key.startswith(PENDING)]
        # Parts are put side by side, so a kill after one of them may leave the upload of another.
        assert not uploads or sender == "upload"
        assert uploads or sender == "request" or not point.endswith("during")
        pending += len(uploads)
        done = job.run(out, work, variables=server.variables)
        assert done.code == 0, done.err
        after = stored_on_s3(server, prefix)
        assert_whole(job, after)
        assert violations(after, job.expected["manifest.json"]) == []
    report("R2 on S3", verb=name, point=point, sender=sender, kills=rounds, uploads_cleared=pending, lost=0)
