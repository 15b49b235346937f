"""A distant object as a stream that fetches block after block."""

import io
from collections.abc import Callable

BLOCK_BYTES = 8 << 20
"""Bytes that a stream fetches and holds at a time."""

Fetch = Callable[[int, int], tuple[bytes, int | None]]
"""Return the bytes [start, stop) of an object, as far as it reaches, and where it ends if that is known."""


def open_blocks(fetch: Fetch, block: int | None, start: int) -> io.BufferedReader:
    """Open a stream at byte `start` that holds one block at a time, of at most BLOCK_BYTES.

    The first block is fetched at once, which also shows if there is no such object.
    """
    size = min(block or BLOCK_BYTES, BLOCK_BYTES)
    stream: io.BufferedReader = io.BufferedReader(_Blocks(fetch, start), size)
    stream.peek()
    return stream


class _Blocks(io.RawIOBase):
    """An object as a raw stream; a BufferedReader around it asks for block after block."""

    def __init__(self, fetch: Fetch, start: int) -> None:
        self._fetch, self._place = fetch, start
        self._end: int | None = None
        """Where the object ends, once an answer said it."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the end of an object is not known before it is reached")
        self._place = offset + (self._place if whence == io.SEEK_CUR else 0)
        return self._place

    # RawIOBase allows any writable buffer; the BufferedReader around this class passes memoryviews only.
    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        stop = self._place + len(target)
        if self._end is not None:
            stop = min(stop, self._end)
        if stop <= self._place:
            return 0
        data, self._end = self._fetch(self._place, stop)
        target[: len(data)] = data
        self._place += len(data)
        return len(data)
