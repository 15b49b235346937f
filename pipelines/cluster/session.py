"""Where Ray runs: started for a verb on the loopback address, or joined, and what the cluster has to offer."""

import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipelines.cluster.access import require_ray_token, token_refused
from pipelines.config import Config, RaySettings
from pipelines.errors import ClusterUnavailable, UsageError
from pipelines.storage import Store

LOCAL_OBJECT_STORE_BYTES = 256 << 20
LEAST_DISK_BYTES = 64 << 10
"""What Ray writes below its temporary folder until it is up, about."""
STOP_WAIT_S = 10.0
PR_SET_CHILD_SUBREAPER = 36

_kept: ContextVar[list[str] | None] = ContextVar("kept", default=None)


def ray_address(config: Config) -> str:
    """Where Ray runs: the setting, else RAY_ADDRESS, else `local`; never whatever cluster happens to be about."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Ray for the length of the block: the one that is connected already, else started or joined by address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = ray_address(config)
    if address == "local":
        # Ray's switch for platforms without clusters: its ports are then bound to the loopback address.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Nobody takes this machine away with a notice: one process less to start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    import ray

    if ray.is_initialized():
        with _termination_interrupts():
            yield
        return
    kept = _kept.get()
    try:
        with _termination_interrupts():
            _start(address, config.ray)
            yield
    finally:
        if kept is None:
            _stop(address)
        else:
            kept.append(address)


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is a KeyboardInterrupt; the block then ends with what the handler from outside makes of it.

    KeyboardInterrupt is the one exception of a signal handler that gets through Ray's compiled code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, before)
        if arrived:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept_ray() -> Iterator[None]:
    """Let the sessions begun inside share one Ray, started by the first that needs it and ended with the block."""
    begun: list[str] = []
    token = _kept.set(begun)
    try:
        yield
    finally:
        _kept.reset(token)
        if begun:
            _stop(begun[0])


def _start(address: str, settings: RaySettings) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    on_term = signal.getsignal(signal.SIGTERM)
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": LOCAL_OBJECT_STORE_BYTES}
    local |= {"num_cpus": settings.cpus} if settings.cpus else {}
    if address == "local" and settings.metrics_port is not None:
        _require_free(settings.metrics_port)
        local |= {"_metrics_export_port": settings.metrics_port, "_system_config": {"metrics_report_interval_ms": 1000}}
    _adopt_orphans()
    try:
        require_ray_token(_found() if address == "auto" else address)
        ray.init(
            address=address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if address == "local" else {}),
        )
    except AuthenticationError as error:
        raise token_refused(address) from error
    except Exception as error:
        bare = type(error) is Exception  # what Ray raises when a node is slow to start
        if not (bare or isinstance(error, OSError | RuntimeError | ValueError)):
            raise
        said = str(error).splitlines() or [type(error).__name__]
        full = _full_disk() if address == "local" else ""
        raise ClusterUnavailable(f"cannot reach Ray at {address}: {said[0]}{full}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # ray.init leaves a handler of its own there


def _require_free(port: int) -> None:
    """UsageError where the port is taken: Ray would wait half a minute for its agent, and not say why it ended."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UsageError(
                f"ray.metrics_port={port} is taken on this machine, by another run perhaps: choose another port"
            ) from None


def _full_disk() -> str:
    """What to say where the disk has no room for Ray's own files: Ray only tells that its processes did not start."""
    from ray._common.utils import get_default_system_temp_dir  # not tempfile's, which passes over a full disk

    folder = get_default_system_temp_dir()
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    hint = f"; {folder} has no space left for Ray's files: free some space, or set TMPDIR to a larger disk"
    return hint if free < LEAST_DISK_BYTES else ""


def _found() -> str:
    """The address of the cluster that `auto` would join; ConnectionError where there is none."""
    from ray._private.services import get_ray_address_from_environment

    return str(get_ray_address_from_environment("auto", None))


def _adopt_orphans() -> None:
    """Have the kernel make this process the parent of helpers whose own parent dies, so that `_stop` finds them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _stop(address: str) -> None:
    """Leave Ray. A local one leaves agents behind that notice only after a minute that their raylet is gone."""
    import ray

    me = psutil.Process()
    helpers = me.children(recursive=True)
    ray.shutdown()
    if address != "local":
        return
    left = [process for process in {*helpers, *me.children(recursive=True)} if is_rays(_words(process))]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_WAIT_S)


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_rays(words: list[str]) -> bool:
    """Whether a command line is that of a process which Ray itself starts."""
    import ray

    package = f"{Path(ray.__file__).parent}/"
    return any(word.startswith(("ray::", package)) for word in words[:3])


def require_shared_store(store: Store, config: Config) -> None:
    """UsageError for a local --out on a cluster of several nodes that was not declared to be shared."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if store.is_local and nodes > 1 and not config.store.shared:
        raise UsageError(
            f"{store.uri} is a local path and the Ray cluster has {nodes} nodes: write to s3://, or set "
            "store.shared=true if it is a network file system"
        )


def require_node() -> None:
    """ClusterUnavailable once Ray knows that the node this process is on is lost: it would place nothing any more."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == here and not node["Alive"] for node in ray.nodes()):
        raise ClusterUnavailable(
            "the Ray node that this command runs on is lost (its raylet ended): what was finished is kept, run it again"
        )


def pool_size(wanted: int | None) -> tuple[int, int]:
    """(workers, GPUs of each): what was asked for, else one per GPU, else one per CPU of the cluster."""
    import ray

    total = ray.cluster_resources()
    gpus = int(total.get("GPU", 0))
    return wanted or gpus or max(1, int(total.get("CPU", 1))), 1 if gpus else 0


def wait_for(resources: dict[str, float], config: Config) -> None:
    """Wait up to `ray.wait_s` until the cluster has `resources` in all; ClusterUnavailable after that."""
    import ray

    deadline = time.monotonic() + config.ray.wait_s
    while True:
        total = ray.cluster_resources()
        lacking = {name: need for name, need in resources.items() if total.get(name, 0) < need}
        if not lacking:
            return
        if time.monotonic() >= deadline:
            have = ", ".join(f"{name} {total.get(name, 0):g} of {need:g}" for name, need in lacking.items())
            raise ClusterUnavailable(
                f"the Ray cluster has too little ({have}) after {config.ray.wait_s:g} s: ask for fewer workers "
                "or add nodes"
            )
        time.sleep(min(1.0, config.ray.wait_s))
