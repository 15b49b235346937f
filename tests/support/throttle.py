"""A proxy in front of an S3 server that answers 503 SlowDown to what comes while it has enough to do.

with ThrottlingProxy(server.endpoint) as proxy, server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint):
    proxy.capacity = 4
    proxy.peaks         # how many requests were in flight as each arrived, that one included
"""

import time
from collections.abc import Callable
from typing import Any

from tests.support.faults import FaultProxy, Harm, Refusal, _Handler

DISTANCE_S = 0.02
"""How long a request is on its way, as with a store in another city: on loopback none would ever meet another."""


class ThrottlingProxy(FaultProxy):
    """Refuses requests beyond `capacity` in flight; each that it lets in first passes `hold`."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.capacity: int | None = None
        self.hold: Callable[[], Any] = lambda: time.sleep(DISTANCE_S)
        self.peaks: list[int] = []
        self._in_flight = 0
        self._server.RequestHandlerClass = _Throttled

    def judge(self, operation: str, key: str) -> Harm | None:
        with self._lock:
            self._in_flight += 1
            self.peaks.append(self._in_flight)
            full = self.capacity is not None and self._in_flight > self.capacity
        if not full:
            self.hold()
            return super().judge(operation, key)
        with self._lock:
            self.seen[operation] += 1
            self.done["SLOW_DOWN"] += 1
        return Refusal(503, "SlowDown")

    def leave(self) -> None:
        """Count a request as answered."""
        with self._lock:
            self._in_flight -= 1


class _Throttled(_Handler):
    def _answer(self, *arguments: Any, **named: Any) -> None:
        # Before the answer: the client may send its next request as soon as it has it.
        assert isinstance(self.server.proxy, ThrottlingProxy)
        self.server.proxy.leave()
        super()._answer(*arguments, **named)
