"""Processes that are stopped for a while."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import psutil


@contextmanager
def stopped(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Stop these processes for the length of the block."""
    try:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)


def trainers_below(pid: int) -> list[psutil.Process]:
    """The workers of Ray Train below a process."""
    found = psutil.Process(pid).children(recursive=True)
    workers = [process for process in found if "RayTrainWorker" in process.name()]
    assert workers, [process.name() for process in found]
    return workers
