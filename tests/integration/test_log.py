"""What Ray's workers log, and what a verb on Ray writes to stderr where every line shall be JSON."""

import json
import logging
import subprocess
import sys
from pathlib import Path

from tests.integration.conftest import SETTINGS


def speak() -> None:
    logging.getLogger("pipelines.encode.shard").debug("a worker speaks", extra={"shard": "a.tar"})


LOCAL = """
import json, logging, pathlib, sys, time
import ray
from pipelines.cluster.session import ray_session
from pipelines.config.settings import Config
from pipelines.console import show_log
from tests.integration.test_log import speak

show_log("debug", as_json=True)
with ray_session(Config()):
    ray.get(ray.remote(speak).remote())
    folder = pathlib.Path(ray._private.worker._global_node.get_logs_dir_path())
    found, deadline = [], time.monotonic() + 30
    while not found and time.monotonic() < deadline:
        lines = [line for path in folder.glob("worker-*.err") for line in path.read_text().splitlines()]
        found = [line for line in lines if "a worker speaks" in line]
        time.sleep(0.1)
print(*found)
"""


def test_a_worker_of_a_local_ray_logs_as_the_verb_does() -> None:
    done = subprocess.run([sys.executable, "-c", LOCAL], capture_output=True, text=True, timeout=120)
    (line,) = map(json.loads, done.stdout.splitlines())
    assert (line["level"], line["message"], line["shard"]) == ("debug", "a worker speaks", "a.tar"), done.stderr
    assert all(json.loads(line)["level"] == "debug" for line in done.stderr.splitlines())


def test_every_line_of_an_encode_is_json_if_asked_for(shards: Path, model: Path, tmp_path: Path) -> None:
    words = ["encode", "--shards", str(shards / "train"), "--model", str(model), "--out", str(tmp_path / "codes")]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "-m", "pipelines", *words, "--log-level", "debug", "--log-json", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert (done.returncode, json.loads(done.stdout)["status"]) == (0, "done")
    begun = [line["shard"] for line in lines if "worker" in line and "begun on" in line["message"]]
    assert sorted(begun) == [f"train-{number:06d}.tar" for number in range(4)]
    (last,) = [line for line in lines if line.get("stage") == "encode: codes" and line["done"] == line["total"]]
    assert (last["total"], last["unit"]) == (36, "images") and last["rate"] > 0
