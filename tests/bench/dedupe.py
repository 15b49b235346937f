"""All pairs within a radius, beside a scan of all codes for each.

    python -m tests.bench.dedupe [--codes 2000000] [--radii 0 2 4 8] [--rounds 3] [--memory 256MiB]

Codes of 64 bits lie around one random centre for every twenty of them, each bit flipped with one probability, seeded.
Ours is `hhnet dedupe` as a whole in a process of its own, from the codes artifact to the committed result, with the
peak of its RssAnon. The peer is `hamming_range` of `--queries` of the codes over all of them; its seconds are those of
so many queries times how often they go into the codes, half of it, since a pair needs to be found once. Both use all
CPUs and take turns. The results of all rounds are the same bytes, and the last is proven by `hhnet verify`.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hhnet import hamming_range
from pipelines.config.loading import load_config
from pipelines.dedupe.dedupe import dedupe
from pipelines.verify.verify import verify
from tests.bench.multihash import BITS, clustered
from tests.bench.search import THREADS
from tests.support.codes import Rows, write_codes

PER_TAR = 100_000
PER_CENTRE, FLIP = 20, 0.1
EVERY_S = 0.05


def corpus(root: Path, codes: npt.NDArray[np.uint8]) -> str:
    tars = {}
    for number, start in enumerate(range(0, len(codes), PER_TAR)):
        part = codes[start : start + PER_TAR]
        keys = [f"{number:04d}/{row:06d}" for row in range(len(part))]
        tars[f"a-{number:06d}.tar"] = Rows(keys, part, [[]] * len(part))
    return write_codes(root / "codes", tars, BITS).uri


def rss_anon() -> int:
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def find(uri: str, out: str, radius: int, memory: str, answer: Any) -> None:
    """One `dedupe`: seconds, the largest RssAnon above that at its start, and the result."""
    config = load_config(
        sets=[f"dedupe.memory={memory}", "dedupe.max_pairs=1000000000"], flags={"dedupe.radius": radius}
    )
    before, peak, ended = rss_anon(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(EVERY_S):
            peak = max(peak, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    result = dedupe([uri], out, config).as_json()
    seconds = time.perf_counter() - begun
    ended.set()
    watcher.join()
    answer.send({"seconds": seconds, "above_start": max(peak - before, 0), "start": before, **result})


def ours(uri: str, out: str, radius: int, memory: str) -> dict[str, Any]:
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=find, args=(uri, out, radius, memory, send))
    process.start()
    answer: dict[str, Any] = receive.recv()
    process.join()
    return answer


def scanned(codes: npt.NDArray[np.uint8], radius: int, queries: int) -> float:
    """Seconds that half of all comparisons would take, from those of some queries with all codes."""
    begun = time.perf_counter()
    hamming_range(codes[:queries], codes, radius)
    return (time.perf_counter() - begun) * len(codes) / queries / 2


def measure(uri: str, codes: npt.NDArray[np.uint8], radius: int, args: argparse.Namespace) -> dict[str, Any]:
    runs, scans = [], []
    scanned(codes, radius, THREADS)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            runs.append(ours(uri, f"{folder}/{number}", radius, args.memory))
            scans.append(scanned(codes, radius, min(args.queries, len(codes))))
        assert len({run["digest"] for run in runs}) == 1, "two rounds made different bytes"
        verify(runs[-1]["uri"])
    mine, scan = statistics.median(run["seconds"] for run in runs), statistics.median(scans)
    return {
        "bench": "dedupe",
        "codes": len(codes),
        "bits": BITS,
        "radius": radius,
        "threads": THREADS,
        "memory": args.memory,
        **{name: runs[-1][name] for name in ("pairs", "groups", "components")},
        "dedupe_s": round(mine, 2),
        "scan_s": round(scan, 2),
        "speedup": round(scan / mine, 2),
        "rss_anon_mib": round(max(run["start"] + run["above_start"] for run in runs) / (1 << 20)),
        "above_start_mib": round(max(run["above_start"] for run in runs) / (1 << 20)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=2_000_000)
    parser.add_argument("--radii", type=int, nargs="+", default=[0, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=1024)
    parser.add_argument("--memory", default="256MiB")
    args = parser.parse_args()
    centres = np.random.default_rng(0).integers(0, 1 << 64, max(1, args.codes // PER_CENTRE), dtype=np.uint64)
    codes = clustered(args.codes, centres, FLIP, 1)
    with tempfile.TemporaryDirectory() as folder:
        uri = corpus(Path(folder), codes)
        for radius in args.radii:
            sys.stdout.write(json.dumps(measure(uri, codes, radius, args)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
