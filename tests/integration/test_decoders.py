"""Decoders on other nodes: the same bytes, whoever decodes; and what it costs when they die.

The GPUs are Ray's counts only: what runs beside them runs on CPUs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import psutil
import pytest

from pipelines.config.loading import load_config
from pipelines.encode.encode import encode
from pipelines.ingest.ingest import ingest
from tests.integration.conftest import SETTINGS
from tests.integration.test_encode import tree
from tests.support.encodes import remote_decoders, starting_decoders
from tests.support.inline import InlinePool
from tests.support.nodes import LOOPBACK, Nodes, cluster_of
from tests.support.pictures import animated_gif, truncated_jpeg, write_folder
from tests.support.poison import KILLS, write_hook
from tests.support.runs import run_record

DEADLINE_S = 120
ALONE = (*SETTINGS, "data.workers=1", "encode.reject_budget=1")


@contextmanager
def encoding(shards: str, model: Path, out: Path, *sets: str, **env: str) -> "Iterator[subprocess.Popen[str]]":
    words = [sys.executable, "-m", "pipelines", "encode", "--shards", shards, "--model", str(model), "--out", str(out)]
    words += [word for setting in (*ALONE, *sets) for word in ("--set", setting)]
    verb = subprocess.Popen(words, env={**os.environ, **LOOPBACK, **env}, stderr=subprocess.PIPE, text=True)
    try:
        yield verb
    finally:
        verb.kill()
        verb.wait()


@contextmanager
def stopped_processes(top: "subprocess.Popen[str]") -> Iterator[Callable[[], bool]]:
    """Yield a function that stops the decode processes below `top`, and tells whether none was ready before."""
    stopped: set[psutil.Process] = set()
    early = True

    def stop() -> bool:
        nonlocal early
        for process in set(starting_decoders(top)) - stopped:
            with suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGSTOP)
                early &= "memfd:hhnet-feed" not in Path(f"/proc/{process.pid}/maps").read_text()
                stopped.add(process)
        return early

    try:
        yield stop
    finally:
        for process in stopped:  # a stopped process does not notice that its worker is gone
            with suppress(psutil.Error):
                process.kill()


@pytest.fixture(scope="module")
def mixed(common: Path) -> str:
    """Shards with rejects and animations."""
    folder = common / "mixed"
    write_folder(folder / "photos", classes=2, per_class=20)
    (klass, *_) = sorted((folder / "photos").iterdir())
    for number in range(3):
        (klass / f"short{number}.jpg").write_bytes(truncated_jpeg())
        (klass / f"moving{number}.gif").write_bytes(animated_gif())
    return ingest(str(folder / "photos"), str(folder / "shards"), load_config(sets=SETTINGS)).uri


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    with cluster_of({"num_cpus": 2, "num_gpus": 1}, 1, 1) as nodes:
        yield nodes


@pytest.mark.parametrize(("workers", "gpus"), [(1, 1), (2, 0.5)])
def test_decoders_on_nodes_without_gpus_change_no_byte(
    workers: int, gpus: float, mixed: str, model: Path, cluster: Nodes, tmp_path: Path
) -> None:
    """The workers' own processes never get ready, so that the decoders that `auto` chooses do all the work."""
    encode(mixed, str(model), str(tmp_path / "here"), load_config(sets=ALONE), pool=InlinePool())
    sets = f"ray.address={cluster.address}", f"encode.workers={workers}", f"encode.gpus={gpus}"
    for number in range(3):  # under load a process may be ready before it is seen
        out = tmp_path / str(number)
        seen: set[psutil.Process] = set()
        early = True
        with (
            encoding(mixed, model, out, *sets, "store.shared=true") as verb,
            stopped_processes(cluster.process) as stop,
        ):
            deadline = time.monotonic() + DEADLINE_S
            while verb.poll() is None and early:
                assert time.monotonic() < deadline, "nobody decodes"
                early = stop()
                seen.update(remote_decoders(cluster.process))
                time.sleep(0.01)
            if early:
                assert verb.wait() == 0, verb.communicate()[1]
                break
    assert tree(out) == tree(tmp_path / "here")
    _, alive = psutil.wait_procs(seen, timeout=20)
    assert alive == [], "decoders end with their worker"


def test_a_picture_that_kills_its_decoder_costs_its_shard_and_nothing_else(model: Path, tmp_path: Path) -> None:
    """On this machine alone, where one of the two decoders that are asked for has room."""
    write_folder(tmp_path / "photos", classes=2, per_class=19)
    (klass, *_) = (path for path in (tmp_path / "photos").iterdir() if path.is_dir())
    (klass / "poison.jpg").write_bytes(KILLS)
    shards = ingest(str(tmp_path / "photos"), str(tmp_path / "shards"), load_config(sets=SETTINGS)).uri
    sets = "ray.cpus=2", "encode.workers=1", "encode.max_attempts=2", "encode.decoders=2"
    path = os.pathsep.join([write_hook(tmp_path / "hook", "default_worker.py"), str(Path.cwd())])
    out = tmp_path / "codes"
    with encoding(shards, model, out, *sets, PYTHONPATH=path) as verb:
        deadline = time.monotonic() + DEADLINE_S
        seen: set[psutil.Process] = set()
        with stopped_processes(verb) as stop:
            while not any(not process.is_running() for process in seen):
                assert verb.poll() is None and time.monotonic() < deadline
                if not seen:
                    stop()
                seen.update(remote_decoders(verb))
                time.sleep(0.01)
        _, err = verb.communicate(timeout=DEADLINE_S)
    assert verb.returncode == 0, err
    shards_done = run_record(out)["shards"]
    assert sorted(shard["attempts"] for shard in shards_done) == [1, 1, 1, 2]
    rejects = duckdb.sql(f"select distinct reason, shard from '{out}/rejects/*.parquet'").fetchall()
    assert rejects == [("worker_died", next(shard["shard"] for shard in shards_done if shard["attempts"] == 2))]
