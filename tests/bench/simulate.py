"""An encode of up to 10^10 images on 1,000 nodes that nobody has: simulated nodes and store, the real code between.

    python -m tests.bench.simulate [--tars 100000] [--per-shard 100000] [--nodes 1000] [--losses .05] [--seed 0]

The planner (`find_missing_work`), the pool, the receipts and the commit are those of `hhnet encode`; images, tars and
the time are made up. The driver is killed at a third and at two thirds of the time that the work should take, and
started again. At the end all that was published is counted from the store alone: each sample of each tar once, each
receipt as it was put. CPU is that of the driver, without the simulation's own; memory is of both together.
"""

import argparse
import json
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa

from pipelines.artifacts.commit import ArtifactWriter
from pipelines.artifacts.facts import Receipt, ShardsMeta
from pipelines.artifacts.manifest import ArtifactInput, Part, open_artifact
from pipelines.artifacts.parquet import parquet_bytes, table_of_rows
from pipelines.artifacts.tables import codes_schema
from pipelines.config.loading import load_config
from pipelines.encode.encode import _encode_missing
from pipelines.encode.job import EncodeJob
from pipelines.errors import StoreUnavailable
from pipelines.shards.index import DIRECTORY, DIRECTORY_NAME, PIECE_ROWS, IndexedTar, piece_name, put_index
from pipelines.shards.shards import Member, Record, ShardSet, index_table, open_shards
from pipelines.storage import Store, scratch_folder, sha256_of
from tests.support.simulation import (
    HOUR_S,
    DriverKilled,
    SimulatedActors,
    SimulatedObjects,
    Weather,
    World,
    simulated_pool,
)

MARK = "a" * 64


@dataclass(frozen=True)
class SimulatedJob(EncodeJob):
    """An encode to a simulated store."""

    store: Store

    def writer(self) -> ArtifactWriter:
        return ArtifactWriter(self.store, "codes", self.fingerprint, self.inputs, self.origin, {})


