"""Exact Hamming search over packed codes.

Codes are read as words of the widest unsigned type that divides them, in place: a database may be a memory map larger
than RAM. Work is spread over plain threads, since the compiled loops release the interpreter lock: numba's own thread
pools are neither fork-safe nor (its "workqueue" layer) safe to enter from two threads at once, and a search service
does both.

Order everywhere is (distance, row), both ascending, so results do not depend on the number of threads.

Shape suffixes: Q queries, N database codes, W words per code, D distance values, U units of work.
"""

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from hhnet.search import _compiled
from hhnet.search._compiled import Hits, Ints, Query, Words

_T = TypeVar("_T")
NO_ROW = -1
NO_DISTANCE = np.iinfo(np.int32).max
"""NO_DISTANCE and NO_ROW fill the places of a query that has fewer than k neighbours within its radius."""

_QUERIES_PER_UNIT = 64  # queries per unit of work of one thread
_MAX_CANDIDATES = 1 << 21  # candidates one thread may hold, 12 bytes each
_MIN_THREADED_WORDS = 1 << 19  # word comparisons below which waking threads costs more than it saves
_MIN_SHARED_WORDS = 1 << 21  # words of a database below which sharing it between threads is slower for a few queries


def as_words(codes: npt.NDArray[Any], name: str) -> Words:
    """View uint8 codes (N, bytes) as read-only words (N, W) of the widest type that divides them.

    Copies only codes that are not contiguous, or not aligned for such words.
    """
    codes = np.asarray(codes)
    if codes.dtype != np.uint8:
        raise TypeError(f"{name} must be packed codes of dtype uint8, see pack_bits: got {codes.dtype}")
    if codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(f"{name} must have shape (N, bytes): got {codes.shape}")
    size = math.gcd(codes.shape[1], 8)
    if not codes.flags.c_contiguous or codes.ctypes.data % size:
        codes = codes.copy()
    words: Words = np.asarray(codes).view(f"u{size}")
    words.flags.writeable = False  # one array type, hence one compiled kernel, for writable and mapped codes
    return words


def code_pair(queries: npt.NDArray[Any], database: npt.NDArray[Any]) -> tuple[Words, Words]:
    """Return both sets of codes as words, after checking that they have one width."""
    queries_QW, database_NW = as_words(queries, "queries"), as_words(database, "database")
    if np.shape(queries)[1] != np.shape(database)[1]:
        raise ValueError(
            f"queries and database must have codes of one length: "
            f"got {np.shape(queries)[1]} and {np.shape(database)[1]} bytes"
        )
    return queries_QW, database_NW


def _zeros(words: Words) -> Query:
    """Return W zero words; the length of the tuple tells the compiled loops how many words a code has."""
    return tuple([words.dtype.type(0)] * words.shape[1])


