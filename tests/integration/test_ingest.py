"""Ingest on a real Ray: the same bytes for any number of workers and after kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines.config.loading import load_config
from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from pipelines.verify.verify import verify
from tests.support.folders import tree, zip_of
from tests.support.runs import run_record
from tests.support.web import body, web_server

SMALL = "ingest.samples_per_shard=5"


def on(workers: int) -> Config:
    """Settings with 5 pictures to a tar and this number of workers, 0 for no Ray."""
    return load_config(sets=[SMALL, f"ingest.workers={workers}"])


def test_one_two_and_no_workers_write_the_same_bytes(pictures: Path, tmp_path: Path, local_ray: None) -> None:
    archive = zip_of(pictures, tmp_path / "x.zip", prefix="wrapped/")
    for workers, source in ((0, pictures), (1, archive), (2, pictures)):
        result = ingest(str(source), str(tmp_path / str(workers)), on(workers), split="train=.5,query=.5")
        assert (result.status, result.samples, result.skipped) == ("done", 60, 0)
        record = run_record(tmp_path / str(workers) / "train")
        assert (record["done"], record["total"], len(record["shards"])) == (30, 30, 6 if workers else 0)
    assert tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "2")
    assert ingest(str(pictures), str(tmp_path / "1"), on(2), split="train=.5,query=.5").status == "unchanged"


def begun(source: Path, out: Path, **variables: str) -> "subprocess.Popen[str]":
    """An ingest on a Ray of its own, in another process."""
    words = [sys.executable, "-m", "pipelines", "ingest", str(source), "--out", str(out), "--set", SMALL]
    environment = {**os.environ, **variables}
    return subprocess.Popen(
        [*words, "--set", "ingest.workers=2"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_killed_workers_and_a_killed_driver_leave_the_same_bytes(pictures: Path, tmp_path: Path) -> None:
    ingest(str(pictures), str(tmp_path / "whole"), on(0))
    # Every worker kills itself when it has put its fifth receipt.
    with begun(pictures, tmp_path / "died", HHNET_FAILPOINTS="receipt.put.after=kill@5") as run:
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert max(shard["attempts"] for shard in run_record(tmp_path / "died")["shards"]) > 1
    assert tree(tmp_path / "died") == tree(tmp_path / "whole")

    with begun(pictures, tmp_path / "cut") as run:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "cut/receipts").glob("*.json"))) < 2 and time.monotonic() < deadline:
            assert run.poll() is None, run.communicate()
            time.sleep(0.02)
        os.kill(run.pid, signal.SIGKILL)
        run.communicate(timeout=120)
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "cut/manifest.json").exists()
    assert ingest(str(pictures), str(tmp_path / "cut"), on(0)).status == "done"
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert verify(str(tmp_path / "cut")).orphans == []


def test_workers_fetch_a_list_of_urls(pictures: Path, tmp_path: Path, local_ray: None) -> None:
    files = sorted(pictures.rglob("*.jpg"))
    with web_server({f"/{number}": body(file.read_bytes()) for number, file in enumerate(files)}) as server:
        rows = [f"{server}/{number},{file.parent.name}\n" for number, file in enumerate(files)]
        (tmp_path / "list.csv").write_text("path,label\n" + "".join(rows) + f"{server}/nowhere,x\n")
        for workers in (0, 2):
            config = load_config(sets=[SMALL, f"ingest.workers={workers}", "ingest.private_hosts=true"])
            result = ingest(str(tmp_path / "list.csv"), str(tmp_path / str(workers)), config, allow_degraded=True)
            assert (result.samples, result.skipped_reasons) == (len(files), {"missing": 1})
    assert tree(tmp_path / "0") == tree(tmp_path / "2")
