"""How many requests to a bucket are in flight, adapted to what the store takes: AIMD, as in TCP's congestion control.

The limit begins at START and grows by one with each answer, until the store throttles for the first time; from then on
by one with each round of answers. An answer that throttles halves what is in flight. Only fsspec's event loop uses
a limiter, so it needs no lock.

botocore's mode `adaptive` is not used. It limits requests per second, and so makes half of the requests that a busy
store would take; after one 503 it stays on for the rest of the process, though the store is idle; and it waits inside
the deadline of the operation.
"""

import asyncio
import logging
import os
import time
from collections import deque

_log = logging.getLogger(__name__)

START = 16
"""Requests in flight at first: as many as reads are asked for at a time, so that none waits without need."""
MOST = 64
"""Largest number of requests in flight: one event loop makes them all, and is busy long before."""
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Environment variables with the endpoint, the first one first."""


class Limiter:
    """Lets requests go in the order in which they came, at most `limit` at a time. `name` stands in the log."""

    def __init__(self, name: str = "") -> None:
        self.name, self.limit, self.in_flight = name, float(START), 0
        self.served = time.monotonic()
        """Time of the last answer that did not throttle, or of the beginning."""
        self._cuts = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, patience_s: float) -> int:
        """Wait for a turn, and return a number that `throttled` asks for; each turn ends with `leave`.

        Raises TimeoutError when no request has been served for so many seconds of waiting.
        """
        if self._is_full() or self._waiting:
            await self._queue(patience_s)
        else:
            self.in_flight += 1
        return self._cuts

    def answered(self) -> None:
        """Take an answer that did not throttle for room for more, if all the room there was is used."""
        self.served = time.monotonic()
        if self._is_full():
            self.limit = min(MOST, self.limit + (1 / self.limit if self._cuts else 1))

    def throttled(self, turn: int) -> None:
        """Halve what is in flight, unless that was done since the request was made: a round of refusals counts once."""
        if turn == self._cuts:
            self._cuts += 1
            self.limit = max(1.0, float(self.in_flight // 2))
            _log.info("%s throttles; %d requests at a time", self.name, self.limit, extra={"in_flight": self.in_flight})

    def leave(self) -> None:
        """End a turn, and give it to who waits the longest."""
        self.in_flight -= 1
        while self._waiting and not self._is_full():
            self._waiting.popleft().set_result(None)
            self.in_flight += 1

    def _is_full(self) -> bool:
        return self.in_flight >= int(self.limit)

    async def _queue(self, patience_s: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        begun = time.monotonic()
        try:
            while not turn.done():
                left = max(begun, self.served) + patience_s - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                await asyncio.wait([turn], timeout=left)
        except BaseException:
            if turn.done():
                self.leave()
            else:
                self._waiting.remove(turn)
            raise


_limiters: dict[tuple[int, str, str], Limiter] = {}


def limiter_of(bucket: str) -> Limiter:
    """Return the limiter that all requests of this process to a bucket, given by its URI, share."""
    endpoint = next((url for name in ENDPOINT_VARIABLES if (url := os.environ.get(name))), "")
    # A forked process has none of the requests that its parent has in flight.
    return _limiters.setdefault((os.getpid(), endpoint, bucket), Limiter(bucket))
