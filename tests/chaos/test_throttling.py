"""A real S3 server behind a proxy that answers 503 SlowDown to what is more than it can take at a time."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import TypeVar

import pytest

from pipelines.config.loading import load_config
from pipelines.ingest.ingest import ingest
from pipelines.storage import Store
from pipelines.storage.limiter import START
from pipelines.verify.verify import verify
from tests.support import pictures
from tests.support.report import report, scaled
from tests.support.rig import DEADLINE_S, LARGE, SMALL, Rig, data_of, deadline
from tests.support.seaweed import seaweed
from tests.support.throttle import ThrottlingProxy

pytestmark = pytest.mark.timeout(scaled(300, 3600))

THREADS = 24
BARRIER_S = 20
T = TypeVar("T")


@pytest.fixture
def throttled(tmp_path: Path) -> Iterator[tuple[Rig, ThrottlingProxy]]:
    with (
        seaweed(tmp_path / "weed") as server,
        ThrottlingProxy(server.endpoint) as proxy,
        deadline(server, proxy, DEADLINE_S),
    ):
        yield Rig(server, proxy, "throttled"), proxy


def at_once(work: Callable[[int], T], count: int, threads: int = THREADS) -> list[T]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(count)))


@pytest.mark.parametrize("capacity", [2, 4, 12])
def test_what_is_in_flight_settles_near_what_the_store_takes(
    throttled: tuple[Rig, ThrottlingProxy], capacity: int
) -> None:
    rig, proxy = throttled
    store, count = rig.store(), scaled(400, 4000)
    for number in range(10):
        store.put(f"o{number}", data_of(SMALL, number))
    proxy.capacity = capacity
    proxy.hold = lambda: time.sleep(0.01 * capacity)  # a hundred requests a second: a busy machine can make them
    proxy.peaks.clear()
    read = at_once(lambda number: store.read(f"o{number % 10}"), count)
    assert read == [data_of(SMALL, number % 10) for number in range(count)]
    settled = proxy.peaks[len(proxy.peaks) // 2 :]
    refused = sum(peak > capacity for peak in settled) / len(settled)
    report("R6 throttled reads", capacity=capacity, in_flight=round(mean(settled), 1), refused=round(refused, 2))
    assert capacity / 2 <= mean(settled) <= capacity + 1
    assert max(settled) <= capacity + 2
    assert refused < 0.3


def test_throttled_puts_are_made_once_each(throttled: tuple[Rig, ThrottlingProxy]) -> None:
    """Four writers for each name: one of them wins, and no upload is left.

    Large objects go in several requests, and the server of the tests lets several of such writers win, see
    docs/stores.md. Their names have their digests, so all bring the same bytes.
    """
    rig, proxy = throttled
    store, names = rig.store(), scaled(20, 200)
    proxy.capacity = 3
    large = {name for name in range(names) if name % 5 == 0}
    data = {
        number: data_of(LARGE, number // 4) if number // 4 in large else data_of(SMALL, number)
        for number in range(4 * names)
    }
    made = at_once(lambda number: store.put(f"o{number // 4}", data[number]), 4 * names)
    winners = [number for number, won in enumerate(made) if won]
    report("R6 throttled puts", puts=len(made), throttled=proxy.done["SLOW_DOWN"], made=len(winners))
    assert {number // 4 for number in winners} == set(range(names))
    small = [number // 4 for number in winners if number // 4 not in large]
    assert small == sorted({*range(names)} - large)
    assert rig.stored() == {f"o{number // 4}": data[number] for number in winners}
    assert store.uploads() == {}
    assert proxy.done["SLOW_DOWN"] > 0


def test_verbs_finish_on_a_store_that_throttles_and_make_the_same_bytes(
    throttled: tuple[Rig, ThrottlingProxy], tmp_path: Path
) -> None:
    rig, proxy = throttled
    pictures.write_folder(tmp_path / "images")
    config = load_config(sets=["ingest.samples_per_shard=1"])
    local = ingest(str(tmp_path / "images"), str(tmp_path / "out"), config)
    proxy.capacity = 2
    remote = ingest(str(tmp_path / "images"), rig.store().uri, config)
    assert (remote.status, remote.digest) == ("done", local.digest)
    assert verify(remote.uri).orphans == []
    seen = sum(proxy.seen.values())
    report("R6 throttled verbs", requests=seen, throttled=proxy.done["SLOW_DOWN"])
    assert 0 < proxy.done["SLOW_DOWN"] < seen / 2


def test_a_store_that_does_not_throttle_is_never_waited_for(throttled: tuple[Rig, ThrottlingProxy]) -> None:
    """Requests that are answered only when all of them have come: START at first, and soon as many as are asked for."""
    rig, proxy = throttled
    store, distant = Store(rig.store().uri), proxy.hold  # the rig's own stores have no patience with silence
    store.put("x", b"data")
    for threads in (START, 3 * START):
        proxy.hold = threading.Barrier(threads, timeout=BARRIER_S).wait
        proxy.peaks.clear()
        assert at_once(lambda _: store.read("x"), threads, threads) == [b"data"] * threads
        assert len(proxy.peaks) == threads  # none was given up and made again
        proxy.hold = distant
        at_once(lambda _: store.read("x"), 200, 64)
