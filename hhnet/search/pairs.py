"""All near pairs among codes and the groups they join: equal codes by hashing, near ones by tables or a scan.

The tables are those of multi-index hashing. Made for sets that nearly fill the memory: a call holds a bounded amount
besides its arguments, and results are handed on as they come. Rows are int32, so there may be 2^31 - 1 codes.

Shape suffixes: Q queries, N codes, P pairs.
"""

import secrets
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hhnet.search import _pairs
from hhnet.search.kernels import as_words, hamming_range, run_blocks
from hhnet.search.multi_index import Codes, MultiIndexHash, padded

MAX_CODES = (1 << 31) - 1

_QUERIES_PER_UNIT = 1024  # queries per unit of work of one thread
_QUERIES_PER_SCAN = 64  # queries of one scan
_ROWS_PER_SCAN = 1 << 15  # rows of one scan; memory has to hold them as hits of all its queries

Emit = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]], None]
"""Function that takes queries, rows and distances of some pairs; several threads may call it at once."""


def equal_groups(
    codes: Codes, known: int, table_bytes: int, min_slots: int = 1 << 16
) -> tuple[npt.NDArray[np.int32], int, int]:
    """Find the leader of each group of equal codes: its first code, except that the first `known` codes lead nobody.

    Args:
        codes: uint8 (N, 8 * W), whole words; may be mapped.
        known: how many codes at the beginning are not compared with each other.
        table_bytes: about how much a hash table may take; with less than 8 bytes per code there are several passes
            over the codes.
        min_slots: slots of the smallest hash table, a power of 2.

    Returns:
        Leaders int32 (N,), the number of leaders, and the number of leaders that other codes follow. A leader has its
        own number. Of several equal known codes the first follows the first equal code that is not known, or else leads
        itself; the other known ones have -1.
    """
    words_NW = as_words(codes, "codes")
    leaders_N = np.empty(len(codes), np.int32)
    wanted = max(2 * len(codes), min_slots)
    slots = 1 << (wanted - 1).bit_length()
    while slots > min_slots and 4 * slots > table_bytes:
        slots //= 2
    table_S, shares = np.empty(slots, np.int32), -(-wanted // slots)
    seed = np.uint64(secrets.randbits(64))  # so that nobody can make codes that meet in one slot; no result shows it
    while True:
        counts_2 = np.zeros(2, np.int64)
        if all(
            _pairs.group(words_NW, known, share, shares, seed, table_S, leaders_N, counts_2) for share in range(shares)
        ):
            return leaders_N, int(counts_2[0]), int(counts_2[1])
        shares *= 2


def near_pairs(
    queries: Codes,
    first: npt.NDArray[np.int64],
    table: MultiIndexHash,
    radius: int,
    emit: Emit,
    threads: int | None = None,
    room: int = 1 << 17,
) -> None:
    """Find all codes of `table` within a radius of each query, from the query's first row on, and pass them to `emit`.

    Args:
        queries: uint8 (Q, bytes), as wide as the table's codes before or after padding.
        first: int64 (Q,), the first row that each may find: its own plus one where the queries are the codes.
        table: the codes with their tables, as `MultiIndexHash.build` makes them.
        radius: largest distance in bits, inclusive.
        emit: is called with up to some hundred thousand pairs at a time, in no order, each pair once.
        threads: how many threads to use; by default the CPUs this process may use.
        room: pairs that one thread holds, 14 bytes each.
    """
    queries_QW, codes_NW = as_words(padded(queries, "queries"), "queries"), as_words(table.codes, "codes")
    radius = min(radius, 64 * codes_NW.shape[1])

    def search(part: slice) -> None:
        state_Q, begin, num = np.zeros(part.stop - part.start, np.uint8), 0, part.stop - part.start
        # int16 holds the number of a query within its unit of work: there are _QUERIES_PER_UNIT of them.
        found = np.empty(room, np.int16), np.empty(room, np.int64), np.empty(room, np.int32)
        while begin < num:
            begin, count = _pairs.join(
                *(queries_QW[part], first[part], codes_NW, *table.tables()),
                *(radius, table.costs.compare, begin, state_Q, found),
            )
            if count:
                emit(found[0][:count] + np.int64(part.start), found[1][:count], found[2][:count])
        scanned = np.flatnonzero(state_Q == _pairs.SCAN) + part.start
        for start in range(0, len(scanned), _QUERIES_PER_SCAN):
            _scan(queries_QW, scanned[start : start + _QUERIES_PER_SCAN], first, table.codes, radius, emit)

    run_blocks(search, len(queries_QW), len(queries_QW) * codes_NW.size, threads, _QUERIES_PER_UNIT)


def _scan(
    queries_QW: npt.NDArray[np.uint64],
    some: npt.NDArray[np.int64],
    first: npt.NDArray[np.int64],
    codes: Codes,
    radius: int,
    emit: Emit,
) -> None:
    """Find the pairs of `some` of the queries by comparing these with every code."""
    chosen, from_row = queries_QW[some].view(np.uint8), first[some]
    for start in range(int(from_row.min()), len(codes), _ROWS_PER_SCAN):
        offsets, rows, distances = hamming_range(chosen, codes[start : start + _ROWS_PER_SCAN], radius, threads=1)
        queries, rows = np.repeat(np.arange(len(some)), np.diff(offsets)), rows + start
        new = rows >= from_row[queries]
        if new.any():
            emit(some[queries[new]], rows[new], distances[new])


class UnionFind:
    """A union-find over N things: it joins pairs and finds the groups. Takes 4 bytes for each thing."""

    def __init__(self, count: int) -> None:
        self._parents = np.full(count, -1, np.int32)

    def unite(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> None:
        """Join each of `a` (P,) with its partner in `b` (P,)."""
        _pairs.unite(self._parents, a, b)

    def roots(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the smallest member of the group of each of the things [start, stop)."""
        out = np.empty(stop - start, np.int64)
        _pairs.roots(self._parents, start, out)
        return out

    def sizes(self, roots: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """Return how many things are joined at each of these roots."""
        return -self._parents[roots]
