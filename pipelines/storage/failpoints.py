"""Named places where a test can kill the process or fill the disk, to show what a crash there leaves behind.

    HHNET_FAILPOINTS=part.put.before=kill,receipt.put.after=enospc@3

kills the process with SIGKILL when it comes to the first place, and makes the second one fail with ENOSPC the third
time it is passed. Unset, a failpoint does nothing. Hits are counted in each process.
"""

import errno
import os
import signal
import threading
from collections import Counter

FAILPOINTS_VARIABLE = "HHNET_FAILPOINTS"

_hits: Counter[str] = Counter()
_lock = threading.Lock()


def failpoint(name: str) -> None:
    """Pass the place called `name`; raise OSError (ENOSPC) or kill the process where the environment asks for it."""
    wanted = os.environ.get(FAILPOINTS_VARIABLE)
    if not wanted:
        return
    with _lock:
        _hits[name] += 1
        hit = _hits[name]
    for entry in wanted.split(","):
        place, _, rest = entry.partition("=")
        action, _, number = rest.partition("@")
        if place == name and hit == int(number or 1):
            _act(action)


def _act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    raise ValueError(f"{FAILPOINTS_VARIABLE} names the action {action!r}: write kill or enospc")
