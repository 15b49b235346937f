"""A process that was started by a serving process does not outlive it."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

CHILD = (
    "import signal, time; signal.signal(signal.SIGTERM, {handler}); {follow}; print('up', flush=True); time.sleep(60)"
)
FOLLOW = (
    "from flows import lifeline; "
    "lifeline.ORPHAN_GRACE_S = {end}; lifeline.LOOK_EVERY_S = 0.05; lifeline.follow_parent()"
)
PARENT = (
    "import os, subprocess, sys, time; os.environ['HHNET_SERVED_BY'] = str(os.getpid()); "
    "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True); "
    "p.stdout.readline(); print(p.pid, flush=True); time.sleep(60)"
)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def outlives(child: str, seconds: float) -> bool:
    """Kill the parent of a process that runs `child`; whether that goes on."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = is_alive(pid)
    if left:
        os.kill(pid, 9)
    return left


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("handler", "end"),
    [
        ("signal.SIG_DFL", 60),  # it ends at the first signal
        ("signal.SIG_IGN", 0.2),  # it does not, and is killed
    ],
)
def test_a_run_ends_with_the_process_that_serves_it(handler: str, end: float) -> None:
    child = CHILD.format(handler=handler, follow=FOLLOW.format(end=end))
    assert not outlives(child, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_run_ends_whose_server_died_before_it_could_follow() -> None:
    child = "import os, time; up = os.getppid(); print('up', flush=True)\nwhile os.getppid() == up: time.sleep(0.05)\n"
    assert not outlives(child + FOLLOW.format(end=60) + "; time.sleep(60)", 20)
    assert not outlives(child, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_follows_nobody_goes_on() -> None:
    assert outlives(CHILD.format(handler="signal.SIG_DFL", follow="pass"), 1)


def test_without_a_serving_process_there_is_nobody_to_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.lifeline import SERVED_BY_VARIABLE, follow_parent

    for value in ("", "no number", str(os.getpid())):
        monkeypatch.setenv(SERVED_BY_VARIABLE, value)
        threads = threading.active_count()
        follow_parent()
        assert threading.active_count() == threads, value
