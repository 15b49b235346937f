"""Multi-index hashing beside the exact scan, on clustered codes.

    python -m tests.bench.multihash [--codes 10000000] [--centres 10000 1000 100 10] [--flip 0.1] [--rounds 5]

Codes of 64 bits lie around random centres, each bit flipped with one probability, seeded; queries come from the same
centres and are none of the codes. The fewer the centres the larger the buckets, and the sooner the tables give way to
the scan. Both take turns; a speed-up is the ratio of the medians of their seconds, for queries asked one by one and all
at once. `scanned` is the share of the queries that the tables left to the scan. All answers are compared first.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet import hamming_knn, hamming_range
from hhnet.search.multi_index import MultiIndexHash
from tests.bench.search import THREADS, medians

Codes = npt.NDArray[np.uint8]
BITS, CHUNK = 64, 1 << 20
ALONE = 8  # queries that are asked one by one in one turn
KS, RADII = (1, 10, 100), range(9)


def clustered(count: int, centres: npt.NDArray[np.uint64], flip: float, seed: int) -> Codes:
    """uint8 (N, 8): a random centre each, with Bernoulli(flip) flips."""
    random = np.random.default_rng(seed)
    words = np.empty(count, np.uint64)
    for start in range(0, count, CHUNK):
        part = centres[random.integers(0, len(centres), min(CHUNK, count - start))]
        for bit in range(BITS):
            part ^= (random.random(len(part), np.float32) < flip).astype(np.uint64) << np.uint64(bit)
        words[start : start + len(part)] = part
    return words.view(np.uint8).reshape(count, BITS // 8)


def same(found: tuple[Any, ...], expected: tuple[Any, ...], what: str) -> None:
    for mine, scan in zip(found, expected, strict=True):
        assert np.array_equal(mine, scan), f"{what}: other answers than the scan's"


def one_by_one(search: Callable[[Codes], object], queries: Codes) -> None:
    for number in range(ALONE):
        search(queries[number : number + 1])


def compare(
    mine: Callable[..., Any], scan: Callable[..., Any], queries: Codes, what: str, rounds: int
) -> dict[str, Any]:
    """Speed-ups of one kind of search over the scan, alone and in a batch."""
    *answer, scanned = mine(queries)
    same(tuple(answer), scan(queries), what)
    batch = medians({"multihash": lambda: mine(queries), "scan": lambda: scan(queries)}, rounds)
    alone = medians({"multihash": lambda: one_by_one(mine, queries), "scan": lambda: one_by_one(scan, queries)}, rounds)
    lone = [mine(queries[number : number + 1])[-1][0] for number in range(ALONE)]
    return {
        "what": what,
        "alone_ms": {name: round(1e3 * value / ALONE, 3) for name, value in alone.items()},
        "alone_speedup": round(alone["scan"] / alone["multihash"], 2),
        "alone_scanned": round(float(np.mean(lone)), 3),
        "batch_ms": {name: round(1e3 * value / len(queries), 3) for name, value in batch.items()},
        "batch_speedup": round(batch["scan"] / batch["multihash"], 2),
        "batch_scanned": round(float(scanned.mean()), 3),
    }


def measure(count: int, num_centres: int, flip: float, num_queries: int, rounds: int) -> list[dict[str, Any]]:
    centres = np.random.default_rng(num_centres).integers(0, 1 << 64, num_centres, dtype=np.uint64)
    codes, queries = clustered(count, centres, flip, 1), clustered(num_queries, centres, flip, 2)
    begun = time.perf_counter()
    table = MultiIndexHash.build(codes)
    built = time.perf_counter() - begun
    size = (table.codes.nbytes + table.starts.nbytes + table.rows.nbytes) / count
    head = {"bench": "multihash", "codes": count, "bits": BITS, "centres": num_centres, "flip": flip}
    about = {"queries": num_queries, "threads": THREADS, "substrings": len(table.rows)}
    rows = [{**head, **about, "build_s": round(built, 2), "bytes_per_code": round(size, 1)}]
    for k in KS:
        mine, scan = (lambda q, k=k: table._knn(q, k, None, None)), (lambda q, k=k: hamming_knn(q, codes, k))
        rows.append(head | compare(mine, scan, queries, f"k={k}", rounds))
    for r in RADII:
        mine, scan = (lambda q, r=r: table._range(q, r, None, None)), (lambda q, r=r: hamming_range(q, codes, r))
        rows.append(head | compare(mine, scan, queries, f"r={r}", rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=10_000_000)
    parser.add_argument("--centres", type=int, nargs="+", default=[10_000, 1000, 100, 10])
    parser.add_argument("--flip", type=float, default=0.1)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.queries < ALONE:
        parser.error(f"--queries must be at least {ALONE}")
    for centres in args.centres:
        rows = measure(args.codes, centres, args.flip, args.queries, args.rounds)
        for row in rows:
            sys.stdout.write(json.dumps(row) + "\n")
        slowest = min(row[key] for row in rows for key in ("alone_speedup", "batch_speedup") if key in row)
        sys.stdout.write(json.dumps({"bench": "multihash", "centres": centres, "least_speedup": slowest}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
