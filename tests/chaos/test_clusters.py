"""Clusters as they are: nodes that go and do not come back, too few places, held GPUs, an autoscaler, a notice.

Each verb runs as a process of its own. It ends with the bytes of an undisturbed run, or with exit 3 and a line that
says what was asked, what there is and what is in use; and a node that was lost makes no reject.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support.encodes import (
    RUN_LIMIT_S,
    Corpus,
    encode_words,
    encoders,
    hhnet,
    joined,
    more_receipts,
    result_of,
    started,
)
from tests.support.nodes import LOOPBACK, Nodes, cluster_of, growing_cluster
from tests.support.report import report, scaled
from tests.support.runs import run_record

pytestmark = pytest.mark.timeout(scaled(300, 3600))

SOON = ("--set", "ray.wait_s=5")
"""For runs that are to end for lack of room. On a busy machine the first worker of another may take longer to begin."""
SOONER = ("--set", "ray.wait_s=20")
"""For runs that find room, some of them after a wait for what does not come."""


def on(cluster: Nodes) -> tuple[str, ...]:
    """The settings by which a verb joins the cluster, whose nodes share this machine's disk."""
    return ("--set", f"ray.address={cluster.address}", "--set", "store.shared=true")


def ended(*words: str) -> subprocess.CompletedProcess[str]:
    """A verb's end."""
    with started(hhnet(*words), {**os.environ, **LOOPBACK}) as verb:
        out, err = verb.communicate(timeout=RUN_LIMIT_S)
    return subprocess.CompletedProcess(words, verb.returncode, out, err)


# ---------------------------------------------------------------------------------------------------------- encode


