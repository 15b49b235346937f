"""The connection to Ray: a local one started for a verb on the loopback address, or a cluster that is joined."""

import atexit
import ctypes
import logging
import os
import resource
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from pipelines.artifacts.host import allowed_cpus
from pipelines.cluster.access import has_ray_token, refused_token_error, require_ray_token, set_environment
from pipelines.cluster.head import HeadWatch, await_head, head_is_lost, interruptible, require_head, settle_head
from pipelines.cluster.ray_private import (
    dialled_address,
    find_cluster,
    forget_token,
    job_config,
    private_options,
    set_switches,
)
from pipelines.config.settings import Config, RaySettings
from pipelines.console import log_variables, show_as_ours
from pipelines.errors import ClusterUnavailable, UsageError
from pipelines.storage import Store
from pipelines.storage.scratch import RANDOM_NAME_CHARS, PrivateFolder

_log = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 256 << 20
"""Size of a local Ray's object store in bytes."""
MIN_ADDRESS_BYTES = 8 << 30
"""Bytes of address space (`ulimit -v`) that a local Ray needs; with 6 GiB its processes abort without a reason."""
MIN_DISK_BYTES = 64 << 10
"""Bytes that Ray writes below its temporary folder until it is up, approximately."""
STOP_WAIT_S = 10.0
"""Seconds that the killed processes of a local Ray may take to end."""
LEAVE_WAIT_S = 30.0
"""Seconds that leaving Ray may take; without a head it may never return."""
PR_SET_CHILD_SUBREAPER = 36
"""Number of the prctl option, from linux/prctl.h."""
FOLDER_PREFIX = "hhray-"
"""Start of the name of a local Ray's temporary folder."""
MAX_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket in bytes."""
# The longest session name that Ray makes: the time, and the largest process id of Linux.
RAY_SOCKET_SUFFIX_BYTES = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes that Ray appends to its temporary folder in the path of a socket, at most."""


def ray_address(config: Config) -> str:
    """Return the address of Ray: the setting, else RAY_ADDRESS, else `local`; never a cluster that happens to run."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or "local"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to Ray for the length of the block: keep the present connection, else start or join Ray by its address.

    Raises HeadLost if the head stops answering meanwhile. In the main thread this interrupts any wait; in other
    threads `require_head` and `require_node` raise it.
    """
    # Before Ray is imported, which reads them: it sends no usage statistics, and uses the second version of Ray Train,
    # whose API `train` needs.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    address = ray_address(config)
    set_switches(local=address == "local")
    import ray

    if ray.is_initialized():
        with _interrupts():
            yield
        return
    kept = _kept.get()  # not None inside `kept_ray`, which closes the connection for all its sessions
    connection = _Connection(address)
    try:
        with _interrupts():
            connection.open(config)
            yield
    finally:
        if kept is None:
            connection.close()
        else:
            kept.append(connection)


@contextmanager
def _interrupts() -> Iterator[None]:
    """Turn SIGTERM into a KeyboardInterrupt inside the block, then pass the signal on to the handler from before.

    A lost head interrupts in the same way, and then the block ends with HeadLost. Of all exceptions that a signal
    handler can raise, only KeyboardInterrupt gets through Ray's compiled code.
    """
    require_head()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal arrived
        arrived = arrived or not head_is_lost()
        raise KeyboardInterrupt

    from ray.exceptions import RayActorError, RaySystemError, RpcError

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with interruptible():
            try:
                yield
            except (RayActorError, RaySystemError, RpcError):
                settle_head()  # actors and calls fail long before their head counts as lost: find out which it was
                raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, before)
        if arrived:
            signal.raise_signal(signal.SIGTERM)
        require_head()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def kept_ray() -> Iterator[None]:
    """Let the sessions begun inside share one Ray; the first starts it, and the end of the block ends it."""
    begun: list[_Connection] = []
    token = _kept.set(begun)
    try:
        yield
    finally:
        _kept.reset(token)
        for connection in begun:
            connection.close()


