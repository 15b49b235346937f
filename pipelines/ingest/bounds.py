"""How far a source may unfold: in all, and in memory at once. Pictures barely shrink, bombs do."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.errors import InputError

MAX_EXPANSION = 200
"""How many times its own size a compressed source may unfold to."""
SMALL_BYTES = 64 << 20
"""Any source may unfold to this much."""
READING_BYTES = 1 << 30
"""Memory that reading a few rows of a table may take, beside four times the size of its file."""

_STATM = Path("/proc/self/statm")
_DATA_PAGES = 5


def largest(path: Path) -> int:
    """Return how many bytes a compressed source may unfold to."""
    return max(SMALL_BYTES, MAX_EXPANSION * path.stat().st_size)


def require_bounded(path: Path, unfolded: int) -> None:
    """InputError where a source unfolds to more than it may."""
    if unfolded > largest(path):
        raise InputError(
            f"{path} unfolds to more than {largest(path) >> 20} MiB, {MAX_EXPANSION} times its size: it is no source "
            "of pictures; unpack it if it is one"
        )


@contextmanager
def memory_for(path: Path) -> Iterator[None]:
    """Let this process take only so much more memory as reading a table at `path` may need: MemoryError beyond.

    A table announces sizes that nothing but unfolding it can check. Where there is no /proc, there is no limit.
    """
    if not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(_STATM.read_text().split()[_DATA_PAGES]) * resource.getpagesize()
    limit = held + READING_BYTES + 4 * path.stat().st_size
    ends = [end for end in (soft, hard) if end != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *ends]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