def test_an_encode_with_more_workers_than_places_ends(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    words = encode_words(corpus.shards, corpus.model, out, "--workers", "3", "--set", "ray.cpus=2", *SOONER)
    with started(words) as verb:
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest


def test_a_node_that_is_lost_and_not_replaced_leaves_the_work_to_the_others(
    corpus: Corpus,
    tmp_path: Path,
) -> None:
    out = tmp_path / "codes"
    with cluster_of(1, 1) as cluster, joined(corpus, cluster, out, *SOONER) as verb:
        assert more_receipts(verb, out, 3)
        cluster.tell("lose 0")
        assert result_of(verb)["rejects"] == 0
    assert (out / "manifest.json").read_bytes() == corpus.manifest


def test_when_all_nodes_are_lost_the_run_says_so_and_goes_on_later(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    with cluster_of(1) as cluster:
        with joined(corpus, cluster, out, *SOON) as verb:
            assert more_receipts(verb, out, 3)
            cluster.tell("lose 0")
            _, err = verb.communicate(timeout=RUN_LIMIT_S)
        assert verb.returncode == 3
        assert "no room for 1 worker of 1 CPU after 5 s (ray.wait_s)" in err
        cluster.tell("add")
        with joined(corpus, cluster, out, *SOONER) as verb:
            result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest


def test_a_node_that_joins_gets_work(corpus: Corpus, tmp_path: Path) -> None:
    """The number of workers is not given: they are as many as find room."""
    out = tmp_path / "codes"
    words = without(encode_words(corpus.shards, corpus.model, out), "encode.workers=2")
    with cluster_of(1) as cluster, started([*words, *on(cluster)], {**os.environ, **LOOPBACK}) as verb:
        assert more_receipts(verb, out, 2)
        with stopped_encoder(cluster):
            cluster.tell("add")
            assert more_receipts(verb, out, 3), "nobody but the node that joined can have made them"
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest


@contextmanager
def stopped_encoder(cluster: Nodes) -> Iterator[psutil.Process]:
    """Hold the worker that encodes in the middle of what it does, for the length of the block."""
    (worker,) = encoders(cluster.process)
    worker.send_signal(signal.SIGSTOP)
    try:
        yield worker
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGCONT)


def without(words: list[str], setting: str) -> list[str]:
    """A command line without one of its settings."""
    place = words.index(setting)
    return [*words[: place - 1], *words[place + 1 :]]


def test_a_preemption_in_the_last_shard_rejects_nothing(corpus: Corpus, tmp_path: Path) -> None:
    """A worker gets one attempt here: what it held when its node went is the node's fault."""
    out = tmp_path / "codes"
    once = ("--set", "encode.max_attempts=1")
    with cluster_of(1) as cluster, joined(corpus, cluster, out, *once, *SOONER) as verb:
        assert more_receipts(verb, out, 22)
        with stopped_encoder(cluster):
            cluster.tell("drain 0")
            cluster.tell("add")
            cluster.tell("lose 0")
        result = result_of(verb)
    assert (result["rejects"], result["status"]) == (0, "done")
    assert (out / "manifest.json").read_bytes() == corpus.manifest


def test_after_a_notice_a_worker_takes_no_further_shard(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    with cluster_of(1) as cluster, joined(corpus, cluster, out, "--workers", "1") as verb:
        assert more_receipts(verb, out, 2)
        with stopped_encoder(cluster) as first:
            done = len(list(out.glob("receipts/*.json")))
            cluster.tell("drain 0")
            cluster.tell("add")
            time.sleep(10)  # the notice is looked for every few seconds
        result_of(verb)
    assert (out / "manifest.json").read_bytes() == corpus.manifest
    assert sum(shard["pid"] == first.pid for shard in run_record(out)["shards"]) <= done + 1


# ------------------------------------------------------------------------------------------------------------ GPUs


def test_gpus_that_another_job_holds_are_waited_for_and_not_for_ever(
    corpus: Corpus,
    tmp_path: Path,
) -> None:
    """The GPUs are Ray's counts only: what runs beside them runs on CPUs."""
    words = ("encode", "--shards", corpus.shards, "--model", corpus.model)
    with cluster_of({"num_cpus": 2, "num_gpus": 1}) as cluster:
        cluster.tell("hold GPU 1")
        held = ended(*words, "--out", str(tmp_path / "held"), *on(cluster), *SOON)
        assert held.returncode == 3
        assert "no room for 1 worker of 1 CPU, 1 GPU" in held.stderr and "in use are 1 GPU" in held.stderr
        fallen = ended(*words, "--out", str(tmp_path / "cpu"), *on(cluster), *SOONER, "--set", "ray.cpu_fallback=true")
        assert fallen.returncode == 0 and "goes on without a GPU" in fallen.stderr
        cluster.tell("release")
        shared = ended(*words, "--out", str(tmp_path / "half"), *on(cluster), "--set", "encode.gpus=0.5")
    assert shared.returncode == 0, shared.stderr
    assert {shard["gpu"] for shard in run_record(tmp_path / "half")["shards"]} == {"0"}
    for out in ("cpu", "half"):
        assert (tmp_path / out / "manifest.json").read_bytes() == corpus.manifest


def test_a_gpu_that_is_asked_for_and_is_nowhere_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    words = encode_words(corpus.shards, corpus.model, tmp_path / "codes", "--set", "encode.gpus=1", *SOON)
    with started(words) as verb:
        _, err = verb.communicate(timeout=RUN_LIMIT_S)
    assert verb.returncode == 3
    assert "no room for 1 worker of 1 CPU, 1 GPU after 5 s" in err and "add nodes" in err


# -------------------------------------------------------------------------------------------------------- training


TRAINING = (
    *("data.image_size=32", "data.batch_size=96", "model.backbone=test_resnet", "model.bits=16"),
    *("train.epochs=1", "train.val_limit=50", "train.cpus=1"),
)


def train_words(corpus: Corpus, out: Path, *more: str) -> list[str]:
    """The command line of a training of a few steps."""
    settings = [word for setting in TRAINING for word in ("--set", setting)]
    return ["train", "--shards", corpus.shards, "--out", str(out), *settings, *more]


@pytest.mark.parametrize("workers", scaled((1,), (1, 2, 3, 4, 5)))
def test_training_on_unequal_nodes(corpus: Corpus, tmp_path: Path, workers: int) -> None:
    """Nodes of 1, 2 and 2 CPUs: workers of CPUs of their own choice."""
    words = without(train_words(corpus, tmp_path / "model", "--workers", str(workers), *SOONER), "train.cpus=1")
    with cluster_of(1, 2, 2) as cluster:
        done = ended(*words, *on(cluster))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("workers", scaled((3,), (1, 2, 3, 4, 5)))
def test_training_on_unequal_nodes_makes_the_bytes_of_one_node(corpus: Corpus, tmp_path: Path, workers: int) -> None:
    digests = set()
    for name, nodes in (("spread", (1, 2, 2)), ("alone", (workers,))):
        with cluster_of(*nodes) as cluster:
            out = tmp_path / name
            done = ended(*train_words(corpus, out, "--workers", str(workers), *SOONER), *on(cluster))
        assert done.returncode == 0, done.stderr
        digests.add(json.loads((out / "manifest.json").read_bytes())["digest"])
    assert len(digests) == 1


def test_training_workers_that_find_no_room_end_the_run(corpus: Corpus, tmp_path: Path) -> None:
    with cluster_of(1, 2) as cluster:
        done = ended(*train_words(corpus, tmp_path / "model", "--workers", "4", *SOON), *on(cluster))
    assert done.returncode == 3
    assert "no room for 4 workers of 1 CPU after 5 s (ray.wait_s): the cluster's nodes are" in done.stderr


def test_training_that_loses_its_room_ends_and_goes_on_later(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "model"
    long = ("--set", "data.batch_size=12", "--set", "train.checkpoint_steps=5")
    words = train_words(corpus, out, "--workers", "2", *long, *SOONER)
    with cluster_of(1, 1) as cluster:
        with started(hhnet(*words, *on(cluster)), {**os.environ, **LOOPBACK}) as verb:
            deadline = time.monotonic() + 120
            while not list(out.glob("checkpoints/*/manifest.json")):
                assert verb.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            cluster.tell("lose 0")
            _, err = verb.communicate(timeout=RUN_LIMIT_S)
        assert verb.returncode == 3, err
        assert "no room for 2 workers" in err
        cluster.tell("add")
        done = ended(*words, *on(cluster))
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------------------------- index, search


def test_index_and_search_with_more_workers_than_places(corpus: Corpus, tmp_path: Path) -> None:
    codes, index = str(tmp_path / "codes"), str(tmp_path / "index")
    with cluster_of(1, 1) as cluster:
        assert (
            ended("encode", "--shards", corpus.shards, "--model", corpus.model, "--out", codes, *on(cluster)).returncode
            == 0
        )
        built = ended("index", "build", "--codes", codes, "--out", index, "--workers", "5", *on(cluster), *SOONER)
        assert built.returncode == 0, built.stderr
        words = ("search", "--index", index, "--codes", codes, "-k", "3")
        alone, spread = ended(*words), ended(*words, "--workers", "7", *on(cluster), *SOONER)
    assert (alone.returncode, spread.returncode) == (0, 0), spread.stderr
    assert alone.stdout == spread.stdout
    report("more workers than places", verbs=2, hung=0)


# ------------------------------------------------------------------------------------------------------- autoscaling


def nodes_of(cluster: Nodes) -> int:
    """The nodes that run beside the head."""
    found = psutil.Process(cluster.process.pid).children(recursive=True)
    return sum(process.name() == "raylet" and process.status() != psutil.STATUS_ZOMBIE for process in found) - 1


def test_a_cluster_grows_from_zero_for_the_work_and_shrinks_after_it(corpus: Corpus, tmp_path: Path) -> None:
    """Ray's own autoscaler starts processes of this machine as nodes and drains those that are idle."""
    codes, model = tmp_path / "codes", tmp_path / "model"
    patient = ("--set", "ray.wait_s=120")
    with growing_cluster(2, idle_s=10) as cluster:
        trained = ended(*train_words(corpus, model, "--workers", "2", *patient), *on(cluster))
        assert trained.returncode == 0, trained.stderr
        await_nodes(cluster, 0)
        with joined(corpus, cluster, codes, "--workers", "2", *patient) as verb:
            assert more_receipts(verb, codes, 1)
            assert nodes_of(cluster) > 0
            result_of(verb)
        await_nodes(cluster, 0)
    assert (codes / "manifest.json").read_bytes() == corpus.manifest


def await_nodes(cluster: Nodes, count: int) -> None:
    """Wait until so many nodes are left."""
    deadline = time.monotonic() + 120
    while nodes_of(cluster) != count:
        assert time.monotonic() < deadline, nodes_of(cluster)
        time.sleep(0.5)
