"""The settings around the temporary server; that it really runs a flow is an integration test."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import server
from flows.server import _await, environment
from pipelines.errors import Unavailable


def test_the_environment_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHNET_A", "1")
    monkeypatch.delenv("HHNET_B", raising=False)
    with pytest.raises(KeyError), environment({"HHNET_A": "2", "HHNET_B": "3"}):
        assert (os.environ["HHNET_A"], os.environ["HHNET_B"]) == ("2", "3")
        raise KeyError
    assert os.environ["HHNET_A"] == "1"
    assert "HHNET_B" not in os.environ


def test_a_server_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", "raise SystemExit('no disk')"], stdout=stream, stderr=stream)
    with pytest.raises(Unavailable, match=r"ended with code 1 \(no disk\).*PREFECT_API_URL"):
        _await(process, "http://127.0.0.1:9/api", log)


def test_a_server_that_does_not_come_up_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STARTUP_S", 0.3)
    (tmp_path / "log").write_text("")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(Unavailable, match="did not answer in time"):
            _await(process, "http://127.0.0.1:9/api", tmp_path / "log")
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_the_server_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time; from flows.server import _die_with_parent; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], preexec_fn=_die_with_parent); "
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
