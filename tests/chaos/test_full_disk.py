"""Disks that really are full: file systems of their own, too small for what a verb writes there."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checker import stored
from tests.support.jobs import Jobs, assert_nothing_half, assert_whole, rerun

pytestmark = pytest.mark.timeout(300)

HHNET = f"{sys.executable} -m pipelines"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("jobs"))


def on_a_disk_of(size: str, mount: Path, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that has a file system of this size at `mount`."""
    mount.mkdir()
    whole = f"mount -t tmpfs -o size={size} none {mount} || exit 99\n{script}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", whole],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    if done.returncode == 99 or "unshare:" in done.stderr:
        pytest.skip(f"this system lets nobody mount a file system: {done.stderr.strip()}")
    return done


def test_a_disk_that_is_full_and_grows(jobs: Jobs, tmp_path: Path) -> None:
    """Too small for the shards; when it has grown, the same command completes."""
    job, mount = jobs["ingest"], tmp_path / "small"
    hhnet = f"{HHNET} {' '.join(job.words_to(mount / 'out'))}"
    done = on_a_disk_of(
        "48k",
        mount,
        f"{hhnet}; echo $? > {tmp_path}/code\n"
        f"cp -r {mount}/out {tmp_path}/full\n"
        f"mount -o remount,size=16m {mount}\n"
        f"{hhnet} && cp -r {mount}/out {tmp_path}/grown\n",
    )
    assert (tmp_path / "code").read_text().strip() == "3", done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith(("hhnet:", "Traceback"))]
    assert len(errors) == 1, done.stderr
    assert "No space left" in errors[0]
    assert_nothing_half(job, stored(tmp_path / "full"))
    assert done.returncode == 0, done.stderr
    assert_whole(job, stored(tmp_path / "grown"))


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for the names of Unix sockets: Ray runs elsewhere if TMPDIR is longer."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(("name", "says"), [("ingest", "No space left"), ("index", "no space left")])
def test_a_scratch_disk_that_is_full(jobs: Jobs, short_folder: Path, name: str, says: str) -> None:
    """Shards are built, and Ray runs, on another disk than results go to; the error names it, readers see nothing."""
    job, scratch, out = jobs[name], short_folder / "scratch", jobs.place()
    done = on_a_disk_of("8k", scratch, f"{HHNET} {' '.join(job.words_to(out))}", TMPDIR=str(scratch))
    assert done.returncode == 3, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("hhnet:")
    assert str(scratch) in error
    assert says in error
    assert "Traceback" not in done.stderr
    assert_nothing_half(job, stored(out))
    rerun(job, out)
