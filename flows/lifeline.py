"""Ends the processes that work for another process once that one is gone, whatever ended it.

Otherwise a run would go on beside the next one that the server starts, and nobody would see or stop it.
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

SERVED_BY_VARIABLE = "HHNET_SERVED_BY"
"""Environment variable with the process id of the serving process."""
PR_SET_PDEATHSIG = 1
"""Number of a prctl option from linux/prctl.h."""
RAY_NAMES = ("ray", "gcs_server")
"""Beginnings of the names of Ray's processes; of an ended process only its name is left."""
LOOK_EVERY_S = 1.0
"""Seconds between two looks for the parent."""
ORPHAN_GRACE_S = 30.0
"""Seconds that an orphan has to end its Ray and report before it is killed."""


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def follow_parent() -> None:
    """End this process once the serving process that started it is gone; do nothing if there was none."""
    served_by = os.environ.get(SERVED_BY_VARIABLE, "")
    if not served_by.isdigit() or int(served_by) == os.getpid():
        return
    die_with_parent()
    # The kernel sends SIGTERM only if the parent still lived when it was asked to.
    told = sys.platform == "linux" and os.getppid() == int(served_by)
    threading.Thread(target=_watch, args=(int(served_by), told), daemon=True).start()


def _watch(parent: int, told: bool) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY_S)
    if not told:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def end_orphaned_ray() -> None:
    """Kill the processes of Ray whose run is gone. Some would notice that only after a minute."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                if process.name().startswith(RAY_NAMES):  # not a run's own process, whose end the runner waits for
                    os.waitpid(process.pid, os.WNOHANG)
            elif is_rays(process.cmdline()):
                process.kill()
                process.wait(timeout=ORPHAN_GRACE_S)
