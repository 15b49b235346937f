"""Runs a verb's items in this process, where a test is about the verb and not about Ray."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.cluster.pool import Outcome


class InlinePool:
    """Runs items here, in reverse order if `reverse`; `done` lists them. Items in `fatal` kill their worker."""

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.reverse = False
        self.fatal: Callable[[Any], bool] = lambda item: False

    @contextmanager
    def __call__(self, *_: Any) -> Iterator[Callable[..., Iterator[Outcome[Any]]]]:
        yield self.map_items

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
