"""What the planner predicts beside what is then built and searched.

    python -m tests.bench.planner [--codes 1000000] [--parts 4] [--flip 0.1] [--kinds flat multihash ivf hnsw]

Codes of 64 bits lie around 1,000 random centres, each bit flipped with one probability, seeded; --flip 0.5 makes them
uniform. The planner is given a sample as `hhnet index build` would take it; then every kind is trained, each part built
and opened, and 64 queries are asked of all parts one after another. Ratios are predicted / measured; a build is counted
as if by one worker, and a recall is a difference.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hhnet import hamming_knn
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.index.gate import search_one_by_one, tie_aware_recall
from pipelines.index.kinds import NOTHING_REMOVED, Codes, index_kind, kind_names
from pipelines.index.planner import MAX_SAMPLE_CODES, MIN_SAMPLE_CODES, TRIAL_QUERIES, predict_kinds
from pipelines.index.reader import merge_nearest
from pipelines.storage import scratch_folder
from tests.bench.multihash import clustered

CENTRES = 1000


def measure(name: str, parts: list[Codes], queries_QB: Codes, config: Config, folder: Path) -> dict[str, float]:
    """Bytes, seconds to build, seconds of the median query and recall of an index of this kind."""
    kind, codes_NB = index_kind(name), np.concatenate(parts)
    parameters = kind.parameters(config.index, len(codes_NB))
    size, opened, shared = kind.sample_size(parameters), [], None
    begun = time.perf_counter()
    if size:
        places = np.random.default_rng(0).permutation(len(codes_NB))[:size]
        shared = kind.train(codes_NB[places], parameters, 0)
    first = 0
    written, seconds = 0, time.perf_counter() - begun
    for number, part_NB in enumerate(parts):
        begun = time.perf_counter()
        data = kind.build(part_NB, np.arange(first, first + len(part_NB)), shared, parameters)
        seconds += time.perf_counter() - begun
        path = folder / f"{name}-{number}"
        path.write_bytes(data)
        opened.append(kind.open(path, part_NB.shape[1], len(part_NB), shared, parameters, NOTHING_REMOVED))
        written, first = written + len(data), first + len(part_NB)
    found, seconds_Q = search_one_by_one(opened[0], queries_QB, config.search.k)
    for part in opened[1:]:
        answers, more_Q = search_one_by_one(part, queries_QB, config.search.k)
        found, seconds_Q = merge_nearest(found, answers, config.search.k), seconds_Q + more_Q
    recall = tie_aware_recall(found[0], hamming_knn(queries_QB, codes_NB, config.search.k)[0])
    return {"bytes": written, "build_s": seconds, "query_s": float(np.median(seconds_Q)), "recall": recall}


def compare(count: int, num_parts: int, flip: float, kinds: list[str]) -> list[dict[str, Any]]:
    """A row for each kind."""
    centres = np.random.default_rng(7).integers(0, 1 << 64, CENTRES, dtype=np.uint64)
    codes_NB, queries_QB = clustered(count, centres, flip, 1), clustered(TRIAL_QUERIES, centres, flip, 2)
    parts = np.array_split(codes_NB, num_parts)
    wanted = min(MAX_SAMPLE_CODES, max(MIN_SAMPLE_CODES, TRIAL_QUERIES + len(parts[0])), count)
    sample_NB = codes_NB[np.random.default_rng(3).permutation(count)[:wanted]]
    config = load_config(sets=["index.workers=1"])
    begun = time.perf_counter()
    predictions = predict_kinds(sample_NB, [len(part) for part in parts], config)
    rows: list[dict[str, Any]] = [{"bench": "planner", "predicting_s": round(time.perf_counter() - begun, 1)}]
    for entry in predictions:
        if entry.kind in kinds:
            with scratch_folder() as folder:
                real = measure(entry.kind, parts, queries_QB, config, folder)
            row: dict[str, Any] = {"bench": "planner", "codes": count, "parts": num_parts, "flip": flip}
            row["kind"] = entry.kind
            for name, value in real.items():
                predicted = getattr(entry, name)
                row[name] = [float(f"{predicted:.4g}"), float(f"{value:.4g}")]
                row[f"{name}_off"] = round(predicted - value if name == "recall" else predicted / value, 3)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=1_000_000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--flip", type=float, default=0.1)
    parser.add_argument("--kinds", nargs="+", choices=kind_names(), default=kind_names())
    args = parser.parse_args()
    for row in compare(args.codes, args.parts, args.flip, args.kinds):
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
