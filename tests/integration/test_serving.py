"""A serving process against a real Prefect server that is restarted, and kills of the server's processes."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.prefect import Prefect, serving, until
from tests.support.processes import stopped, trainers_below

pytestmark = pytest.mark.timeout(600)

ENDLESS = """
[ingest]
samples_per_shard = 10
[data]
image_size = 32
batch_size = 12
[model]
backbone = "test_resnet"
bits = 16
[train]
epochs = 100000
val_every = 50000
[run]
source = "{pictures}"
split = "train=.6,query=.2,database=.2"
out = "{home}/out"
"""


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture
def prefect(home: Path) -> Iterator[Prefect]:
    server = Prefect(home)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def config(home: Path, pictures: Path) -> str:
    (home / "endless.toml").write_text(ENDLESS.format(pictures=pictures, home=home))
    return str(home / "endless.toml")


def training(prefect: Prefect, key: str) -> str:
    """Trigger a run and wait until its training has a bar that moves; the run."""
    uid = prefect.trigger("test", key)
    until("progress of training", lambda: 0 < prefect.progress(uid).get("hhnet-train-model", 0) < 100, 200)
    return uid


def workers_of(process: Any) -> list[psutil.Process]:
    """The processes of the runs and of their Ray."""
    return psutil.Process(process.pid).children(recursive=True)


def test_a_cancellation_is_heard_after_a_restart_of_the_server(prefect: Prefect, config: str, home: Path) -> None:
    """The server is away for longer than Prefect's own observer asks for it."""
    with serving(prefect, home, "--config", config, "--name", "test") as process:
        uid = training(prefect, "restart")
        family = workers_of(process)
        prefect.stop()
        with stopped(trainers_below(process.pid)):  # what runs beside this test has the processors meanwhile
            time.sleep(45)
        prefect.start()
        prefect.cancel(uid)
        ended = prefect.end_of(uid, 90)
        assert ended["state_type"] == "CANCELLED", ended["state"]
        _, alive = psutil.wait_procs([one for one in family if "resource_tracker" not in _words(one)], timeout=30)
        assert alive == []
        assert process.poll() is None


def test_a_killed_serving_process_leaves_no_run_and_no_orphan(prefect: Prefect, config: str, home: Path) -> None:
    with serving(prefect, home, "--config", config, "--name", "test") as process:
        uid = training(prefect, "kill")
        family = workers_of(process)
        process.kill()
        ended = prefect.end_of(uid, 90)
        assert ended["state_type"] == "CRASHED"
        _, alive = psutil.wait_procs(family, timeout=90)
        assert alive == []


def test_a_run_whose_host_is_lost_is_marked_by_the_automation_that_comes_with_the_deployment(
    prefect: Prefect, config: str, home: Path
) -> None:
    """Nobody is left who could say so: neither the serving process nor that of the run."""
    with serving(prefect, home, "--config", config, "--name", "test", "--lost-after", "90s") as process:
        uid = training(prefect, "lost")
        worker = next(one for one in workers_of(process) if "spawn_main" in _words(one) and one.ppid() == process.pid)
        family = workers_of(process)
        process.kill()
        worker.kill()
        assert prefect.run(uid)["state_type"] == "RUNNING"
        ended = prefect.end_of(uid, 300)
        assert (ended["state_type"], "no sign of life for 90 s" in ended["state"]["message"]) == ("CRASHED", True)
        _, alive = psutil.wait_procs(family, timeout=90)
        assert alive == []


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
