"""Many reads at a time, their results in order; and items in batches."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

READS_AT_ONCE = 16
"""Reads under way at a time: a distant store answers each after tens of milliseconds, but many of them at once."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def batched(items: Iterator[_T], size: int) -> Iterator[list[_T]]:
    """Yield the items in lists of `size`, the last one with the rest; Python 3.12 has it as `itertools.batched`."""
    while batch := list(islice(items, size)):
        yield batch


def map_in_order(work: Callable[[_T], _R], items: Iterable[_T], at_once: int = READS_AT_ONCE) -> Iterator[_R]:
    """Do `work` on `at_once` items at a time in threads, and yield the results in the order of the items.

    Of several errors, the first by that order is raised, whichever happened first. At most twice `at_once` results are
    held, so memory does not grow with the number of items.
    """
    pool = ThreadPoolExecutor(at_once, "many")
    under_way: deque[Future[_R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(work, item))
            if len(under_way) == 2 * at_once:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
