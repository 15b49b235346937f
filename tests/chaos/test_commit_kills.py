"""A driver is killed, or its disk is full, at each named step of a commit; the same command then ends undisturbed.

Every step of every put is a failpoint: before it, with the bytes stored but not named, and after it. What readers see
is judged from the bytes in the store by `tests.support.checker`, which has to find a store that streams a part
straight to its final name.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from pipelines.artifacts import open_artifact
from pipelines.errors import InputError
from pipelines.failpoints import failpoint
from pipelines.learning.checkpoints import Checkpoints
from pipelines.storage import Store
from pipelines.storage.local import LocalObjects
from tests.support.checker import stored, violations
from tests.support.codes import simple_rows, write_codes
from tests.support.drivers import MARK, Done, run, save_checkpoints, verb
from tests.support.pictures import write_folder
from tests.support.report import SEED, report, scaled

pytestmark = pytest.mark.timeout(scaled(300, 3600))

SHARD = "ingest.samples_per_shard=10"
MOMENTS = ("before", "during", "after")
CHECKPOINT_STEPS = 4


@dataclass(frozen=True)
class Job:
    """A verb under test: its words without `--out`, the bytes of its manifest when undisturbed, and its failpoints."""

    words: tuple[str, ...]
    expected: bytes
    seconds: float
    hits: dict[str, int]

    def run(self, out: Path, **options: Any) -> Done:
        return run(verb, *self.words, "--out", str(out), **options)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    folder = tmp_path_factory.mktemp("jobs")
    write_folder(folder / "images")
    codes = write_codes(folder / "codes", {f"s-{n}.tar": simple_rows(f"s-{n}", 20, seed=n) for n in range(3)})
    made = {}
    for name, words, hits in (
        ("ingest", ("ingest", str(folder / "images"), "--set", SHARD), {"identity": 1, "part": 4, "manifest": 1}),
        (
            "index",
            ("index", "build", "--codes", codes.uri, "--workers", "1"),
            {"identity": 1, "part": 7, "receipt": 3, "manifest": 1},
        ),
        (
            "dedupe",
            ("dedupe", "--codes", codes.uri, "--radius", "12"),
            {"identity": 1, "part": 3, "receipt": 1, "manifest": 1},
        ),
    ):
        done = run(verb, *words, "--out", str(folder / name))
        assert done.code == 0, done.err
        objects = stored(folder / name)
        assert violations(objects) == []
        # Of a second run, since the first one waits for the disk: a kill at a random time is to hit a run.
        done = run(verb, *words, "--out", str(folder / f"{name}-again"))
        assert violations(stored(folder / f"{name}-again"), objects["manifest.json"]) == []
        made[name] = Job(
            words, objects["manifest.json"], done.seconds, {f"{point}.put": n for point, n in hits.items()}
        )
    return made


def cases() -> list[tuple[str, str]]:
    """Every named step, by the verb that passes it."""
    return [
        *(("ingest", f"{point}.put.{moment}") for point in ("identity", "part", "manifest") for moment in MOMENTS),
        *(
            (name, f"{point}.put.{moment}")
            for name in ("index", "dedupe")
            for point in ("part", "receipt", "manifest")
            for moment in MOMENTS
        ),
    ]


def assert_nothing_half(out: Path, expected: bytes) -> dict[str, bytes]:
    """Whatever has its final name is whole, and readers see nothing or everything."""
    objects = stored(out) if out.exists() else {}
    for name, data in objects.items():
        assert not PurePosixPath(name).name.startswith(".tmp-"), name
        if name.startswith("parts/"):
            assert hashlib.sha256(data).hexdigest()[:16] in name, f"{name} is torn"
    if "manifest.json" in objects:
        assert violations(objects, expected) == []
    else:
        with pytest.raises(InputError):
            open_artifact(str(out))
    return objects


def rerun(job: Job, out: Path, before: dict[str, bytes]) -> None:
    """The same command again: the undisturbed result, and nothing that was there is changed."""
    done = job.run(out)
    assert done.code == 0, done.err
    after = stored(out)
    assert violations(after, job.expected) == []
    kept = {name: data for name, data in before.items() if not name.startswith("runs/")}
    assert {name: after.get(name) for name in kept} == kept


@pytest.mark.parametrize(("name", "point"), cases(), ids=lambda value: value)
def test_a_driver_killed_at_a_step_converges(jobs: dict[str, Job], tmp_path: Path, name: str, point: str) -> None:
    job, draw = jobs[name], random.Random(f"{SEED} {name} {point}")
    rounds = scaled(1, 10)
    for round_ in range(rounds):
        hit = draw.randint(1, job.hits[point.rpartition(".")[0]])
        out = tmp_path / str(round_)
        done = job.run(out, failpoints=f"{point}=kill@{hit}")
        assert done.code == -signal.SIGKILL, f"{point} was not passed {hit} times: {done.err}"
        rerun(job, out, assert_nothing_half(out, job.expected))
    report("R2 failpoints", verb=name, point=point, kills=rounds, lost=0)


@pytest.mark.parametrize("name", ["ingest", "index", "dedupe"])
def test_a_driver_killed_at_any_time_converges(jobs: dict[str, Job], tmp_path: Path, name: str) -> None:
    job, draw = jobs[name], random.Random(f"{SEED} {name}")
    rounds, killed = scaled(3, 50), 0
    for round_ in range(rounds):
        out = tmp_path / str(round_)
        killed += job.run(out, kill_after=draw.uniform(0, job.seconds)).code == -signal.SIGKILL
        rerun(job, out, assert_nothing_half(out, job.expected))
    report("R2 random times", verb=name, runs=rounds, kills=killed, lost=0)


@pytest.mark.parametrize(("name", "point"), cases(), ids=lambda value: value)
def test_a_full_disk_at_a_step(jobs: dict[str, Job], tmp_path: Path, name: str, point: str) -> None:
    job, out = jobs[name], tmp_path / "out"
    done = job.run(out, failpoints=f"{point}=enospc")
    assert done.code == 3
    assert len(done.errors) == 1, done.err
    assert str(out) in done.errors[0]
    assert "No space left" in done.errors[0]
    rerun(job, out, assert_nothing_half(out, job.expected))


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


def test_the_command_line_itself_is_killed(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = jobs["ingest"]
    command = [sys.executable, "-m", "pipelines", *job.words, "--out", str(tmp_path)]
    environment = {"HHNET_FAILPOINTS": "manifest.put.during=kill"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    rerun(job, tmp_path, assert_nothing_half(tmp_path, job.expected))


def test_a_disk_that_is_really_full(jobs: dict[str, Job], tmp_path: Path) -> None:
    """On a file system of its own: too small for the shards, then grown, and the same command completes."""
    mount = tmp_path / "small"
    mount.mkdir()
    hhnet = f"{sys.executable} -m pipelines {' '.join(jobs['ingest'].words)} --out {mount}/out"
    script = (
        f"mount -t tmpfs -o size=48k none {mount} || exit 99\n"
        f"{hhnet}; echo $? > {tmp_path}/code\n"
        f"cp -r {mount}/out {tmp_path}/full\n"
        f"mount -o remount,size=16m {mount}\n"
        f"{hhnet} && cp -r {mount}/out {tmp_path}/grown\n"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    if done.returncode in (1, 99) and not (tmp_path / "code").exists():
        pytest.skip(f"this system lets nobody mount a file system: {done.stderr.strip()}")
    assert (tmp_path / "code").read_text().strip() == "3", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("hhnet:", "Traceback"))]
    assert len(errors) == 1, done.stderr
    assert "No space left" in errors[0]
    assert_nothing_half(tmp_path / "full", jobs["ingest"].expected)
    assert done.returncode == 0, done.stderr
    assert violations(stored(tmp_path / "grown"), jobs["ingest"].expected) == []


def test_a_scratch_disk_that_is_full(jobs: dict[str, Job], tmp_path: Path) -> None:
    """Where shards are built is another disk than where they go; readers see nothing, and the error says where."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    hhnet = f"{sys.executable} -m pipelines {' '.join(jobs['ingest'].words)} --out {tmp_path}/out"
    script = f"mount -t tmpfs -o size=8k none {scratch} || exit 99\nTMPDIR={scratch} {hhnet}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    if done.returncode in (1, 99):
        pytest.skip(f"this system lets nobody mount a file system: {done.stderr.strip()}")
    assert done.returncode == 3, done.stderr
    assert str(scratch) in done.stderr
    assert "Traceback" not in done.stderr
    rerun(jobs["ingest"], tmp_path / "out", assert_nothing_half(tmp_path / "out", jobs["ingest"].expected))


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


@pytest.mark.parametrize("point", ["part", "manifest"])
def test_a_store_that_streams_to_the_final_name_is_found_out(jobs: dict[str, Job], tmp_path: Path, point: str) -> None:
    job = jobs["ingest"]
    words = (*job.words, "--out", str(tmp_path))
    assert run(streaming_verb, *words, failpoints=f"{point}.put.during=kill").code == -signal.SIGKILL
    with pytest.raises(AssertionError):
        assert_nothing_half(tmp_path, job.expected)
    again = run(streaming_verb, *words)
    assert again.code != 0 or violations(stored(tmp_path), job.expected)
    report("R7 streaming writer", point=point, found=True)
