"""What a hostile input must not do: grow memory, write files, run anything, or take for ever.

with peak_growth() as memory:   memory.mib afterwards: how far resident memory rose above where it stood
with watched() as events:       events lists every file opened for writing, every program started, every class unpickled
with within(seconds):           ends what takes more CPU seconds, whatever else the machine does; no measure of speed
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HANG_S = 5.0

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_FORBIDDEN = (
    *("os.mkdir", "os.symlink", "os.link", "os.rename", "os.truncate", "os.chmod", "os.chown"),
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class"),
)
_active: list[list[str]] = []
_hooked = False


@dataclass
class Memory:
    mib: float = 0.0


@contextmanager
def peak_growth() -> Iterator[Memory]:
    """Linux only: the kernel's high-water mark of resident memory is reset, then read."""
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would hide what is used now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    memory = Memory()
    try:
        yield memory
    finally:
        memory.mib = (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


class Hung(BaseException):
    """Nothing that is tested catches it."""


@contextmanager
def within(seconds: float = HANG_S, what: str = "") -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise Hung(f"{what} took more than {seconds:g} s")

    before, begun = signal.signal(signal.SIGPROF, give_up), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    took = time.process_time() - begun  # more than allowed where one call into C never came back to Python
    assert took < seconds, f"{what} took {took:.1f} s"


@contextmanager
def watched() -> Iterator[list[str]]:
    """Python's own audit events, in all threads of this process."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_note)
        _hooked = True
    events: list[str] = []
    _active.append(events)
    try:
        yield events
    finally:
        _active.remove(events)


def _note(event: str, args: tuple[object, ...]) -> None:
    if not _active:
        return
    if event == "open":
        flags = args[2]
        if isinstance(flags, int) and flags & _WRITES:
            _active[-1].append(f"open {args[0]!r}")
    elif event in _FORBIDDEN:
        _active[-1].append(f"{event} {args!r}")


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()}
