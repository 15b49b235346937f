"""Search of one index by several Ray actors: the parts are dealt out, and the answers merged by (distance, id).

An actor opens the manifest that this process opened, and of its parts just those of its share. What comes back is what
`IndexReader.search` finds for these parts, so the merged answer is the one that a single process gives.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from pipelines.artifacts import Artifact, parse_manifest
from pipelines.cluster.pool import ASK_EVERY_S
from pipelines.cluster.session import ray_session, require_node, require_shared_store, wait_for
from pipelines.config import Config
from pipelines.errors import WorkFailed
from pipelines.kinds import Codes, Neighbours
from pipelines.kinds.artifact import IndexReader, merge
from pipelines.storage import Store, scratch_folder

ATTEMPTS = 3
"""Actors that may die on one batch of queries before the search ends."""


class Share:
    """Lives in an actor and searches some of an index's parts, which it opens at the first search."""

    def __init__(self, uri: str, manifest: bytes, ordinals: Sequence[int]) -> None:
        os.environ["NUMBA_NUM_THREADS"] = "1"  # an actor is placed on one CPU; others have the rest
        self._uri, self._manifest, self._ordinals = uri, manifest, ordinals
        self._reader: IndexReader | None = None
        self._closing = ExitStack()

    def search(self, queries: Codes, k: int) -> Neighbours:
        """The k nearest in the share."""
        if self._reader is None:  # not when the actor is made, so that an error of the parts is one of the search
            artifact = Artifact(Store(self._uri), parse_manifest(self._manifest, self._uri))
            self._reader = IndexReader(artifact, self._closing.enter_context(scratch_folder()))
        shards = self._reader.shards
        return self._reader.search(queries, k, [shards[ordinal] for ordinal in self._ordinals])

    def close(self) -> None:
        """Delete what was copied from a store of objects."""
        self._closing.close()


@contextmanager
def spread(reader: IndexReader, workers: int, config: Config) -> Iterator[Callable[[Codes, int], Neighbours]]:
    """Deal the parts to at most `workers` actors, one CPU each; what is yielded searches them like `reader.search`.

    ClusterUnavailable where so many cannot be placed. WorkFailed where a share lost its actor at each of several
    attempts; an error in an actor is raised here.
    """
    ordinals = [shard.ordinal for shard in reader.filled()]
    shares = [ordinals[place::workers] for place in range(min(workers, len(ordinals)))]
    with ray_session(config):
        require_shared_store(reader.artifact.store, config)
        wait_for({"CPU": len(shares)}, config)
        fan = _Fan(reader.artifact, shares)
        try:
            yield fan.search
        finally:
            fan.close()


class _Fan:
    """One actor for each share; one that died is replaced when its share is asked for."""

    def __init__(self, artifact: Artifact, shares: Sequence[Sequence[int]]) -> None:
        import ray

        self._artifact, self._shares = artifact, shares
        self._remote = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(Share)
        self._manifest = ray.put(artifact.manifest.to_bytes())
        self._actors = [self._start(ordinals) for ordinals in shares]

    def _start(self, ordinals: Sequence[int]) -> Any:
        return self._remote.remote(self._artifact.uri, self._manifest, ordinals)

    def search(self, queries: Codes, k: int) -> Neighbours:
        """The k nearest over all shares: distances int32 and ids int64, (Q, min(k, count)), by (distance, id)."""
        import ray

        batch = ray.put(queries)
        asked = {actor.search.remote(batch, k): place for place, actor in enumerate(self._actors)}
        died = [0] * len(self._actors)
        best: Neighbours = np.empty((len(queries), 0), np.int32), np.empty((len(queries), 0), np.int64)
        while asked:
            ready, _ = ray.wait(list(asked), timeout=ASK_EVERY_S)
            if not ready:
                require_node()
            for ref in ready:
                place = asked.pop(ref)
                answer = self._answer(ref, place)
                if isinstance(answer, str):
                    died[place] += 1
                    if died[place] == ATTEMPTS:
                        raise WorkFailed(f"{self._artifact.uri}: {answer}, at the last of {ATTEMPTS} attempts")
                    self._actors[place] = self._start(self._shares[place])
                    asked[self._actors[place].search.remote(batch, k)] = place
                else:
                    best = merge(best, answer, k)
        return best

    def _answer(self, ref: Any, place: int) -> Neighbours | str:
        """What an actor found in its share, or how it died."""
        import ray
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            distances, ids = ray.get(ref)
        except (RayActorError, OutOfMemoryError) as death:
            ray.kill(self._actors[place])
            parts = len(self._shares[place])
            return f"the worker that searches {parts} of its parts died ({str(death).splitlines()[0]})"
        except RayTaskError as error:
            raise (error.cause or error) from None
        return distances, ids

    def close(self) -> None:
        """End the actors, each after it has cleaned up."""
        import ray

        ray.wait([actor.close.remote() for actor in self._actors], num_returns=len(self._actors), timeout=ASK_EVERY_S)
        for actor in self._actors:
            ray.kill(actor)
