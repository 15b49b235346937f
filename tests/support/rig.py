"""A server of S3, a proxy before it that does harm, and stores that go through the proxy."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
import s3fs
from botocore.exceptions import BotoCoreError
from fsspec.asyn import sync

from pipelines.errors import StoreUnavailable
from pipelines.storage import Store
from pipelines.storage.bucket import Bucket, BucketLimits
from pipelines.storage.clock import DEADLINE_VARIABLE, deadline_s
from pipelines.storage.s3 import S3Objects
from tests.support.checker import client_of, stored_on_s3
from tests.support.faults import FaultProxy, Harm, Request
from tests.support.report import SEED, report, scaled
from tests.support.seaweed import BUCKET, Seaweed

SMALL = 5_000
PART = 5 << 20  # the smallest that S3 takes; the store itself sends parts of 16 MiB
LARGE = PART + SMALL  # goes in two parts
DEADLINE_S = 30.0
SILENCE_S = 0.3  # a client waits no longer for a connection or an answer, and has time left to try again
LIMITS = BucketLimits(single_bytes=PART, part_bytes=PART, connect_s=SILENCE_S, silence_s=SILENCE_S)
HASTE_S = scaled(1.0, 5.0)
NAP_S = 0.01


@dataclass
class Rig:
    """A server, the proxy before it, and stores that go through the proxy."""

    server: Seaweed
    proxy: FaultProxy
    prefix: str
    bucket: type[Bucket] = Bucket

    def store(self, name: str = "") -> Store:
        uri = self.server.uri(self.prefix + (f"/{name}" if name else ""))
        return Store(uri, S3Objects(uri.removeprefix("s3://"), self.bucket(BUCKET, deadline_s(), LIMITS)))

    def client(self) -> s3fs.S3FileSystem:
        """A client of the server itself."""
        return client_of(self.server)

    def stored(self) -> dict[str, bytes]:
        """What lies in the store, past the proxy."""
        return stored_on_s3(self.server, self.prefix)


@contextmanager
def deadline(server: Seaweed, proxy: FaultProxy, seconds: float) -> Iterator[None]:
    """Stores that are made inside give up after so long."""
    with server.environment(AWS_ENDPOINT_URL_S3=proxy.endpoint, **{DEADLINE_VARIABLE: str(seconds)}):
        yield


def hasty(rig: Rig, seconds: float) -> Store:
    """A store that gives up after so long and is warm.

    The first request of a process builds its TLS context, even for http, which can take a busy machine longer than a
    short deadline. So that request is made by another bucket of the same settings, to which s3fs gives the same client,
    and without a clock; it need not succeed.
    """
    with deadline(rig.server, rig.proxy, seconds):
        store, twin = rig.store(), Bucket(BUCKET, seconds, LIMITS)
        with suppress(BotoCoreError):
            sync(twin.fs.loop, twin.request, "head_bucket")
    rig.proxy.reset()
    return store


@contextmanager
def lateness() -> Iterator[Callable[[], float]]:
    """Seconds for which a thread that only naps has been kept waiting: what the machine withheld, whatever was asked.

    On a busy machine anything may end late, and no bound on the time that passed can hold. What a call took less this
    is bounded: a call that itself waits too long lets the thread nap in time.
    """
    late, over = 0.0, threading.Event()

    def nap() -> None:
        nonlocal late
        while not over.is_set():
            begun = time.monotonic()
            time.sleep(NAP_S)
            late += time.monotonic() - begun - NAP_S

    thread = threading.Thread(target=nap)
    thread.start()
    try:
        yield lambda: late
    finally:
        over.set()
        thread.join()


def data_of(size: int, seed: object) -> bytes:
    return random.Random(f"{SEED} {seed}").randbytes(size)


def on(operation: str, fault: Harm, times: int = 1) -> Callable[[Request], Harm | None]:
    """This fault at the first `times` requests of an operation from now on."""
    left = [times]

    def choose(request: Request) -> Harm | None:
        if request.operation != operation or not left[0]:
            return None
        left[0] -= 1
        return fault

    return choose


def direct(rig: Rig, key: str, data: bytes) -> None:
    """Put an object past the proxy, whatever is there."""
    rig.client().pipe_file(f"{BUCKET}/{key}", data)


READS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "read": ("read", lambda store: store.read("there")),
    "size": ("stat", lambda store: store.size("there")),
    "list": ("list", lambda store: store.names("")),
    "delete": ("delete", lambda store: store.delete("there")),
}

WRITES: dict[str, tuple[str, Callable[[Store], object]]] = {
    "put": ("write", lambda store: store.put("new", bytes(SMALL))),
    "multipart": ("write", lambda store: store.put("large", bytes(LARGE))),
}


def failure(rig: Rig, name: str, store: Store, fault: str) -> StoreUnavailable:
    """The error of an operation of which no request succeeds: typed, in time, and saying what was asked for."""
    verb, call = (READS | WRITES)[name]
    with lateness() as late:
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            call(store)
        took, withheld = time.monotonic() - begun, late()
    asked = {"list": f"{rig.prefix}/", "put": "new", "multipart": "large"}.get(name, "there")
    assert f"cannot {verb} s3://{BUCKET}/{rig.prefix}/" in str(caught.value)
    assert asked in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    times = {"deadline_s": HASTE_S, "took_s": round(took, 2), "withheld_s": round(withheld, 2)}
    report("R6 100 %", operation=name, fault=fault, requests=sum(rig.proxy.seen.values()), **times)
    assert HASTE_S <= took <= HASTE_S * 1.1 + withheld
    return caught.value
