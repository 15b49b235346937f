"""How many requests the limiter lets go at a time, and in which order."""

import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest

from pipelines.errors import StoreUnavailable
from pipelines.storage import limiter as module
from pipelines.storage.clock import Clock, Throttled
from pipelines.storage.limiter import MOST, START, Limiter, limiter_of

PATIENCE_S = 60.0


def run(work: Callable[[Limiter], Awaitable[None]], **state: float) -> Limiter:
    async def begun() -> Limiter:
        limiter = Limiter()
        vars(limiter).update(state)
        await work(limiter)
        return limiter

    return asyncio.run(begun())


async def serve(limiter: Limiter, count: int) -> None:
    """Let so many requests come at once, and answer each when its turn comes."""

    async def one() -> None:
        await limiter.enter(PATIENCE_S)
        await asyncio.sleep(0)
        limiter.answered()
        limiter.leave()

    await asyncio.gather(*(one() for _ in range(count)))


def test_the_limit_grows_with_each_answer_while_it_is_used_up_to_the_most() -> None:
    assert run(lambda limiter: serve(limiter, START - 1)).limit == START
    assert run(lambda limiter: serve(limiter, 3 * MOST)).limit == MOST


def test_a_round_of_refusals_halves_once_and_the_limit_grows_by_one_a_round() -> None:
    async def refuse(limiter: Limiter) -> None:
        turns = [await limiter.enter(PATIENCE_S) for _ in range(12)]
        for turn in turns:
            limiter.throttled(turn)
            limiter.leave()
        assert limiter.limit == 6
        await serve(limiter, 6)

    assert 6 < run(refuse).limit < 7.5


def test_one_request_goes_however_much_is_refused() -> None:
    async def refuse(limiter: Limiter) -> None:
        for _ in range(20):
            limiter.throttled(await limiter.enter(PATIENCE_S))
            limiter.leave()

    assert run(refuse).limit == 1


def test_who_comes_first_goes_first_and_who_gives_up_leaves_no_gap() -> None:
    order = []

    async def queue(limiter: Limiter) -> None:
        await limiter.enter(PATIENCE_S)

        async def wait(number: int) -> None:
            await limiter.enter(PATIENCE_S)
            order.append(number)
            limiter.leave()

        tasks = [asyncio.create_task(wait(number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[2].cancel()
        await asyncio.sleep(0)
        limiter.leave()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert limiter.in_flight == 0

    run(queue, limit=1.0)
    assert order == [1, 3]


def test_a_turn_given_to_one_who_was_just_cancelled_is_passed_on() -> None:
    async def queue(limiter: Limiter) -> None:
        await limiter.enter(PATIENCE_S)
        first, second = (asyncio.create_task(limiter.enter(PATIENCE_S)) for _ in range(2))
        await asyncio.sleep(0)
        limiter.leave()
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await second
        assert limiter.in_flight == 1

    run(queue, limit=1.0)


def test_waiting_ends_in_an_error_only_when_nobody_is_served() -> None:
    async def starve(limiter: Limiter) -> None:
        await limiter.enter(PATIENCE_S)
        clock = Clock("read s3://bucket/x", 0.05, limiter)
        with pytest.raises(StoreUnavailable, match=r"within 0\.05 s \(0 tries\): none of the requests before it was"):
            await clock.persist(lambda: asyncio.sleep(0))

    run(starve, limit=1.0)


def test_throttled_tries_are_counted_and_outlast_the_deadline_while_others_are_served() -> None:
    begun = time.monotonic()

    async def refuse_for_a_while() -> str:
        if time.monotonic() < begun + 0.6:
            raise Throttled("503 SlowDown")
        return "bytes"

    async def served(limiter: Limiter) -> None:
        clock = Clock("read s3://bucket/x", 0.5, limiter)
        assert await clock.persist(refuse_for_a_while) == "bytes"
        assert clock.throttled == clock.tries - 1 > 0

    async def alone(limiter: Limiter) -> None:
        with pytest.raises(StoreUnavailable, match=r"\(\d+ tries, \d+ of them throttled\): 503 SlowDown"):
            await Clock("read s3://bucket/x", 0.05, limiter).persist(always)

    async def always() -> None:
        raise Throttled("503 SlowDown")

    run(served, served=begun + 60)
    run(alone)


def test_who_waits_for_a_long_download_waits_as_long_as_bytes_arrive() -> None:
    async def download(clock: Clock) -> str:
        for _ in range(20):
            await asyncio.sleep(0.05)
            clock.renew()
        return "large"

    async def small() -> str:
        return "small"

    async def both(limiter: Limiter) -> None:
        first, second = (Clock(f"read s3://bucket/{name}", 0.4, limiter) for name in ("large", "small"))
        found = await asyncio.gather(first.persist(lambda: download(first)), second.persist(small))
        assert found == ["large", "small"]

    run(both, limit=1.0)


def test_an_object_that_is_refused_for_good_fails_though_the_store_serves_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.storage.clock.MAX_PAUSE_S", 0.02)

    async def always() -> None:
        raise Throttled("503 SlowDownRead")

    async def served() -> None:
        pass

    async def beside(limiter: Limiter) -> None:
        async def beat() -> None:
            while True:
                await Clock("write s3://bucket/run", 0.1, limiter).persist(served)
                await asyncio.sleep(0.02)

        others = asyncio.create_task(beat())
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable, match="503 SlowDownRead"):
            async with asyncio.timeout(20):
                await Clock("read s3://bucket/x", 0.2, limiter).persist(always)
        others.cancel()
        assert time.monotonic() - begun > 1  # the answers of others count for many deadlines

    run(beside)


def test_a_bucket_of_an_endpoint_has_one_limiter_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_limiters", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://one")
    first = limiter_of("a")
    assert limiter_of("a") is first and limiter_of("b") is not first
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://two")
    assert limiter_of("a") is not first
    monkeypatch.setattr("os.getpid", lambda: -1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://one")
    assert limiter_of("a") is not first