def _workers(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1: got {threads}")
    return threads or int(numba.config.NUMBA_NUM_THREADS)  # the CPUs this process may use


@functools.cache
def _helpers() -> ThreadPoolExecutor:
    """Return the threads that work beside the caller's.

    They are kept, since starting them takes as long as scanning a million codes.
    """
    return ThreadPoolExecutor(max(1, _workers(None) - 1), "hhnet-kernels")


os.register_at_fork(after_in_child=_helpers.cache_clear)  # a child process has none of its parent's threads


def run_blocks(
    work: Callable[[slice], _T], num: int, cost: int, threads: int | None = None, block: int = _QUERIES_PER_UNIT
) -> list[_T]:
    """Call `work` on slices of at most `block` that cover range(num); return the results in the order of the slices.

    Threads are used unless `cost`, in word comparisons, is small. The caller's thread works too, and it does not wait
    for a helper that has not begun. So `work` may itself call this, and a busy pool delays nobody. After an error
    nothing more is begun, and nothing still runs when it is raised.
    """
    workers = _workers(threads)
    step = max(1, min(block, -(-num // workers)))
    slices = [slice(start, min(start + step, num)) for start in range(0, num, step)]
    if workers == 1 or len(slices) < 2 or cost < _MIN_THREADED_WORDS:
        return [work(part) for part in slices]
    found: dict[int, _T] = {}
    remaining = iter(range(len(slices)))  # the next number is given out under the interpreter lock

    def drain() -> None:
        try:
            for number in remaining:
                found[number] = work(slices[number])
        finally:
            for _ in remaining:  # after an error: nothing is left for the other threads to begin
                pass

    helpers = [_helpers().submit(drain) for _ in range(min(workers, len(slices)) - 1)]
    try:
        drain()
    finally:
        # Helpers that still wait for a thread have nothing left to do; only those that began are waited for.
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()
    return [found[number] for number in range(len(slices))]


def hamming_distances(queries: npt.NDArray[np.uint8], database: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Return all distances, for small sets: uint8 (Q, bytes), (N, bytes) -> int32 (Q, N), in bits.

    Raises:
        TypeError: for codes that are not uint8. ValueError: for shapes that do not fit.
    """
    queries_QW, database_NW = code_pair(queries, database)
    out = np.empty((len(queries_QW), len(database_NW)), np.int32)
    _compiled.distances(queries_QW, database_NW, out)
    return out


def allowed_rows(allowed: npt.NDArray[np.bool_] | None, num: int) -> npt.NDArray[np.bool_]:
    """Return the mask for the compiled loops; an empty one allows all rows."""
    if allowed is None:
        return np.empty(0, np.bool_)
    mask = np.ascontiguousarray(allowed)
    if mask.dtype != np.bool_ or mask.shape != (num,):
        raise ValueError(f"allowed must be bool of shape ({num},): got {mask.dtype} {mask.shape}")
    return mask


def radii(radius: Ints | None, num_queries: int, bits: int) -> npt.NDArray[np.int64]:
    """Return the radius of each query for the compiled loops, int64 (Q,), at most `bits`."""
    if radius is None:
        return np.full(num_queries, bits, np.int64)
    radius = np.asarray(radius)
    if radius.dtype.kind not in "iu" or radius.shape != (num_queries,) or (radius < 0).any():
        raise ValueError(f"radius must be whole numbers from 0 on of shape ({num_queries},): got {radius!r}")
    found: npt.NDArray[np.int64] = radius.clip(max=min(bits, np.iinfo(radius.dtype).max)).astype(np.int64)
    return found


def _nearest(
    queries_QW: Words,
    database_NW: Words,
    allowed_N: npt.NDArray[np.bool_],
    radius_Q: npt.NDArray[np.int64],
    k: int,
    first_row: int = 0,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    out = np.full((len(queries_QW), k), NO_DISTANCE, np.int32), np.full((len(queries_QW), k), NO_ROW, np.int64)
    _compiled.scan_knn(_zeros(queries_QW), queries_QW, database_NW.reshape(-1), allowed_N, radius_Q, first_row, *out)
    return out


def hamming_knn(
    queries: npt.NDArray[np.uint8],
    database: npt.NDArray[np.uint8],
    k: int,
    threads: int | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
    radius: Ints | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Find the k nearest database codes of each query, exactly.

    Args:
        queries: uint8 (Q, bytes).
        database: uint8 (N, bytes).
        k: how many neighbours, at least 1; cut to N, or to the rows that are allowed.
        threads: how many threads to use at most; by default the CPUs this process may use, and never more.
        allowed: bool (N,), which rows may be found; by default all.
        radius: integers (Q,), the largest distance in bits at which each query finds anything; by default any. A
            search over several databases is faster if it passes the distance of its k-th neighbour so far.

    Returns:
        Distances in bits, int32 (Q, min(k, N)), and database rows, int64 (Q, min(k, N)), each row of both
        ordered by (distance, row). Where fewer lie within the radius, the last are NO_DISTANCE and NO_ROW.

    Raises:
        TypeError: for codes that are not uint8. ValueError: for shapes that do not fit, k < 1 or a negative radius.
    """
    queries_QW, database_NW = code_pair(queries, database)
    if k < 1:
        raise ValueError(f"k must be at least 1: got {k}")
    num_queries, size = len(queries_QW), len(database_NW)
    allowed_N, radius_Q = allowed_rows(allowed, size), radii(radius, num_queries, 8 * np.shape(queries)[1])
    k, workers = min(k, size if allowed is None else int(np.count_nonzero(allowed_N))), _workers(threads)
    if num_queries == 0 or k == 0:
        return np.empty((num_queries, k), np.int32), np.empty((num_queries, k), np.int64)
    cost = num_queries * database_NW.size
    if num_queries >= workers or database_NW.size < _MIN_SHARED_WORDS:
        block = max(1, min(_QUERIES_PER_UNIT, _MAX_CANDIDATES // (2 * k + 2 * _compiled.CHUNK_CODES)))
        found = run_blocks(
            lambda part: _nearest(queries_QW[part], database_NW, allowed_N, radius_Q[part], k),
            *(num_queries, cost, workers, block),
        )
        return np.concatenate([d for d, _ in found]), np.concatenate([r for _, r in found])
    # Fewer queries than threads: share out the database instead. The parts lie in row order, so a stable sort
    # by distance alone merges them; a part with fewer than k has NO_DISTANCE there, which sorts last.
    found = run_blocks(
        lambda part: _nearest(queries_QW, database_NW[part], allowed_N[part], radius_Q, k, part.start),
        *(size, cost, workers, size),
    )
    distances, rows = np.hstack([d for d, _ in found]), np.hstack([r for _, r in found])
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(rows, order, 1)


def hamming_range(
    queries: npt.NDArray[np.uint8],
    database: npt.NDArray[np.uint8],
    radius: int,
    threads: int | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Find all database codes within a Hamming radius of each query.

    Args:
        queries: uint8 (Q, bytes).
        database: uint8 (N, bytes).
        radius: largest distance in bits, inclusive, at least 0.
        threads: how many threads to use at most; by default the CPUs this process may use, and never more.
        allowed: bool (N,), which rows may be found; by default all.

    Returns:
        `(offsets, rows, distances)`: int64 (Q + 1,), int64 (hits,), int32 (hits,). The hits of query q are
        `rows[offsets[q]:offsets[q + 1]]`, ordered by (distance, row).

    Raises:
        TypeError: for codes that are not uint8. ValueError: for shapes that do not fit or a negative radius.
    """
    queries_QW, database_NW = code_pair(queries, database)
    if radius < 0:
        raise ValueError(f"radius must be at least 0: got {radius}")
    num_queries, size = len(queries_QW), len(database_NW)
    allowed_N = allowed_rows(allowed, size)
    radius = min(radius, 8 * np.shape(queries)[1])

    def scan(part: slice, among: slice) -> tuple[slice, npt.NDArray[np.int64], Hits]:
        counts_QD = np.zeros((part.stop - part.start, radius + 1), np.int64)
        part_QW, flat = queries_QW[part], database_NW[among].reshape(-1)
        hits = _compiled.scan_range(_zeros(part_QW), part_QW, flat, allowed_N[among], radius, among.start, counts_QD)
        return part, counts_QD, hits

    cost = num_queries * database_NW.size
    if num_queries >= _workers(threads) or database_NW.size < _MIN_SHARED_WORDS:
        units = run_blocks(lambda part: scan(part, slice(0, size)), num_queries, cost, threads)
    else:
        units = run_blocks(lambda part: scan(slice(0, num_queries), part), size, cost, threads, size)
    counts_QD = np.zeros((num_queries, radius + 1), np.int64)
    for part, counts, _ in units:
        counts_QD[part] += counts
    ends = np.cumsum(counts_QD.ravel())
    offsets = np.concatenate([np.zeros(1, np.int64), ends[radius :: radius + 1]])
    place_QD = (ends - counts_QD.ravel()).reshape(counts_QD.shape)
    rows, distances = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], np.int32)
    for part, _, hits in units:  # in the order of their queries or of their rows, so places are used up in order
        _compiled.place_hits(hits, place_QD[part], rows, distances)
    return offsets, rows, distances
