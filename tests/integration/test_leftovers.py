"""What a local Ray leaves behind: nothing, however its verb ends, and wherever temporary files and homes are."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files; its path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


def encode(shards: Path, model: Path, out: Path, **variables: str) -> "subprocess.Popen[str]":
    words = ["encode", "--shards", str(shards / "train"), "--model", str(model), "--out", str(out)]
    words += [word for setting in (*SETTINGS, "ray.cpus=1") for word in ("--set", setting)]
    env = {name: value for name, value in {**os.environ, **variables}.items() if value}
    return subprocess.Popen([sys.executable, "-m", "pipelines", *words], env=env, stderr=subprocess.PIPE, text=True)


def at_work(verb: "subprocess.Popen[str]", scratch: Path) -> tuple[psutil.Process, list[psutil.Process]]:
    """The keeper of a verb's Ray, and all the other processes below the verb once its workers are there."""
    deadline = time.monotonic() + 120
    while True:
        below = psutil.Process(verb.pid).children(recursive=True)
        words = {process: " ".join(process.cmdline()) for process in below}
        if any(said.startswith(("ray::EncodeWorker", "ray::encode ")) for said in words.values()):
            break
        assert verb.poll() is None and time.monotonic() < deadline, verb.communicate()[1]
        time.sleep(0.05)
    (keeper,) = [process for process, said in words.items() if "scratch.py" in said]
    assert any(scratch.iterdir()), "its files are where TMPDIR says"
    return keeper, [process for process in below if process != keeper]


def gone(processes: list[psutil.Process], folder: Path, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    while any(folder.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive, [process.cmdline() for process in alive]
    return not any(folder.iterdir())


def test_a_verb_that_ends_well_leaves_nothing(shards: Path, model: Path, scratch: Path, tmp_path: Path) -> None:
    verb = encode(shards, model, tmp_path / "codes", TMPDIR=str(scratch))
    _, others = at_work(verb, scratch)
    _, err = verb.communicate(timeout=120)
    assert verb.returncode == 0, err
    assert gone(others, scratch)


def test_a_killed_verb_leaves_neither_process_nor_file(
    shards: Path, model: Path, codes: Path, scratch: Path, tmp_path: Path
) -> None:
    """Where its keeper is killed too, the next verb clears up, but nothing of a verb that runs."""
    out = tmp_path / "codes"
    verb = encode(shards, model, out, TMPDIR=str(scratch))
    keeper, others = at_work(verb, scratch)
    verb.kill()
    assert gone([keeper, *others], scratch)

    orphan = encode(shards, model, out, TMPDIR=str(scratch))
    keeper, others = at_work(orphan, scratch)
    keeper.kill()
    orphan.kill()
    verb = encode(shards, model, out, TMPDIR=str(scratch))
    _, mine = at_work(verb, scratch)
    rival = encode(shards, model, tmp_path / "more", TMPDIR=str(scratch))
    for each in (verb, rival):
        _, err = each.communicate(timeout=240)
        assert each.returncode == 0, err
    assert gone([*others, *mine], scratch)
    assert tree(out) == tree(codes / "train")


@pytest.mark.parametrize("home", ["missing", "unset", "unwritable"])
def test_neither_a_home_nor_a_short_path_is_needed(home: str, shards: Path, model: Path, tmp_path: Path) -> None:
    """Ray's sockets lie below the folder for temporary files, and its token in the home, where there is none."""
    long = tmp_path / ("long" * 16)
    long.mkdir()
    (unwritable := tmp_path / "home").touch()
    homes = {"missing": str(tmp_path / "missing"), "unset": "", "unwritable": str(unwritable)}
    verb = encode(shards, model, tmp_path / "codes", TMPDIR=str(long), HOME=homes[home], RAY_AUTH_TOKEN_PATH="")
    _, err = verb.communicate(timeout=120)
    assert verb.returncode == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "home", long.name]


def test_an_interrupt_leaves_nothing(shards: Path, model: Path, scratch: Path, tmp_path: Path) -> None:
    verb = encode(shards, model, tmp_path / "codes", TMPDIR=str(scratch))
    keeper, others = at_work(verb, scratch)
    verb.send_signal(signal.SIGTERM)
    _, err = verb.communicate(timeout=120)
    assert verb.returncode == 143, err
    assert gone([keeper, *others], scratch)
