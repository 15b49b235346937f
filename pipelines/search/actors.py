"""Searches one index with several Ray actors: deals out the parts, and merges the answers by (distance, id).

An actor opens the same manifest as this process, and only those of its parts that it is asked about. It returns the
result of `IndexReader.search` for these parts, so the merged answer equals that of a single process.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.artifacts.manifest import Artifact, parse_manifest
from pipelines.cluster.attempts import OWN_FAULT, cause_of_death, first_line
from pipelines.cluster.head import require_node
from pipelines.cluster.placement import Need, await_need, explain_shortage, list_live_nodes
from pipelines.cluster.pool import ASK_EVERY_S, STUCK_S
from pipelines.cluster.ray_actors import BESIDE_GROUP
from pipelines.cluster.session import ray_session, require_shared_store
from pipelines.config.settings import Config
from pipelines.errors import ClusterUnavailable, WorkFailed
from pipelines.index.kinds import Codes, Neighbours
from pipelines.index.reader import IndexReader, merge_nearest
from pipelines.storage import Store, scratch_folder

_log = logging.getLogger(__name__)

MAX_ACTOR_DEATHS = 3
"""Number of actors that may die on one share of a batch of queries before the search ends."""


class SearchActor:
    """An actor that searches parts of an index; it opens the index at the first search."""

    def __init__(self, uri: str, manifest: bytes) -> None:
        os.environ["NUMBA_NUM_THREADS"] = "1"  # Ray gives an actor one CPU; other actors use the rest
        self._uri, self._manifest = uri, manifest
        self._reader: IndexReader | None = None
        self._closing = ExitStack()

    def place(self) -> str:
        """Return the id of the actor's node."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def search(self, queries: Codes, k: int, numbers: Sequence[int]) -> Neighbours:
        """Find the k nearest in the parts of these numbers."""
        if self._reader is None:  # not when the actor is made, so that an error of the parts is one of the search
            store = Store(self._uri)
            artifact = Artifact(store, parse_manifest(self._manifest, store, "manifest.json"))
            self._reader = IndexReader(artifact, self._closing.enter_context(scratch_folder()))
        parts = self._reader.parts
        return self._reader.search(queries, k, [parts[number] for number in numbers])

    def close(self) -> None:
        """Delete the files that were copied from an object store."""
        self._closing.close()


@contextmanager
def spread_over_actors(
    reader: IndexReader, workers: int, config: Config, attempts: int = MAX_ACTOR_DEATHS, stuck_s: float = STUCK_S
) -> Iterator[Callable[[Codes, int], Neighbours]]:
    """Deal the parts to at most `workers` actors; yield a function that searches them like `reader.search`.

    If there is room for fewer actors only, these do all the work. Raises ClusterUnavailable if there is room for none
    within `ray.wait_s`, WorkFailed where a share lost its actor at each of several attempts; an error in an actor is
    raised here.
    """
    numbers = [part.number for part in reader.searched()]
    # Round-robin, so that shares differ by one part at most.
    shares = [numbers[place::workers] for place in range(min(workers, len(numbers)))]
    with ray_session(config):
        require_shared_store(reader.artifact.store, config)
        fan = _Fan(reader.artifact, shares, await_need(config.search, config), config.ray.wait_s, attempts, stuck_s)
        try:
            yield fan.search
        finally:
            fan.close()


@dataclass(eq=False)
class _Actor:
    """An actor; `waits` is the reference of its last request: its node, or the answer for a share."""

    handle: Any
    waits: Any
    node: str | None = None
    share: int | None = None
    beat: Any = None
    heard: float = 0.0
    """Time of its last answer to a look at whether it lives (`time.monotonic`)."""


