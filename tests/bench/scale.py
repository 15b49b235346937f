"""A flat index of many codes: built on Ray, opened, searched, and changed night after night.

    python -m tests.bench.scale [--codes 1000000 10000000] [--per-tar 1000] [--nights 10] [--folder DIR]

Codes of 64 bits are random, at most --per-tar to a shard, and are committed as codes artifacts without any image. Each
step is a verb, or a search, in a process of its own, whose memory is RssAnon + RssShmem over the tree of the process,
Ray's own processes included. A night adds 1% and removes 1% of the rows by key. At the end the answers are compared
with those of fresh builds of the rows that are left: in the same order, and so with the same ordinals, and in another
(equal distances, and equal sets below the k-th). A search is set beside a scan of all codes in one array. One JSON line
for each step and size. With --folder what was made stays, and a run that was stopped goes on there: a verb that was
done says `unchanged`, codes that are there stay.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hhnet import hamming_knn
from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt
from pipelines.artifacts.manifest import ArtifactInput
from pipelines.artifacts.parquet import parquet_bytes
from pipelines.artifacts.tables import codes_schema
from pipelines.artifacts.versions import find_finished
from pipelines.encode.codes import code_array
from pipelines.index.kinds import NOTHING_REMOVED
from pipelines.index.reader import IndexReader, open_index
from pipelines.storage import Store, sha256_of
from tests.bench.memory import watched

BITS, K, QUERIES = 64, 100, 64
ROUNDS = 3


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps({"bench": "scale", **facts}) + "\n")
    sys.stdout.flush()


# -------------------------------------------------------------------------------------------------------------- codes


def shard_rows(stem: str, count: int, classes: tuple[str, ...], mark: str) -> pa.Table:
    """The rows of one tar, which follow from its name."""
    random = np.random.default_rng(int(sha256_of(stem.encode())[:15], 16))
    code = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(BITS // 8), count, [None, pa.py_buffer(random.bytes(count * BITS // 8))]
    )
    name = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([f"{stem}.tar"]))
    labels = pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32), np.zeros(count, np.int32))
    keys = pa.array([f"{stem}-{row:06d}" for row in range(count)], pa.string())
    rows = pa.array(np.arange(count, dtype=np.int32))
    paths = pc.binary_join_element_wise(keys, ".png", "")
    return pa.Table.from_arrays([keys, name, rows, paths, code, labels], schema=codes_schema(BITS, mark, classes))


def write_codes(out: Path, prefix: str, count: int, per_tar: int, removed: Any = NOTHING_REMOVED) -> str:
    """Commit a codes artifact of `count` rows but for the ids `removed`, one shard in memory at a time."""
    inputs = (
        ArtifactInput(role="shards", kind="shards", digest=sha256_of(prefix.encode())),
        ArtifactInput(role="model", kind="model", digest="a" * 64),
    )
    mark = sha256_of(f"{prefix} {count} {per_tar}".encode() + removed.tobytes())
    if (done := find_finished(Store(out), "codes", mark)) is not None:
        return done.uri
    writer = ArtifactWriter(Store(out), "codes", mark, inputs, {})
    parts, receipts = [], {}
    for number, start in enumerate(range(0, count, per_tar)):
        stem, rows = f"{prefix}{number:06d}", min(per_tar, count - start)
        table = shard_rows(stem, rows, ("one",), mark)
        table = table.filter(pa.array(~np.isin(np.arange(rows), removed[removed >> 32 == number] & 0xFFFFFFFF)))
        part = writer.put_part(f"{stem}.parquet", parquet_bytes(table), len(table))
        parts.append(part)
        claim = {"shard": f"{stem}.tar", "shard_sha256": sha256_of(stem.encode()), "samples": len(table)}
        receipts[stem] = writer.put_receipt(stem, Receipt(**claim, part=part, rejects=None))
    meta = {"bits": BITS, "classes": ["one"], "carried": {}, "settings": {"encode.carry": []}}
    return writer.commit(parts, {"samples": sum(part.rows for part in parts)}, meta, receipts).uri


# -------------------------------------------------------------------------------------------------------------- steps


def verb(codes: int, step: str, *words: str) -> None:
    """Run a verb of the command line and say what it took."""
    begun = time.perf_counter()
    memory = watched([sys.executable, "-m", "pipelines", *words, "--json"])
    seconds = time.perf_counter() - begun
    say(codes=codes, step=step, seconds=round(seconds, 2), ns_per_code=round(1e9 * seconds / codes, 1),
        peak_mib=round(memory.peak), at_peak=memory.at_peak)  # fmt: skip


def queries() -> Any:
    return np.random.default_rng(7).integers(0, 256, (QUERIES, BITS // 8), dtype=np.uint8)


def look(codes: int, index: str) -> None:
    """Say how long it takes to open the index, to answer first (digests are checked then), and to answer again."""
    begun = time.perf_counter()
    with open_index(index) as reader:
        opened = time.perf_counter() - begun
        times = []
        for batch in [queries()[:1]] * (ROUNDS + 1) + [queries()] * ROUNDS:
            begun = time.perf_counter()
            reader.search(batch, K)
            times.append(time.perf_counter() - begun)
        one, many = (float(np.median(part)) for part in (times[1 : ROUNDS + 1], times[ROUNDS + 1 :]))
        per = 1e9 / codes
        array = np.concatenate([code_array(reader.live_keys(p, ["id", "code"])["code"]) for p in reader.searched()])
        begun = time.perf_counter()
        for _ in range(ROUNDS):
            hamming_knn(queries()[:1], array, K)
        alone = (time.perf_counter() - begun) / ROUNDS
        say(codes=codes, step="search", tars=len(reader.shards), parts=len(reader.searched()), array_s=round(alone, 4),
            opened_s=round(opened, 4),
            first_s=round(times[0], 3), one_s=round(one, 4), one_ns_per_code=round(per * one, 3),
            batch=QUERIES, batch_s=round(many, 3), batch_ns_per_code=round(per * many / len(batch), 4))  # fmt: skip


def night(codes: int, per_tar: int, index: str, folder: Path, number: int) -> None:
    """Add one hundredth as new shards, and remove as many random rows of the first build by key."""
    added = write_codes(folder / f"night-{number}", f"n{number:02d}x", codes // 100, per_tar)
    verb(codes, f"add {number}", "index", "add", "--index", index, "--codes", added)
    keys = folder / f"night-{number}.txt"
    rows = np.random.default_rng(number).choice(codes, codes // 100, replace=False)
    keys.write_text("".join(f"s{row // per_tar:06d}-{row % per_tar:06d}\n" for row in rows.tolist()))
    verb(codes, f"remove {number}", "index", "remove", "--index", index, "--keys", str(keys))


def gone(codes: int, per_tar: int, nights: int) -> Any:
    """Ids that the nights removed, ascending."""
    drawn = [np.random.default_rng(n).choice(codes, codes // 100, replace=False) for n in range(1, nights + 1)]
    rows = np.unique(np.concatenate(drawn))
    return rows // per_tar << 32 | rows % per_tar


def below_last(reader: IndexReader, distances: Any, ids: Any) -> list[set[tuple[str, int]]]:
    """For each query the samples nearer than its k-th, whatever ordinals they have."""
    return [
        {(reader.shards[number >> 32].shard, number & 0xFFFFFFFF) for number in near[far < far[-1]].tolist()}
        for far, near in zip(distances, ids, strict=True)
    ]


def compare(codes: int, per_tar: int, index: str, folder: Path, nights: int) -> None:
    """Hold the answers of the changed index against fresh builds of what is left, in the same and in another order."""
    left = write_codes(folder / "left", "s", codes, per_tar, gone(codes, per_tar, nights))
    every = [left, *(str(folder / f"night-{number}") for number in range(1, nights + 1))]
    with open_index(index) as reader:
        distances, ids = reader.search(queries(), K)
        below = below_last(reader, distances, ids)
    for name, order in (("fresh", every), ("reversed", every[::-1])):
        fresh = build(codes, folder, name, order)
        with open_index(fresh) as reader:
            found = reader.search(queries(), K)
            assert np.array_equal(found[0], distances), f"{name}: other distances"
            assert below_last(reader, *found) == below, f"{name}: other samples below the k-th distance"
            assert name == "reversed" or np.array_equal(found[1], ids), f"{name}: other ids"
            say(codes=codes, step=f"compared with {name}", left=reader.count, queries=QUERIES, k=K)


def build(codes: int, folder: Path, name: str, inputs: list[str]) -> str:
    words = [word for uri in inputs for word in ("--codes", uri)]
    verb(codes, f"build {name}", "index", "build", *words, "--out", str(folder / name))
    return str(folder / name)


def measure(codes: int, per_tar: int, nights: int, folder: Path) -> None:
    begun = time.perf_counter()
    base = write_codes(folder / "codes", "s", codes, per_tar)
    say(codes=codes, step="generate", seconds=round(time.perf_counter() - begun, 2))
    index = build(codes, folder, "index", [base])
    look(codes, index)
    for number in range(1, nights + 1):
        night(codes, per_tar, index, folder, number)
    look(codes, index)
    if nights:
        compare(codes, per_tar, index, folder, nights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="multiples of 100")
    parser.add_argument("--per-tar", type=int, default=1_000_000, help="codes of a tar, a divisor of --codes")
    parser.add_argument("--nights", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    names = ("ray", "numpy", "numba", "pyarrow")
    say(cpus=len(os.sched_getaffinity(0)), machine=platform.machine(), python=platform.python_version(),
        versions={name: version(name) for name in names})  # fmt: skip
    for codes in args.codes:
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            measure(codes, args.per_tar, args.nights, Path(args.folder or name, str(codes)))


if __name__ == "__main__":
    main()
