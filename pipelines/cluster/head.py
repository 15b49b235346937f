"""Heartbeat of the cluster's head: `await_head` asks before Ray is joined, `HeadWatch` keeps asking while a verb works.

Ray's own calls wait up to a minute for a head that is gone and then end the process. So a thread asks with a short
deadline for each question, and `require_head` and `require_node` only look at the answers.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.cluster.access import refused_token_error
from pipelines.cluster.ray_private import HEAD_METHOD, HEAD_TIMEOUT_S, HEAD_TIMEOUT_VARIABLE, Head, token_headers
from pipelines.errors import ClusterUnavailable, HeadLost

_log = logging.getLogger(__name__)

MIN_PATIENCE_S = 1.0
"""Seconds that the head may stay silent at least, however small Ray's own limit is."""
ASK_EVERY_S = 5.0
"""Seconds between two questions to the head."""
ASK_TIMEOUT_S = 5.0
"""Seconds that one question may take at most."""
SETTLE_EVERY_S = 0.1
"""Seconds between two looks for the head's next answer."""
MAX_RECONNECT_PAUSE_MS = 1000
"""Longest pause between two attempts to connect, in milliseconds."""
_GOES_ON = "the same command goes on from there once the cluster is back"


def await_head(address: str, wait_s: float) -> None:
    """Wait up to `wait_s` until a Ray head answers at host:port.

    Raises UsageError if the head refuses this environment's token, ClusterUnavailable if no Ray head answers.
    """
    import grpc

    _log.debug("waits for the head of Ray at %s, up to %g s", address, wait_s, extra={"address": address})
    # gRPC takes only lower-case names of metadata; Ray's helper returns them as HTTP headers.
    token = [(name.lower(), value) for name, value in token_headers().items()]
    # No proxy from the environment, as in Ray's own calls. gRPC's own pause between attempts grows to two minutes.
    options = [("grpc.enable_http_proxy", 0), ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_PAUSE_MS)]
    with grpc.insecure_channel(address, options=options) as channel:
        ask = channel.unary_unary(HEAD_METHOD, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=wait_s, metadata=token, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise refused_token_error(address) from None
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return  # any other gRPC error is an answer, so a server is there
            raise ClusterUnavailable(
                f"no Ray head answers at {address} within {wait_s:g} s (ray.wait_s): see that the cluster is up, and "
                "that ray.address names the port of its GCS (6379 unless set), not that of the dashboard"
            ) from None


class HeadWatch:
    """Asks the connected head for a sign of life in a thread, and interrupts the main thread once the head is lost.

    A head that has not answered for half of Ray's own limit counts as lost from then on, even if it answers later.
    """

    def __init__(self, address: str) -> None:
        self.patience_s = max(MIN_PATIENCE_S, float(os.environ.get(HEAD_TIMEOUT_VARIABLE) or HEAD_TIMEOUT_S) / 2)
        self.lost = False
        self._address, self._node_lost, self._silent = address, False, False
        self._head = Head()
        self._heard = time.monotonic()
        """Monotonic time at which the last answered question was asked."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="head", daemon=True)

    def require_head(self) -> None:
        """Raise HeadLost once the head has been silent for too long."""
        if self.lost:
            raise HeadLost(
                f"the head of Ray at {self._address} has not answered for {self.patience_s:g} s: what was committed "
                f"stays, {_GOES_ON}"
            )

    def require_node(self) -> None:
        """Raise HeadLost like `require_head`, or ClusterUnavailable once the head says that this node is lost.

        A process on a lost node could start no more workers.
        """
        self.require_head()
        if self._node_lost:
            raise ClusterUnavailable(
                "the Ray node that this command runs on is lost (its raylet ended): what was finished is kept, run the "
                "same command again"
            )

    def settle(self) -> None:
        """Wait for the head's next answer. Raises HeadLost if none comes."""
        failed = time.monotonic()
        while not self.lost and self._heard < failed and not self._ended.wait(SETTLE_EVERY_S):
            pass
        self.require_head()

    def begin(self) -> None:
        """Start asking."""
        _current.append(self)
        self._thread.start()

    def end(self) -> None:
        """Stop asking, and wait for the last question to end."""
        self._ended.set()
        self._thread.join(timeout=2 * ASK_TIMEOUT_S)

    def forget(self) -> None:
        """Let later sessions begin. Without this call they are refused, since this process is still in the old Ray."""
        _current.remove(self)

    def _watch(self) -> None:
        every = min(ASK_EVERY_S, self.patience_s / 4)
        while not self._ended.wait(every):
            asked = time.monotonic()
            if not self.lost and self._hear(min(ASK_TIMEOUT_S, every)):
                self._heard = asked
                self._say("the head of Ray at %s answers again", silent=False)
                continue
            self._say("the head of Ray at %s does not answer; asking on", silent=True)
            if time.monotonic() - self._heard > self.patience_s:
                self.lost = True
                _interrupt()  # at every turn: the clean-up after the first interrupt may wait for the head too

    def _say(self, text: str, silent: bool) -> None:
        """Log once that the head fell silent, and once that it answers again."""
        if silent != self._silent:
            _log.info(text, self._address, extra={"address": self._address})
        self._silent = silent

    def _hear(self, timeout: float) -> bool:
        """Ask the head about this process's node, and tell whether it answered."""
        from ray.exceptions import RayError

        try:
            self._node_lost = self._head.has_lost_node(timeout)
        except (RayError, RuntimeError):
            return False
        return True


_current: list[HeadWatch] = []
"""The watch of this process's Ray, or empty. Ray connects once in a process, so all threads share it."""
_lock = threading.RLock()
_inside = 0
"""Number of open `interruptible` blocks; the main thread is interrupted only while there is one."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let a lost head interrupt the block by SIGTERM; the caller's handler must turn that into an exception."""
    global _inside
    with _lock:
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1


def _interrupt() -> None:
    # Only a signal ends a wait in Ray's compiled code. The lock keeps it from being sent once the block has ended.
    with _lock:
        if _inside:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def head_is_lost() -> bool:
    """Tell whether the head of the session's Ray has been silent for too long."""
    return any(watch.lost for watch in _current)


def require_head() -> None:
    """Raise HeadLost once the head of the session's Ray has been silent for too long."""
    for watch in _current:
        watch.require_head()


def settle_head() -> None:
    """Wait until the head of the session's Ray answers once more. Raises HeadLost if it does not."""
    for watch in _current:
        watch.settle()


def require_node() -> None:
    """Raise HeadLost like `require_head`, or ClusterUnavailable once this process's own node is lost."""
    for watch in _current:
        watch.require_node()
