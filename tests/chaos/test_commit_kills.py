"""A driver is killed, or its disk is full, at each named step of a commit; the same command then ends undisturbed.

Every step of every put is a failpoint: before it, with the bytes stored but not named, and after it. What is left is
judged from the bytes in the store, which are to be those of an undisturbed run; a store that streams a part straight
to its final name has to be found out.
"""

import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.artifacts import manifest
from pipelines.artifacts.manifest import open_artifact
from pipelines.errors import InputError
from pipelines.storage import Store
from pipelines.storage.failpoints import failpoint
from pipelines.storage.local import LocalObjects
from pipelines.train.checkpoints import Checkpoints
from tests.support.checker import stored, violations
from tests.support.drivers import MARK, run, save_checkpoints, verb
from tests.support.jobs import (
    EVERY_MOMENT,
    MOMENTS,
    STEPS,
    Jobs,
    assert_nothing_half,
    assert_whole,
    cases,
    failpoint_of,
    lasting,
    rerun,
)
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

CHECKPOINT_STEPS = scaled(4, 10)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def full_disks() -> list[tuple[str, str]]:
    """(verb, failpoint); on every change one of each verb, and each of those that are tried at every moment."""
    found = []
    for name in STEPS:
        points = cases([name], STEPS)
        drawn = random.Random(f"{SEED} {name} full").choice(points)
        found += points if name in EVERY_MOMENT else scaled([drawn], points)
    return found


def test_every_failpoint_is_tried() -> None:
    """Those of a commit here, of checkpoints below, of gc in test_gc_kills.py."""
    named = set()
    for path in (Path(__file__).parents[2] / "pipelines").rglob("*.py"):
        named |= set(re.findall(r'"((?:[a-z]+\.)?put|[a-z]+\.delete\.[a-z]+)"', path.read_text()))
    steps = {failpoint_of(step, "").rstrip(".") for verbs in STEPS.values() for step in verbs}
    assert named == steps | {"list.put", "checkpoint.put", "gc.delete.before", "gc.delete.after"}


@pytest.mark.parametrize(("name", "point"), cases(), ids=lambda value: value)
def test_a_driver_killed_at_a_step_converges(jobs: Jobs, name: str, point: str) -> None:
    job, draw = jobs[name], random.Random(f"{SEED} {name} {point}")
    rounds = scaled(1, 10)
    for _ in range(rounds):
        hit, out = draw.randint(1, job.hits[point]), job.begin(jobs.place())
        done = job.run(out, failpoints=f"{point}=kill@{hit}")
        assert done.code == -signal.SIGKILL, f"{point} was not passed {hit} times: {done.err}"
        assert_nothing_half(job, stored(out))
        if job.seed is None and not (out / "manifest.json").exists():
            with pytest.raises(InputError):
                open_artifact(out)
        rerun(job, out)
    report("R2 failpoints", verb=name, point=point, kills=rounds, lost=0)


@pytest.mark.parametrize("name", STEPS)
def test_a_driver_killed_at_any_time_converges(jobs: Jobs, name: str) -> None:
    """As many kills as are asked for; a run that ends before its own does not count."""
    job, draw = jobs[name], random.Random(f"{SEED} {name}")
    wanted = scaled(3, 50) if name in EVERY_MOMENT else scaled(1, 10)
    runs = kills = 0
    while kills < wanted:
        out = job.begin(jobs.place())
        runs += 1
        kills += job.run(out, kill_after=draw.uniform(0, job.seconds)).code == -signal.SIGKILL
        assert_nothing_half(job, stored(out) if out.exists() else {})
        rerun(job, out)
    report("R2 random times", verb=name, runs=runs, kills=kills, lost=0)


@pytest.mark.parametrize(("name", "point"), full_disks(), ids=lambda value: value)
def test_a_full_disk_at_a_step(jobs: Jobs, name: str, point: str) -> None:
    job = jobs[name]
    hit = random.Random(f"{SEED} {name} {point} full").randint(1, job.hits[point])
    out = job.begin(jobs.place())
    done = job.run(out, failpoints=f"{point}=enospc@{hit}")
    assert done.code == 3
    assert len(done.errors) == 1, done.err
    assert str(out) in done.errors[0]
    assert "No space left" in done.errors[0]
    assert_nothing_half(job, stored(out))
    rerun(job, out)


