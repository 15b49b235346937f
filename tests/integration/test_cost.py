"""The cost model against a real S3 server: it predicts requests exactly, and bytes within a fifth, at two sizes.

Lists and pieces are made small, so that these sizes have several of each, as a large corpus has.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import lists, manifest
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
from pipelines.shards import index
from pipelines.verify.verify import verify
from tests.support.inline import InlinePool
from tests.support.models import write_model
from tests.support.pictures import write_folder
from tests.support.seaweed import Seaweed, seaweed
from tests.support.traffic import Traffic, counted

PER_SHARD, PART_CODES, WORKERS, SIZES = 2, 8, 2, (12, 30)
SETTINGS = (
    *(f"ingest.samples_per_shard={PER_SHARD}", f"index.part_codes={PART_CODES}", "index.kind=flat"),
    *("data.image_size=32", "data.workers=1", "encode.batch_size=8"),
)
BYTES = ("bytes_read", "bytes_written", "metadata_bytes")


class TwoWorkers(InlinePool):
    """Hands the items to two workers in turn."""

    def map_items(
        self, worker: Callable[..., Any], worker_args: tuple[Any, ...], items: Sequence[Any], **options: Any
    ) -> Iterator[Outcome[Any]]:
        made = [worker(*worker_args) for _ in range(min(WORKERS, len(items)))]
        for number, item in enumerate(items):
            yield Outcome(item, made[number % len(made)].run(item), 1)


def run_all(server: Seaweed, folder: Path, tars: int, traffic: Traffic) -> dict[str, Traffic]:
    """Run what the model knows, from pictures to a night; return what each step asked the store."""
    asked: dict[str, Traffic] = {}
    night = tars // 3

    def at(name: str) -> str:
        return server.uri(f"{tars}/{name}")

    def count(step: str, work: Callable[[], object]) -> None:
        traffic.clear()
        work()
        asked[step] = Traffic(traffic)

    def named(name: str) -> Config:
        return load_config(sets=[*SETTINGS, f"ingest.name={name}"])

    config = named("photos")
    write_folder(folder / "photos", classes=2, per_class=tars, seed=1)
    write_folder(folder / "tonight", classes=2, per_class=night, seed=2, first=1000)
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


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Seaweed, dict[int, dict[str, Traffic]]]]:
    """The server, and what each step asked it, by the number of tars."""
    folder = tmp_path_factory.mktemp("cost")
    with pytest.MonkeyPatch.context() as patch, seaweed(folder / "weed") as server, server.environment():
        for module in (lists, manifest):
            patch.setattr(module, "INLINE_ENTRIES", 8)
        patch.setattr(lists, "LIST_ENTRIES", 10)
        patch.setattr(index, "PIECE_ROWS", 12)
        with counted() as traffic:
            yield server, {tars: run_all(server, folder / str(tars), tars, traffic) for tars in SIZES}


def predicted(model: Model) -> dict[str, Work]:
    images, new = model.planned.images, model.planned.night
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


def models(server: Seaweed, tars: int) -> dict[str, Work]:
    """What the model predicts for this size from the artifacts of the first one."""
    told = [server.uri(f"{SIZES[0]}/{name}") for name in ("photos", "model", "codes", "index")]
    images = tars * PER_SHARD
    night = tars // 3 * PER_SHARD
    planned = Planned(images=images, per_shard=PER_SHARD, part_codes=PART_CODES, night=night, cpus=WORKERS)
    return predicted(Model(read_constants(told)[0], planned))


@pytest.mark.parametrize("tars", SIZES)
def test_requests_are_predicted_exactly(runs: tuple[Seaweed, dict[int, dict[str, Traffic]]], tars: int) -> None:
    server, asked = runs
    found = {step: {name: seen[name] for name in ("get", "head", "put", "list")} for step, seen in asked[tars].items()}
    assert found == {step: asdict(work.requests) for step, work in models(server, tars).items()}


@pytest.mark.parametrize("tars", SIZES)
def test_bytes_are_predicted_within_a_fifth(runs: tuple[Seaweed, dict[int, dict[str, Traffic]]], tars: int) -> None:
    server, asked = runs
    off = {}
    for step, work in models(server, tars).items():
        for name, value in zip(BYTES, (work.read, work.written, work.metadata), strict=True):
            measured = asked[tars][step][name]
            if measured and value and abs(value / measured - 1) > 0.2:
                off[step, name] = (measured, round(value))
    assert off == {}
