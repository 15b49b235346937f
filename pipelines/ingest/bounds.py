"""Limits on how far a compressed source may unfold, in all and in memory. Pictures barely compress, bombs do."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import InputError
from pipelines.shards.tar import MAX_MEMBER_BYTES

MAX_EXPANSION = 200
"""Limit on the unfolded size of a compressed source, as a multiple of its own size."""
MIN_LIMIT_BYTES = 64 << 20
"""Bytes that any source may unfold to, however small it is."""

_STATM = Path("/proc/self/statm")
_DATA_PAGES = 5
"""Place of the number of data and stack pages in /proc/self/statm, see proc(5)."""


@dataclass(frozen=True)
class SourceLimits:
    """Limits on what is taken from a source."""

    files: int = 20_000_000
    """Largest number of files."""
    file_bytes: int = MAX_MEMBER_BYTES
    """Largest size of a file that becomes a sample, in bytes."""
    reading_bytes: int = 1 << 30
    """Bytes of memory that reading a few rows of a table may take, besides four times the size of its file."""


LIMITS = SourceLimits()


def max_unfolded_bytes(path: Path) -> int:
    """Return the number of bytes that a compressed source may unfold to."""
    return max(MIN_LIMIT_BYTES, MAX_EXPANSION * path.stat().st_size)


def require_bounded(path: Path, unfolded: int) -> None:
    """Raise InputError if a source unfolds to more bytes than `max_unfolded_bytes` allows."""
    if unfolded > max_unfolded_bytes(path):
        raise InputError(
            f"{path} unfolds to more than {max_unfolded_bytes(path) >> 20} MiB, {MAX_EXPANSION} times its size: "
            "it is no source of pictures; unpack it if it is one"
        )


@contextmanager
def limit_memory(path: Path, reading_bytes: int) -> Iterator[None]:
    """Limit this process, inside the block, to the additional memory that reading a table at `path` may need.

    Allocations beyond it raise MemoryError. A table announces sizes that can only be checked by unfolding it. Without
    /proc there is no limit.
    """
    if not _STATM.exists():
        yield
        return
    # RLIMIT_DATA counts private writable memory only, so mapped files do not use it up.
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(_STATM.read_text().split()[_DATA_PAGES]) * resource.getpagesize()
    limit = held + reading_bytes + 4 * path.stat().st_size
    ends = [end for end in (soft, hard) if end != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([limit, *ends]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
