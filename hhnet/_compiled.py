"""The compiled loops behind `hhnet.kernels` and `hhnet.metrics`.

The database is scanned in chunks that stay in the first-level cache while a few queries pass over them, so no
array of the size queries x database is ever made. The loops are serial and release the interpreter lock; the
callers spread blocks over threads. Arguments are not checked here.

Shape suffixes: Q queries, N database codes, W 64-bit words per code, L words per label, D distance values.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import types
from numba.extending import intrinsic

_F = TypeVar("_F", bound=Callable[..., Any])

CHUNK = 4096  # codes per chunk: 32 KiB at 64 bits


def compiled(function: _F) -> _F:
    """Compile with numba, on first call, outside the interpreter lock, kept in numba's cache on disk."""
    return cast(_F, numba.njit(cache=True, nogil=True)(function))


def _ctpop(typingctx: Any, word: Any) -> Any:

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


# Number of set bits of a uint64, as the CPU's own instruction.
_popcount: Any = intrinsic(_ctpop)


@compiled
def chunk_distances(query_W: Any, database_NW: Any, start: int, stop: int, out: Any) -> None:
    """Write the distances of `query_W` to rows start..stop of the database to `out[: stop - start]`."""
    words = query_W.shape[0]
    num = stop - start
    if words == 1:
        # Slices and a loop from 0 let LLVM drop the checks for negative subscripts and use vector registers.
        word, codes_N, out_N = query_W[0], database_NW[start:stop].reshape(num), out[:num]
        for i in range(num):
            out_N[i] = _popcount(word ^ codes_N[i])
    elif words == 2:
        low, high = query_W[0], query_W[1]
        codes_N, out_N = database_NW[start:stop].reshape(2 * num), out[:num]
        for i in range(num):
            out_N[i] = _popcount(low ^ codes_N[2 * i]) + _popcount(high ^ codes_N[2 * i + 1])
    else:
        codes_NW, out_N = database_NW[start:stop], out[:num]
        for i in range(num):
            distance = np.uint64(0)
            for w in range(words):
                distance += _popcount(query_W[w] ^ codes_NW[i, w])
            out_N[i] = distance


@compiled
def distances(queries_QW: Any, database_NW: Any, out_QN: Any) -> None:
    for q in range(queries_QW.shape[0]):
        chunk_distances(queries_QW[q], database_NW, 0, database_NW.shape[0], out_QN[q])


@compiled
def _compact(distances: Any, rows: Any, count: int, keep: int, hist_D: Any, spare_d: Any, spare_r: Any) -> int:
    """Counting sort of the first `count` candidates by distance, stable, cut to `keep`; redoes `hist_D`."""
    place = np.empty(hist_D.shape[0], np.int64)
    total = 0
    for d in range(hist_D.shape[0]):
        place[d] = total
        total += hist_D[d]
    for i in range(count):
        d = distances[i]
        to = place[d]
        place[d] += 1
        if to < keep:
            spare_d[to] = d
            spare_r[to] = rows[i]
    kept = min(count, keep)
    hist_D[:] = 0
    for i in range(kept):
        distances[i] = spare_d[i]
        rows[i] = spare_r[i]
        hist_D[spare_d[i]] += 1
    return kept


@compiled
def _threshold(hist_D: Any, k: int) -> int:
    """Smallest distance below or at which k candidates lie already: a later row there cannot win."""
    total = 0
    for d in range(hist_D.shape[0]):
        total += hist_D[d]
        if total >= k:
            return d
    return int(hist_D.shape[0])


@compiled
def knn(queries_QW: Any, database_NW: Any, allowed_N: Any, first_row: int, out_d: Any, out_r: Any) -> None:
    """The k nearest of `database_NW`, whose first row has number `first_row`; k is the width of `out_d`.

    `allowed_N` says which rows count; empty, all do.
    """
    every = allowed_N.shape[0] == 0
    num_queries, size, k = queries_QW.shape[0], database_NW.shape[0], out_d.shape[1]
    bound = max(2 * k, k + CHUNK)  # compact when above; one more chunk always fits
    cand_d = np.empty((num_queries, bound + CHUNK), np.int32)
    cand_r = np.empty((num_queries, bound + CHUNK), np.int64)
    spare_d, spare_r = np.empty(k, np.int32), np.empty(k, np.int64)
    hist = np.zeros((num_queries, 64 * queries_QW.shape[1] + 1), np.int64)
    counts = np.zeros(num_queries, np.int64)
    buffer = np.empty(CHUNK, np.int32)
    for start in range(0, size, CHUNK):
        stop = min(start + CHUNK, size)
        for q in range(num_queries):
            limit = _threshold(hist[q], k)
            chunk_distances(queries_QW[q], database_NW, start, stop, buffer)
            count = counts[q]
            for i in range(stop - start):
                d = buffer[i]
                if d < limit and (every or allowed_N[start + i]):
                    cand_d[q, count] = d
                    cand_r[q, count] = first_row + start + i
                    hist[q, d] += 1
                    count += 1
            if count > bound:
                count = _compact(cand_d[q], cand_r[q], count, k, hist[q], spare_d, spare_r)
            counts[q] = count
    for q in range(num_queries):
        _compact(cand_d[q], cand_r[q], counts[q], k, hist[q], out_d[q], out_r[q])


@compiled
def range_counts(queries_QW: Any, database_NW: Any, allowed_N: Any, radius: int, counts_QD: Any) -> None:
    every = allowed_N.shape[0] == 0
    buffer = np.empty(CHUNK, np.int32)
    for start in range(0, database_NW.shape[0], CHUNK):
        stop = min(start + CHUNK, database_NW.shape[0])
        for q in range(queries_QW.shape[0]):
            chunk_distances(queries_QW[q], database_NW, start, stop, buffer)
            for i in range(stop - start):
                if buffer[i] <= radius and (every or allowed_N[start + i]):
                    counts_QD[q, buffer[i]] += 1


@compiled
def range_fill(
    queries_QW: Any, database_NW: Any, allowed_N: Any, radius: int, place_QD: Any, rows: Any, distances: Any
) -> None:
    """Second pass: `place_QD` says where the next hit of each distance goes and is used up."""
    every = allowed_N.shape[0] == 0
    buffer = np.empty(CHUNK, np.int32)
    for start in range(0, database_NW.shape[0], CHUNK):
        stop = min(start + CHUNK, database_NW.shape[0])
        for q in range(queries_QW.shape[0]):
            chunk_distances(queries_QW[q], database_NW, start, stop, buffer)
            for i in range(stop - start):
                d = buffer[i]
                if d <= radius and (every or allowed_N[start + i]):
                    to = place_QD[q, d]
                    place_QD[q, d] = to + 1
                    rows[to] = start + i
                    distances[to] = d
