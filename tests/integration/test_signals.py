"""Ctrl-C and termination of verbs with processes of their own: exit code, one line, nothing left, nothing published."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import SETTINGS
from tests.support.report import scaled

PROGRESS = re.compile(
    r"[\w ]+: (\w+: )?[\d,]+/[\d,]+ \w+ in .*|starting (Ray, reading \d+ images|a Prefect .*)|epoch \d+/\d+: loss .*"
)


def words_of(verb: str, shards: Path, model: Path, codes: Path, pictures: Path, out: Path) -> list[str]:
    train, query = str(shards / "train"), str(codes / "query")
    return {
        "train": ["train", "--shards", train, "--out", str(out)],
        "encode": ["encode", "--shards", train, "--model", str(model), "--out", str(out)],
        "index": ["index", "build", "--codes", query, "--out", str(out)],
        "run": ["run", "--config", str(out.parent / "run.toml"), "--out", str(out)],
        "demo": ["demo", "--data", str(pictures), "--out", str(out)],
    }[verb]


def write_run(path: Path, shards: Path) -> None:
    """The configuration of a run on these shards."""
    roles = f'train = "{shards}/train"\nquery = "{shards}/query"\ndatabase = ["{shards}/database"]\n'
    path.write_text(f"[run]\n{roles}[data]\nimage_size = 32\n[model]\nbackbone = 'test_resnet'\n")


def started(words: list[str], **variables: str) -> subprocess.Popen[str]:
    """A verb in a session of its own."""
    if words[0] not in ("run", "demo"):
        settings = [word for setting in SETTINGS for word in ("--set", setting)]
        words = [*words[:2], *settings, *words[2:]] if words[0] == "index" else [*words[:1], *settings, *words[1:]]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
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


def test_an_interrupt_before_the_work_begins_needs_no_traceback(tmp_path: Path) -> None:
    process = started(["ingest", str(tmp_path), "--out", str(tmp_path / "out")])
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "pydantic_core" in maps.read_text(), process)  # its imports are under way
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=30)
    assert (process.returncode, printed) == (130, ""), err
    assert err.startswith("hhnet: interrupted") and err.count("\n") == 1


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files; its path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("verb", "number", "code", "said"),
    [
        ("run", signal.SIGTERM, 143, "terminated"),
        ("train", signal.SIGINT, 130, "interrupted"),
        *scaled((), (("run", signal.SIGINT, 130, "interrupted"), ("train", signal.SIGTERM, 143, "terminated"))),
    ],
)
def test_a_signal_while_the_training_runs(
    verb: str, number: signal.Signals, code: int, said: str, shards: Path, scratch: Path, tmp_path: Path
) -> None:
    """SIGTERM comes to a run in Prefect's handler; Ctrl-C comes to all processes, and Ray Train has its own answer."""
    out = tmp_path / "out"
    write_run(tmp_path / "run.toml", shards)
    words = words_of(verb, shards, out, out, out, out)
    long = ["--set", "train.epochs=500", "--set", "train.checkpoint_steps=1"]
    process = started([*words, *long], TMPDIR=str(scratch))
    wait_until(lambda: any(out.rglob("checkpoints/*/manifest.json")), process, 240)
    helpers = descendants(process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    try:
        printed, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:  # it is not left to the tests that follow
        for left in (process, *helpers):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        raise
    assert (process.returncode, printed) == (code, ""), err
    complaints = [line for line in err.splitlines() if not PROGRESS.fullmatch(line)]
    assert complaints == [f"hhnet: {said}; what was committed stays, the same command goes on from there"]
    _, alive = psutil.wait_procs(helpers, timeout=10)
    assert [p.name() for p in alive] == []
    assert list(scratch.glob("hh*-????????")) == []


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [
        ("index", signal.SIGINT, 130),
        ("encode", signal.SIGTERM, 143),
        ("run", signal.SIGINT, 130),
        # Their first steps are those of encode and of run.
        *scaled((), (("train", signal.SIGINT, 130), ("demo", signal.SIGINT, 130))),
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
    write_run(tmp_path / "run.toml", shards)
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


_UNAVAILABLE = """
import psutil
from ray.exceptions import ActorUnavailableError
from pipelines.cluster.session import ray_session
from pipelines.config.settings import Config

for kill in (False, True):
    try:
        with ray_session(Config()):
            if kill:
                (gcs,) = (one for one in psutil.Process().children(recursive=True) if "gcs_server" in one.name())
                gcs.kill()
            raise ActorUnavailableError("Socket closed", None)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def test_an_actor_that_fails_with_the_head_is_told_as_the_lost_head() -> None:
    """Ray reports the actor at once, and the head counts as lost only later. While the head lives the error stays."""
    env = os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "16"}
    done = subprocess.run([sys.executable, "-c", _UNAVAILABLE], env=env, capture_output=True, text=True, timeout=180)
    assert done.stdout.split() == ["ActorUnavailableError", "HeadLost"], done.stderr
