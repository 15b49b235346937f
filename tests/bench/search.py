"""Exact search and ranking beside Faiss, beside NumPy, and beside what the memory can deliver.

    python -m tests.bench.search [--codes 20000000] [--bits 64 128 256] [--queries 1 64] [-k 100] [--rounds 5]

All take turns on the same random codes; a ratio is that of the medians of their seconds. Faiss is `IndexBinaryFlat`
with the better of `use_heap` true and false, on as many threads. The limit is a sum over the same array by as many
threads. Distances are compared with those of Faiss, and ids with the rule (distance, row).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numba
import numpy as np
import numpy.typing as npt

from hhnet import hamming_knn, mean_average_precision

Codes = npt.NDArray[np.uint8]
THREADS = int(numba.config.NUMBA_NUM_THREADS)
SPIN = 0.05  # seconds


@numba.njit(nogil=True, cache=True)
def total(words: Any) -> Any:
    found = np.uint64(0)
    for word in words:
        found += word
    return found


def read_all(codes: Codes, pool: ThreadPoolExecutor) -> None:
    list(pool.map(total, np.array_split(codes.view(np.uint64).reshape(-1), THREADS)))


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, which take turns; a first round warms up.

    Each goes on for a while before it is timed: the threads of Faiss spin after a search, on the cores of the next.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            calm = time.perf_counter() + SPIN
            while time.perf_counter() < calm:
                work()
            begun = time.perf_counter()
            work()
            if number:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def check(queries: Codes, codes: Codes, k: int, index: Any) -> None:
    """The distances of Faiss, and the smallest rows that have them."""
    distances, rows = hamming_knn(queries, codes, k)
    assert (distances == index.search(queries, k)[0]).all(), "other distances than Faiss"
    steps = np.diff(distances.astype(np.int64) * len(codes) + rows, axis=1)
    assert (steps > 0).all(), "not in the order (distance, row)"
    for query, found, last in zip(queries[:4], rows, distances[:, -1], strict=False):
        every = np.bitwise_count(codes ^ query).sum(1, dtype=np.int64)
        tied = np.flatnonzero(every == last)
        inside = found[every[found] == last]
        assert (inside == tied[: len(inside)]).all(), "not the smallest rows of a tie"


def search(count: int, bits: int, num_queries: int, k: int, rounds: int) -> dict[str, Any]:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    queries = random.integers(0, 256, (num_queries, bits // 8), dtype=np.uint8)
    index = faiss.IndexBinaryFlat(bits)
    index.add(codes)
    faiss.omp_set_num_threads(THREADS)
    check(queries, codes, k, index)

    def by_faiss(heap: bool) -> None:
        index.use_heap = heap
        index.search(queries, k)

    with ThreadPoolExecutor(THREADS) as pool:
        works = {
            "hhnet": lambda: hamming_knn(queries, codes, k),
            "faiss heap": lambda: by_faiss(True),
            "faiss count": lambda: by_faiss(False),
            "read": lambda: read_all(codes, pool),
        }
        found = medians(works, rounds)
    read = codes.nbytes / 1e9
    return {
        "bench": "search",
        "codes": count,
        "bits": bits,
        "queries": num_queries,
        "k": k,
        "seconds": {name: round(value, 4) for name, value in found.items()},
        "gb_per_s": {"hhnet": round(read / found["hhnet"], 2), "read": round(read / found["read"], 2)},
        "of_bandwidth": round(found["read"] / found["hhnet"], 3),
        "faiss_ratio": round(min(found["faiss heap"], found["faiss count"]) / found["hhnet"], 2),
    }


def numpy_map(queries: Codes, labels_Q: Any, database: Codes, labels_N: Any) -> float:
    """mAP@all as it is commonly written: one argsort a query."""
    found = []
    for query, label in zip(queries, labels_Q, strict=True):
        distances = np.unpackbits(query ^ database, axis=1).sum(1)
        relevant = labels_N[np.argsort(distances, kind="stable")] == label
        ranks = np.flatnonzero(relevant) + 1
        found.append((np.arange(1, len(ranks) + 1) / ranks).mean() if len(ranks) else 0.0)
    return float(np.mean(found))


def ranking(num_queries: int, count: int, rounds: int) -> dict[str, Any]:
    """mAP@all over 64-bit codes of ten classes."""
    random = np.random.default_rng(0)
    centres = random.random((10, 64)) < 0.5
    labels = random.integers(0, 10, num_queries + count)
    codes = np.packbits(centres[labels] ^ (random.random((len(labels), 64)) < 0.25), axis=1, bitorder="little")
    case = codes[:num_queries], labels[:num_queries], codes[num_queries:], labels[num_queries:]
    works: dict[str, Callable[[], object]] = {
        "expected": lambda: mean_average_precision(*case),
        "stable": lambda: mean_average_precision(*case, ties="stable"),
    }
    found = medians(works, rounds)
    begun = time.perf_counter()
    plain = numpy_map(*case)
    found["numpy"] = time.perf_counter() - begun
    difference = abs(plain - mean_average_precision(*case, ties="stable"))
    assert difference < 1e-9, f"mAP differs from NumPy's by {difference}"
    return {
        "bench": "ranking",
        "codes": count,
        "queries": num_queries,
        "seconds": {name: round(value, 4) for name, value in found.items()},
        "stable_speedup": round(found["numpy"] / found["stable"], 1),
        "expected_speedup": round(found["numpy"] / found["expected"], 1),
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=20_000_000)
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64])
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for bits in args.bits:
        for num_queries in args.queries:
            row = search(args.codes, bits, num_queries, args.k, args.rounds)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(ranking(1000, 54_000, args.rounds)) + "\n")


if __name__ == "__main__":
    main()
