"""Answers that Ray 2.60 gives through private interfaces only, and switches that its documentation does not name.

Each has a test that notices a change.
"""

import json
import os
from pathlib import Path
from typing import Any

HEAD_TIMEOUT_VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"
HEAD_TIMEOUT_S = 60.0
"""Seconds without a head after which Ray ends the process, unless HEAD_TIMEOUT_VARIABLE says otherwise."""
JOB_CONFIG_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray tells the driver of a job its metadata, the submission id among it."""
HEAD_METHOD = "/ray.rpc.InternalKVGcsService/InternalKVGet"
"""A call of gRPC that every head answers, if only to refuse the token."""
CLUSTERS_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for platforms without clusters: at 0 its ports are bound to the loopback address."""
PREEMPTION_VARIABLE = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Switch of the process that listens for a cloud's notice that it takes a machine away."""
START_TIMEOUT_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
"""Variable with the seconds that all workers of a training may take to start."""
ACCELERATORS_VARIABLE = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
"""Switch by which Ray empties CUDA_VISIBLE_DEVICES in workers without GPUs."""


def set_switches(local: bool) -> None:
    """Set what Ray reads when it is imported; a `local` Ray is for this machine alone."""
    # Workers without GPUs keep CUDA_VISIBLE_DEVICES as it is. That is Ray's present default; earlier ones emptied it.
    os.environ.setdefault(ACCELERATORS_VARIABLE, "0")
    if local:
        os.environ[CLUSTERS_VARIABLE] = "0"
        # Nobody takes this machine away with a notice: one process less to start.
        os.environ.setdefault(PREEMPTION_VARIABLE, "0")


def job_config() -> dict[str, Any]:
    """Return what Ray tells the driver of a job: its metadata and environment; {} in any other process."""
    try:
        found = json.loads(os.environ.get(JOB_CONFIG_VARIABLE) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def private_options(folder: Path, metrics_port: int | None) -> dict[str, Any]:
    """Return options of `ray.init` for a Ray that keeps its files in `folder` and serves metrics at the port."""
    options: dict[str, Any] = {"_temp_dir": str(folder)}
    if metrics_port is not None:
        # Ray's own interval of 10 s would show little of a short verb.
        options |= {"_metrics_export_port": metrics_port, "_system_config": {"metrics_report_interval_ms": 1000}}
    return options


def token_headers() -> dict[str, str]:
    """Return the headers with the token of this environment; none where Ray asks for none."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return dict(get_auth_headers_if_auth_enabled({}))


def forget_token() -> None:
    """Make Ray look for its token again: its compiled code keeps the first one it finds."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    AuthenticationTokenLoader.instance().reset_cache()


def dialled_address(address: str) -> str:
    """Return the host:port that Ray will dial: it replaces loopback by another address of the machine."""
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address(address))


def find_cluster() -> str:
    """Return the address of the cluster that `auto` would join. Raises ConnectionError if there is none."""
    from ray._private.services import get_ray_address_from_environment

    return str(get_ray_address_from_environment("auto", None))


class Head:
    """The connection of this process to its head.

    Kept once taken: Ray's public functions would connect to a cluster again if they were called after leaving.
    """

    def __init__(self) -> None:
        import ray

        self._gcs = ray._private.worker.global_worker.gcs_client
        self._here = ray.NodeID.from_hex(ray.get_runtime_context().get_node_id())

    def has_lost_node(self, timeout: float) -> bool:
        """Ask whether the node that this process is on is lost; RayError or RuntimeError where nothing answers."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        nodes = self._gcs.get_all_node_info(timeout=timeout)
        return self._here in nodes and nodes[self._here].state != GcsNodeInfo.GcsNodeState.ALIVE


def free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources of each live node by its id, as of about a second ago."""
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def draining_nodes() -> dict[str, int]:
    """Return the ids of draining nodes, each with its deadline in ms since 1970, or 0 for none."""
    from ray._private.state import state

    found: dict[str, Any] = state.get_draining_nodes()
    return found
