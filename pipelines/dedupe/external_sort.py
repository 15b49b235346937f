"""External sort of distinct 64-bit integers in a scratch file."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]

_WAYS = 16
"""Number of files that a too large file is split into, by ranges of values."""


class ExternalSort:
    """An external sort of distinct 64-bit integers: added in any order, by several threads, then read once, sorted."""

    def __init__(self, path: Path, at_once: int) -> None:
        self._path, self._at_once = path, at_once
        self._lock = threading.Lock()

    def add(self, keys: Keys) -> None:
        """Append integers, in any order."""
        with self._lock, self._path.open("ab") as stream:
            keys.tofile(stream)

    def in_order(self) -> Iterator[Keys]:
        """Yield all integers in ascending order, at most `at_once` at a time; the file is removed."""
        if self._path.exists():
            yield from _in_order(self._path, self._at_once)


def _in_order(path: Path, at_once: int) -> Iterator[Keys]:
    """Sort a file that fits; else deal it to files by ranges of the values, and sort these one after another."""
    count = path.stat().st_size // 8
    if count <= at_once:
        keys = np.fromfile(path, np.uint64)
        path.unlink()
        keys.sort()
        yield keys
        return
    ends = [(int(keys.min()), int(keys.max())) for keys in _blocks(path, at_once)]
    low, high = min(first for first, _ in ends), max(last for _, last in ends)
    width = np.uint64((high - low) // _WAYS + 1)
    paths = [path.with_name(f"{path.name}.{way}") for way in range(_WAYS)]
    for keys in _blocks(path, at_once // 4 or 1):  # a quarter, since dealing makes copies of a block
        way_of = (keys - np.uint64(low)) // width
        for way in np.unique(way_of):
            ExternalSort(paths[int(way)], at_once).add(keys[way_of == way])
    path.unlink()
    for part in paths:
        if part.exists():
            yield from _in_order(part, at_once)


def _blocks(path: Path, count: int) -> Iterator[Keys]:
    with path.open("rb") as stream:
        while data := stream.read(8 * count):
            yield np.frombuffer(data, np.uint64)


def cut_blocks(arrays: Iterable[Keys], rows: int) -> Iterator[Keys]:
    """Cut a stream of integers into arrays of exactly `rows`, and a last one with the rest."""
    rest = np.empty(0, np.uint64)
    for array in arrays:
        taken = rows - len(rest) if len(rest) else 0
        rest, array = np.concatenate([rest, array[:taken]]), array[taken:]
        if len(rest) == rows:
            yield rest
            rest = rest[:0]
        if not len(rest):
            whole = len(array) // rows * rows
            yield from (array[start : start + rows] for start in range(0, whole, rows))
            rest = array[whole:]
    if len(rest):
        yield rest
