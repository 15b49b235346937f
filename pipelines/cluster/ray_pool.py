"""The pool that a verb's workers run on. Verbs take it as an argument, `ray_pool` by default."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

from pipelines.cluster.attempts import Outcome
from pipelines.cluster.placement import Need, await_need
from pipelines.cluster.pool import map_items
from pipelines.cluster.session import ray_session, require_shared_store
from pipelines.config.settings import Config, PlacedSettings
from pipelines.storage import Store

MapItems = Callable[..., Iterator[Outcome[Any]]]
"""`map_items` of `pipelines.cluster.pool`, without the arguments that the pool itself knows: `need` and `wait_s`."""


class Pool(Protocol):
    """A context in which items can be mapped: it connects, checks that workers can write to the store, finds room."""

    def __call__(
        self, store: Store, config: Config, placed: PlacedSettings | None = None, /
    ) -> AbstractContextManager[MapItems]:
        """Enter it for workers that write to `store` and reserve what `placed` says."""


@contextmanager
def ray_pool(store: Store, config: Config, placed: PlacedSettings | None = None, /) -> Iterator[MapItems]:
    """Connect to Ray and wait for room for one worker as `placed` asks, or by default for one CPU.

    Raises UsageError if the workers cannot write to the store, ClusterUnavailable if no room is found in time.
    """
    with ray_session(config):
        require_shared_store(store, config)
        need = Need() if placed is None else await_need(placed, config)
        yield partial(map_items, need=need, wait_s=config.ray.wait_s)
