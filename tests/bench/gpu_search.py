"""Exact search on a GPU beside Faiss on the same GPU, beside our scan on the CPUs, and beside what the card can do.

    python -m tests.bench.gpu_search [--codes 20000000] [--bits 64 128 256] [--queries 1 64 1024] [-k 100] [--rounds 5]

All take turns on the same random codes; a ratio is that of the medians of their seconds. Faiss is `GpuIndexBinaryFlat`,
where Faiss was built for GPUs. The limits are the int8 products of a large matrix product on the same card, of which a
search needs one for each bit of each pair, and a copy inside its memory, of which a search needs each code read once.
Distances and rows are compared with those of the scan. Without a GPU it runs under TRITON_INTERPRET=1 only, as a
rehearsal of few codes.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hhnet import hamming_knn
from hhnet.search.device import DeviceCodes

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CHECKED = 8
"""Queries whose answers are compared with the scan's."""


def await_gpu() -> None:
    if CUDA:
        torch.cuda.synchronize()


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, which take turns; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            await_gpu()
            begun = time.perf_counter()
            work()
            await_gpu()
            if number:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(found) for name, found in times.items()}


def limits() -> dict[str, float]:
    """int8 products a second, and bytes read and written a second, of this card."""
    side, size = (8192, 1 << 31) if CUDA else (256, 1 << 20)
    matrix = torch.randint(-100, 100, (side, side), dtype=torch.int8, device=DEVICE)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    found = medians(
        {"product": lambda: torch._int_mm(matrix, matrix.t()), "copy": lambda: target.copy_(source)}, rounds=10
    )
    return {"products_per_s": side**3 / found["product"], "bytes_per_s": 2 * size / found["copy"]}


def faiss_index(codes: Any) -> Any:
    """Faiss's index of the codes on the GPU; none where Faiss is missing or knows no GPU."""
    try:
        import faiss
    except ImportError:
        return None
    if not hasattr(faiss, "GpuIndexBinaryFlat"):
        return None
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexBinaryFlat(resources, 8 * codes.shape[1])
    index.add(codes)
    return index


def search(count: int, bits: int, num_queries: int, k: int, rounds: int, card: Mapping[str, float]) -> dict[str, Any]:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 256, (count, bits // 8), dtype=np.uint8)
    queries = random.integers(0, 256, (num_queries, bits // 8), dtype=np.uint8)
    begun = time.perf_counter()
    ours = DeviceCodes([codes], DEVICE)
    await_gpu()
    copied = time.perf_counter() - begun
    few = queries[:CHECKED]
    for mine, other in zip(ours.knn(few, k), hamming_knn(few, codes, k), strict=True):
        np.testing.assert_array_equal(mine, other)
    works: dict[str, Callable[[], object]] = {
        "hhnet": lambda: ours.knn(queries, k),
        "scan on the CPUs": lambda: hamming_knn(queries, codes, k),
    }
    index = faiss_index(codes)
    if index is not None:
        np.testing.assert_array_equal(ours.knn(few, k)[0], index.search(few, k)[0])
        works["faiss"] = lambda: index.search(queries, k)
    found = medians(works, rounds)
    pairs = count * num_queries
    return {
        "bench": "gpu search",
        "codes": count,
        "bits": bits,
        "queries": num_queries,
        "k": k,
        "copied_s": round(copied, 3),
        "seconds": {name: round(value, 5) for name, value in found.items()},
        "pairs_per_s": float(f"{pairs / found['hhnet']:.3g}"),
        "of_products": round(pairs * bits / card["products_per_s"] / found["hhnet"], 3),
        "of_bandwidth": round(codes.nbytes / card["bytes_per_s"] / found["hhnet"], 3),
        "faiss_ratio": round(found["faiss"] / found["hhnet"], 2) if "faiss" in found else None,
        "scan_ratio": round(found["scan on the CPUs"] / found["hhnet"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=20_000_000)
    parser.add_argument("--bits", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("-k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("torch sees no GPU here: this benchmark needs one")
    card = limits()
    rates = {name: float(f"{value:.4g}") for name, value in card.items()}
    sys.stdout.write(
        json.dumps({"bench": "gpu", "card": torch.cuda.get_device_name() if CUDA else "CPU", **rates}) + "\n"
    )
    for bits in args.bits:
        for num_queries in args.queries:
            row = search(args.codes, bits, num_queries, args.k, args.rounds, card)
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
