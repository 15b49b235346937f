"""R1: encode while the decoders that its workers have on other nodes are killed, and their nodes lost.

The GPU is Ray's count only: what runs beside it runs on CPUs.
"""

import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.chaos.test_workers import lost_and_doubled, require_clean
from tests.support.encodes import Corpus, joined, remote_decoders, result_of, starting_decoders
from tests.support.nodes import Nodes, cluster_of
from tests.support.report import SEED, report, scaled
from tests.support.runs import run_record

pytestmark = pytest.mark.timeout(scaled(480, 3600))

MOST_RUNS = scaled(3, 100)
READY_S = 45.0
"""A decoder that was of no use is replaced after a minute only: then the workers' own processes go on."""
BESIDE_A_GPU = ("--set", "encode.gpus=0.5", "--set", "data.workers=1")


def test_killed_decoders_and_their_lost_nodes_change_no_byte(corpus: Corpus, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    strikes, kills, losses, number = scaled(5, 100), 0, 0, 0
    with cluster_of({"num_cpus": 2, "num_gpus": 1}, 1, 1) as cluster:
        while kills + losses < strikes and number < MOST_RUNS:
            number += 1
            out = tmp_path / str(number)
            with joined(corpus, cluster, out, *BESIDE_A_GPU) as verb:
                killed, lost = strike_decoders(verb, cluster, rng)
                result_of(verb)
            assert (out / "manifest.json").read_bytes() == corpus.manifest, f"seed {SEED}, run {number}"
            assert lost_and_doubled(corpus, out) == (0, 0)
            assert {shard["attempts"] for shard in run_record(out)["shards"]} == {1}, "a decoder costs no attempt"
            require_clean(out)
            kills, losses = kills + killed, losses + lost
    assert kills, f"seed {SEED}: {number} runs ended before the first kill"
    report("R1 killed decoders", runs=number, kills=kills, nodes_lost=losses, lost=0, doubled=0, other_manifests=0)


def strike_decoders(
    verb: "subprocess.Popen[str]", cluster: Nodes, rng: random.Random, most: int = 5
) -> tuple[int, int]:
    """Kill decoders at random, and after two of them a node; return how many of each before the verb ended."""
    killed = lost = 0
    while killed + lost < most and (decoders := await_decoders(verb, cluster)):
        time.sleep(rng.uniform(0.0, 0.3))
        if verb.poll() is None and killed // 2 > lost:
            cluster.tell("lose 1")
            cluster.tell("add")
            lost += 1
        elif verb.poll() is None:
            with suppress(psutil.Error):
                rng.choice(decoders).kill()
                killed += 1
    return killed, lost


def await_decoders(verb: "subprocess.Popen[str]", cluster: Nodes) -> list[psutil.Process]:
    """Stop the workers' own decode processes until a decoder on another node is ready, for READY_S at most.

    So the work is not done before there is somebody to strike. Returns [] where none is ready or the verb ends before.
    """
    stopped: set[psutil.Process] = set()
    deadline = time.monotonic() + READY_S
    try:
        while verb.poll() is None and time.monotonic() < deadline:
            if decoders := remote_decoders(cluster.process, ready=True):
                return decoders
            for process in set(starting_decoders(cluster.process)) - stopped:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGSTOP)
                    stopped.add(process)
            time.sleep(0.05)
    finally:
        for process in stopped:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
    return []
