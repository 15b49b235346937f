"""A private temporary folder for a local Ray, which is gone with its owner, however that ends.

The owner holds a lock on the folder and a pipe to a keeper, which is this file run by itself. When the pipe breaks, the
keeper kills the processes that still have files open below the folder and removes it. Where the keeper was killed too,
the next owner does so for every folder whose lock is free. Only the standard library is imported: the keeper starts at
once, and it must not depend on the environment.
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

PREFIX = "hhray-"
SOCKET_BYTES = 107
"""Longest path of a Unix socket."""
RAYS_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""What Ray puts behind its temporary folder at most."""
DRAWN_BYTES = len(f"/{PREFIX}12345678")
SWEEP_S = 10.0
"""How long the keeper may take to end what is left and to remove the folder."""
AGAIN_S = 0.1


class PrivateFolder:
    """A new folder, locked by this process and watched by a keeper until `close`."""

    def __init__(self) -> None:
        base = Path(short_base())
        for left in base.glob(f"{PREFIX}*"):
            _sweep_if_left(left)
        self.path, self._lock = _locked_folder(base)
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C, and what kills the owner's group, are not for the keeper
        )

    def close(self) -> None:
        """Let the keeper remove the folder, and wait until it is gone, at most twice SWEEP_S."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout=2 * SWEEP_S)
        os.close(self._lock)


def short_base() -> str:
    """The folder of temporary files, or another where its path is too long for Ray's sockets below it."""
    usual = (f"/{name}" for name in ("tmp", "var/tmp", "dev/shm"))
    wanted = [os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), *usual]
    for folder in filter(None, wanted):
        path = os.path.realpath(folder)
        fits = len(os.fsencode(path)) + DRAWN_BYTES + RAYS_BYTES <= SOCKET_BYTES
        if fits and Path(path).is_dir() and os.access(path, os.W_OK | os.X_OK):
            return path
    return tempfile.gettempdir()  # Ray says what is wrong with it


def _locked_folder(base: Path) -> tuple[Path, int]:
    """A new folder and the descriptor that holds its lock; another one if somebody swept it before it was locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                folder.stat()
            except OSError:
                os.close(lock)
            else:
                return folder, lock


def _sweep_if_left(folder: Path) -> None:
    """Sweep a folder of this user whose owner is dead: nobody holds its lock."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if os.fstat(lock).st_uid == os.geteuid():
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            sweep(str(folder), spared=os.getpid())
    except OSError:  # its owner is alive
        pass
    finally:
        os.close(lock)


def sweep(folder: str, spared: int) -> None:
    """Kill the processes with open files below `folder`, but not `spared`, and remove it; gives up after SWEEP_S."""
    deadline = time.monotonic() + SWEEP_S
    while Path(folder).exists() and time.monotonic() < deadline:
        holders = [process for process in _holders(folder) if process != spared]
        for process in holders:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        if holders:
            time.sleep(AGAIN_S)
            continue
        shutil.rmtree(folder, ignore_errors=True)


def _holders(folder: str) -> Iterator[int]:
    """The processes that have a file below `folder` open to write it; who only reads a log there may go on."""
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
    """Wait until the owner closes its end of the pipe, by its will or by its death; then sweep."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    owner = os.getppid()  # where it closes the pipe itself, it may have logs open still
    sys.stdin.buffer.read()
    sweep(folder, spared=owner)


if __name__ == "__main__":
    _keep(sys.argv[1])
