"""The cost model against measured runs: ingest, encode, index and a night at one size predict those at another.

    python -m tests.bench.cost [--tars 24 96] [--per-shard 100]

All run in this process on a real S3 server on loopback, with two encode workers that take turns. The constants come
from the run records and sizes of the artifacts of the first size. CPU is that of this process, without the server's.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.cluster.attempts import Outcome
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.cost.model import Model, Planned, Work
from pipelines.cost.records import read_constants
from pipelines.encode.encode import encode
from pipelines.index.build import build_index
from pipelines.index.diff import plan_changes
from pipelines.index.update import add_codes
from pipelines.ingest.ingest import ingest
from pipelines.storage import scratch_folder
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder
from tests.support.seaweed import Seaweed, seaweed
from tests.support.traffic import Traffic, counted

WORKERS = 2
BYTES = ("bytes_read", "bytes_written", "metadata_bytes")
NIGHT = ("night ingest", "verify", "night encode", "plan", "add")
"""Steps of a night."""


class TwoWorkers(InlinePool):
    """Hands the items to two workers in turn."""

    def map_items(
        self, worker: Callable[..., Any], worker_args: tuple[Any, ...], items: Sequence[Any], **options: Any
    ) -> Iterator[Outcome[Any]]:
        made = [worker(*worker_args) for _ in range(min(WORKERS, len(items)))]
        for number, item in enumerate(items):
            yield Outcome(item, made[number % len(made)].run(item), 1)


def planned_for(tars: int, per_shard: int, part_codes: int) -> Planned:
    """The images of so many tars; a third as many come in a night."""
    images, night = tars * per_shard, tars // 3 * per_shard
    return Planned(images=images, per_shard=per_shard, part_codes=part_codes, night=night, cpus=WORKERS)


def run_all(server: Seaweed, folder: Path, planned: Planned, traffic: Traffic) -> dict[str, Traffic]:
    """Run what the model knows, from pictures to a night; return what each step asked the store, and its `cpu_s`."""
    asked: dict[str, Traffic] = {}

    def at(name: str) -> str:
        return server.uri(f"{planned.images}/{name}")

    def count(step: str, work: Callable[[], object]) -> None:
        traffic.clear()
        begun = time.process_time()
        work()
        asked[step] = Traffic({**traffic, "cpu_s": time.process_time() - begun})

    def named(name: str) -> Config:
        sizes = f"ingest.samples_per_shard={planned.per_shard}", f"index.part_codes={planned.part_codes}"
        how = "data.image_size=32", "data.workers=1", "encode.batch_size=8", "index.kind=flat"
        return load_config(sets=[*sizes, *how, f"ingest.name={name}"])

    config = named("photos")
    write_folder(folder / "photos", classes=2, per_class=planned.images // 2, seed=1)
    write_folder(folder / "tonight", classes=2, per_class=planned.night // 2, seed=2, first=100_000)
    count("ingest", lambda: ingest(str(folder / "photos"), at("photos"), config))
    write_model(at("model"), at("photos"), backbone="test_resnet")
    count("encode", lambda: encode(at("photos"), at("model"), at("codes"), config, pool=TwoWorkers()))
    count("build", lambda: build_index([at("codes")], at("index"), config, pool=InlinePool()))
    count("night ingest", lambda: ingest(str(folder / "tonight"), at("tonight"), named("tonight")))
    count("verify", lambda: verify(at("tonight"), config, pool=None))  # type: ignore[arg-type]
    count("night encode", lambda: encode(at("tonight"), at("model"), at("more"), config, pool=TwoWorkers()))
    shards, codes = [at("photos"), at("tonight")], [at("codes"), at("more")]
    count("plan", lambda: plan_changes(shards, codes, at("index")))
    count("add", lambda: add_codes(at("index"), [at("more")], config, pool=InlinePool()))
    return asked


def predict(server: Seaweed, told: Planned, planned: Planned) -> dict[str, Work]:
    """What the model says of each step, from the artifacts of `told`."""
    names = ("photos", "model", "codes", "index")
    model = Model(read_constants([server.uri(f"{told.images}/{name}") for name in names])[0], planned)
    images, new = planned.images, planned.night
    return {
        "ingest": model.ingest(images),
        "encode": model.encode(images),
        "build": model.build(images),
        "night ingest": model.ingest(new),
        "verify": model.verify(new),
        "night encode": model.encode(new),
        "plan": model.plan(images, new),
        "add": model.add(images, new),
    }


def figures(work: Work) -> dict[str, float]:
    """The figures of a step that are measured too."""
    asked = work.requests
    whole = {"get": asked.get, "head": asked.head, "put": asked.put, "list": asked.list}
    sizes = {"bytes_read": work.read, "bytes_written": work.written, "metadata_bytes": work.metadata}
    return {**whole, **sizes, "cpu_s": work.cpu_s + work.planning_s}


def show(told: dict[str, Work], seen: dict[str, Traffic]) -> None:
    """Print predicted, measured and their ratio for each step, and for the night as a whole."""
    nights = sum((told[step] for step in NIGHT[1:]), told[NIGHT[0]])
    rows = {step: (figures(work), seen[step]) for step, work in told.items()}
    rows["night"] = figures(nights), sum((seen[step] for step in NIGHT), Traffic())
    for step, (model, measured) in rows.items():
        for name, value in model.items():
            ratio = f"{value / measured[name]:.3f}" if measured[name] else "-"
            sys.stdout.write(f"{step:13} {name:15} {value:>14,.2f} {measured[name]:>14,.2f} {ratio:>7}\n")


def main() -> None:
    """Run three sizes: a tiny one, which pays for all imports, the one that tells, and the one that is predicted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tars", type=int, nargs=2, default=[24, 96])
    parser.add_argument("--per-shard", type=int, default=100)
    given = parser.parse_args()
    warm, small, large = (planned_for(n, given.per_shard, 4 * given.per_shard) for n in (3, *given.tars))
    with scratch_folder() as folder:
        (folder / "weed").mkdir()
        with seaweed(folder / "weed") as server, server.environment(), counted() as traffic:
            seen = {}
            for planned in (warm, small, large):
                seen[planned.images] = run_all(server, folder / str(planned.images), planned, traffic)
            for planned in (small, large):
                sys.stdout.write(f"\n{planned.tars(planned.images)} tars from the records of {given.tars[0]}\n")
                sys.stdout.write(f"{'step':13} {'figure':15} {'predicted':>14} {'measured':>14} {'ratio':>7}\n")
                show(predict(server, small, planned), seen[planned.images])


if __name__ == "__main__":
    main()