class _Fan:
    """The actors of one search, one per share if there is room. Each keeps to the shares that it has opened."""

    def __init__(
        self,
        artifact: Artifact,
        shares: Sequence[Sequence[int]],
        need: Need,
        wait_s: float,
        attempts: int,
        stuck_s: float,
    ) -> None:
        import ray

        self._artifact, self._shares, self._need, self._wait_s = artifact, shares, need, wait_s
        self._attempts, self._stuck_s = attempts, stuck_s
        # No restarts by Ray: `_bury` counts deaths and starts actors itself. BESIDE is a thread of its own, so that an
        # actor can answer `_watch` while it searches.
        options = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {BESIDE_GROUP: 1}}
        self._remote = ray.remote(**need.options(), **options)(SearchActor)
        self._manifest = ray.put(artifact.manifest.to_bytes())
        self._opened: dict[int, _Actor] = {}
        self._actors: list[_Actor] = []
        for _ in shares:
            self._start()

    def _start(self) -> None:
        handle = self._remote.remote(self._artifact.uri, self._manifest)
        self._actors.append(_Actor(handle, handle.place.remote()))

    def search(self, queries: Codes, k: int) -> Neighbours:
        """Find the k nearest over all shares: distances int32 and ids int64, (Q, min(k, count)), by (distance, id)."""
        import ray

        batch = ray.put(queries)
        waiting, died = list(range(len(self._shares))), [0] * len(self._shares)
        best: Neighbours = np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)
        roomless_since = time.monotonic()
        while waiting or any(actor.share is not None for actor in self._actors):
            for actor in self._actors:
                if waiting and actor.waits is None:
                    self._ask(actor, waiting, batch, k)
            asked = {actor.waits: actor for actor in self._actors if actor.waits is not None}
            ready, _ = ray.wait(list(asked), timeout=min(ASK_EVERY_S, self._wait_s / 4))
            for ref in ready:
                best = merge_nearest(best, answer, k) if (answer := self._answer(asked[ref], waiting, died)) else best
            if any(actor.node is not None for actor in self._actors):
                roomless_since = time.monotonic()
            elif time.monotonic() - roomless_since > self._wait_s:
                raise ClusterUnavailable(explain_shortage(1, self._need, list_live_nodes(), self._wait_s))
            if not ready:
                require_node()
                for actor in [actor for actor in self._actors if actor.share is not None]:
                    self._watch(actor, waiting, died)
        return best

    def _watch(self, actor: _Actor, waiting: list[int], died: list[int]) -> None:
        """Ask an actor, beside its work, whether it lives; one without an answer for so long is replaced."""
        import ray

        if actor.beat is None or ray.wait([actor.beat], timeout=0)[0]:
            actor.heard = time.monotonic()
            actor.beat = actor.handle.place.options(concurrency_group=BESIDE_GROUP).remote()
        elif time.monotonic() - actor.heard > self._stuck_s:
            self._bury(actor, f"did not answer for {self._stuck_s:g} s", True, waiting, died)

    def _ask(self, actor: _Actor, waiting: list[int], batch: Any, k: int) -> None:
        """Give an actor a waiting share: one that it has opened, else one that no other has."""
        share = min(waiting, key=lambda share: (self._opened.get(share) is not actor, share in self._opened))
        waiting.remove(share)
        self._opened[share] = actor
        actor.share, actor.waits = share, actor.handle.search.remote(batch, k, self._shares[share])

    def _answer(self, actor: _Actor, waiting: list[int], died: list[int]) -> Neighbours | None:
        """Take an actor's answer: its node, its neighbours, or its death, after which another is started."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            answer = ray.get(actor.waits)
        except (RayActorError, OutOfMemoryError) as death:
            own = cause_of_death(death, actor.node, ()) in OWN_FAULT
            self._bury(actor, f"died ({first_line(death)})", own, waiting, died)
            return None
        except RayTaskError as error:
            raise (error.cause or error) from None
        actor.waits = None
        if actor.node is None:
            actor.node = answer
            return None
        actor.share = None
        distances, ids = answer
        return distances, ids

    def _bury(self, actor: _Actor, reason: str, own_fault: bool, waiting: list[int], died: list[int]) -> None:
        """Start another actor and search the share again; raise WorkFailed where that was tried too often."""
        import ray

        ray.kill(actor.handle)
        self._actors.remove(actor)
        self._opened = {share: other for share, other in self._opened.items() if other is not actor}
        fields = {"index": self._artifact.uri, "share": actor.share, "node": actor.node}
        _log.info("a search worker %s; another takes its place", reason, extra=fields)
        if actor.share is not None:
            waiting.append(actor.share)
            died[actor.share] += own_fault
            if died[actor.share] == self._attempts:
                parts = len(self._shares[actor.share])
                problem = f"{self._artifact.uri}: the worker that searches {parts} of its parts {reason}"
                last = f"at the last of {self._attempts} attempts"
                raise WorkFailed(f"{problem}, {last}: look at the memory and the logs of the nodes")
        self._start()

    def close(self) -> None:
        """End the actors, each after it has cleaned up."""
        import ray

        closed = [actor.handle.close.remote() for actor in self._actors if actor.node is not None]
        if closed:
            ray.wait(closed, num_returns=len(closed), timeout=ASK_EVERY_S)
        for actor in self._actors:
            ray.kill(actor.handle)
