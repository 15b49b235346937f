"""Encode on S3 with two workers while a worker, the driver, the S3 server and a Ray node are killed, in any order.

The same command is run again until it ends with 0; its manifest must be the one of an undisturbed run.

A release tries every order. HHNET_IMAGES=DIR takes the images from a folder of class folders instead of drawing them.
"""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts.manifest import open_artifact
from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store
from pipelines.verify.verify import verify
from tests.support.models import write_model
from tests.support.pictures import write_folder
from tests.support.report import SEED, report, scaled
from tests.support.seaweed import Seaweed, seaweed

IMAGES = os.environ.get("HHNET_IMAGES")
SETS = (
    *(f"ingest.samples_per_shard={500 if IMAGES else 16}", "data.image_size=32", "encode.batch_size=16"),
    *("encode.workers=2", "encode.max_attempts=10"),
)
ORDERS = random.Random(SEED).sample(list(itertools.permutations(("worker", "driver", "server", "node"))), k=24)
SERVER_DOWN_S = 5
ROUNDS_AT_MOST = 12

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed(tmp_path_factory.mktemp("weed")) as running, running.environment():
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards and a model on the server; returns the digest of codes that nobody disturbed."""
    config = load_config(sets=SETS)
    source = IMAGES
    if source is None:
        source = str(tmp_path_factory.mktemp("pictures"))
        write_folder(Path(source), classes=4, per_class=scaled(120, 1200))
    ingest(source, server.uri("shards"), config)
    write_model(server.uri("model"), server.uri("shards"))
    with ray_session(config):
        encode(server.uri("shards"), server.uri("model"), server.uri("codes"), config)
    return open_artifact(server.uri("codes")).digest


@contextmanager
def started(server: Seaweed, out: str) -> Iterator[subprocess.Popen[str]]:
    """The command; it is ended with whatever it started if it does not end by itself."""
    words = [sys.executable, "-m", "pipelines", "encode", "--shards", server.uri("shards"), "--json"]
    words += ["--model", server.uri("model"), "--out", server.uri(out)]
    for setting in SETS:
        words += ["--set", setting]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | server.variables
    )
    try:
        yield process
    finally:
        for left in [process, *named(process, "")] if process.poll() is None else []:
            left.kill()


def receipts(server: Seaweed, out: str) -> int:
    return len(Store(server.uri(out)).names("receipts"))


ENCODERS = ("ray::EncodeWork",)
"""What Linux keeps of the name of a worker's process, before and while it encodes a shard."""


def named(process: subprocess.Popen[str], *names: str) -> list[psutil.Process]:
    """Descendants of the driver that bear one of these names."""
    try:
        return [p for p in psutil.Process(process.pid).children(recursive=True) if any(n in p.name() for n in names)]
    except psutil.Error:
        return []


def kill_worker(process: subprocess.Popen[str], server: Seaweed) -> None:
    named(process, *ENCODERS)[0].kill()


def kill_driver(process: subprocess.Popen[str], server: Seaweed) -> None:
    process.kill()


def kill_server(process: subprocess.Popen[str], server: Seaweed) -> None:
    server.kill()
    time.sleep(SERVER_DOWN_S)
    server.start()


def kill_node(process: subprocess.Popen[str], server: Seaweed) -> None:
    """The raylet is the node: its workers and agents die with it."""
    named(process, "raylet")[0].kill()


KILLS: dict[str, Callable[[subprocess.Popen[str], Seaweed], None]] = {
    "worker": kill_worker,
    "driver": kill_driver,
    "server": kill_server,
    "node": kill_node,
}


def wait_for_work(process: subprocess.Popen[str], server: Seaweed, out: str, done: int) -> bool:
    """Until a worker runs and `done` shards are finished; False where the run ended before."""
    while process.poll() is None:
        if named(process, *ENCODERS) and receipts(server, out) >= done:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("trial", range(scaled(1, len(ORDERS))))
def test_whatever_is_killed_the_same_command_ends_with_the_same_manifest(
    trial: int, server: Seaweed, undisturbed: str
) -> None:
    choose = random.Random(f"{SEED}-{trial}")
    order = list(ORDERS[trial])
    out, left, codes, killed = f"trial-{trial}", list(order), [], []
    for _ in range(ROUNDS_AT_MOST):
        with started(server, out) as process:
            while left and wait_for_work(process, server, out, receipts(server, out) + choose.randrange(1, 3)):
                killed.append(left.pop(0))
                KILLS[killed[-1]](process, server)
            printed, err = process.communicate(timeout=600)
        codes.append(process.returncode)
        if process.returncode == 0:
            break
        assert process.returncode in (-9, 1, 3), err
        assert "Traceback" not in err, err
    result = json.loads(printed.splitlines()[-1])
    found = open_artifact(server.uri(out)).digest
    totals = {name: result[name] for name in ("samples", "codes", "rejects")}
    report("encode on S3", order=order, killed=killed, exit_codes=codes, same_digest=found == undisturbed, **totals)
    assert killed == order, f"seed {SEED}: the run ended before {left} could be killed"
    assert found == undisturbed, f"seed {SEED}, order {order}"
    assert verify(server.uri(out)).status == "done"
