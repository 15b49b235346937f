"""What many tars cost before any image is touched: CPU and memory to open, plan and resume, without images.

    python -m tests.bench.many_tars [--tars 1000 10000 100000] [--s3]

Artifacts of tars of 1,000 samples each are made without tars, codes or rows of the index, which none of the steps
reads: manifests, lists, the directory of the shard index and, for the resumed encode, a receipt and an empty part for
each second tar. Each step runs in a process of its own; CPU is that of its work, memory what it adds to the imports.
They lie on a local disk, or with --s3 on a real S3 server.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import CodesMeta, Receipt, ShardsMeta
from pipelines.artifacts.manifest import ArtifactInput, Part, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, table_of_rows
from pipelines.config.settings import Config
from pipelines.encode.codes import open_codes
from pipelines.encode.job import find_missing_work
from pipelines.index.build import plan_parts
from pipelines.shards.index import DIRECTORY, DIRECTORY_NAME, IndexedTar, piece_name
from pipelines.shards.shards import open_shards
from pipelines.storage import Store, canonical_json, map_in_order, scratch_folder, sha256_of
from tests.support.seaweed import seaweed

MARK = "a" * 64
SAMPLES = 1000
TARS_A_PIECE = 17
"""Number of tars of so many samples that fill a piece of the shard index."""


def tar_parts(count: int) -> Iterator[Part]:
    """Tars and pieces of the index, none of which is there."""
    for number in range(count):
        digest = sha256_of(f"tar {number}".encode())
        yield Part(path=f"parts/many-{number:06d}-{digest[:16]}.tar", bytes=30 << 20, sha256=digest, rows=SAMPLES)
    for piece in range(-(-count // TARS_A_PIECE)):
        digest = sha256_of(f"piece {piece}".encode())
        rows = SAMPLES * min(TARS_A_PIECE, count - piece * TARS_A_PIECE)
        path = f"parts/{piece_name(piece).removesuffix('.parquet')}-{digest[:16]}.parquet"
        yield Part(path=path, bytes=1 << 20, sha256=digest, rows=rows)


def make_shards(root: Store, count: int) -> None:
    """A shards artifact of so many tars."""
    writer = ArtifactWriter(root, "shards", MARK, (), {})
    tars = [
        IndexedTar(f"many-{n:06d}.tar", n // TARS_A_PIECE, SAMPLES * (n % TARS_A_PIECE), SAMPLES) for n in range(count)
    ]
    directory = writer.put_part(DIRECTORY_NAME, parquet_bytes(table_of_rows(DIRECTORY, tars)), count)
    meta = ShardsMeta(classes=("cat",), source="", split=None)
    writer.commit([*tar_parts(count), directory], {"samples": SAMPLES * count}, meta)


def receipt_of(number: int) -> Receipt:
    """The receipt of a tar's codes."""
    digest = sha256_of(f"codes {number}".encode())
    part = Part(path=f"parts/many-{number:06d}-{digest[:16]}.parquet", bytes=0, sha256=digest, rows=SAMPLES)
    tar = sha256_of(f"tar {number}".encode())
    return Receipt(shard=f"many-{number:06d}.tar", shard_sha256=tar, samples=SAMPLES, part=part, rejects=None)


def make_codes(root: Store, count: int) -> None:
    """A codes artifact of so many tars, and beside it a root with half of them encoded and nothing published."""
    receipts = {f"many-{number:06d}": receipt_of(number) for number in range(count)}
    inputs = tuple(ArtifactInput(role=kind, kind=kind, digest=MARK) for kind in ("shards", "model"))
    writer = ArtifactWriter(root.child("codes"), "codes", MARK, inputs, {})
    totals = {"samples": SAMPLES * count, "codes": SAMPLES * count, "rejects": 0}
    meta = CodesMeta(bits=64, classes=("cat",), carried={}, settings={"encode.carry": []})
    writer.commit([receipt.part for receipt in receipts.values()], totals, meta, receipts)
    half = list(receipts.items())[::2]
    objects = {f"receipts/{stem}.json": canonical_json(receipt) for stem, receipt in half}
    put_all(root.child("half"), objects | {receipt.part.path: b"" for _, receipt in half})


def put_all(store: Store, objects: Mapping[str, bytes]) -> None:
    """Put many small objects; on a disk without the fsync of each, which would take minutes."""
    if not store.is_local:
        for _ in map_in_order(lambda name: store.put(name, objects[name]), objects):
            pass
        return
    for name, data in objects.items():
        path = Path(store.path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


STEPS: dict[str, Callable[[str], object]] = {
    "open shards": lambda root: open_shards(f"{root}/shards").samples,
    "open codes": lambda root: len(open_codes(open_artifact(f"{root}/codes")).shards),
    "plan an index": lambda root: len(plan_parts([open_codes(open_artifact(f"{root}/codes"))], Config())),
    "resume an encode": lambda root: len(find_missing_work(Store(f"{root}/half"), open_shards(f"{root}/shards"))[2]),
}


def measure(step: str, root: str) -> dict[str, float]:
    """Run a step in this process; return its CPU seconds and the MiB that it adds at its peak."""
    before, began = psutil.Process().memory_info().rss, time.process_time()
    STEPS[step](root)
    cpu = time.process_time() - began
    # Not getrusage: its peak begins with that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"cpu": cpu, "mib": (int(peak[1]) * 1024 - before) / (1 << 20)}


def table_of(count: int, root: Store) -> None:
    """Make the artifacts of so many tars, and print a line for each step."""
    make_shards(root.child("shards"), count)
    make_codes(root, count)
    there = root.entries("codes")
    size = sum(info.size for name, info in there.items() if "manifest" in name) / 1e6
    for step in STEPS:
        command = [sys.executable, "-m", "tests.bench.many_tars", "--step", step, root.uri]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"{count:>9,}  {step:18} {found['cpu']:>8.2f} {found['mib']:>7.0f}  {size:>24.2f}\n")
        sys.stdout.flush()


def main() -> None:
    """Print a table: for each step and number of tars CPU seconds and MiB."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--s3", action="store_true")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        sys.stdout.write(json.dumps(measure(*given.step)) + "\n")
        return
    sys.stdout.write(f"{'tars':>9}  {'step':18} {'CPU s':>8} {'MiB':>7}  {'manifest and lists, MB':>24}\n")
    for count in given.tars:
        with scratch_folder() as folder:
            if not given.s3:
                table_of(count, Store(folder))
                continue
            with seaweed(folder) as server, server.environment():
                table_of(count, Store(server.uri("many")))


if __name__ == "__main__":
    main()