def make_shards(root: Path, tars: int, per_shard: int, rows: bool = False) -> ShardSet:
    """Publish shards of tars that are not there; with `rows`, those of the index are."""
    writer = ArtifactWriter(Store(root), "shards", MARK, (), {})
    names = [f"s-{number:07d}.tar" for number in range(tars)]
    digests = [sha256_of(name.encode()) for name in names]
    parts = [
        Part(path=f"parts/{name[:-4]}-{digest[:16]}.tar", bytes=30 << 20, sha256=digest, rows=per_shard)
        for name, digest in zip(names, digests, strict=True)
    ]
    if rows:
        parts += put_index(writer, (rows_of_tar(name, per_shard) for name in names))
    else:
        fill = -(-PIECE_ROWS // per_shard)
        placed = [IndexedTar(name, n // fill, per_shard * (n % fill), per_shard) for n, name in enumerate(names)]
        parts.append(writer.put_part(DIRECTORY_NAME, parquet_bytes(table_of_rows(DIRECTORY, placed)), tars))
        for piece in range(-(-tars // fill)):
            path = f"parts/{piece_name(piece)[:-8]}-{MARK[:16]}.parquet"
            inside = min(fill, tars - piece * fill)
            parts.append(Part(path=path, bytes=1 << 20, sha256=MARK, rows=per_shard * inside))
    writer.commit(parts, {"samples": tars * per_shard}, ShardsMeta(classes=("cat",), source="", split=None))
    return open_shards(str(root))


def rows_of_tar(name: str, count: int) -> pa.Table:
    """The rows of a tar in the shard index."""
    return index_table(
        [
            Record(f"{name}/{row}", name, row, f"{name}/{row}.jpg", (0,), (Member(f"{row}.jpg", 512, 9, b"x" * 32),))
            for row in range(count)
        ]
    )


def job_of(opened: ShardSet, folder: Path, store: Store, workers: int) -> SimulatedJob:
    """The job of an encode of these shards."""
    inputs = tuple(
        ArtifactInput(role=kind, kind=kind, digest=digest)
        for kind, digest in (("shards", opened.artifact.digest), ("model", MARK))
    )
    config = load_config(sets=[f"encode.workers={workers}", "encode.reject_budget=1"])
    schema = codes_schema(64, MARK, opened.classes, {}, False)
    where = opened.artifact.uri, str(folder / "model"), str(folder / "codes")
    return SimulatedJob(*where, MARK, inputs, schema, None, None, config, store)


@dataclass(frozen=True)
class Report:
    """What a simulated encode took, and what was found wrong with what it published."""

    images: int
    tars: int
    hours: float
    driver_cpu_s: float
    peak_mib: float
    attempts: int
    repeated: float
    """Share of the workers' time whose result was thrown away or never came."""
    rejects: int
    orphans: int
    drivers: int
    requests: dict[str, int]
    happened: dict[str, int]
    problems: list[str]


def simulate(
    folder: Path, tars: int, per_shard: int, weather: Weather, seed: int = 0, careless: bool = False, rows: bool = False
) -> Report:
    """Encode shards until the codes are published, however often the driver ends; return what happened."""
    opened = make_shards(folder / "shards", tars, per_shard, rows)
    world = World(weather, seed)
    objects = SimulatedObjects(world, careless)
    store = Store("s3://simulated/codes", objects)
    job, drivers = job_of(opened, folder, store, weather.nodes), 0
    pool = simulated_pool(SimulatedActors(world, job, opened))
    begun, done = time.process_time(), False
    while not done:
        drivers += 1
        try:
            _encode_missing(job, allow_degraded=True, pool=pool)
            done = True
        except (DriverKilled, StoreUnavailable) as end:  # as a user would, who runs the same command again
            sys.stderr.write(f"driver {drivers} ended after {world.now / HOUR_S:.2f} h: {type(end).__name__}\n")
    cpu = time.process_time() - begun - world.beside_s
    hours = world.now / HOUR_S
    while world.step(hours * HOUR_S + 2 * weather.cut_off_s):
        pass  # those who are cut off still put what they have
    problems, orphans, rejects = examine(store, objects, opened)
    named = ("get", "head", "put", "list")
    return Report(
        images=tars * per_shard,
        tars=tars,
        hours=round(hours, 2),
        driver_cpu_s=round(cpu, 1),
        peak_mib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        attempts=world.counts["attempts"],
        repeated=round(1 - world.useful_s / max(world.worked_s, 1e-9), 4),
        rejects=rejects,
        orphans=orphans,
        drivers=drivers,
        requests={name: world.counts[name] for name in named},
        happened={name: number for name, number in sorted(world.counts.items()) if name not in named},
        problems=problems,
    )


def examine(store: Store, objects: SimulatedObjects, opened: ShardSet) -> tuple[list[str], int, int]:
    """Count what was published from what the store holds; return what is wrong, and the orphans and rejects."""
    artifact = open_artifact(store, "codes")
    refs = Counter(ref.shard for ref in artifact.manifest.receipts)
    problems = [f"{shard} is published {number} times" for shard, number in refs.items() if number != 1]
    problems += [f"{shard.name} is lost" for shard in opened.shards if shard.stem not in refs]
    named, samples, rejects = Counter[str](), 0, 0
    for ref in artifact.manifest.receipts:
        receipt = ref.parse(Receipt, store.uri, "")
        shard = opened.shard(receipt.shard)
        if sha256_of(objects.held.get(ref.path, b"")) != ref.sha256:
            problems.append(f"{ref.path} is not the one that was published")
        rows = sum(part.rows for part in receipt.parts)
        if (receipt.shard_sha256, receipt.samples, rows) != (shard.part.sha256, shard.rows, shard.rows):
            problems.append(f"{ref.path} has {rows} rows of {shard.rows}")
        for part in receipt.parts:
            data = objects.held.get(part.path)
            if data is None or sha256_of(data) != part.sha256:
                problems.append(f"{part.path} is gone or has other bytes")
            elif part.path.startswith("parts/") and part.rows and not data.startswith(shard.name.encode()):
                problems.append(f"{part.path} holds another tar")
            named[part.path] += 1
            rejects += part.rows if part.path.startswith("rejects/") else 0
        samples += rows
    listed = Counter(part.path for part in artifact.manifest.parts)
    problems += [f"{path} is listed {listed[path]} times" for path in named | listed if listed[path] != named[path]]
    problems += [f"{path} is named {number} times" for path, number in named.items() if number != 1]
    if samples != artifact.manifest.totals["samples"] or samples != opened.samples:
        problems.append(f"{samples} samples of {opened.samples}")
    there = [path for path in objects.held if path.startswith(("parts/", "rejects/"))]
    return problems, len(there) - len(named), rejects


def main() -> int:
    """Print the report as JSON; exit with 1 if anything was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, default=100_000)
    parser.add_argument("--per-shard", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--losses", type=float, default=0.05, help="share of the nodes that are lost in an hour")
    parser.add_argument("--image-s", type=float, default=0.002, help="seconds of a node for an image")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    weather = Weather(nodes=given.nodes, losses_an_hour=given.losses, image_s=given.image_s)
    whole = given.tars * given.per_shard * given.image_s / given.nodes
    weather = replace(weather, driver_ends=(whole / 3, 2 * whole / 3))
    with scratch_folder() as folder:
        report = simulate(folder, given.tars, given.per_shard, weather, given.seed)
    sys.stdout.write(json.dumps(asdict(report), indent=1) + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