class _Connection:
    """This process's connection to Ray, with the folder and environment variables of a local one."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._folder: PrivateFolder | None = None
        self._environment = ExitStack()
        self._watch: HeadWatch | None = None

    def open(self, config: Config) -> None:
        """Start or join Ray. Raises UsageError if the address lacks a token, ClusterUnavailable if connecting fails."""
        import ray

        on_term = signal.getsignal(signal.SIGTERM)
        options: dict[str, Any] = {"address": self._address}
        adopt_orphans()
        with _said_as_unavailable(self._address):
            require_ray_token(find_cluster() if self._address == "auto" else self._address)
            if self._address == "local":
                _require_address_space()
                options |= self._make_room(config.ray)
                for name, value in log_variables().items():
                    self._set(name, value)
            else:
                options |= _logging_workers()
                if "://" not in self._address:
                    await_head(dialled_address(self._address), config.ray.wait_s)
            begun = time.monotonic()
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            show_as_ours("ray")
            seconds = round(time.monotonic() - begun, 1)
            _log.debug("connected to Ray at %s in %g s", self._address, seconds, extra={"address": self._address})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # ray.init leaves a handler of its own there
        self._watch = HeadWatch(self._address)
        self._watch.begin()

    def _make_room(self, settings: RaySettings) -> dict[str, Any]:
        """Make a private folder with a token and, if the user has no home, one; return the options of a Ray in it."""
        self._folder = PrivateFolder(short_base(), FOLDER_PREFIX, kept=True)
        if not has_ray_token() and os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
            token = self._folder.path / "auth_token"
            token.touch(mode=0o600)  # before the secret is in it, so that no other user can read it
            token.write_text(secrets.token_hex(32))
            self._set("RAY_AUTH_TOKEN_PATH", str(token))
        if not _has_home():
            (self._folder.path / "home").mkdir()
            self._set("HOME", str(self._folder.path / "home"))
        options = {
            "include_dashboard": False,
            "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
            "num_cpus": settings.cpus or allowed_cpus(),
        }
        if settings.metrics_port is not None:
            _require_free(settings.metrics_port)
        return options | private_options(self._folder.path, settings.metrics_port)

    def _set(self, name: str, value: str) -> None:
        self._environment.callback(forget_token)
        self._environment.enter_context(set_environment({name: value}))
        forget_token()

    def close(self) -> None:
        """Leave Ray, and end a local one with its processes and files. Takes at most LEAVE_WAIT_S and STOP_WAIT_S."""
        # Listed before leaving: where this process cannot adopt orphans (not Linux), they would not be found later.
        helpers = psutil.Process().children(recursive=True) if self._address == "local" else []
        if self._watch is not None:
            self._watch.end()
        _end_monitor(helpers)
        left = _left_ray(STOP_WAIT_S if self._watch is not None and self._watch.lost else LEAVE_WAIT_S)
        if not left:
            _log.info("Ray at %s did not let go: given up", self._address, extra={"address": self._address})
        if self._watch is not None and left:
            self._watch.forget()
        if self._address == "local":
            _end_processes(helpers)
        self._environment.close()
        if self._folder is not None:
            self._folder.close()


_kept: ContextVar[list[_Connection] | None] = ContextVar("kept", default=None)


@contextmanager
def _said_as_unavailable(address: str) -> Iterator[None]:
    """Turn Ray's exceptions at start or join into ClusterUnavailable, or UsageError for a refused token."""
    from ray.exceptions import AuthenticationError, RaySystemError

    try:
        yield
    except AuthenticationError as error:
        raise refused_token_error(address) from error
    except Exception as error:
        bare = type(error) is Exception  # Ray raises the plain class when a node is slow to start
        if not (bare or isinstance(error, OSError | RuntimeError | ValueError | RaySystemError)):
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if address == "local":
            hint = _full_disk() or ": the machine may be too busy: run the same command again"
            raise ClusterUnavailable(f"Ray does not start on this machine: {said}{hint}") from error
        hint = "check that the cluster is up and ray.address names it"
        raise ClusterUnavailable(f"cannot reach Ray at {address}: {said}: {hint}") from error


def _logging_workers() -> dict[str, Any]:
    """Return the options of `ray.init` by which the workers of a cluster log like this process."""
    known = job_config().get("runtime_env", {}).get("env_vars", {})  # Ray refuses what the job has set already
    variables = {name: value for name, value in log_variables().items() if name not in known}
    return {"runtime_env": {"env_vars": variables}} if variables else {}


