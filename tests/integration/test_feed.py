"""Encodes whose images are decoded in processes of their own: the same bytes, and nothing left when they are killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import psutil
import pytest

from pipelines.artifacts.facts import CodesMeta
from pipelines.artifacts.manifest import open_artifact
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.ingest.ingest import ingest
from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree
from tests.support.encodes import decoders
from tests.support.pictures import write_folder
from tests.support.poison import HOLDS, KILLS, write_hook
from tests.support.runs import run_record

APART = (*SETTINGS, "encode.decode_processes=2")


@pytest.mark.parametrize("workers", [1, 2])
def test_decode_processes_change_no_byte(workers: int, shards: Path, model: Path, codes: Path, tmp_path: Path) -> None:
    config = load_config(sets=[*APART, f"encode.workers={workers}"])
    encode(str(shards / "train"), str(model), str(tmp_path / "codes"), config)
    assert tree(tmp_path / "codes") == tree(codes / "train")


def test_without_a_gpu_an_automatic_batch_size_is_a_number(
    shards: Path, model: Path, tmp_path: Path, local_ray: None
) -> None:
    config = load_config(sets=[*SETTINGS, "encode.batch_size=auto"])
    result = encode(str(shards / "query"), str(model), str(tmp_path / "codes"), config)
    assert result.status == "done"
    assert open_artifact(result.uri).facts(CodesMeta).settings["encode.batch_size"] == 64


def poisoned(folder: Path, what: bytes) -> str:
    """Shards of ten samples; one picture does `what` to the process that decodes it."""
    write_folder(folder / "photos", classes=2, per_class=19)
    (klass, *_) = (path for path in (folder / "photos").iterdir() if path.is_dir())
    (klass / "poison.jpg").write_bytes(what)
    return ingest(str(folder / "photos"), str(folder / "shards"), load_config(sets=SETTINGS)).uri


def started(shards: str, model: Path, out: Path, hook: str, *sets: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "pipelines", "encode", "--shards", shards, "--model", str(model), "--out", str(out)]
    words += [word for setting in (*APART, *sets) for word in ("--set", setting)]
    path = os.pathsep.join([hook, *filter(None, [os.environ.get("PYTHONPATH")]), str(Path.cwd())])
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def test_a_picture_that_kills_its_decode_process_costs_its_shard_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    sets = "encode.workers=1", "encode.max_attempts=2"
    verb = started(poisoned(tmp_path, KILLS), model, out, write_hook(tmp_path / "hook"), *sets)
    _, err = verb.communicate(timeout=240)
    assert verb.returncode == 4, err
    assert re.search(r"(9|10) of 39 samples were rejected", err.splitlines()[-1])
    shards = run_record(out)["shards"]
    attempts = sorted(shard["attempts"] for shard in shards)
    assert attempts == [1, 1, 1, 2]
    reasons = duckdb.sql(f"select distinct reason, shard from '{out}/rejects/*.parquet'").fetchall()
    assert [reason for reason, _ in reasons] == ["worker_died"]
    assert reasons[0][1] == next(shard["shard"] for shard in shards if shard["attempts"] == 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_leaves_neither_decode_processes_nor_shared_memory(
    number: signal.Signals, code: int, model: Path, tmp_path: Path
) -> None:
    """A picture that is decoded for ever keeps one of them busy."""
    verb = started(poisoned(tmp_path, HOLDS), model, tmp_path / "codes", write_hook(tmp_path / "hook"), "ray.cpus=1")
    deadline = time.monotonic() + 120
    while len(found := decoders(verb)) < 2:
        assert verb.poll() is None and time.monotonic() < deadline, verb.communicate()[1]
        time.sleep(0.05)
    below = psutil.Process(verb.pid).children(recursive=True)
    assert {process.pid for process in found} <= {process.pid for process in below}
    verb.send_signal(number)
    _, err = verb.communicate(timeout=120)
    assert verb.returncode == code, err
    _, alive = psutil.wait_procs(below, timeout=20)
    assert [process.cmdline() for process in alive] == []
