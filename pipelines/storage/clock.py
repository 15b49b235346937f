"""The deadline of an operation on a remote store, and the failures that are worth another try.

One clock runs for an operation, whatever fails in it: exponential backoff with full jitter inside one deadline. The
libraries below are told not to retry, since their retries would multiply with these.

A store that throttles is no failure: the limiter lets fewer requests go at a time, those that were turned away are made
again, and the deadline counts from the last request of the process that the bucket served, up to THROTTLED_DEADLINES.
"""

import asyncio
import logging
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from pipelines.errors import ConfigError, HHNetError, StoreRefused, StoreUnavailable
from pipelines.storage.limiter import Limiter

_log = logging.getLogger(__name__)

DEADLINE_VARIABLE = "HHNET_STORE_DEADLINE_S"
"""Environment variable with the deadline, in seconds."""
DEADLINE_S = 60.0
"""Seconds that an operation may take without progress, unless the environment says otherwise."""
MAX_FIRST_PAUSE_S = 0.1
"""Longest pause before the second try, in seconds; it doubles with each further try."""
MAX_PAUSE_S = 5.0
"""Longest pause before any try, in seconds."""

BUSY = {408, 429}
"""Statuses of a store that did not let a request in."""
THROTTLING = {429, 503}
"""Statuses of a store that has too much to do."""
_THROTTLING_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded"}
NOT_IMPLEMENTED = 501
"""A server error by its number, but waiting does not help: the store lacks the operation."""
# Client errors by their status, but caused on the way to the store and not by the request.
_ON_THE_WAY = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}
_REFUSED = ": check the keys and what they may do; a bucket in store.unsigned must be public"
_HINTS = {
    401: _REFUSED,
    403: _REFUSED,
    NOT_IMPLEMENTED: ": the store does not offer what this needs; use one that does",
}
_CUT = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.IncompleteReadError,
    boto.FlexibleChecksumError,
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)

THROTTLED_DEADLINES = 10
"""Number of deadlines after which a request that is always throttled fails, though the store serves others."""

_T = TypeVar("_T")
_jitter = random.SystemRandom()  # not the seeded generators, whose draws are results