def _has_home() -> bool:
    try:
        return Path.home().is_dir()
    except RuntimeError:  # no HOME, and no entry of this user
        return False


def short_base() -> Path:
    """Return the folder for temporary files, or another one if its path is too long for the sockets of Ray in it."""
    usual = (f"/{name}" for name in ("tmp", "var/tmp", "dev/shm"))
    wanted = [os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), *usual]
    for folder in filter(None, wanted):
        path = os.path.realpath(folder)
        length = len(os.fsencode(f"{path}/{FOLDER_PREFIX}")) + RANDOM_NAME_CHARS + RAY_SOCKET_SUFFIX_BYTES
        if length <= MAX_SOCKET_PATH_BYTES and Path(path).is_dir() and os.access(path, os.W_OK | os.X_OK):
            return Path(path)
    return Path(tempfile.gettempdir())  # none fits: Ray's own error will say why


def _require_free(port: int) -> None:
    """Raise UsageError if the port is taken: Ray would wait half a minute for its agent and not say why it ended."""
    with socket.socket() as probe:
        # A port whose last connections are still closing is free for a new server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UsageError(
                f"ray.metrics_port={port} is taken on this machine, by another run perhaps: choose another port"
            ) from None


def _require_address_space() -> None:
    """Raise UsageError if `ulimit -v` leaves a local Ray too little address space."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < MIN_ADDRESS_BYTES:
        raise UsageError(
            f"the limit on address space (ulimit -v) is {limit / 2**30:.1f} GiB and a local Ray needs "
            f"{MIN_ADDRESS_BYTES >> 30} GiB: raise it, or limit the memory by a cgroup instead"
        )


def _full_disk() -> str:
    """Return a hint if the disk is too full for Ray, else "". Ray itself only says that its processes did not start."""
    folder = short_base()  # not tempfile's, which passes over a full disk
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    hint = f"; {folder} has no space left for Ray's files: free some space, or set TMPDIR to a larger disk"
    return hint if free < MIN_DISK_BYTES else ""


def adopt_orphans() -> None:
    """Make this process the parent of orphaned processes (Linux), so that it finds the helpers of Ray."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _left_ray(limit_s: float) -> bool:
    """Leave Ray in a thread, since it may wait for ever without a head; tell whether it ended within `limit_s`."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="leave", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        atexit.unregister(ray.shutdown)  # it would wait again when the process exits
    return not thread.is_alive()


def _end_processes(helpers: list[psutil.Process]) -> None:
    """Kill the processes that a local Ray leaves behind: its agents notice the end of their raylet after a minute."""
    left = [process for process in {*helpers, *psutil.Process().children(recursive=True)} if is_rays(_words(process))]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_WAIT_S)


def _end_monitor(helpers: list[psutil.Process]) -> None:
    """Kill the autoscaler's monitor of a local Ray: leaving would wait a second for it."""
    for process in helpers:
        if any(word.endswith("/autoscaler/_private/monitor.py") for word in _words(process)):
            with suppress(psutil.Error):
                process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_rays(words: list[str]) -> bool:
    """Tell whether a command line belongs to a process of Ray itself."""
    import ray

    package = f"{Path(ray.__file__).parent}/"
    return any(word.startswith(("ray::", package)) for word in words[:3])


def require_shared_store(store: Store, config: Config) -> None:
    """Raise UsageError for a local --out on a cluster of several nodes, unless store.shared is set."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if store.is_local and nodes > 1 and not config.store.shared:
        raise UsageError(
            f"{store.uri} is a local path and the Ray cluster has {nodes} nodes: write to s3://, or set "
            "store.shared=true if it is a network file system"
        )


def require_shared_source(source: str, config: Config) -> None:
    """Raise UsageError for a local SOURCE on a cluster of several nodes, unless store.shared is set."""
    import ray

    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    if nodes > 1 and not config.store.shared:
        raise UsageError(
            f"{source} is a local path and the Ray cluster has {nodes} nodes: set store.shared=true if each of them "
            "sees it there, or ingest.workers=0 to ingest in this process"
        )
