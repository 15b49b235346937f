"""A Ray cluster of several nodes on this machine whose nodes, or whose head, can be lost without a warning.

with cluster_of(2) as cluster:
    cluster.address                   host:port for ray.address
    cluster.tell("lose 1")            the second worker node is gone
    cluster.tell("add")               a node of one CPU joins
    cluster.tell("behead")            the head's control service is gone

It runs in a process of its own, since Ray reads when it is imported that its ports belong on the loopback address;
whoever joins it needs LOOPBACK in the environment as well.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Nodes:
    """A running cluster."""

    process: subprocess.Popen[str]
    address: str

    def tell(self, words: str) -> None:
        """Do something to the cluster, and wait until it is done."""
        stdin, stdout = cast("IO[str]", self.process.stdin), cast("IO[str]", self.process.stdout)
        stdin.write(words + "\n")
        stdin.flush()
        assert stdout.readline() == "done\n"


@contextmanager
def cluster_of(nodes: int) -> Iterator[Nodes]:
    """A head without CPUs of its own, and worker nodes of one CPU each."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.nodes", str(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **LOOPBACK},
    )
    try:
        yield Nodes(process, cast("IO[str]", process.stdout).readline().strip())
    finally:
        cast("IO[str]", process.stdin).close()
        process.wait(60)


def serve(nodes: int) -> None:
    """Start a cluster, name its address, and do what standard input says until it ends."""
    from ray.cluster_utils import Cluster

    here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **here})
    workers = [cluster.add_node(num_cpus=1, **here) for _ in range(nodes)]
    say(cluster.address)
    for line in sys.stdin:
        action, _, number = line.strip().partition(" ")
        if action == "lose":
            cluster.remove_node(workers.pop(int(number)), allow_graceful=False)
        elif action == "add":
            workers.append(cluster.add_node(num_cpus=1, **here))
        elif action == "behead":
            cluster.head_node.kill_gcs_server(check_alive=False)
        say("done")
    for worker in workers:
        worker.kill_all_processes(check_alive=False, allow_graceful=False)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)


def say(text: str) -> None:
    """One line to the test."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
