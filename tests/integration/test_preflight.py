"""`encode --dry-run` on a real Ray: what it counts is what an encode does, and it puts nothing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.encode.encode import encode
from pipelines.encode.job import ShardTask, plan_encode
from pipelines.encode.preflight import preflight
from pipelines.encode.workers import ShardEncoder
from pipelines.errors import FingerprintMismatch
from pipelines.ingest.ingest import ingest
from pipelines.shards.shards import open_shards
from tests.integration.conftest import SETTINGS
from tests.support.faults import FaultProxy
from tests.support.models import write_model
from tests.support.seaweed import seaweed

STEPS = {"read", "decode", "forward", "write", "together"}


def test_it_says_what_an_encode_would_take_and_puts_nothing(
    shards: Path, model: Path, codes: Path, tmp_path: Path, local_ray: None
) -> None:
    config = load_config(sets=[*SETTINGS, "encode.workers=2"])
    out = tmp_path / "codes"
    told = preflight(str(shards / "train"), str(model), str(out), config, price=2.0).as_json()
    assert not out.exists()
    assert (told["shards"], told["shards_left"], told["images_left"], told["workers"]) == (4, 4, 36, 2)
    assert told["tried"].startswith("20 images of 2 shards in ")
    assert {row["step"] for row in told["by_step"]} == STEPS
    assert told["binds"].split("-bound: ")[0] in {*STEPS, "cpu"}
    tars = sum(shard.part.bytes for shard in open_shards(str(shards / "train")).shards)
    assert tars < told["bytes_read"] < tars + 2 * sum(file.stat().st_size for file in model.rglob("*.*"))
    parts = sum(part.bytes for part in open_artifact(str(codes / "train"), "codes").manifest.parts)
    receipts = sum(file.stat().st_size for file in (codes / "train" / "receipts").iterdir())
    assert told["bytes_written"] == pytest.approx(parts + receipts, rel=0.1)
    assert told["requests"] == {}
    assert told["cost"] == pytest.approx(2.0 * told["cpu_hours"], abs=1e-3)
    assert told["million_images"]["cost"] == pytest.approx(2.0 * told["million_images"]["cpu_hours"], rel=1e-3)
    assert told["million_images"]["hours"] == pytest.approx(1e6 / told["images_per_second"] / 3600, rel=0.01)


def test_receipts_that_are_there_count_as_done(
    shards: Path, model: Path, codes: Path, tmp_path: Path, local_ray: None, config: Config
) -> None:
    out = tmp_path / "codes"
    shutil.copytree(codes / "train", out)
    assert preflight(str(shards / "train"), str(model), str(out), config).time == "nothing is left to encode"
    (out / "manifest.json").unlink()
    last = max((out / "receipts").iterdir())
    last.unlink()
    rows = open_shards(str(shards / "train")).shard(f"{last.stem}.tar").rows
    told = preflight(str(shards / "train"), str(model), str(out), config).as_json()
    assert (told["shards_left"], told["images_left"], told["workers"]) == (1, rows, 1)
    assert told["tried"].startswith(f"{rows} images of 1 shard in ")
    assert not last.exists()
    assert encode(str(shards / "train"), str(model), str(out), config).digest == open_artifact(codes / "train").digest


def test_what_an_encode_would_refuse_is_refused(shards: Path, model: Path, codes: Path) -> None:
    config = load_config(sets=[*SETTINGS, "encode.batch_size=4"])
    with pytest.raises(FingerprintMismatch, match="choose another --out"):
        preflight(str(shards / "query"), str(model), str(codes / "query"), config)


def hhnet(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipelines", *words], capture_output=True, text=True, timeout=200)


def test_a_price_needs_a_dry_run() -> None:
    done = hhnet("encode", "--shards", "s", "--model", "m", "--out", "o", "--price", "2")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def test_requests_are_those_that_a_worker_makes(pictures: Path, tmp_path: Path, config: Config) -> None:
    with (
        seaweed(tmp_path / "weed") as server,
        FaultProxy(server.endpoint) as proxy,
        server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint),
    ):
        shards, model, out = server.uri("shards"), server.uri("model"), server.uri("codes")
        ingest(str(pictures), shards, config)
        write_model(model, shards, backbone="test_resnet")
        words = ["encode", "--shards", shards, "--model", model, "--out", out, "--dry-run", "--json"]
        words += [word for setting in (*SETTINGS, "ray.cpus=1") for word in ("--set", setting)]
        done = hhnet(*words)
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (told["shards_left"], told["workers"]) == (6, 1)

        job = plan_encode(open_artifact(shards), open_artifact(model), out, config)
        assert job.writer().store.names("") == ["identity.json", "origin.json"]  # as the encode does before its workers
        proxy.reset()
        worker = ShardEncoder(job)
        for shard in worker.shards.shards:
            worker.run(ShardTask(shard.name, shard.stem))
        assert told["requests"] == dict(proxy.seen)
