"""`hhnet status` of a real encode, from another process: while it works, after kill -9 of its driver, after the resume.

On a local store and on S3. In the resumed run a worker is killed too, so that a shard is retried.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import psutil
import pytest

from pipelines.artifacts.runs import closed_records
from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store
from tests.support.encodes import encoders, started
from tests.support.models import write_model
from tests.support.pictures import truncated_jpeg, write_folder
from tests.support.processes import stopped
from tests.support.report import report, scaled
from tests.support.seaweed import Seaweed, seaweed

SHARDS, IMAGES = 60, 24
SETTINGS = ("ingest.samples_per_shard=24", "data.image_size=32", "encode.batch_size=1", "encode.workers=2")

pytestmark = pytest.mark.timeout(scaled(600, 1200))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with three pictures that are none, enough to be looked at while they are encoded, and a model."""
    folder = tmp_path_factory.mktemp("corpus")
    write_folder(folder / "images", classes=8, per_class=SHARDS * IMAGES // 8, size=16)
    first = sorted((folder / "images").iterdir())[0]
    for number in range(3):
        (first / f"short{number}.jpg").write_bytes(truncated_jpeg())
    shards = str(ingest(str(folder / "images"), str(folder / "shards"), load_config(sets=SETTINGS)).uri)
    write_model(folder / "model", shards)
    return folder


def hhnet(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, words), "--json"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return cast("dict[str, Any]", json.loads(done.stdout.splitlines()[-1]))


def seen_when(out: str, verb: "subprocess.Popen[str]", enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status of `out` that is enough, while the verb runs.

    A look is slow, so the workers wait meanwhile, and it is taken only after another shard.
    """
    deadline, seen = time.monotonic() + 240, 0
    while True:
        assert verb.poll() is None, "the encode ended too early"
        assert time.monotonic() < deadline
        if (done := len(Store(out).names("receipts"))) > seen:
            seen = done
            with stopped(encoders(verb)):
                found = hhnet("status", out)
            if enough(found):
                return found
        time.sleep(0.05)


def at_full_work(found: dict[str, Any]) -> bool:
    """Both workers are there, and five shards are done."""
    return bool(found.get("rate")) and len(found["slowest"]) == 5 and found["hosts"][0]["workers"] == 2


@pytest.mark.parametrize("where", ["local", "s3"])
def test_an_encode_is_seen_from_outside(where: str, corpus: Path, tmp_path: Path, server: Seaweed) -> None:
    root = str(tmp_path) if where == "local" else server.uri("seen")
    shards, model, out = str(corpus / "shards"), str(corpus / "model"), f"{root}/codes/database"
    words = ["encode", "--shards", shards, "--model", model, "--out", out]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", *words, *settings, "--json"]

    with started(command, os.environ.copy()) as verb:
        working = seen_when(out, verb, at_full_work)
        with stopped(encoders(verb)):
            whole = hhnet("status", root)
    assert (working["status"], working["digest"]) == ("working", None)
    assert 4 <= working["shards"]["done"] < working["shards"]["of"] == SHARDS + 1
    assert 0 < working["done"] < working["of"] == SHARDS * IMAGES + 3
    assert working["rate"] > 0
    assert working["left_s"] >= 0
    assert [host["host"] for host in working["hosts"]] == [os.uname().nodename]
    assert (working["hosts"][0]["workers"], working["hosts"][0]["failed"], working["retried"]) == (2, 0, [])
    assert working["slowest"][0]["seconds"] >= working["slowest"][-1]["seconds"] > 0
    assert working["run"]["settings"]["encode.workers"] == 2
    assert [(stage["stage"], stage["status"]) for stage in whole["stages"]] == [("codes/database", "working")]

    # The driver was killed with SIGKILL, and all of its Ray.
    died = hhnet("status", out)
    assert (died["status"], died["digest"], died["left_s"]) == ("died", None, None)
    done = len(Store(out).names("receipts"))
    assert died["shards"]["done"] == done
    assert len({one["shard"] for one in died["slowest"]}) == 5
    planned = hhnet("plan", "--shards", shards, "--codes", out)
    assert (planned["encode"], planned["publish"]) == (SHARDS + 1 - done, done)

    with started(command, os.environ.copy()) as verb:
        resumed = seen_when(out, verb, lambda found: found["status"] == "working" and found["shards"]["done"] > done)
        with suppress(psutil.Error):
            encoders(verb)[0].kill()
        out_text, err = verb.communicate(timeout=240)
        assert verb.returncode == 0, err
    assert resumed["done"] >= died["done"]
    first, second = closed_records(Store(out))
    assert (first["end"], first["closed_by"], second["end"]) == ("died", resumed["run"]["name"], "done")
    finished = hhnet("status", out)
    assert (finished["status"], finished["digest"]) == ("done", json.loads(out_text.splitlines()[-1])["digest"])
    assert finished["rejects"] == {"total": 3, "reasons": {"truncated": 3}}
    (retried,) = finished["retried"]
    assert (retried["attempts"], retried["ends"]) == (2, ["died", "done"])
    assert finished["hosts"][0]["failed"] == 1
    objects = len(Store(out).names("runs"))
    report("status", where=where, shards=SHARDS + 1, run_objects=objects)
    assert objects < SHARDS, "a run of many shards does not write an object for each"
