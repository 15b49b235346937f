"""A study on a real Ray, by two processes that share a store, of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipelines.verify.verify import verify

STUDY = """
title = "Two lengths, one of them turned as well"
[settings]
data.image_size = 32
data.batch_size = 12
model.backbone = "test_resnet"
train.epochs = 2
train.checkpoint_steps = 2
encode.batch_size = 8
evaluate.gallery = 0
[axes.code]
short = { model.bits = 16 }
long = { model.bits = 24 }
short_turned = { model.bits = 16, train.rotate = "itq" }
"""

LOOK = """
import ray
from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
with ray_session(load_config(sets=["ray.cpus=3"])):
    print(ray.cluster_resources()["CPU"])
"""


def start(shards: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    file = folder / "two.toml"
    file.write_text(STUDY)
    words = [sys.executable, "-m", "pipelines", "study", str(file), "--out", str(folder / "out"), "--json"]
    for role in ("train", "query", "database"):
        words += [f"--{role}", str(shards / role)]
    words += ["--set", "ray.cpus=1", *more]
    return subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)


def answer_of(process: subprocess.Popen[bytes]) -> dict[str, object]:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    found: dict[str, object] = json.loads(said)
    return found


def test_a_share_that_is_killed_is_done_by_a_rerun_and_the_other_one_is_kept(shards: Path, tmp_path: Path) -> None:
    killed, other = (start(shards, tmp_path, "--share", f"{number}/2") for number in (1, 2))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/model/*/checkpoints/*/manifest.json")):
        assert killed.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    half = answer_of(other)
    assert (half["cells"], half["done"], half["missing"], half["failed"]) == (3, 1, 2, 0)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/manifest.json")}
    whole = answer_of(start(shards, tmp_path))
    assert (whole["status"], whole["cells"], whole["failed"]) == ("done", 3, 0)
    assert len(list(tmp_path.glob("out/model/*/checkpoints"))) == 2  # both short ones are made of one training
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert verify(str(whole["uri"])).status == "done"
    assert answer_of(start(shards, tmp_path)) == {**whole, "status": "unchanged"}


def test_a_local_ray_uses_as_many_processors_as_it_is_told() -> None:
    look = subprocess.run([sys.executable, "-c", LOOK], check=True, stdout=subprocess.PIPE, timeout=120)
    assert float(look.stdout) == 3
