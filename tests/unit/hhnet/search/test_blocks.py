"""How the kernels share work out between threads."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hhnet.search.kernels import run_blocks

COST = 1 << 40  # worth every thread
WAIT = 20  # seconds, for what must happen at once


def bounds(part: slice) -> tuple[int, int]:
    return part.start, part.stop


def test_results_come_in_the_order_of_the_slices() -> None:
    def slow_first(part: slice) -> tuple[int, int]:
        time.sleep(0.05 if part.start == 0 else 0)
        return bounds(part)

    assert run_blocks(slow_first, 10, COST, threads=2, block=3) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert run_blocks(bounds, 0, COST, threads=2) == []


def test_work_may_share_out_work() -> None:
    def inner(part: slice) -> list[tuple[int, int]]:
        return run_blocks(bounds, 4, COST, threads=2, block=1)

    assert run_blocks(inner, 40, COST, threads=2, block=1) == [[(0, 1), (1, 2), (2, 3), (3, 4)]] * 40


def test_many_callers_at_once() -> None:
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(lambda _: run_blocks(bounds, 100, COST, threads=2, block=1), range(50)))
    assert found == [[(i, i + 1) for i in range(100)]] * 50


@pytest.mark.parametrize("failing", ["caller", "helper"])
def test_an_error_stops_the_rest_and_is_raised_when_all_is_still(failing: str) -> None:
    caller, running, met = threading.current_thread(), 0, threading.Barrier(2)
    begun: list[int] = []

    def work(part: slice) -> None:
        nonlocal running
        begun.append(part.start)
        if part.start < 2:  # one of these on each thread
            met.wait(WAIT)
            if (threading.current_thread() is caller) == (failing == "caller"):
                raise OSError("the disk is gone")
            running += 1
            time.sleep(0.2)
            running -= 1

    with pytest.raises(OSError, match="the disk is gone"):
        run_blocks(work, 100, COST, threads=2, block=1)
    assert running == 0
    assert sorted(begun) == [0, 1]
    assert run_blocks(bounds, 2, COST, threads=2, block=1) == [(0, 1), (1, 2)], "works again afterwards"


def meet() -> None:
    meeting = threading.Barrier(2)
    places = run_blocks(lambda part: meeting.wait(WAIT), 2, COST, threads=2, block=1)
    assert sorted(places) == [0, 1]


def test_two_threads_work_at_once() -> None:
    meet()


def test_a_forked_process_gets_threads_of_its_own() -> None:
    meet()  # the threads that a fork does not take along have begun
    child = multiprocessing.get_context("fork").Process(target=meet)
    child.start()
    child.join(2 * WAIT)
    hangs = child.is_alive()
    child.kill()
    assert not hangs
    assert child.exitcode == 0
