"""What Ray serves to Prometheus while verbs work is what the artifacts say, on a local Ray and on a joined cluster."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import duckdb
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipelines.artifacts.manifest import open_artifact
from pipelines.config.settings import Config
from pipelines.ingest.ingest import ingest
from tests.integration.conftest import SETTINGS
from tests.integration.test_ray_job import BIN, environment, free_port
from tests.support.models import write_model
from tests.support.pictures import truncated_jpeg, write_folder

Figures = dict[tuple[str, ...], float]

WAIT_S = 60

# A verb's own local Ray ends with it; this one stays until standard input ends, so that it can be asked afterwards.
ENCODE_AND_STAY = """
import sys
from pipelines.cluster.session import ray_session
from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
shards, model, out, *sets = sys.argv[1:]
with ray_session(config := load_config(sets=sets)):
    encode(shards, model, out, config, allow_degraded=True)
    print("done", flush=True)
    sys.stdin.read()
"""

# A GPU by name is enough for Ray: what a worker is given is asked of Ray, not of a driver.
HALF_A_GPU = """
import sys, time
import ray
from pipelines.cluster.metrics import Meter

class Worker:
    def run(self):
        begun = time.perf_counter()
        with Meter("encode").busy():
            time.sleep(2)
        return time.perf_counter() - begun

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, _metrics_export_port=int(sys.argv[1]))
worker = ray.remote(num_cpus=1, num_gpus=0.5)(Worker).remote()
print(ray.get(worker.run.remote()), flush=True)
sys.stdin.read()
"""


SIX_AT_A_GATE = """
import pathlib, sys, time
import ray
from pipelines.cluster.placement import Need
from pipelines.cluster.pool import map_items

class Worker:
    def __init__(self, gate):
        self.gate = pathlib.Path(gate)

    def run(self, item):
        while not self.gate.exists():
            time.sleep(0.1)
        return item

port, gate = sys.argv[1:]
ray.init(address="local", num_cpus=1, include_dashboard=False, _metrics_export_port=int(port))
done = map_items(Worker, (gate,), range(6), verb="test", need=Need(), workers=1, wait_s=60)
print(sorted(one.item for one in done), flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, config: Config) -> tuple[str, str]:
    """60 images in 6 shards, of which 2 are cut and 1 is a text; and a model that nobody trained."""
    folder = tmp_path_factory.mktemp("metrics")
    write_folder(folder / "photos", classes=3, per_class=19)
    for name in ("cut-0", "cut-1"):
        (folder / "photos" / "class_00" / f"{name}.jpg").write_bytes(truncated_jpeg())
    (folder / "photos" / "class_01" / "text.jpg").write_text("no picture")
    ingest(str(folder / "photos"), str(folder / "shards"), config)
    model = write_model(folder / "model", str(folder / "shards"), backbone="test_resnet")
    return str(folder / "shards"), model.uri


