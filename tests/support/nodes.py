"""A Ray cluster of several nodes on this machine whose nodes, or whose head, can be lost without a warning.

with cluster_of(1, 2) as cluster:     worker nodes of one and of two CPUs
    cluster.address                   host:port for ray.address
    cluster.tell("lose 1")            the second worker node is gone
    cluster.tell("add")               a node of one CPU joins
    cluster.tell('add {"num_gpus": 1}')
    cluster.tell("drain 0")           the first worker node is about to be taken away, by a notice of preemption
    cluster.tell("hold GPU 1")        another job takes that much of the cluster and keeps it
    cluster.tell("release")           that job ends
    cluster.tell("behead")            the head's control service is gone

It runs in a process of its own, since Ray reads when it is imported that its ports belong on the loopback address;
whoever joins it needs LOOPBACK in the environment as well.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

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
def cluster_of(*nodes: int | dict[str, Any]) -> Iterator[Nodes]:
    """A head without CPUs of its own, and worker nodes, each by its CPUs or by what Ray's Cluster.add_node takes."""
    with _served(*map(json.dumps, nodes)) as served:
        yield served


@contextmanager
def _served(*words: str) -> Iterator[Nodes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.nodes", *words],
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


@contextmanager
def growing_cluster(most: int, idle_s: float) -> Iterator[Nodes]:
    """A head without CPUs and no other node; Ray's autoscaler starts nodes of one CPU, and ends those idle so long."""
    with _served("grow", str(most), str(idle_s)) as nodes:
        yield nodes


class Served:
    """The cluster as the process that started it sees it."""

    HERE: dict[str, Any] = {"node_ip_address": "127.0.0.1", "include_dashboard": False}  # noqa: RUF012

    def __init__(self, nodes: list[int | dict[str, Any]]) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **self.HERE})
        self.workers: list[Any] = []
        self.holder: subprocess.Popen[str] | None = None
        for node in nodes:
            self.add(json.dumps(node))

    def add(self, words: str) -> None:
        asked = json.loads(words or "1")
        options = {"num_cpus": asked} if isinstance(asked, int) else {"num_cpus": 1, **asked}
        self.workers.append(self.cluster.add_node(**options, **self.HERE))

    def lose(self, words: str) -> None:
        self.cluster.remove_node(self.workers.pop(int(words)), allow_graceful=False)

    def drain(self, words: str) -> None:
        """As a cloud's notice has it: reason preemption, a deadline in an hour."""
        from ray._raylet import GcsClient

        node = self.workers[int(words)].node_id
        GcsClient(address=self.cluster.address).drain_node(node, 2, "spot", int((time.time() + 3600) * 1000))

    def hold(self, words: str) -> None:
        resource, amount = words.split()
        command = [sys.executable, "-m", "tests.support.nodes", "hold", self.cluster.address, resource, amount]
        self.holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert cast("IO[str]", self.holder.stdout).readline() == "held\n"

    def release(self, words: str = "") -> None:
        if self.holder is not None:
            cast("IO[str]", self.holder.stdin).close()
            self.holder.wait(60)

    def behead(self, words: str) -> None:
        self.cluster.head_node.kill_gcs_server(check_alive=False)

    def close(self) -> None:
        self.release()
        for node in [*self.workers, self.cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def serve(nodes: list[int | dict[str, Any]]) -> None:
    """Start a cluster, name its address, and do what standard input says until it ends."""
    served = Served(nodes)
    say(served.cluster.address)
    for line in sys.stdin:
        action, _, words = line.strip().partition(" ")
        getattr(served, action)(words)
        say("done")
    served.close()


def grow(most: int, idle_s: float) -> None:
    """Start a head whose autoscaler starts and ends nodes, name its address, and wait until standard input ends."""
    import psutil
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.cluster_utils import Cluster

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": most},
    }
    config = {
        "cluster_name": "growing",
        "max_workers": most,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }
    os.environ |= {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(json.dumps(config))
        file.flush()
        head = {"num_cpus": 0, "gcs_server_port": port, "autoscaling_config": file.name, **Served.HERE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        say(cluster.address)
        sys.stdin.read()
        for process in psutil.Process().children(recursive=True):
            process.kill()


def hold(address: str, resource: str, amount: str) -> None:
    """Be a job of another user that holds a resource until standard input ends."""
    import ray

    ray.init(address=address, log_to_driver=False)

    class Holder:
        def ready(self) -> None:
            """Answer once it is placed."""

    wanted = {f"num_{resource.lower()}s": float(amount)}
    holder = ray.remote(**{"num_cpus": 0, **wanted})(Holder).remote()
    ray.get(holder.ready.remote())
    say("held")
    sys.stdin.read()


def say(text: str) -> None:
    """One line to the test."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["hold"]:
        hold(*sys.argv[2:])
    elif sys.argv[1:2] == ["grow"]:
        grow(int(sys.argv[2]), float(sys.argv[3]))
    else:
        serve([json.loads(word) for word in sys.argv[1:]])
