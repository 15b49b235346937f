"""A process that works for another one ends when that one is gone, however it went.

Else a run goes on beside the next one that the server starts, and nobody sees or stops it.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

from pipelines.cluster.session import is_rays

VARIABLE = "HHNET_SERVED_BY"
"""Environment variable with the process id of the serving process."""
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
RAY_NAMES = ("ray", "gcs_server")
"""How names of Ray's processes begin; a process that has ended has only its name left."""
LOOK_EVERY_S = 1.0
END_S = 30.0
"""Seconds that an orphan has to end its Ray and report, before it is killed."""


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def follow_parent() -> None:
    """End this process once the serving process that started it is gone; do nothing where none did."""
    served_by = os.environ.get(VARIABLE, "")
    if not served_by.isdigit() or int(served_by) == os.getpid():
        return
    die_with_parent()
    told = sys.platform == "linux" and os.getppid() == int(served_by)  # by the kernel, when the time comes
    threading.Thread(target=_watch, args=(int(served_by), told), daemon=True).start()


def _watch(parent: int, told: bool) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    if not told:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_S)
    os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Have the kernel make this process the parent of what runs leave behind; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_orphaned_ray() -> None:
    """Kill the processes of Ray whose run is gone, some of which would notice that only after a minute."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                if process.name().startswith(RAY_NAMES):  # never a run's own, whose end others wait for
                    os.waitpid(process.pid, os.WNOHANG)
            elif is_rays(process.cmdline()):
                process.kill()
                process.wait(timeout=END_S)
