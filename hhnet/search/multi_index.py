"""Exact search through multi-index hashing: sublinear for near neighbours of short codes.

Norouzi, Punjani and Fleet, "Fast Exact Search in Hamming Space with Multi-Index Hashing", PAMI 2014, arXiv 1307.2982.
A code is cut into M disjoint substrings; a table per substring lists the rows of each pattern. Step s of a search
visits the buckets of substring s % M with exactly s // M bits flipped. A code within distance r of the query lies in
one of the buckets of the steps 0 to r: if every substring differed in more bits than these steps flip in it, the
distance would be at least r + 1.

Real codes lie in clusters and have large buckets. Each search therefore adds up the sizes of the buckets before it
goes through them, and leaves queries to a scan (`hhnet.search.kernels`) where that is faster. The answers and their
order are those of the scan in both cases.

Shape suffixes: Q queries, N database codes, W 64-bit words per code, M substrings, K neighbours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from hhnet.codes import pad_bytes
from hhnet.search import _buckets
from hhnet.search.kernels import (
    NO_DISTANCE,
    NO_ROW,
    allowed_rows,
    as_words,
    hamming_knn,
    hamming_range,
    radii,
    run_blocks,
)

_T = TypeVar("_T")

Codes = npt.NDArray[np.uint8]

MIN_SUBSTRING_BITS, MAX_SUBSTRING_BITS = 8, 22
"""Bits of a substring: fewer have too many rows in a bucket, and more need tables that outgrow the cache."""

SCAN_ALL_SHARE = 0.95  # share of scanned queries from which scanning all is faster than merging the hits of both ways
_NS_PER_COMPARISON = 10  # nanoseconds of a scan that count as one word comparison, to decide whether threads pay


def default_substrings(count: int, bits: int) -> int:
    """Return a number of substrings for `count` codes: each has about log2(count) bits, and no more."""
    width = min(max(count, 1).bit_length() - 1, MAX_SUBSTRING_BITS)
    return -(-bits // max(width, MIN_SUBSTRING_BITS))


def substring_widths(bits: int, substrings: int) -> list[int]:
    """Return the bits of each substring, in the order of the bits of the code; ValueError for an impossible number."""
    if not -(-bits // MAX_SUBSTRING_BITS) <= substrings <= bits:
        raise ValueError(
            f"{bits} bits can be cut into {-(-bits // MAX_SUBSTRING_BITS)} to {bits} substrings of at most "
            f"{MAX_SUBSTRING_BITS} bits: got {substrings}"
        )
    return [bits // substrings + (j < bits % substrings) for j in range(substrings)]


def table_length(bits: int, substrings: int) -> int:
    """Return the number of entries of `starts`: one more than there are patterns, for each substring."""
    return sum((1 << width) + 1 for width in substring_widths(bits, substrings))


def padded(codes: npt.NDArray[Any], name: str = "codes") -> Codes:
    """Return codes of any width as uint8 (N, 8 * W), zero-padded; a view if the width is a multiple of 8 already."""
    words = as_words(codes, name)
    return words.view(np.uint8) if words.dtype == np.uint64 else pad_bytes(codes, 8)


class TablesDamagedError(ValueError):
    """A table points outside its codes."""


@dataclass(frozen=True)
class ScanCosts:
    """Costs by which a query chooses between the tables and a scan, in nanoseconds of one thread."""

    compare: float = _buckets.COMPARE_WORD_NS
    """Cost of a scan for each 64-bit word of a code and each query."""
    least: float = 80_000
    """Cost of the cheapest search by tables; a cheaper scan is taken at once."""


COSTS = ScanCosts()


@dataclass(frozen=True)
class MultiIndexHash:
    """Codes and the tables of their substrings: plain arrays, so that they can be mapped from a file.

    Attributes:
        codes: uint8 (N, 8 * W), zero-padded to whole words.
        bits: how many bits of a code, from the first on, the substrings cover; all bits count for distances.
        starts: uint32 (sum of 2^b + 1,), the tables one after another: the rows with pattern p in substring j are
            `rows[j, starts_j[p]:starts_j[p + 1]]`.
        rows: uint32 (M, N), ascending in each bucket.
        costs: by which each query chooses between the tables and a scan; they change no answer.

    The tables need not be trusted: a search that meets a subscript outside the codes raises TablesDamagedError.
    """

    codes: Codes
    bits: int
    starts: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint32]
    costs: ScanCosts = COSTS

    @classmethod
    def build(
        cls, codes: Codes, bits: int | None = None, substrings: int | None = None, costs: ScanCosts = COSTS
    ) -> "MultiIndexHash":
        """Build the tables: sort the rows of `codes`, uint8 (N, bytes), by each substring.

        Args:
            codes: packed codes, fewer than 2^32.
            bits: how many bits the substrings cover, where the rest is padding. By default all.
            substrings: how many; by default `default_substrings` of N.
            costs: of a scan and of a search by tables.

        Raises:
            TypeError: for codes that are not uint8. ValueError: for shapes or numbers that do not fit.
        """
        words_NW = as_words(padded(codes), "codes")
        num, bits = len(words_NW), 8 * codes.shape[1] if bits is None else bits
        if num >= 1 << 32:
            raise ValueError(f"rows are numbered in 32 bits: {num} codes are too many for one table")
        if not 0 < bits <= 8 * codes.shape[1]:
            raise ValueError(f"bits must be from 1 to {8 * codes.shape[1]}: got {bits}")
        substrings = default_substrings(num, bits) if substrings is None else substrings
        layout_M3, offsets_M = _layout(bits, substrings)
        starts, rows_MN = np.empty(offsets_M[-1], np.uint32), np.empty((substrings, num), np.uint32)

        def sort(part: slice) -> None:
            for j in range(part.start, part.stop):
                _buckets.fill_table(words_NW, layout_M3, j, starts[offsets_M[j] : offsets_M[j + 1]], rows_MN[j])

        run_blocks(sort, substrings, 10 * num * substrings, block=1)
        return cls(words_NW.view(np.uint8), bits, starts, rows_MN, costs)

    def __post_init__(self) -> None:
        substrings = len(self.rows) if self.rows.ndim == 2 else 0
        if self.rows.dtype != np.uint32 or self.starts.dtype != np.uint32:
            raise TypeError(f"tables must be uint32: got {self.starts.dtype} and {self.rows.dtype}")
        if self.codes.ndim != 2 or self.codes.shape[1] % 8 or not 0 < self.bits <= 8 * self.codes.shape[1]:
            raise ValueError(f"codes must have whole words that hold {self.bits} bits: got {self.codes.shape}")
        shapes = (table_length(self.bits, substrings),), (substrings, len(self.codes))
        if (self.starts.shape, self.rows.shape) != shapes:
            raise ValueError(f"tables must have shapes {shapes}: got {self.starts.shape} and {self.rows.shape}")

    def knn(
        self,
        queries: Codes,
        k: int,
        threads: int | None = None,
        allowed: npt.NDArray[np.bool_] | None = None,
        radius: npt.NDArray[Any] | None = None,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Find the k nearest codes of each query, as `hamming_knn(queries, codes, k, threads, allowed, radius)` does.

        Args:
            queries: uint8 (Q, bytes), as wide as the codes before or after padding.
            k: how many neighbours, at least 1; cut to the number of allowed rows.
            threads: how many threads to use; by default the CPUs this process may use.
            allowed: bool (N,), the rows that may be returned; by default all.
            radius: integers (Q,), the largest distance in bits at which each query finds anything; by default any.

        Raises:
            TypeError: for codes that are not uint8. ValueError: for shapes that do not fit, k < 1 or a negative
                radius. TablesDamagedError: for tables that point outside the codes.
        """
        return self._knn(queries, k, threads, allowed, radius)[:2]

    def range_search(
        self, queries: Codes, radius: int, threads: int | None = None, allowed: npt.NDArray[np.bool_] | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Find all codes within a radius, as `hamming_range(queries, codes, radius, threads, allowed)` does.

        Returns:
            Offsets, rows and distances.

        Raises:
            TypeError: for codes that are not uint8. ValueError: for shapes that do not fit or a negative radius.
                TablesDamagedError: for tables that point outside the codes.
        """
        return self._range(queries, radius, threads, allowed)[:3]

    def _knn(
        self, queries: Codes, k: int, threads: int | None, allowed: Any, radius: Any = None
    ) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
        """Return distances and rows, and which queries were answered by a scan."""
        queries_QW, codes_NW, allowed_N = self._checked(queries, allowed)
        if k < 1:
            raise ValueError(f"k must be at least 1: got {k}")
        radius_Q = radii(radius, len(queries_QW), 64 * codes_NW.shape[1])
        scan = self._scan_cost(len(queries_QW), threads)
        k = min(k, len(codes_NW) if allowed is None else int(np.count_nonzero(allowed_N)))
        if k == 0 or self._clearly_a_scan(len(queries_QW), scan):
            found = hamming_knn(_bytes(queries_QW), self.codes, max(k, 1), threads, allowed, radius_Q)
            return *found, np.ones(len(queries_QW), np.bool_)
        shape = len(queries_QW), k
        distances, rows = np.full(shape, NO_DISTANCE, np.int32), np.full(shape, NO_ROW, np.int64)

        def search(part: slice, state_Q: Any) -> None:
            _buckets.mih_knn(
                *(queries_QW[part], codes_NW, *self.tables(), allowed_N, radius_Q[part], scan),
                *(distances[part], rows[part], state_Q),
            )

        scanned, _ = _in_blocks(search, len(queries_QW), scan, threads)
        if scanned.any():
            left = hamming_knn(_bytes(queries_QW[scanned]), self.codes, k, threads, allowed, radius_Q[scanned])
            distances[scanned], rows[scanned] = left
        return distances, rows, scanned

    def _range(
        self, queries: Codes, radius: int, threads: int | None, allowed: Any
    ) -> tuple[Any, Any, Any, npt.NDArray[np.bool_]]:
        """Return offsets, rows and distances, and which queries were answered by a scan."""
        queries_QW, codes_NW, allowed_N = self._checked(queries, allowed)
        if radius < 0:
            raise ValueError(f"radius must be at least 0: got {radius}")
        radius = min(radius, 64 * codes_NW.shape[1])
        scan = self._scan_cost(len(queries_QW), threads)
        if self._clearly_a_scan(len(queries_QW), scan):
            found = hamming_range(_bytes(queries_QW), self.codes, radius, threads, allowed)
            return *found, np.ones(len(queries_QW), np.bool_)
        counts = np.zeros(len(queries_QW), np.int64)

        def search(part: slice, state_Q: Any) -> npt.NDArray[np.int64]:
            found_keys: npt.NDArray[np.int64] = _buckets.mih_range(
                *(queries_QW[part], codes_NW, *self.tables(), allowed_N),
                *(radius, scan, counts[part], state_Q),
            )
            return found_keys

        scanned, keys_of_blocks = _in_blocks(search, len(queries_QW), scan, threads)
        if scanned.mean() >= SCAN_ALL_SHARE:
            found = hamming_range(_bytes(queries_QW), self.codes, radius, threads, allowed)
            return *found, np.ones(len(queries_QW), np.bool_)
        keys = np.concatenate(keys_of_blocks)
        rows, distances = keys & _buckets.NO_ROW, (keys >> _buckets.ROW_BITS).astype(np.int32)
        if scanned.any():
            left = _bytes(queries_QW[scanned])
            ends, more_rows, more_distances = hamming_range(left, self.codes, radius, threads, allowed)
            counts[scanned] = np.diff(ends)
            by_scan = np.repeat(scanned, counts)
            rows, distances = _woven(by_scan, more_rows, rows), _woven(by_scan, more_distances, distances)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), rows, distances, scanned

    def _scan_cost(self, num: int, threads: int | None) -> float:
        """Return the cost of scanning for one query, in nanoseconds of one thread.

        Fewer queries than threads share all the threads. Memory is read once for all queries.
        """
        workers = threads or int(numba.config.NUMBA_NUM_THREADS)
        return (
            self.codes.size / 8 * min(1.0, num / workers) * (self.costs.compare + _buckets.READ_WORD_NS / max(num, 1))
        )

    def _clearly_a_scan(self, num: int, scan: float) -> bool:
        """Test, without a look at the tables, whether there are no queries or not even one bucket is worth a look."""
        return num == 0 or num * scan < self.costs.least or _buckets.PROBE_COST_SHARE * scan < _buckets.LOOKUP_NS

    def tables(self) -> tuple[Any, Any, Any, Any]:
        """Return layout, offsets, `starts` and `rows` for the compiled loops.

        All are read-only, so that the loops are compiled once for mapped and for new tables.
        """
        return *_layout(self.bits, len(self.rows)), _readonly(self.starts), _readonly(self.rows)

    def _checked(self, queries: Codes, allowed: Any) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
        queries_QW, codes_NW = as_words(padded(queries, "queries"), "queries"), as_words(self.codes, "codes")
        width = np.shape(queries)[1]
        if queries_QW.shape[1] != codes_NW.shape[1] or 8 * width < self.bits:
            raise ValueError(f"queries must have codes of {self.bits} bits: got {width} bytes")
        return queries_QW, codes_NW, _readonly(allowed_rows(allowed, len(codes_NW)))


def _in_blocks(
    search: Callable[[slice, Any], _T], num: int, scan: float, threads: int | None
) -> tuple[npt.NDArray[np.bool_], list[_T]]:
    """Run `search` on blocks of queries; return the mask of queries left to a scan, and the results of the blocks."""
    state = np.empty(num, np.uint8)
    found = run_blocks(lambda part: search(part, state[part]), num, int(num * scan) // _NS_PER_COMPARISON, threads)
    if (state == _buckets.DAMAGED).any():
        raise TablesDamagedError("the tables point outside the codes")
    return state == _buckets.SCAN, found


def _bytes(words: npt.NDArray[np.uint64]) -> Codes:
    return words.view(np.uint8)


@lru_cache(maxsize=64)
def _layout(bits: int, substrings: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return word, shift and width of each substring, (M, 3), and where its table begins in `starts`, (M + 1,)."""
    widths = substring_widths(bits, substrings)
    begins = np.cumsum([0, *widths[:-1]])
    offsets = np.cumsum([0, *((1 << width) + 1 for width in widths)])
    return _readonly(np.stack([begins // 64, begins % 64, widths], axis=1).astype(np.int64)), _readonly(offsets)


def _readonly(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    view = np.ascontiguousarray(array).view(np.ndarray)[:]
    view.flags.writeable = False
    return view


def _woven(by_scan: npt.NDArray[np.bool_], scanned: npt.NDArray[Any], others: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Merge the hits of scanned queries and of the others into the order of the queries."""
    out = np.empty(len(by_scan), scanned.dtype)
    out[by_scan], out[~by_scan] = scanned, others
    return out
