"""Two runs of one command on one root at the same time: both end well, and the root is as after one alone.

Encode, ingest and index build are tried on two Rays as well (integration/test_resume.py); here the runs are forked, so
that they begin together, and do in their own process what Ray would do.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.verify.verify import verify
from tests.support.checker import stored
from tests.support.drivers import Done, run, train_checkpoints, verb
from tests.support.jobs import STEPS, TRAINING, Jobs, assert_whole
from tests.support.report import report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

ROUNDS = scaled(2, 20)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def both(work: Callable[[], Done]) -> list[Done]:
    """Do it twice at once; both end well."""
    with ThreadPoolExecutor(2) as pool:
        ended = [future.result() for future in [pool.submit(work) for _ in range(2)]]
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    return ended


@pytest.mark.parametrize("name", STEPS)
def test_two_runs_of_one_command(jobs: Jobs, name: str) -> None:
    job = jobs[name]
    found = []
    for _ in range(ROUNDS):
        out = job.begin(jobs.place())
        ended = both(lambda out=out: job.run(out))  # type: ignore[misc]
        assert_whole(job, stored(out))
        digests = {done.result["digest"] for done in ended if done.result}
        assert digests == {verify(str(out)).digest}
        found += [done.result["status"] for done in ended if done.result]
    counts = {status: found.count(status) for status in sorted(set(found))}
    report("two at once", verb=name, rounds=ROUNDS, statuses=counts, other_bytes=0)


def test_two_trainings_of_one_root(jobs: Jobs, tmp_path: Path) -> None:
    """From the first step on, with checkpoints of both beside each other."""
    shards = str(jobs.result("ingest"))
    both(lambda: run(train_checkpoints, shards, str(tmp_path), TRAINING))
    words = [word for setting in TRAINING for word in ("--set", setting)]
    done = run(verb, "train", "--shards", shards, "--out", str(tmp_path), *words)
    assert done.code == 0, done.err
    assert stored(tmp_path)["manifest.json"] == jobs["train"].expected["manifest.json"]
    report("two at once", verb="train, every step", rounds=1, other_bytes=0)


def test_two_gcs_of_one_root(jobs: Jobs) -> None:
    for _ in range(ROUNDS):
        out = jobs["retry-rejects"].begin(jobs.place())
        whole = stored(out)
        for number in range(50):
            (out / "parts" / f"orphan-{number:06d}-0123456789abcdef.parquet").write_bytes(b"litter")
        both(lambda out=out: run(verb, "gc", str(out), "--older-than", "0s"))  # type: ignore[misc]
        assert stored(out) == whole
    report("two at once", verb="gc", rounds=ROUNDS, lost=0)
