"""Private temporary folders that are removed when their owner ends, in whatever way.

The owner holds a lock on its folder. Whoever makes the next folder beside it looks for folders whose lock is free,
kills the processes that still write below them, and removes them. Where that would be too late, the owner has a keeper
that does so at once: this file run by itself, which notices the owner's end by the broken pipe between them. Only the
standard library is imported: the keeper starts fast, and it must not depend on the environment.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

RANDOM_NAME_CHARS = 8
"""Characters that `mkdtemp` appends to a prefix."""
SWEEP_TIMEOUT_S = 10.0
"""Seconds that a sweep may take to end the remaining processes and to remove the folder."""
SWEEP_EVERY_S = 0.1
"""Seconds between two tries of a sweep."""


class PrivateFolder:
    """A new folder `base/prefix...`, locked by this process until `close`; with `kept` a keeper watches over it."""

    def __init__(self, base: Path, prefix: str, kept: bool = False) -> None:
        for left in base.glob(prefix + RANDOM_NAME_CHARS * "?"):
            _sweep_if_left(left)
        self.path, self._lock = _locked_folder(base, prefix)
        self._keeper = _start_keeper(self.path) if kept else None

    def close(self) -> None:
        """Remove the folder; if there is a keeper, wait until it has done so, at most twice SWEEP_TIMEOUT_S."""
        if self._keeper is None:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            assert self._keeper.stdin is not None
            self._keeper.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._keeper.wait(timeout=2 * SWEEP_TIMEOUT_S)
        os.close(self._lock)


def _start_keeper(folder: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(folder)],  # without PYTHON* variables, user folders and site
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C, and what kills the owner's group, are not for the keeper
    )


def _locked_folder(base: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder and lock it; return it and the descriptor that holds the lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for an abandoned one, before it was locked
            continue
        try:
            # The kernel frees a flock when its holder ends, even by SIGKILL. A file with a process id would stay, and
            # the id may belong to another process by then.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder.stat()
        except (BlockingIOError, FileNotFoundError):  # another process sweeps it, or has removed it
            os.close(lock)
            continue
        except OSError:  # a file system without locks, where nobody sweeps folders
            pass
        return folder, lock


def _sweep_if_left(folder: Path) -> None:
    """Sweep a folder of this user if its owner is dead, that is, if nobody holds its lock."""
    try:
        # Anybody can put names into /tmp: a link there must not lead the sweep into another folder.
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep_folder(str(folder), spared=os.getpid())
    except OSError:  # its owner is alive
        pass
    finally:
        os.close(lock)


def sweep_folder(folder: str, spared: int) -> None:
    """Kill the processes with open files below `folder` except `spared`, and remove it; end after SWEEP_TIMEOUT_S."""
    deadline = time.monotonic() + SWEEP_TIMEOUT_S
    while Path(folder).exists() and time.monotonic() < deadline:
        holders = [process for process in _holders(folder) if process != spared]
        # Before the folder goes: a process that still writes would make new files while it is removed.
        for process in holders:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if holders:
            time.sleep(SWEEP_EVERY_S)
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _holders(folder: str) -> Iterator[int]:
    """Yield the processes that have a file below `folder` open for writing; those that only read there may go on."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(_writes(link, folder) for link in (process / "fd").iterdir()):
                yield int(process.name)


def _writes(link: Path, folder: str) -> bool:
    try:
        if not os.readlink(link).startswith(f"{folder}/"):  # noqa: PTH115 (of a file that may be deleted)
            return False
        flags = re.search(r"^flags:\s*(\d+)", (link.parent.parent / "fdinfo" / link.name).read_text(), re.M)
        return flags is not None and int(flags[1], 8) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        return False


def _keep(folder: str) -> None:
    """Wait until the pipe breaks because the owner closed it or died; then sweep."""
    # A supervisor signals the keeper together with its owner; the keeper has to outlive it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = os.getppid()  # spared: if it closed the pipe itself, it is alive and may still write logs there
    sys.stdin.buffer.read()
    sweep_folder(folder, spared=owner)


if __name__ == "__main__":
    _keep(sys.argv[1])
