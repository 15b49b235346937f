"""A bounded pool of Ray actors: one item in flight per worker, attempts counted, deaths survived."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of an item: its result, or the error after all workers that held it died."""

    item: T
    result: Any
    attempts: int
    error: str | None = None


class _Worker:
    """Lives in an actor; builds the real worker at first use, so that its errors are errors and not a death."""

    def __init__(self, kind: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._make: Callable[[], Any] = lambda: kind(*args)
        self._worker: Any = None

    def run(self, item: Any) -> Any:
        """Do one item."""
        if self._worker is None:
            self._worker = self._make()
        return self._worker.run(item)


def map_items(
    worker: Callable[..., Any],
    worker_args: tuple[Any, ...],
    items: Sequence[T],
    *,
    workers: int,
    num_cpus: float = 1,
    num_gpus: float = 0,
    max_attempts: int = 3,
    label: Callable[[T], str] = str,
) -> Iterator[Outcome[T]]:
    """Run `worker(*worker_args).run(item)` for every item on a pool of actors; outcomes in order of completion.

    An actor holds one item at a time. When it dies, the item counts one attempt and goes to a fresh actor, up to
    `max_attempts`; then its outcome carries the error. Exceptions of the worker itself are raised here.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, max_task_retries=0)(_Worker)
    waiting = deque((item, 0) for item in items)
    running: dict[Any, tuple[Any, T, int]] = {}
    idle: list[Any] = []

    def start() -> None:
        while waiting and len(running) < workers:
            actor = idle.pop() if idle else remote.remote(worker, worker_args)
            item, attempts = waiting.popleft()
            running[actor.run.remote(item)] = (actor, item, attempts)

    try:
        start()
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            actor, item, attempts = running.pop(ready[0])
            try:
                result = ray.get(ready[0])
            except RayActorError as death:
                if attempts + 1 < max_attempts:
                    waiting.append((item, attempts + 1))
                else:
                    reason = f"{label(item)}: {max_attempts} workers died: {str(death).splitlines()[0]}"
                    yield Outcome(item, None, attempts + 1, reason)
            except RayTaskError as error:
                raise (error.cause or error) from None
            else:
                idle.append(actor)
                yield Outcome(item, result, attempts + 1)
            start()
    finally:
        for actor in [*idle, *(entry[0] for entry in running.values())]:
            ray.kill(actor)
