"""The head of a cluster: whether it answers before it is joined, and whether it still does while a verb works.

Every question has a deadline of its own, since Ray's calls wait up to a minute for a head that is gone and then end the
process. So the questions are asked in a thread, and `require_head` and `require_node` only look at the answers.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.cluster.access import token_refused
from pipelines.cluster.ray_private import ASK_HEAD, RAYS_PATIENCE, RAYS_PATIENCE_S, Head, token_headers
from pipelines.errors import ClusterUnavailable, HeadLost

LEAST_PATIENCE_S = 1.0
ASK_EVERY_S = 5.0
ASK_S = 5.0
"""How long one question may take at most."""
AGAIN_MS = 1000
"""Longest pause between two attempts to connect."""
_UP = "the same command goes on from there once the cluster is back"


def await_head(address: str, wait_s: float) -> None:
    """Wait up to `wait_s` until a Ray head answers at host:port.

    UsageError where it refuses this environment's token, ClusterUnavailable where nothing answers, or no Ray.
    """
    import grpc

    token = [(name.lower(), value) for name, value in token_headers().items()]
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", AGAIN_MS)]
    with grpc.insecure_channel(address, options=options) as channel:
        ask = channel.unary_unary(ASK_HEAD, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=wait_s, metadata=token, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise token_refused(address) from None
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return  # it speaks, if of something else
            raise ClusterUnavailable(
                f"no Ray head answers at {address} within {wait_s:g} s (ray.wait_s): see that the cluster is up, and "
                "that ray.address names the port of its GCS (6379 unless set), not that of the dashboard"
            ) from None


class HeadWatch:
    """Asks the connected head in a thread; interrupts the session in the main thread once it is lost.

    A head that has not answered for half of Ray's own patience counts as lost, for good.
    """

    def __init__(self, address: str) -> None:
        self.patience_s = max(LEAST_PATIENCE_S, float(os.environ.get(RAYS_PATIENCE) or RAYS_PATIENCE_S) / 2)
        self.lost = False
        self._address, self._node_lost = address, False
        self._head = Head()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head", daemon=True)

    def require_head(self) -> None:
        """HeadLost once the head has not answered for too long."""
        if self.lost:
            raise HeadLost(
                f"the head of Ray at {self._address} has not answered for {self.patience_s:g} s: what was committed "
                f"stays, {_UP}"
            )

    def require_node(self) -> None:
        """ClusterUnavailable once the head says that this process's own node is lost: it would place nothing more."""
        self.require_head()
        if self._node_lost:
            raise ClusterUnavailable(
                "the Ray node that this command runs on is lost (its raylet ended): what was finished is kept, run it "
                "again"
            )

    def begin(self) -> None:
        """Begin to ask."""
        _current.append(self)
        self._thread.start()

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._thread.join(timeout=2 * ASK_S)

    def forget(self) -> None:
        """Let later sessions begin. Until then they are kept out of a Ray that could not be left."""
        _current.remove(self)

    def _watch(self) -> None:
        heard = time.monotonic()
        every = min(ASK_EVERY_S, self.patience_s / 4)
        while not self._ended.wait(every):
            if not self.lost and self._hear(min(ASK_S, every)):
                heard = time.monotonic()
            elif time.monotonic() - heard > self.patience_s:
                self.lost = True
                _interrupt()  # again and again: what cleans up may wait for the head too

    def _hear(self, timeout: float) -> bool:
        """Ask the head for the node that this process is on; whether it answered."""
        from ray.exceptions import RayError

        try:
            self._node_lost = self._head.has_lost_node(timeout)
        except (RayError, RuntimeError):
            return False
        return True


_current: list[HeadWatch] = []
"""The watch of the process's Ray, if there is one: Ray is connected once in a process, whatever threads use it."""
_lock = threading.RLock()
_inside = 0
"""Blocks of the main thread that may be interrupted."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a lost head interrupt the block, which runs in the main thread and turns SIGTERM into an exception."""
    global _inside
    with _lock:
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1


def _interrupt() -> None:
    with _lock:
        if _inside:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def head_is_lost() -> bool:
    """Whether the head of the session's Ray has not answered for too long."""
    return any(watch.lost for watch in _current)


def require_head() -> None:
    """HeadLost once the head of the session's Ray has not answered for too long."""
    for watch in _current:
        watch.require_head()


def require_node() -> None:
    """HeadLost likewise; ClusterUnavailable once the node that this process is on is lost."""
    for watch in _current:
        watch.require_node()
