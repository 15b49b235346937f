"""Ctrl-C and termination of verbs with processes of their own: exit code, one line, nothing left, nothing published."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import SETTINGS


def words_of(verb: str, shards: Path, model: Path, codes: Path, pictures: Path, out: Path) -> list[str]:
    train, query = str(shards / "train"), str(codes / "query")
    return {
        "train": ["train", "--shards", train, "--out", str(out)],
        "encode": ["encode", "--shards", train, "--model", str(model), "--out", str(out)],
        "index": ["index", "build", "--codes", query, "--out", str(out)],
        "run": ["run", "--config", str(out.parent / "run.toml"), "--out", str(out)],
        "demo": ["demo", "--data", str(pictures), "--out", str(out)],
    }[verb]


def started(words: list[str]) -> subprocess.Popen[str]:
    """A verb in a session of its own."""
    if words[0] not in ("run", "demo"):
        words = [*words, *(word for setting in SETTINGS for word in ("--set", setting))]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs this suite in the background has it ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_until(condition: object, process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [
        ("train", signal.SIGINT, 130),
        ("index", signal.SIGINT, 130),
        ("encode", signal.SIGTERM, 143),
        ("run", signal.SIGINT, 130),
        ("demo", signal.SIGINT, 130),
    ],
)
def test_a_signal_while_ray_or_prefect_runs(
    verb: str,
    number: signal.Signals,
    code: int,
    shards: Path,
    model: Path,
    codes: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    roles = f'train = "{shards}/train"\nquery = "{shards}/query"\ndatabase = ["{shards}/database"]\n'
    (tmp_path / "run.toml").write_text(f"[run]\n{roles}[data]\nimage_size = 32\n[model]\nbackbone = 'resnet18'\n")
    process = started(words_of(verb, shards, model, codes, pictures, out))
    wait_until(lambda: descendants(process), process)
    time.sleep(2)
    helpers = descendants(process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    printed, err = process.communicate(timeout=90)
    assert (process.returncode, printed) == (code, ""), err
    assert "Traceback" not in err, err
    assert not (out / "manifest.json").exists()
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert [p.name() for p in alive] == []
