"""Failpoints do what the environment asks for, at the place and the hit it names, and nothing otherwise."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from pipelines.storage.failpoints import FAILPOINTS_VARIABLE, failpoint


def test_unset_a_failpoint_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAILPOINTS_VARIABLE, raising=False)
    assert failpoint("part.put.before") is None
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "receipt.put.before=enospc")
    assert failpoint("part.put.before") is None


def test_a_full_disk_at_the_hit_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "other=kill,second=enospc@2")
    failpoint("second")
    with pytest.raises(OSError, match="No space left") as caught:
        failpoint("second")
    assert caught.value.errno == errno.ENOSPC
    failpoint("second")


def test_kill_ends_the_process_at_once() -> None:
    program = (
        "from pipelines.storage.failpoints import failpoint; failpoint('x'); print('alive', flush=True); failpoint('x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {FAILPOINTS_VARIABLE: "x=kill@2"}, capture_output=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, b"alive\n")


def test_an_unknown_action_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "x=explode")
    with pytest.raises(ValueError, match="explode"):
        failpoint("x")
