"""Runs a verb's items in this process, where a test is about the verb and not about Ray."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pipelines.cluster.attempts import Outcome
from pipelines.cluster.ray_pool import MapItems, Pool, ray_pool


class InlinePool:
    """Runs items here, in reverse order if `reverse`; `done` lists them. Items in `fatal` kill their worker.

    With `worker`, that class does the work instead of the verb's own.
    """

    def __init__(self, worker: Callable[..., Any] | None = None) -> None:
        self.worker = worker
        self.done: list[Any] = []
        self.reverse = False
        self.fatal: Callable[[Any], bool] = lambda item: False

    @contextmanager
    def __call__(self, *_: Any) -> Iterator[Callable[..., Iterator[Outcome[Any]]]]:
        yield self.map_items

    def map_items(
        self, worker: Callable[..., Any], worker_args: tuple[Any, ...], items: Sequence[Any], **options: Any
    ) -> Iterator[Outcome[Any]]:
        made = (self.worker or worker)(*worker_args)
        ordered = list(reversed(items) if self.reverse else items)
        for number, item in enumerate(ordered):
            if self.fatal(item):
                yield Outcome(item, None, 3, "all workers died")
                continue
            for following in ordered[number + 1 : number + 2] if hasattr(made, "expect") else ():
                made.expect(following)
            result = made.run(item)
            self.done.append(item)
            yield Outcome(item, result, 1)


def ray_pool_of(worker: Callable[..., Any]) -> Pool:
    """Return a pool on Ray in which this class does the work instead of the verb's own."""

    @contextmanager
    def pool(*arguments: Any) -> Iterator[MapItems]:
        with ray_pool(*arguments) as map_items:
            yield lambda _, *given, **options: map_items(worker, *given, **options)

    return pool