@pytest.mark.parametrize("action", ["kill", "enospc"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_checkpoint_that_is_cut_off_spoils_none(tmp_path: Path, moment: str, action: str) -> None:
    for step in range(1, CHECKPOINT_STEPS + 1):
        root = tmp_path / str(step)
        done = run(save_checkpoints, str(root), CHECKPOINT_STEPS, failpoints=f"checkpoint.put.{moment}={action}@{step}")
        assert (done.code, len(done.errors)) == ((-signal.SIGKILL, 0) if action == "kill" else (3, 1)), done.err
        last = Checkpoints(Store(root), MARK).latest()
        assert (last.step if last else 0) == (step if moment == "after" else step - 1)
        assert run(save_checkpoints, str(root), CHECKPOINT_STEPS).code == 0
        last = Checkpoints(Store(root), MARK).latest()
        assert last is not None
        assert last.step == CHECKPOINT_STEPS
        assert violations(stored(last.artifact.uri)) == []
    point = f"checkpoint.put.{moment}"
    report("R2 failpoints", verb="checkpoint", point=point, action=action, kills=CHECKPOINT_STEPS, lost=0)


def test_the_command_line_itself_is_killed(jobs: Jobs) -> None:
    job, out = jobs["ingest"], jobs.place()
    command = [sys.executable, "-m", "pipelines", *job.words_to(out)]
    environment = {"HHNET_FAILPOINTS": "manifest.put.during=kill"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert_nothing_half(job, stored(out))
    rerun(job, out)


def listing_verb(*words: str) -> None:
    """The command line on an artifact that is large: its manifest names lists of parts."""
    manifest.INLINE_ENTRIES = 0
    verb(*words)


def test_a_driver_killed_at_a_list_converges(jobs: Jobs) -> None:
    undisturbed = jobs.place()
    assert jobs["encode"].run(undisturbed, listing_verb).code == 0
    job = replace(jobs["encode"], expected=lasting(stored(undisturbed)))
    assert sum(name.startswith("manifests/list-") for name in job.expected) == 2
    for moment in MOMENTS:
        out = jobs.place()
        done = job.run(out, listing_verb, failpoints=f"list.put.{moment}=kill")
        assert done.code == -signal.SIGKILL
        assert_nothing_half(job, stored(out))
        assert job.run(out, listing_verb).code == 0
        assert_whole(job, stored(out))
    report("R2 failpoints", verb="encode", point="list.put", kills=len(MOMENTS), lost=0)


# ------------------------------------------------------------------------------------------------ a test of the test


def stream_to_the_final_name(self: LocalObjects, name: str, data: bytes | Path, point: str) -> bool:
    """What a put must not be: the bytes grow under the name that readers know."""
    target = Path(self._root, name)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = data if isinstance(data, bytes) else data.read_bytes()
    try:
        with target.open("xb") as stream:
            stream.write(content[: len(content) // 2])
            stream.flush()
            failpoint(point)
            stream.write(content[len(content) // 2 :])
    except FileExistsError:
        return False
    return True


def streaming_verb(*words: str) -> None:
    """The command line on such a store."""
    LocalObjects.put = stream_to_the_final_name  # type: ignore[method-assign]
    verb(*words)


@pytest.mark.parametrize(("name", "step"), [("ingest", "part"), ("ingest", "manifest"), ("index add", "version")])
def test_a_store_that_streams_to_the_final_name_is_found_out(jobs: Jobs, name: str, step: str) -> None:
    job = jobs[name]
    out = job.begin(jobs.place())
    done = job.run(out, streaming_verb, failpoints=f"{step}.put.during=kill")
    assert done.code == -signal.SIGKILL
    with pytest.raises(AssertionError):
        assert_nothing_half(job, stored(out))
    again = job.run(out, streaming_verb)
    with pytest.raises(AssertionError):
        assert again.code == 0
        assert_whole(job, stored(out))
    report("R7 streaming writer", verb=name, step=step, found=True)