def scrape(port: int) -> Figures:
    """Sums over workers, by the metric's name and its own tags: verb first, then reason, step, direction or state."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        figures: Figures = {}
        for sample in (sample for family in families for sample in family.samples if "hhnet" in sample.name):
            tags = [
                sample.labels[key] for key in ("verb", "reason", "step", "direction", "state") if key in sample.labels
            ]
            name = (sample.name.removeprefix("ray_hhnet_"), *tags)
            figures[name] = figures.get(name, 0) + sample.value
        return figures


def wait_for(port: int, name: tuple[str, ...], value: float) -> Figures:
    """The figures, once this one has its value."""
    deadline = time.monotonic() + WAIT_S
    figures: Figures = {}
    while figures.get(name) != value and time.monotonic() < deadline:
        time.sleep(0.2)
        with suppress(OSError):  # Ray is not up yet
            figures = scrape(port)
    assert figures.get(name) == value, figures
    return figures


def assert_told_right(figures: Figures, out: Path, shards: str) -> None:
    """Images, rejects and bytes are those of the codes at `out`."""
    codes = open_artifact(str(out), "codes").manifest
    tars = [part for part in open_artifact(shards, "shards").manifest.parts if part.path.endswith(".tar")]
    reasons = duckdb.sql(f"select reason, count(*) from '{out}/rejects/*.parquet' group by reason").fetchall()
    assert dict(reasons) == {"truncated": 2, "not_an_image": 1}
    found = {name[2]: value for name, value in figures.items() if name[:2] == ("rejects_total", "encode")}
    assert found == dict(reasons)
    assert figures["images_total", "encode"] == codes.totals["samples"] == 60
    assert figures["bytes_total", "encode", "read"] == sum(part.bytes for part in tars)
    assert figures["bytes_total", "encode", "written"] == sum(part.bytes for part in codes.parts)
    steps = {name[2] for name in figures if name[:2] == ("step_seconds_total", "encode")}
    assert steps == {"read", "decode", "forward", "write"}


def often(**more: str) -> dict[str, str]:
    """An environment in which the workers of Ray report every second; by default they do every ten."""
    return environment(RAY_metrics_report_interval_ms="1000", **more)


def settings(*more: str) -> list[str]:
    return [word for setting in (*SETTINGS, *more) for word in ("--set", setting)]


def test_a_local_ray_serves_the_figures_of_the_artifact(corpus: tuple[str, str], tmp_path: Path) -> None:
    port = free_port()
    sets = [*SETTINGS, "encode.workers=1", "ray.cpus=1", f"ray.metrics_port={port}"]
    command = [sys.executable, "-c", ENCODE_AND_STAY, *corpus, str(tmp_path / "codes"), *sets]
    worker = subprocess.Popen(command, env=often(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "done\n"
        assert_told_right(wait_for(port, ("images_total", "encode"), 60), tmp_path / "codes", corpus[0])
    finally:
        worker.communicate()
    assert worker.returncode == 0


def test_the_queue_is_what_waits_and_what_a_worker_has(tmp_path: Path) -> None:
    port, gate = free_port(), tmp_path / "gate"
    command = [sys.executable, "-c", SIX_AT_A_GATE, str(port), str(gate)]
    with subprocess.Popen(command, env=often(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as pool:
        assert pool.stdout is not None
        try:
            assert wait_for(port, ("queue", "test", "running"), 1)["queue", "test", "waiting"] == 5
        finally:
            gate.touch()
        assert pool.stdout.readline() == "[0, 1, 2, 3, 4, 5]\n"
        pool.communicate()


def test_gpu_seconds_are_those_of_the_share_that_a_worker_has() -> None:
    port = free_port()
    env = often(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
    command = [sys.executable, "-c", HALF_A_GPU, str(port)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        seconds = float(worker.stdout.readline())
        deadline = time.monotonic() + WAIT_S
        while not (figures := scrape(port)) and time.monotonic() < deadline:
            time.sleep(0.5)
        worker.communicate()
    assert figures["gpu_seconds_total", "encode"] == pytest.approx(seconds / 2, rel=0.05)


def test_a_port_that_is_taken_is_said_at_once(corpus: tuple[str, str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        words = ["encode", "--shards", corpus[0], "--model", corpus[1], "--out", str(tmp_path / "codes")]
        words += settings(f"ray.metrics_port={other.getsockname()[1]}")
        done = subprocess.run(
            [sys.executable, "-m", "pipelines", *words], env=environment(), capture_output=True, text=True
        )
    assert done.returncode == 2
    assert "is taken on this machine" in done.stderr


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, str], str, int]]:
    """A cluster that others began, with a port for Prometheus: the environment of a client, its address, that port."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    port, metrics = free_port(), free_port()
    env = often(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0")
    words = ["start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={port}"]
    words += [f"--metrics-export-port={metrics}", "--include-dashboard=false", "--object-store-memory=200000000"]
    words += [f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen([BIN / "ray", *words], env=env, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield env, f"127.0.0.1:{port}", metrics
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_a_cluster_keeps_the_figures_after_the_verbs_have_ended(
    head: tuple[dict[str, str], str, int], corpus: tuple[str, str], tmp_path: Path
) -> None:
    env, address, metrics = head

    def verb(*words: str) -> dict[str, object]:
        command = [sys.executable, "-m", "pipelines", *words, *settings(f"ray.address={address}"), "--json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode in (0, 4), done.stderr
        return dict(json.loads(done.stdout))

    shards, model = corpus
    out, index = tmp_path / "codes", str(tmp_path / "index")
    encoded = verb("encode", "--shards", shards, "--model", model, "--out", str(out), "--allow-degraded")
    figures = wait_for(metrics, ("images_total", "encode"), 60)
    assert_told_right(figures, out, shards)

    verb("index", "build", "--codes", str(out), "--out", index)
    figures = wait_for(metrics, ("images_total", "index"), float(str(encoded["codes"])))
    parts = [part for part in open_artifact(index, "index").manifest.parts if part.path.startswith("parts/")]
    built = [part for part in parts if part.name.startswith(("part-", "keys-"))]
    assert figures["bytes_total", "index", "written"] == sum(part.bytes for part in built)

    trained = verb("train", "--shards", shards, "--out", str(tmp_path / "model"))
    epochs, held_out = 2, 6
    learnt = epochs * (60 - held_out) - int(str(trained["skipped"]))
    figures = wait_for(metrics, ("images_total", "train"), learnt)
    assert {name[2] for name in figures if name[:2] == ("step_seconds_total", "train")} == {"feed", "step", "validate"}
    assert figures["images_total", "encode"] == 60
