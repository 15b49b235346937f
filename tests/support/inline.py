"""Stands in for the Ray pool where a unit test is about the job and not about Ray: same interface, this process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest

from pipelines.cluster.pool import Outcome


class InlinePool:
    """Runs items here, in reverse order if `reverse`; `done` lists them. Items in `fatal` kill their worker."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.reverse = False
        self.fatal: Callable[[Any], bool] = lambda item: False

    def map_items(
        self, worker: Callable[..., Any], worker_args: tuple[Any, ...], items: Sequence[Any], **options: Any
    ) -> Iterator[Outcome[Any]]:
        made = worker(*worker_args)
        for item in reversed(items) if self.reverse else items:
            if self.fatal(item):
                yield Outcome(item, None, 3, "all workers died")
                continue
            result = made.run(item)
            self.done.append(item)
            yield Outcome(item, result, 1)


def use_inline_pool(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> InlinePool:
    """Replace the pool, the session and the questions about the cluster in a job's module."""

    @contextmanager
    def no_session(config: Any) -> Iterator[None]:
        yield

    pool = InlinePool()
    monkeypatch.setattr(module, "map_items", pool.map_items)
    monkeypatch.setattr(module, "ray_session", no_session)
    monkeypatch.setattr(module, "require_shared_store", lambda store, config: None)
    monkeypatch.setattr(module, "await_need", lambda settings, config: None, raising=False)  # not every job asks
    return pool