def deadline_s() -> float:
    """Return the seconds that an operation may take without progress, from the environment."""
    text = os.environ.get(DEADLINE_VARIABLE, "")
    try:
        seconds = float(text or DEADLINE_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(
            f"{DEADLINE_VARIABLE}={text!r} is not a number of seconds above 0: set it to one, or unset it"
        )
    return seconds


class Exists(Exception):
    """Put-if-absent found an object of the same name."""


class Transient(Exception):
    """A request failed in a way that may pass. `landed`: the store may have carried it out nevertheless."""

    def __init__(self, problem: object, landed: bool = True) -> None:
        super().__init__(one_line(problem))
        self.landed = landed


class Conflict(Transient):
    """Another request for the same object is under way (409); this one was not carried out."""

    def __init__(self, problem: object) -> None:
        super().__init__(problem, landed=False)


class Throttled(Transient):
    """The store has too much to do and turned this request away."""


class Clock:
    """The time left for one operation, over all its tries. `what` names operation and object in errors."""

    def __init__(self, what: str, seconds: float, limiter: Limiter | None = None) -> None:
        self.what, self.seconds, self.tries, self.throttled = what, seconds, 0, 0
        self._limiter = limiter or Limiter()
        self._running: asyncio.Timeout | None = None
        self._restart()

    def _restart(self) -> None:
        self._end = time.monotonic() + self.seconds
        self._pauses = self._throttled_pauses = 0
        self._throttled_since: float | None = None

    def renew(self) -> None:
        """Start the deadline and the pauses anew, because something arrived; the store serves, as others see too."""
        self._restart()
        self._limiter.served = time.monotonic()
        if self._running is not None:
            self._running.reschedule(asyncio.get_running_loop().time() + self.seconds)

    async def attempt(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make one request, once, when its turn comes.

        Raises Transient, Exists or FileNotFoundError, as it turns out, and StoreRefused where no retry can help.
        """
        turn = await self._turn()
        try:
            answer = await self._once(call)
        except Throttled:
            self._limiter.throttled(turn)
            raise
        except (Exists, FileNotFoundError):
            self._limiter.answered()
            raise
        else:
            self._limiter.answered()
            return answer
        finally:
            self._limiter.leave()

    async def _turn(self) -> int:
        """Wait until the limiter lets a request go; the time until then is not the store's silence."""
        begun = time.monotonic()
        try:
            turn = await self._limiter.enter(self.seconds)
        except TimeoutError:
            raise Transient("none of the requests before it was answered", landed=False) from None
        self._end += time.monotonic() - begun
        return turn

    async def _once(self, call: Callable[[], Awaitable[_T]]) -> _T:
        self.tries += 1
        try:
            async with asyncio.timeout(max(0.0, self._end - time.monotonic())) as self._running:
                return await call()
        except (Transient, Exists, FileNotFoundError, HHNetError):
            raise
        except Exception as error:
            judged = self._judged(error)
            if judged is error:
                raise
            raise judged from error
        finally:
            self._running = None

    async def pause(self, problem: Transient) -> None:
        """Wait before the next try; raise StoreUnavailable when the time is up."""
        if isinstance(problem, Throttled):
            self.throttled += 1
            doublings, self._throttled_pauses = self._throttled_pauses, self._throttled_pauses + 1
            self._throttled_since = self._throttled_since or time.monotonic()
            # It serves others, so there is a way; but not for an object that it refuses for good.
            last = self._throttled_since + THROTTLED_DEADLINES * self.seconds
            self._end = max(self._end, min(last, self._limiter.served + self.seconds))
        else:
            doublings, self._pauses = self._pauses, self._pauses + 1
        # A random share of the pause: workers that failed together must not come back together.
        pause = _jitter.uniform(0, min(MAX_PAUSE_S, MAX_FIRST_PAUSE_S * 2**doublings))
        left = self._end - time.monotonic()
        if left > 0:
            await asyncio.sleep(min(pause, left))
        if time.monotonic() >= self._end:
            tries = f"{self.tries} tries" + (f", {self.throttled} of them throttled" if self.throttled else "")
            raise StoreUnavailable(
                f"cannot {self.what} within {self.seconds:g} s ({tries}): {problem}: check the endpoint and "
                "the network, then run the same command again"
            ) from problem
        _log.info("cannot %s: %s; trying again", self.what, problem, extra={"tries": self.tries})

    async def persist(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make a request that may be repeated safely, until it is answered."""
        while True:
            try:
                return await self.attempt(call)
            except Transient as problem:
                await self.pause(problem)

    def _judged(self, error: Exception) -> Exception:
        if isinstance(error, boto.ClientError):
            return self._answered(error)
        if isinstance(error, boto.SSLError) and "certificate" in str(error).lower():
            hint = "check the endpoint, or let AWS_CA_BUNDLE name a file with the certificates to trust"
            return StoreRefused(f"cannot {self.what}: {one_line(error)}: {hint}")
        if isinstance(error, TimeoutError) and not str(error):
            return Transient("no answer in time")
        if isinstance(error, _CUT):
            return Transient(error, landed=not _never_sent(error))
        if isinstance(error, boto.NoCredentialsError):
            hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or store.unsigned for a public bucket"
            return StoreRefused(f"cannot {self.what}: {one_line(error)}: {hint}")
        if isinstance(error, boto.BotoCoreError):
            return StoreRefused(f"cannot {self.what}: {one_line(error)}: check the endpoint and the AWS settings")
        return error

    def _answered(self, error: boto.ClientError) -> Exception:
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))
        facts = error.response.get("Error", {})
        code = str(facts.get("Code", status))
        problem = f"{status} {code}: {facts.get('Message', '')}" if code != str(status) else f"{status}"
        if status == 404:
            return FileNotFoundError(f"{self.what}: {code}")
        if status == 412:
            return Exists(self.what)
        if status == 409:
            return Conflict(problem)
        if status in THROTTLING or code in _THROTTLING_CODES:
            return Throttled(problem, landed=status not in BUSY)
        if (status >= 500 and status != NOT_IMPLEMENTED) or status in BUSY or code in _ON_THE_WAY:
            return Transient(problem, landed=status not in BUSY)
        hint = _HINTS.get(status, ": the store refuses this request for good; check its address and settings")
        return StoreRefused(f"cannot {self.what}: {one_line(problem)}{hint}")


def _never_sent(error: Exception) -> bool:
    """Test whether there was not even a connection; an EndpointConnectionError alone does not say so."""
    cause = getattr(error, "kwargs", {}).get("error")
    return isinstance(error, boto.ConnectTimeoutError) or isinstance(cause, aiohttp.ClientConnectorError)


def one_line(problem: object) -> str:
    """Shorten a problem to one line of at most 300 characters, without the keys that a URL may carry."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(str(problem).split()))[:300]
